"""A fake TensorRT that executes: engines are the names of a bundle's graphs, which ONNX Runtime computes in a fake GPU's memory.

`FakeEngines(version, root, cuda)` gives a module with that version's recorded surface. `engine_set(root, version)` writes a set of
such engines into a bundle. Failures are told as TensorRT tells them: False or None, and a line in the log.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamictrl_edge.bundle.manifest import GraphSpec, Manifest
from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.engines.engine_set import (
    ANYWHERE,
    ENGINES_FOLDER,
    SET_FORMAT,
    SET_VERSION,
    BuildOptions,
    ClipSize,
    EngineEntry,
    EngineSet,
    engine_key,
    graph_digest,
    write_engine_set,
)
from dynamictrl_edge.engines.machine import LEAN, LIBRARIES, Gpu, Machine
from dynamictrl_edge.engines.profiles import axes_of, buildable_graphs, profile_of
from dynamictrl_edge.engines.targets import Flavour
from dynamictrl_edge.runtime.backends.gpu_backend import NUMPY
from dynamictrl_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend
from dynamictrl_edge.runtime.vae import decoded_frames, latent_frames
from tests.cuda_fakes import FakeCuda
from tests.trt_fakes import fake_module

__all__ = ["FakeEngines", "activation_bytes", "engine_set", "fake_machine", "output_shapes"]

_TYPES = {
    "float": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int8": "INT8",
    "float8e4m3fn": "FP8",
}


def _flavour(version: str) -> Flavour:
    return "rtx" if version.startswith("tensorrt_rtx") else "tensorrt"


def activation_bytes(graph: str) -> int:
    """What the engine of a graph says that it needs: something different for each."""
    return 4096 + 512 * (int(hashlib.sha256(graph.encode()).hexdigest()[:4], 16) % 64)


def fake_machine(version: str, cuda: FakeCuda) -> Machine:
    """A machine with that version of the library."""
    number = version.partition("-")[2]
    gpu = Gpu("Fake GPU", cuda.capability, "580.65.06", cuda.total, unified=cuda.integrated)
    lean = version.startswith("tensorrt_lean")
    return Machine(
        gpu=gpu,
        flavours={} if lean else {_flavour(version): number},
        lean=number if lean else None,
        platform="linux-x86_64",
        cuda={LEAN.package if lean else LIBRARIES[_flavour(version)].package: 13},
    )


def engine_set(
    root: Path,
    version: str,
    *,
    sizes: tuple[ClipSize, ...],
    tile: tuple[int, int] = (64, 64),
    steps: int = 30,
    batch: int = 1,
) -> Path:
    """Writes BUNDLE/engines/KEY; its engines are for SM89."""
    manifest = Bundle(root).manifest
    graphs, number, flavour = buildable_graphs(manifest), version.partition("-")[2], _flavour(version)
    options = BuildOptions(
        sizes=sizes, tile=tile, steps=steps, batch=batch, version_compatible=version.startswith("tensorrt_lean")
    )
    axes = axes_of(manifest, options)
    platform = ANYWHERE if flavour == "rtx" else "linux-x86_64"
    key = engine_key(manifest, graphs, flavour, number, platform, ((8, 9),), options)
    folder = root / ENGINES_FOLDER / key
    folder.mkdir(parents=True)
    entries = {}
    for name in graphs:
        weights = _held(manifest, manifest.graphs[name])
        data = json.dumps({"graph": name, "memory": activation_bytes(name), "weights": weights}).encode()
        (folder / f"{name}.engine").write_bytes(data)
        (folder / f"{name}.report.json").write_bytes(b"{}")
        entries[name] = EngineEntry(
            file=f"{name}.engine",
            sha256=hashlib.sha256(data).hexdigest(),
            bytes=len(data),
            report=f"{name}.report.json",
            report_sha256=hashlib.sha256(b"{}").hexdigest(),
            graph_digest=graph_digest(manifest, name),
            profile=profile_of(name, manifest.graphs[name], axes),
            activation_bytes=activation_bytes(name),
            weights_bytes=weights,
            kernels=1,
            fused_attention=0,
            seconds=0.0,
            peak_rss=0,
        )
    write_engine_set(
        folder,
        EngineSet(
            format=SET_FORMAT,
            version=SET_VERSION,
            key=key,
            precision=manifest.label,
            flavour=flavour,
            library_version=number,
            platform=platform,
            capabilities=((8, 9),),
            targets=("rtx4090",),
            options=options,
            axes=axes,
            engines=entries,
            provenance={},
        ),
    )
    return folder


def _held(manifest: Manifest, spec: GraphSpec) -> int:
    """Bytes of weights that an engine holds."""
    return 0 if spec.weights is None else manifest.files[spec.weights].bytes


class FakeEngines:
    """`module`: to be imported as `module.__name__`. `seconds`: how long a run of a graph takes. `fail`: as in `FakeCuda`, asked
    before each call that can fail; a text is logged and the call fails.

    The graphs are computed by `cpu`, an ONNX Runtime backend with one thread.
    """

    def __init__(self, version: str, root: Path, cuda: FakeCuda):
        self.module = fake_module(version)
        self.cuda, self.cpu = cuda, OnnxRuntimeBackend(Bundle(root), threads=1)
        self.manifest = Bundle(root).manifest
        self.seconds: Callable[[str], float] = lambda graph: 1e-3
        self.fail: Callable[[str], str | None] = lambda name: None
        self.compute: Callable[[str, Mapping[str, np.ndarray]], dict[str, np.ndarray]] = self._compute
        self.runs: list[str] = []
        self.configurations: list[Any] = []
        self.cache = b""
        self._teach()

    def install(self, patch: pytest.MonkeyPatch) -> FakeEngines:
        import sys

        patch.setitem(sys.modules, self.module.__name__, self.module)
        return self

    def _compute(self, graph: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.cpu.graph(graph)(feeds)

    def _failed(self, owner: Any, name: str) -> bool:
        if (text := self.fail(name)) is None:
            return False
        self.logger.log(self.module.ILogger.Severity.ERROR, text)
        return True

    def _teach(self) -> None:
        does = self.module.behaviours

        def started(runtime: Any, logger: Any) -> None:
            self.logger = logger

        does["Runtime.__init__"] = started
        does["Runtime.deserialize_cuda_engine"] = self._open
        does["ICudaEngine.num_io_tensors"] = lambda engine: len(_ports(engine.state["spec"]))
        does["ICudaEngine.get_tensor_name"] = lambda engine, index: list(_ports(engine.state["spec"]))[index]
        does["ICudaEngine.get_tensor_dtype"] = self._dtype
        does["ICudaEngine.device_memory_size_v2"] = lambda engine: engine.state["memory"]
        does["ICudaEngine.create_execution_context"] = self._context
        does["ICudaEngine.create_runtime_config"] = lambda engine: self._configuration()
        does["IRuntimeConfig.create_runtime_cache"] = lambda config: self.module.make("IRuntimeCache")
        does["IRuntimeCache.deserialize"] = self._read_cache
        does["IRuntimeCache.serialize"] = lambda cache: self.module.IHostMemory(self.cache)
        does["IExecutionContext.set_input_shape"] = self._set_shape
        does["IExecutionContext.get_tensor_shape"] = self._shape
        does["IExecutionContext.set_tensor_address"] = self._set_address
        does["IExecutionContext.set_device_memory"] = self._set_memory
        does["IExecutionContext.execute_async_v3"] = self._run
        does["IExecutionContext.is_stream_capturable"] = self._recordable

    def _open(self, runtime: Any, serialized_engine: bytes) -> Any:
        if self._failed(runtime, "Runtime.deserialize_cuda_engine"):
            return None
        told = json.loads(serialized_engine)
        engine = self.module.make("ICudaEngine")
        engine.state.update(told, spec=self.manifest.graphs[told["graph"]], held=_Held(self.cuda, told["weights"]))
        return engine

    def _configuration(self) -> Any:
        config = self.module.make("IRuntimeConfig")
        self.configurations.append(config)
        return config

    def _read_cache(self, cache: Any, blob: bytes) -> bool:
        self.cache = bytes(blob)
        return True

    def _dtype(self, engine: Any, name: str) -> Any:
        return getattr(self.module.DataType, _TYPES[_ports(engine.state["spec"])[name].dtype])

    def _context(self, engine: Any, strategy: Any = None, runtime_config: Any = None) -> Any:
        if self._failed(engine, "ICudaEngine.create_execution_context"):
            return None
        if strategy is not None:
            assert strategy == self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self.module.make("IExecutionContext")
        context.state.update(engine=engine, shapes={}, addresses={}, memory=(0, 0))
        return context

    def _set_shape(self, context: Any, name: str, shape: Any) -> bool:
        if self._failed(context, "IExecutionContext.set_input_shape"):
            return False
        context.state["shapes"][name] = tuple(shape)
        return True

    def _shape(self, context: Any, name: str) -> tuple[int, ...]:
        state = context.state
        if name in state["shapes"]:
            return state["shapes"][name]
        return output_shapes(self.manifest, state["engine"].state["graph"], state["shapes"])[name]

    def _set_address(self, context: Any, name: str, memory: int) -> bool:
        if self._failed(context, "IExecutionContext.set_tensor_address"):
            return False
        assert memory % 256 == 0, f"{name} is not aligned"
        context.state["addresses"][name] = memory
        return True

    def _set_memory(self, context: Any, memory: int, size: int) -> None:
        assert size >= context.state["engine"].state["memory"]
        context.state["memory"] = (memory, size)

    def _recordable(self, context: Any, stream: int) -> bool:
        return not self._failed(context, "IExecutionContext.is_stream_capturable")

    def _run(self, context: Any, stream_handle: int) -> bool:
        self.cuda.call("execute_async_v3")
        if self._failed(context, "IExecutionContext.execute_async_v3"):
            return False
        state, engine = context.state, context.state["engine"].state
        graph, spec = engine["graph"], engine["spec"]
        start, size = state["memory"]
        assert size >= engine["memory"], "no activation memory"
        spans = {}
        for name in _ports(spec):
            nbytes = math.prod(self._shape(context, name)) * np.dtype(NUMPY[_ports(spec)[name].dtype]).itemsize
            spans[name] = (state["addresses"][name], state["addresses"][name] + nbytes)
        reads = [spans[port.name] for port in spec.inputs]
        writes = [spans[port.name] for port in spec.outputs] + ([(start, start + engine["memory"])] if size else [])
        shapes = {port.name: self._shape(context, port.name) for port in spec.inputs}

        def carry_out() -> None:
            self.runs.append(graph)
            with self.cuda.work(stream_handle, self.seconds(graph), f"the graph {graph!r}", reads, writes):
                feeds = {
                    port.name: self.cuda.bytes_at(spans[port.name][0], spans[port.name][1] - spans[port.name][0])
                    .view(NUMPY[port.dtype])
                    .reshape(shapes[port.name])
                    for port in spec.inputs
                }
                self.cuda.bytes_at(start, engine["memory"])[:] = 0xEE
                for name, value in self.compute(graph, feeds).items():
                    first, last = spans[name]
                    assert value.nbytes == last - first, f"{name} of {graph} has another shape"
                    self.cuda.bytes_at(first, last - first)[:] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)

        self.cuda.submit(stream_handle, carry_out)
        return True


class _Held:
    """Device memory that TensorRT takes for an engine's weights."""

    def __init__(self, cuda: FakeCuda, nbytes: int):
        self._cuda = cuda
        self._address = cuda.allocate(nbytes) if nbytes else 0

    def __del__(self) -> None:
        if self._address:
            if self._cuda.stack[-1] != "ours":
                self._cuda.live["engines that ended without the context"] += 1
            self._cuda.release(self._address)


