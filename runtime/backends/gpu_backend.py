"""Executes a bundle's engines on one NVIDIA GPU: TensorRT's engines (`tensorrt`) over CUDA's memory and streams (`cuda`).

Before a request, the planner decides what lies where in the GPU's memory (`engines.planner`; `gpu` holds it). Calls return when
their work is enqueued: only reading results waits for the GPU.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle.config import Geometry
from ...bundle.errors import BundleError, DeviceError, UsageError
from ...bundle.manifest import GraphSpec, Port, graph_kind
from ...bundle.store import Bundle
from ...engines.engine_set import ENGINES_FOLDER, ClipSize, EngineSet, read_engine_set
from ...engines.fit import check_fit, find_fitting
from ...engines.machine import LEAN, LIBRARIES, Machine, look_at_machine
from ...engines.mend import ON_PROCESSOR
from ...engines.mismatch import Request as Wanted
from ...engines.planner import GB, MemoryPlan, plan_with_engines
from ...engines.profiles import default_size
from ...engines.targets import capability_name
from ..request import Request
from ..reuse.device import memories
from ..reuse.policy import ReusePolicy
from ..reuse.tokens import active_count
from ..tiling import Tiling
from .arena import ALIGNMENT, DeviceArray, Piece
from .base import Call, Graph
from .cuda import Device, open_device
from .gpu import Gpu, GpuClock, GpuRecording
from .ring import DeviceBlocks
from .tensorrt import CACHE_NAME, Engine, Library

__all__ = ["NUMPY", "GpuBuffers", "GpuCall", "GpuGraph", "TensorRTBackend"]

NUMPY: Mapping[str, type[np.generic]] = {
    "float": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,  # numpy has neither type; the bits are passed on
    "float8e4m3fn": np.uint8,
    "int64": np.int64,
    "int8": np.int8,
}
SLACK = 400 * ALIGNMENT  # what alignment adds to all buffers of a stage beside the blocks' weights
OF_BLOCK = 40 * ALIGNMENT  # likewise to one block's tensors
OF_CACHES = 6 * ALIGNMENT  # likewise to what reuse keeps of one block: keys, values and scales of two halves
STAGES = {
    "text_block": "text",
    "vae_encoder_first": "encode",
    "vae_encoder_next": "encode",
    "modulation": "schedule",
    "head_modulation": "schedule",
    "vae_decoder_first": "decode",
    "vae_decoder_first_even": "decode",
    "vae_decoder_next": "decode",
}  # all others: "denoise"


class GpuBuffers:
    """`base.Buffers` on a GPU."""

    def __init__(self, gpu: Gpu):
        self._gpu = gpu
        self.blocks: list[DeviceBlocks] = []

    def empty(self, shape: Sequence[int], dtype: np.dtype | type) -> DeviceArray:
        return self._gpu.empty(shape, dtype)

    def hold(self, array: np.ndarray) -> DeviceArray:
        held = self._gpu.empty(array.shape, array.dtype)
        self._gpu.upload(held, array)
        return held

    def put(self, buffer: DeviceArray, values: np.ndarray | DeviceArray) -> None:
        if buffer.shape != values.shape or buffer.dtype != values.dtype:
            raise ValueError(f"{values.dtype} {values.shape} does not fit a buffer of {buffer.dtype} {buffer.shape}")
        if isinstance(values, DeviceArray):
            with self._gpu.device.calling("copying on the GPU"):
                self._gpu.compute.copy_within(buffer.address, values.address, buffer.nbytes)
        else:
            self._gpu.upload(buffer, values)

    def get(self, buffer: DeviceArray) -> np.ndarray:
        return self._gpu.download(buffer)

    def keep(self, graph: Graph, feeds: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(graph, GpuGraph):
            raise TypeError("these buffers are for graphs on the GPU")
        return graph.run(feeds, keep=lambda name: True)

    def weights(self, bundle: Bundle, count: int) -> DeviceBlocks:
        made = DeviceBlocks(self._gpu, [bundle.tensors(f"block_{i:02d}") for i in range(count)])
        self.blocks.append(made)
        return made

    def record(self, work: Callable[[], None], calls: Sequence[Call]) -> GpuRecording:
        for call in calls:
            if not isinstance(call, GpuCall):
                raise TypeError("these buffers are for graphs on the GPU")
            call.check_recordable()
        return GpuRecording(self._gpu, work)

    def settle(self) -> None:
        self._gpu.settle()

    def clock(self) -> contextlib.AbstractContextManager[GpuClock]:
        return self._gpu.measuring()


class TensorRTBackend:
    """Executes a bundle with an engine set that fits this machine."""

    name = "tensorrt"
    lanes = 1  # a GPU gains nothing from a second graph beside one that fills it

    def __init__(self, bundle: Bundle, folder: Path, engines: EngineSet, machine: Machine, device: Device):
        """`folder`, `engines`: the engine set to begin with, as `find_fitting` found it.

        Raises:
            DeviceError: `device` is another GPU than the one that the machine was found to have, or TensorRT does not start.
        """
        if device.capability not in engines.capabilities:
            raise DeviceError(
                f"CUDA's first GPU is {device.name} ({capability_name(device.capability)}), for which the engine set "
                f"{folder.name!r} was not built. With several GPUs, CUDA may count them otherwise than nvidia-smi: set "
                "CUDA_DEVICE_ORDER=PCI_BUS_ID, and CUDA_VISIBLE_DEVICES to the number of the GPU to use."
            )
        self._bundle, self._machine, self._device = bundle, machine, device
        self.folder, self.engines = folder, engines
        self._library = self._load_library(folder, engines)
        self._gpu = Gpu(device)
        self.buffers = GpuBuffers(self._gpu)
        self._graphs: dict[str, GpuGraph] = {}
        self._plan: MemoryPlan | None = None
        self._stage = ""
        self._work: Piece | None = None
        self._roomy = self._closed = False

    @classmethod
    def open(cls, bundle: Bundle, *, machine: Machine | None = None) -> TensorRTBackend:
        """Looks at the machine, finds engines, and starts CUDA and TensorRT.

        Raises:
            BundleError: no engine set fits; the text has the reason and the command that mends it.
            DeviceError: there is no GPU, or pycuda, the driver or TensorRT is missing.
        """
        machine = machine or look_at_machine()
        if machine.gpu is None:
            raise DeviceError(
                f"This machine has no NVIDIA GPU that can be asked ({machine.no_gpu or 'none found'}). "
                f"Use the processor: {ON_PROCESSOR}"
            )
        folder, engines = _for_some_clip(bundle, machine)
        return cls(bundle, folder, engines, machine, open_device())

    # --- planning ---

    def plan(self, size: Geometry, request: Request, memory: float | None) -> MemoryPlan:
        """How a clip will lie in the GPU's memory. `memory`: budget in GB; None: what is free.

        Raises:
            BundleError: the engines do not take this clip, or the set lacks those of the policy of reuse.
            DeviceError: it does not fit; the text gives the smallest budget that works, and what of reuse fits.
            UsageError: a policy of reuse that keeps nothing.
        """
        manifest, policy = self._bundle.manifest, request.policy
        _check_kept(policy, size)
        clip = ClipSize(height=size.height, width=size.width, frames=size.frames)
        tile = self._tile(size, request.tiling)
        wanted = Wanted(size=clip, batch=1, steps=request.num_inference_steps, tile=tile)
        self._use(*find_fitting(self._bundle.root, manifest, self._machine, wanted))
        free = self._device.free_memory() + self._gpu.held
        reuse, policies = memories(policy, manifest)
        made = plan_with_engines(
            manifest,
            self.engines,
            clip,
            guidance=request.guided,
            budget=free if memory is None else int(memory * GB),
            steps=request.num_inference_steps,
            unified=self._device.unified,
            tile=tile,
            reuse=reuse,
            policies=policies,
        )
        made.check()
        return made.keeping_blocks()

    def _use(self, folder: Path, engines: EngineSet) -> None:
        """Changes to another engine set; the one in use stays if it is that."""
        if folder == self.folder:
            return
        self._save_cache()
        self._close_engines()
        library = self._load_library(folder, engines)
        # Only now, so that after a fault the next request changes to it.
        self.folder, self.engines, self._library = folder, engines, library

    def _load_library(self, folder: Path, engines: EngineSet) -> Library:
        with self._device.calling("starting TensorRT"):
            return Library(
                _module(engines, self._machine),
                cache=folder / CACHE_NAME,
                version_compatible=engines.options.version_compatible,
            )

    def _save_cache(self) -> None:
        """Keeps what was compiled. Raises nothing."""
        with contextlib.suppress(DeviceError), self._device.calling("keeping compiled kernels"):
            self._library.save_cache()

    def _close_engines(self) -> None:
        with self._device.calling("closing engines"):
            for graph in self._graphs.values():
                graph.close()
            self._graphs.clear()

    def _tile(self, size: Geometry, tiling: str) -> tuple[int, int] | None:
        """Latents (rows, columns); None: what the engines were built for."""
        vae = self._bundle.manifest.vae
        if tiling == "off":
            return size.latent_height, size.latent_width
        if tiling == "on":
            made = Tiling.published(vae.sample_height, vae.sample_width, vae.spatial_compression)
            return made.rows, made.columns
        return None

    def tiling(self, plan: MemoryPlan) -> Tiling | None:
        """The VAE's tiles in this plan; None: whole frames."""
        tile = plan.tile
        if tile.whole:
            return None
        return Tiling(tile.rows, tile.columns, *tile.overlap, self._bundle.manifest.vae.spatial_compression)

    def begin(self, plan: MemoryPlan) -> None:
        """Makes the GPU ready for the request that was planned so. Raises `DeviceError` if its memory is gone."""
        for blocks in self.buffers.blocks:
            blocks.close()
        self._work, self._stage, self._plan = None, "", plan
        held = sum(entry.weights_bytes for entry in self.engines.engines.values())
        self._roomy = plan.budget is None or plan.peak + held <= plan.budget
        of_slots = (plan.resident_blocks + plan.ring) * OF_BLOCK
        arena = plan.arena + SLACK + (plan.layers * OF_CACHES if plan.caches else 0)
        if plan.kept:
            self._gpu.begin(arena, plan.ring, kept=plan.kept + of_slots)
        else:
            self._gpu.begin(arena + of_slots, plan.ring)

    @property
    def peak(self) -> int:
        """Bytes of the arena, and of the blocks that are kept, that the last request used."""
        return sum(arena.peak for arena in (self._gpu.arena, self._gpu.kept) if arena is not None)

    # --- graphs ---

    def graph(self, name: str, lane: int = 0, lanes: int = 1) -> GpuGraph:
        if name not in self._graphs:
            entry = self.engines.engines.get(name)
            if entry is None:
                raise BundleError(f"The engine set {self.folder.name!r} has no engine for {name!r}.")
            with self._device.calling(f"opening the engine of {name!r}"):
                engine = self._library.open(name, self.folder / entry.file)
            self._graphs[name] = GpuGraph(self, self._bundle.manifest.graphs[name], engine)
        return self._graphs[name]

    def drop(self, *names: str) -> None:
        """Frees engines, unless there is room for all of them beside everything else."""
        if self._roomy:
            return
        with self._device.calling("closing engines"):
            for name in names:
                if (graph := self._graphs.pop(name, None)) is not None:
                    graph.close()

    def enqueue(self, engine: Engine, shapes: Mapping[str, tuple[int, ...]], arrays: Mapping[str, DeviceArray]) -> None:
        """One run, in the compute stream. The caller has made the context current."""
        engine.set_shapes(shapes)
        if engine.memory:
            work = self._workspace(engine)
            engine.use_memory(work.address, work.nbytes)
        engine.enqueue({name: array.address for name, array in arrays.items()}, self._gpu.compute.handle)

    def _workspace(self, engine: Engine) -> Piece:
        """Activation memory: one piece for all engines of a stage, of the largest one's size."""
        stage = STAGES.get(graph_kind(engine.graph), "denoise")
        if self._work is None or stage != self._stage or self._work.nbytes < engine.memory:
            planned = 0 if self._plan is None or stage == self._stage else self._plan.activations(stage)
            self._work = None  # before its successor is taken
            self._work = self._gpu.take(max(engine.memory, planned), f"the activations of {engine.graph!r}")
            self._stage = stage
        return self._work

    def device_array(self, graph: str, port: Port, value: np.ndarray | DeviceArray) -> DeviceArray:
        """`value` in device memory. Raises `ValueError` for a type that the port does not have."""
        if value.dtype != NUMPY[port.dtype]:
            raise ValueError(f"{port.name!r} of graph {graph!r} needs {port.dtype} numbers, not {value.dtype}")
        if isinstance(value, DeviceArray):
            return value
        made = self._gpu.empty(value.shape, value.dtype, f"{port.name!r} of {graph!r}")
        self._gpu.upload(made, value)
        return made

    @contextlib.contextmanager
    def running(self, graph: str) -> Iterator[Gpu]:
        with self._device.calling(f"running the graph {graph!r}"):
            yield self._gpu

    def close(self) -> None:
        """Gives the GPU back. Waits for what is running; raises nothing."""
        if self._closed:
            return
        self._closed = True
        self._gpu.settle()
        self._save_cache()
        self._work = None
        for _ in range(2):  # once more for what a fault left there; on a lost GPU in vain
            with contextlib.suppress(DeviceError):
                self._close_engines()
            with contextlib.suppress(DeviceError), self._device.calling("giving the GPU back"):
                for blocks in self.buffers.blocks:
                    blocks.free()
            self._gpu.close()
        self._device.close()


