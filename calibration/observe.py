"""Observing: the runtime denoises the calibration set, and what goes into every linear is looked at on the way.

The blocks' graph is replaced by one that also gives the inputs of its linears. Blocks run one after the other and their
weights are streamed, so that memory holds one or two blocks, one set of tapped activations, and the statistics of all
blocks, which are bounded. After every sample the statistics are stored: an interrupted run goes on with the next sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..bundle.atomic import atomic_file
from ..bundle.config import Geometry, TransformerConfig
from ..bundle.errors import BundleError, InputError
from ..bundle.manifest import BLOCK, OWN, Manifest
from ..bundle.store import Bundle
from ..export.workspace import spec_of
from ..runtime.animator import Animator, Prepared
from ..runtime.backends.onnxruntime import OnnxRuntimeBackend, OrtGraph
from ..runtime.denoiser import Denoiser, Step
from ..runtime.memory import FLOAT, PROCESS, SHARE, block_activations, loop_bytes, physical_memory
from ..runtime.scheduler import Schedule
from .block_graph import LINEARS, observed
from .graphs import read_model
from .statistics import TensorStatistics, statistics_bytes
from .work import Trajectory, Work

__all__ = ["Observations", "Plan", "channels_of", "observe", "observing_bytes", "plan_rows"]

MOST_ROWS = 2048  # per linear; more change no decision
STATISTICS_BUDGET = 1_600_000_000  # bytes for all statistics together
TEXT_SHARE = 0.1  # of the kept rows are text tokens, if those are fewer: they are read by all video tokens
OBSERVED = "observed_"
SEED = 0xCA11B


@dataclass(frozen=True)
class Plan:
    """What will be observed. `rows`: kept per linear."""

    samples: int
    schedule: Schedule
    guidance: float
    rows: int

    @property
    def halves(self) -> int:
        return 2 if self.guidance > 1 else 1

    @property
    def calls(self) -> int:
        """How often every block runs."""
        return self.samples * len(self.schedule) * self.halves

    def taken(self, call: int) -> int:
        """How many rows the call of this number keeps: evenly over all."""
        return (call + 1) * self.rows // self.calls - call * self.rows // self.calls


def channels_of(config: TransformerConfig) -> dict[str, int]:
    """Input channels of every linear of a block."""
    return {name: 4 * config.width if name == "ff_out" else config.width for name in LINEARS}


def plan_rows(config: TransformerConfig, steps: int, budget: int = STATISTICS_BUDGET) -> int:
    """Rows per linear with which the statistics of all blocks stay within `budget` bytes."""
    fixed = config.num_layers * sum(statistics_bytes(c, steps, 0) for c in channels_of(config).values())
    row = 4 * config.num_layers * sum(channels_of(config).values())
    return max(16, min(MOST_ROWS, (budget - fixed) // row))


@dataclass
class Observations:
    """Statistics by (block, linear), and how many samples they are of."""

    tensors: dict[tuple[int, str], TensorStatistics]
    done: int = 0

    @classmethod
    def empty(cls, config: TransformerConfig, plan: Plan) -> Observations:
        steps = len(plan.schedule)
        return cls(
            {
                (block, name): TensorStatistics.empty(channels, steps, plan.rows)
                for block in range(config.num_layers)
                for name, channels in channels_of(config).items()
            }
        )

    def save(self, path: Path) -> None:
        arrays = {"done": np.asarray(self.done)}
        for (block, name), tensor in self.tensors.items():
            arrays.update(tensor.arrays(f"{block}.{name}."))
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path, config: TransformerConfig) -> Observations | None:
        """What `save` wrote; None if there is nothing, or nothing that can be read."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                tensors = {
                    (block, name): TensorStatistics.of(stored, f"{block}.{name}.")
                    for block in range(config.num_layers)
                    for name in LINEARS
                }
                return cls(tensors, int(stored["done"]))
        except (OSError, KeyError, ValueError, EOFError):
            return None


