"""What the tests of the GPU backend share: a bundle with fake engines, on a fake GPU."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.engines import planner
from dynamictrl_edge.engines.engine_set import ClipSize
from dynamictrl_edge.engines.machine import Machine
from dynamictrl_edge.runtime import Animator, Clip
from dynamictrl_edge.runtime.backends.gpu_backend import NUMPY, TensorRTBackend
from dynamictrl_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend
from tests.cuda_fakes import FakeCuda
from tests.trt_fake_runtime import FakeEngines, engine_set, fake_machine, output_shapes

__all__ = [
    *("IN_THE_LOOP", "RTX", "SIZES", "TINY", "TRT", "Machinery", "assert_nothing_left", "assert_same", "look"),
    *("machinery", "on_processor", "with_engines", "zeros"),
]

TRT, RTX = "tensorrt-10.13.3.9", "tensorrt_rtx-1.7.1.116"
SIZES = (ClipSize(height=96, width=160, frames=17),)  # of the engines
TINY: dict[str, Any] = {
    "image": np.zeros((32, 48, 3), np.uint8),
    "pose": np.zeros((9, 32, 48, 3), np.uint8),
    "prompt": "a person",
    "steps": 2,
    "guidance": 3.0,
    "height": 32,
    "width": 48,
    "frames": 9,
}


IN_THE_LOOP = {
    "Context.push",
    "Event.record",
    "Event.synchronize",
    "Stream.wait_for_event",
    "execute_async_v3",
    "memcpy_dtod_async",
    "memcpy_htod_async",
}


@dataclass
class Machinery:
    """A backend on fakes, and the animator that uses it."""

    cuda: FakeCuda
    engines: FakeEngines
    backend: TensorRTBackend
    animator: Animator

    def keep_blocks(self, patch: pytest.MonkeyPatch, resident: int, ring: int, *, lockable: int = 0) -> None:
        """Plans keep so many blocks from now on; the others stream through so many slots, from page-locked memory of their own
        if that is not more than `lockable` bytes."""
        plan, self.backend._gpu.lockable = self.backend.plan, lockable
        patch.setattr(planner.MemoryPlan, "keeping_blocks", lambda made: made)

        def fewer(*arguments: Any, **keywords: Any) -> Any:
            return replace(plan(*arguments, **keywords), resident_blocks=resident, ring=ring)

        patch.setattr(self.backend, "plan", fewer)


def machinery(root: Path, version: str, patch: pytest.MonkeyPatch, **of_cuda: Any) -> Machinery:
    """Opens the bundle `root`, which has an engine set of that version."""
    cuda = FakeCuda(**of_cuda).install(patch)
    engines = FakeEngines(version, root, cuda).install(patch)
    backend = TensorRTBackend.open(Bundle(root), machine=fake_machine(version, cuda))
    return Machinery(cuda, engines, backend, Animator(Bundle(root), backend, cache=False))


def zeros(made: Machinery) -> None:
    """Engines compute nothing, which is quicker."""
    manifest = made.engines.manifest

    def compute(graph: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        spec = manifest.graphs[graph]
        shapes = output_shapes(manifest, graph, {port.name: feeds[port.name].shape for port in spec.inputs})
        return {port.name: np.zeros(shapes[port.name], NUMPY[port.dtype]) for port in spec.outputs}

    made.engines.compute = compute


def with_engines(bundle: Path, folder: Path, *versions: str, batch: int = 1) -> Path:
    """A copy of the bundle with fake engines of these versions."""
    root = folder / "bundle"
    shutil.copytree(bundle, root)
    for version in versions:
        engine_set(root, version, sizes=SIZES, batch=batch)
    return root


def assert_nothing_left(made: Machinery) -> None:
    """The backend was closed: the driver has everything back, and the host application its context."""
    gc.collect()
    cuda = made.cuda
    assert (cuda.memory, cuda.locked, cuda.retained) == (0, 0, 1)
    assert not +cuda.live, cuda.live
    assert cuda.stack == ["the host application's"]


def on_processor(root: Path, **wanted: Any) -> Clip:
    """The same clip by ONNX Runtime."""
    return Animator(Bundle(root), OnnxRuntimeBackend(Bundle(root), threads=1), cache=False)(**wanted)


def assert_same(clip: Clip, reference: Clip) -> None:
    assert np.array_equal(clip.latents, reference.latents)
    assert np.array_equal(clip.frames, reference.frames)


def look(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    """Whoever looks at the machine sees this one."""
    gpus = ([] if machine.gpu is None else [machine.gpu], machine.no_gpu)
    monkeypatch.setattr("dynamictrl_edge.engines.machine.look_at_gpus", lambda: gpus)
    monkeypatch.setattr("dynamictrl_edge.engines.machine.look_at_machine", lambda **_: machine)