class GpuGraph:
    """An engine as a graph of the bundle."""

    def __init__(self, backend: TensorRTBackend, spec: GraphSpec, engine: Engine):
        self._backend, self.spec, self._engine = backend, spec, engine
        self.name = engine.graph
        ports = {port.name: port for port in (*spec.inputs, *spec.outputs)}
        if set(engine.names) != set(ports):
            odd = ", ".join(sorted(set(engine.names) ^ set(ports)))
            raise BundleError(f"The engine of {self.name!r} has other inputs or outputs than the bundle says: {odd}.")
        for name, port in ports.items():
            if engine.item_bytes(name) != np.dtype(NUMPY[port.dtype]).itemsize:
                raise BundleError(
                    f"The engine of {self.name!r} has another number format for {name!r} than the bundle."
                )

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs as arrays; but `state_out.NAME`, which only go back in, stay on the GPU."""
        return self.run(feeds, keep=lambda name: name.startswith("state_out."))

    def run(self, feeds: Mapping[str, Any], *, keep: Callable[[str], bool]) -> dict[str, Any]:
        backend, engine = self._backend, self._engine
        with backend.running(self.name) as gpu:
            arrays = {p.name: backend.device_array(self.name, p, feeds[p.name]) for p in self.spec.inputs}
            shapes = {name: array.shape for name, array in arrays.items()}
            engine.set_shapes(shapes)
            outputs = {
                p.name: gpu.empty(engine.shape(p.name), NUMPY[p.dtype], f"{p.name!r} of {self.name!r}")
                for p in self.spec.outputs
            }
            backend.enqueue(engine, shapes, {**arrays, **outputs})
            return {name: array if keep(name) else gpu.download(array) for name, array in outputs.items()}

    def prepare(self, arrays: Mapping[str, Any]) -> GpuCall:
        call = GpuCall(self._backend, self._engine)
        for port in (*self.spec.inputs, *self.spec.outputs):
            if arrays[port.name].dtype != NUMPY[port.dtype]:
                raise ValueError(f"{port.name!r} of graph {self.name!r} needs {port.dtype} numbers")
            call.bind(port.name, arrays[port.name])
        call.shapes = {port.name: call.arrays[port.name].shape for port in self.spec.inputs}
        return call

    def close(self) -> None:
        """Frees the engine; the caller has made the context current."""
        self._engine.close()


class GpuCall:
    """An engine with fixed buffers. What is a view of a moving buffer (a streamed weight) is looked up at each run."""

    def __init__(self, backend: TensorRTBackend, engine: Engine):
        self._backend, self._engine = backend, engine
        self.arrays: dict[str, DeviceArray] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def bind(self, name: str, array: DeviceArray) -> None:
        if not isinstance(array, DeviceArray):
            raise TypeError(f"{name!r} of graph {self._engine.graph!r} must be a buffer on the GPU")
        if not array.is_aligned:
            raise DeviceError(
                f"{name!r} of graph {self._engine.graph!r} lies at an address that TensorRT does not take: the model is too "
                f"narrow for it (rows must be multiples of {ALIGNMENT} bytes). Use --backend onnxruntime."
            )
        self.arrays[name] = array

    def __call__(self) -> None:
        with self._backend.running(self._engine.graph):
            self._backend.enqueue(self._engine, self.shapes, self.arrays)

    def check_recordable(self) -> None:
        """Raises `DeviceError` if TensorRT says that this engine's runs cannot be recorded."""
        with self._backend.running(self._engine.graph) as gpu:
            if not self._engine.recordable(gpu.compute.handle):
                raise DeviceError(f"TensorRT cannot record the graph {self._engine.graph!r}")