def output_shapes(manifest: Manifest, graph: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of a graph's outputs, from those of its inputs."""
    spec = manifest.graphs[graph]
    axes = _axes(manifest, graph, spec, shapes)
    return {port.name: tuple(_length(n, axes) for n in port.shape) for port in spec.outputs}


def _ports(spec: GraphSpec) -> dict[str, Any]:
    return {port.name: port for port in (*spec.inputs, *spec.outputs)}


def _axes(manifest: Manifest, graph: str, spec: GraphSpec, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Lengths of the named axes, from the inputs' shapes."""
    axes: dict[str, int] = {}
    for port in spec.inputs:
        for told, length in zip(port.shape, shapes[port.name], strict=True):
            if isinstance(told, int):
                assert told == length, f"{port.name} of {graph}: {shapes[port.name]}"
            else:
                factor, _, axis = told.rpartition("*")
                assert axes.setdefault(axis, length // int(factor or 1)) * int(factor or 1) == length
    ratio = manifest.vae.temporal_compression_ratio
    if graph == "conditioning":
        axes["N"] = math.prod(manifest.transformer.token_grid(axes["F"], axes["H"], axes["W"]))
    if graph == "vae_encoder_first":
        axes["latent_frames"] = latent_frames(axes["frames"], ratio)
    if graph == "vae_decoder_first":
        axes["frames"] = decoded_frames(axes["latent_frames"], ratio)
    return axes


def _length(told: int | str, axes: Mapping[str, int]) -> int:
    if isinstance(told, int):
        return told
    factor, _, axis = told.rpartition("*")
    return int(factor or 1) * axes[axis]
