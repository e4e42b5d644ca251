"""The guard that names the step whose numbers are not finite; on the processor, and on the GPU backend's stand-ins."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamictrl_edge.bundle.errors import DeviceError, UsageError
from dynamictrl_edge.runtime import Animator
from dynamictrl_edge.runtime.animator import Clip
from dynamictrl_edge.runtime.denoiser import Loop
from tests.gpu_samples import IN_THE_LOOP, TINY, Machinery, assert_same, on_processor

WANTED: dict[str, Any] = {**TINY, "steps": 4}
TOLD = r"^Step {} of 4: the latents are not finite\. In fp16 .*--precision fp32"


@pytest.fixture(scope="module")
def reference(root: Path) -> Clip:
    return on_processor(root, **WANTED)


Compute = Callable[[str, Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def poisoned(gpu: Machinery, graph: str, run: int, output: str, place: Any) -> Compute:
    """Engines that put one NaN into an output of the run with this number (from 1) of a graph."""
    compute = gpu.engines.compute

    def made(name: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = compute(name, feeds)
        if name == graph and gpu.engines.runs.count(graph) == run:
            outputs[output] = outputs[output].copy()
            outputs[output][place] = np.nan
        return outputs

    return made


def test_a_finite_clip_is_the_same_with_one_small_read_per_step(gpu: Machinery, reference: Clip) -> None:
    seen: dict[bool, list[int]] = {}
    for asked in (False, True):
        counts = seen.setdefault(asked, [])

        def progress(stage: str, done: int, total: int, counts: list[int] = counts) -> None:
            if stage == "denoise":
                counts.append(gpu.cuda.calls.count("memcpy_dtoh_async"))

        assert_same(gpu.animator(**WANTED, check_steps=asked, progress=progress), reference)
    plain, guarded = ([later - earlier for earlier, later in itertools.pairwise(c[1:])] for c in seen.values())
    assert plain == [0, 0, 1]  # the result alone
    assert guarded == [1, 1, 2]


def test_on_a_gpu_it_is_off_unless_asked_for(gpu: Machinery) -> None:
    seen: dict[int, int] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "denoise":
            seen[done] = len(gpu.cuda.calls)

    gpu.animator(**WANTED, progress=progress)
    assert set(gpu.cuda.calls[seen[1] : seen[3]]) == IN_THE_LOOP


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_nan_in_one_token_of_one_block_is_found_in_its_step(step: int, gpu: Machinery) -> None:
    """The first block's, in one half: attention carries it to all tokens, and guidance to the latents."""
    runs = 2 * gpu.engines.manifest.transformer.num_layers
    compute = gpu.engines.compute
    gpu.engines.compute = poisoned(gpu, "block", (step - 1) * runs + 1, "video_out", (0, 0, 0))
    with pytest.raises(DeviceError, match=TOLD.format(step)):
        gpu.animator(**WANTED, check_steps=True)
    gpu.engines.compute = compute


@pytest.mark.parametrize("place", [(0, 0, 0, 0, 0), (0, -1, -1, -1, -1)])
def test_one_number_of_the_latents_is_found_in_the_next_step_at_the_latest(place: Any, gpu: Machinery) -> None:
    gpu.engines.compute = poisoned(gpu, "head", 2, "latents_out", place)
    with pytest.raises(DeviceError, match=TOLD.format("[23]")):
        gpu.animator(**WANTED, check_steps=True)


def test_without_it_the_end_of_the_loop_tells(gpu: Machinery) -> None:
    gpu.engines.compute = poisoned(gpu, "head", 2, "latents_out", (0, 0, 0, 0, 0))
    with pytest.raises(DeviceError, match=r"^The denoising loop ended with.*--check-steps"):
        gpu.animator(**WANTED)


def test_recorded_and_reusing_steps_are_looked_at_too(gpu: Machinery) -> None:
    graphs = Animator(gpu.animator.bundle, gpu.backend, cache=False, cuda_graphs=True)
    gpu.animator = graphs
    gpu.engines.compute = poisoned(gpu, "head", 3, "latents_out", ...)
    with pytest.raises(DeviceError, match=TOLD.format(3)):
        graphs(**WANTED, check_steps=True)
    assert gpu.cuda.calls.count("cuGraphLaunch") == 2
    gpu.engines.runs.clear()
    # A step that reuses a half has another head: the third run of this one is a later step's.
    with pytest.raises(DeviceError, match=TOLD.format("[34]")):
        graphs(**WANTED, check_steps=True, reuse="guidance,warmup=1,final=1")


@pytest.mark.parametrize("asked", [None, True, False])
def test_on_the_processor_it_is_on_unless_refused(
    asked: bool | None, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_over = Loop._take_over
    steps = 0

    def spoiled(loop: Loop) -> None:
        nonlocal steps
        take_over(loop)
        steps += 1
        if steps == 2:
            loop.latents[...] = np.inf

    monkeypatch.setattr(Loop, "_take_over", spoiled)
    told = r"^The denoising loop ended" if asked is False else TOLD.format(2)
    with np.errstate(invalid="ignore"), pytest.raises(DeviceError, match=told):
        on_processor(root, **WANTED, check_steps=asked)
    assert steps == (4 if asked is False else 2)


def test_what_is_no_choice_is_refused(root: Path) -> None:
    with pytest.raises(UsageError, match="'check_steps' must be True, False or None"):
        on_processor(root, **WANTED, check_steps="yes")