def _check_kept(policy: ReusePolicy | None, size: Geometry) -> None:
    """Refuses (`UsageError`) token reuse where every token is active: engines take no arrays without rows."""
    tokens = size.video_tokens
    if policy is not None and policy.reuses_tokens and active_count(policy, tokens) == tokens:
        raise UsageError(
            f"--reuse {policy.name}: with token_share={policy.token_share:g} all {tokens} tokens of this clip are active, so "
            f"that none is kept. Give at most token_share={math.floor(100 * (tokens - 1) / tokens) / 100:g}, or token_period=1."
        )


def _for_some_clip(bundle: Bundle, machine: Machine) -> tuple[Path, EngineSet]:
    """A set that this machine can run, for the bundle's usual clip or for any other: which clips are wanted is not known yet."""
    manifest = bundle.manifest
    try:
        return find_fitting(bundle.root, manifest, machine, Wanted(size=default_size(manifest), batch=1, steps=1))
    except BundleError:
        for folder in sorted((bundle.root / ENGINES_FOLDER).glob("*/")):
            with contextlib.suppress(BundleError):
                engines = read_engine_set(folder)
                size = min(engines.options.sizes)
                if check_fit(engines, folder, manifest, machine, Wanted(size=size, batch=1, steps=1)):
                    return folder, engines
        raise


def _module(engines: EngineSet, machine: Machine) -> str:
    """The module that runs these engines: the whole library, or TensorRT's lean runtime where only that is installed."""
    library = LIBRARIES[engines.flavour]
    if engines.flavour == "tensorrt" and "tensorrt" not in machine.flavours and machine.lean is not None:
        return LEAN.module
    return library.module