def observe(
    animator: Animator,
    prepared: Callable[[int], Prepared],
    plan: Plan,
    work: Work,
    tick: Callable[[], None] = lambda: None,
) -> Observations:
    """Observes every sample that the stored statistics do not have yet.

    Args:
        prepared: the sample of a number, ready to be denoised. tick: called after every step.

    Raises:
        InputError: a tensor is not finite (named), or constant.
    """
    config = animator.bundle.manifest.transformer
    found = Observations.load(work.statistics, config) or Observations.empty(config, plan)
    tap = _Tap(plan, found.tensors)
    backend = _ObservingBackend(animator.backend, animator.bundle, tap)
    denoiser = Denoiser(animator.bundle, backend)
    denoiser.block_graphs = tuple(f"{OBSERVED}{i}" for i in range(config.num_layers))
    denoiser.side_by_side = False
    for sample in range(found.done, plan.samples):
        ready = prepared(sample)
        denoiser.resident_blocks = _resident(animator, ready, plan)
        tap.begin(sample)
        trace = _Trace(ready)
        steps = denoiser.denoise(
            ready.latents, ready.initial, plan.schedule, plan.guidance, ready.noise, ready.run.geometry.grid
        )
        for step in steps:
            tap.step = step.index + 1
            trace.add(step)
            tick()
        # First the trajectory: a sample counts as done when the statistics have it.
        trace.made().save(work.trajectory(sample))
        found.done = sample + 1
        found.save(work.statistics)
    for (block, name), tensor in found.tensors.items():
        tensor.check(f"The input of {name} in block {block}")
    return found


def observing_bytes(manifest: Manifest, size: Geometry, plan: Plan) -> int:
    """What observing one sample needs in memory with streamed blocks: two of them, the loop's buffers, one block's activations
    and tapped inputs, and the statistics of all blocks."""
    config, block = manifest.transformer, _block_bytes(manifest)
    tokens = size.video_tokens + config.max_text_seq_length
    tapped = FLOAT * tokens * sum(channels_of(config).values())
    kept = sum(statistics_bytes(c, len(plan.schedule), plan.rows) for c in channels_of(config).values())
    buffers = loop_bytes(manifest, size, plan.halves, block)
    activations = block_activations(config, size, BLOCK + OWN in manifest.graphs)
    return PROCESS + 2 * block + buffers + activations + tapped + config.num_layers * kept


def _block_bytes(manifest: Manifest) -> int:
    return max(entry.bytes for name, entry in manifest.files.items() if name.startswith("weights/block_"))


def _resident(animator: Animator, ready: Prepared, plan: Plan) -> int:
    """How many blocks stay in memory: all, or none where that would take more than the machine's share."""
    manifest = animator.bundle.manifest
    layers = manifest.transformer.num_layers
    needed = observing_bytes(manifest, ready.run.geometry, plan) + layers * _block_bytes(manifest)
    return layers if room_for(needed) else 0


def room_for(nbytes: int) -> bool:
    """Whether calibrating may hold so many bytes on this machine."""
    physical = physical_memory()
    return physical is None or nbytes <= SHARE * physical


class _Trace:
    """Collects a sample's `Trajectory`."""

    def __init__(self, ready: Prepared):
        self._ready, self._starts, self._predictions = ready, [ready.initial.copy()], list[np.ndarray]()

    def add(self, step: Step) -> None:
        self._predictions.append(step.prediction.copy())
        self._starts.append(step.latents.copy())

    def made(self) -> Trajectory:
        latents, grid = self._ready.latents, self._ready.run.geometry.grid
        starts, predictions = np.stack(self._starts), np.stack(self._predictions)
        return Trajectory(latents, grid, starts[:-1], predictions)


@dataclass
class _Tap:
    """Receives the inputs of a block's linears, and knows at which sample and step the loop is."""

    plan: Plan
    tensors: Mapping[tuple[int, str], TensorStatistics]
    sample: int = 0
    step: int = 0
    prepared: dict[int, int] = field(
        default_factory=dict
    )  # calls that were prepared of each block: the guidance halves

    def begin(self, sample: int) -> None:
        self.sample, self.step = sample, 0
        self.prepared.clear()

    def next_half(self, block: int) -> int:
        half = self.prepared.get(block, 0)
        self.prepared[block] = half + 1
        return half

    def take(self, block: int, half: int, text: int, seen: Mapping[str, np.ndarray]) -> None:
        plan = self.plan
        call = (self.sample * len(plan.schedule) + self.step) * plan.halves + half
        tokens = next(iter(seen.values())).shape[1]
        chosen = _chosen(text, tokens, plan.taken(call), np.random.default_rng((SEED, block, call)))
        for name, array in seen.items():
            try:
                rows = array[0].astype(np.float32, copy=False)
                self.tensors[block, name].add(rows, text, self.step, half, chosen)
            except ValueError as error:
                raise InputError(
                    f"The input of {name} in block {block} has {error}, in sample {self.sample} at timestep "
                    f"{int(plan.schedule.timesteps[self.step])}. In fp16 this is an overflow: calibrate a bundle that was "
                    "exported with --precision fp32."
                ) from error


def _chosen(text: int, tokens: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """Rows to keep, [count]: text tokens have their share, but at least `TEXT_SHARE` of the rows."""
    of_text = min(text, round(count * max(TEXT_SHARE, text / tokens)))
    of_video = min(tokens - text, count - of_text)
    parts = (
        generator.choice(text, of_text, replace=False),
        text + generator.choice(tokens - text, of_video, replace=False),
    )
    return np.concatenate(parts)


class _ObservingBackend:
    """The runtime's backend, with a graph "observed_<i>" for every block i."""

    lanes = 1  # halves in turn: the order of what is seen is always the same

    def __init__(self, backend: object, bundle: Bundle, tap: _Tap):
        if not isinstance(backend, OnnxRuntimeBackend):
            raise BundleError("Observing runs on ONNX Runtime.")
        self.name, self._backend, self._tap = backend.name, backend, tap
        model = observed(read_model(bundle, backend.own_name("block")))
        self._graph = backend.load("block_observed", spec_of(model, ""), model.SerializeToString())
        self._buffers: dict[str, np.ndarray] = {}

    def graph(self, name: str, lane: int = 0, lanes: int = 1) -> OrtGraph | _ObservedGraph:
        if not name.startswith(OBSERVED):
            return self._backend.graph(name)
        return _ObservedGraph(self._graph, int(name.removeprefix(OBSERVED)), self._tap, self._buffers)

    def drop(self, *names: str) -> None:
        self._backend.drop(*names)


class _ObservedGraph:
    """The observing graph as one block's."""

    def __init__(self, graph: OrtGraph, block: int, tap: _Tap, buffers: dict[str, np.ndarray]):
        self.spec = graph.spec
        self._graph, self._block, self._tap, self._buffers = graph, block, tap, buffers

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._graph(feeds)

    def prepare(self, arrays: Mapping[str, np.ndarray]) -> _ObservedCall:
        return _ObservedCall(self._graph, self._block, self._tap, arrays, self._seen(arrays))

    def _seen(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Buffers for the linears' inputs, the same for all blocks."""
        text = arrays["text"].shape[1]
        tokens = text + arrays["video"].shape[1]
        for name in LINEARS:
            weight = arrays[f"{name}_weight"]
            shape = (1, tokens, weight.shape[0])
            if name not in self._buffers or self._buffers[name].shape != shape:
                self._buffers[name] = np.empty(shape, weight.dtype)
        return {name: self._buffers[name] for name in LINEARS}


class _ObservedCall:
    def __init__(
        self,
        graph: OrtGraph,
        block: int,
        tap: _Tap,
        arrays: Mapping[str, np.ndarray],
        seen: Mapping[str, np.ndarray],
    ):
        self._block, self._tap, self._seen = block, tap, seen
        self._half, self._text = tap.next_half(block), arrays["text"].shape[1]
        self._call = graph.prepare({**arrays, **{f"{name}_in": array for name, array in seen.items()}})

    def bind(self, name: str, array: np.ndarray) -> None:
        self._call.bind(name, array)

    def __call__(self) -> None:
        self._call()
        self._tap.take(self._block, self._half, self._text, self._seen)
