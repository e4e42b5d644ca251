"""How much a choice of quantized linears changes: each linear alone, at the end of its block; a whole mixture, at the output.

Both runs see what the float denoiser saw: its latents at every timestep, and within a sensitivity run its tokens before
every block. So errors are compared where they arise, and do not depend on how the trajectories drift apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..bundle.errors import BundleError
from ..bundle.manifest import Scheme
from ..bundle.store import Bundle
from ..bundle.tensors import MappedTensors
from ..export.workspace import spec_of
from ..runtime.backends.onnxruntime import OnnxRuntimeBackend, OrtCall, OrtGraph
from ..runtime.denoiser import OFS, Denoiser
from ..runtime.embeddings import timestep_sinusoid
from ..runtime.noise import NoiseSource
from ..runtime.scheduler import Schedule
from .block_graph import LINEARS, MODULATION_LINEARS, quantized
from .blocks import BlockCandidate, widened
from .conditioning import narrowed_graph
from .graphs import read_model
from .observe import room_for
from .work import Trajectory

__all__ = ["Measurer", "output_snr", "spread_steps"]

MEASURED, MIXED = "measured_", "mixed_"


def spread_steps(count: int, most: int) -> tuple[int, ...]:
    """At most `most` of `count` steps, the first and the last among them, evenly."""
    return tuple(sorted({round(x) for x in np.linspace(0, count - 1, min(count, most))}))


def output_snr(exact: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """(signal, noise): sums of squares."""
    exact, found = exact.astype(np.float64), found.astype(np.float64)
    return float(np.square(exact).sum()), float(np.square(found - exact).sum())


def decibels(signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        found: np.ndarray = 10 * np.log10(np.maximum(signal, 1e-300) / noise)
    return found


class Measurer:
    """Runs candidates over trajectories. `steps` are places in `schedule`."""

    def __init__(
        self,
        bundle: Bundle,
        backend: OnnxRuntimeBackend,
        scheme: Scheme,
        blocks: Sequence[BlockCandidate],
        schedule: Schedule,
        guidance: float,
        steps: Sequence[int],
        check: Callable[[], None] = lambda: None,
    ):
        self._bundle, self._blocks = bundle, blocks
        stored = sum(block.exact.nbytes + block.narrow.nbytes for block in blocks)
        self._backend = _Candidates(bundle, backend, scheme, blocks, keep=room_for(stored))
        self._guidance, self._steps, self._check = guidance, tuple(steps), check
        self._part = Schedule(
            schedule.config, len(steps), schedule.timesteps[list(steps)], tuple(schedule.steps[i] for i in steps)
        )
        self._denoiser = Denoiser(bundle, self._backend)
        self._denoiser.side_by_side = False

    def use_modulation(self, narrowed: Sequence[Path]) -> None:
        """From now on the blocks are modulated with the int8 weights of these files."""
        config = self._bundle.manifest.transformer
        feeds: dict[str, np.ndarray] = {"time_sinusoid": timestep_sinusoid(self._part.timesteps, config.width)}
        if config.ofs_embed_dim is not None:
            feeds["ofs_sinusoid"] = timestep_sinusoid([OFS], config.ofs_embed_dim)
        feeds.update(self._bundle.tensors("denoiser"))
        made = quantized(read_model(self._bundle, "modulation"), MODULATION_LINEARS, "int8-weights")
        graph = self._backend.backend.load("modulation", spec_of(made, ""), made.SerializeToString())
        tables = [graph({**feeds, **self._fed(MappedTensors(path, error=BundleError))})["table"] for path in narrowed]
        head = self._backend.graph("head_modulation")(feeds)["table"]
        self._denoiser.use_tables(self._part, np.stack(tables, axis=1), head)

    def use_conditioning(self, shared: Path, linears: Sequence[str]) -> None:
        """From now on requests are conditioned with the int8 weights of this file, those of `linears`."""
        made = narrowed_graph(self._bundle, linears)
        graph = self._backend.backend.load("conditioning", spec_of(made, ""), made.SerializeToString())
        self._backend.conditioning = _Conditioning(graph, self._fed(MappedTensors(shared, error=BundleError)))

    def _fed(self, stored: MappedTensors) -> Mapping[str, np.ndarray]:
        return widened(stored) if self._blocks[0].wide else stored

    def alone(self, trajectories: Sequence[Trajectory], tick: Callable[[], None] = lambda: None) -> np.ndarray:
        """[blocks, linears, steps] decibels at the end of the block where that linear alone is quantized."""
        sums = _Sums.empty(len(self._blocks), len(self._steps))
        self._backend.sums = sums
        self._run(trajectories, MEASURED, lambda *_: tick())
        return decibels(sums.signal[:, None], sums.noise)

    def mixture(
        self,
        trajectories: Sequence[Trajectory],
        chosen: Sequence[frozenset[str]],
        tick: Callable[[], None] = lambda: None,
    ) -> np.ndarray:
        """[steps] decibels of the denoiser's output; `chosen`: the quantized linears of every block."""
        self._backend.chosen = tuple(chosen)
        sums = np.zeros((2, len(self._steps)))

        def compare(trajectory: Trajectory, place: int, prediction: np.ndarray) -> None:
            sums[:, place] += output_snr(trajectory.predictions[self._steps[place]], prediction)
            tick()

        self._run(trajectories, MIXED, compare)
        return decibels(sums[0], sums[1])

    def _run(
        self, trajectories: Sequence[Trajectory], prefix: str, told: Callable[[Trajectory, int, np.ndarray], None]
    ) -> None:
        self._denoiser.block_graphs = tuple(f"{prefix}{i}" for i in range(len(self._blocks)))
        for trajectory in trajectories:
            starts = [trajectory.starts[i] for i in self._steps]
            self._backend.step = 0
            loop = self._denoiser.denoise(
                trajectory.conditions,
                starts[0],
                self._part,
                self._guidance,
                NoiseSource(0),  # every step begins with the given latents
                trajectory.grid,
                self._check,
            )
            for step in loop:
                told(trajectory, step.index, step.prediction)
                self._backend.step = step.index + 1
                if step.index + 1 < len(starts):
                    np.copyto(step.latents, starts[step.index + 1])


@dataclass
class _Sums:
    """Sums of squares at the ends of blocks: signal [blocks, steps], noise [blocks, linears, steps]."""

    signal: np.ndarray
    noise: np.ndarray

    @classmethod
    def empty(cls, blocks: int, steps: int) -> _Sums:
        return cls(np.zeros((blocks, steps)), np.zeros((blocks, len(LINEARS), steps)))


@dataclass
class _Candidates:
    """The runtime's backend, with graphs "measured_<i>" (the float block, compared with one linear quantized after the
    other) and "mixed_<i>" (the block with the chosen linears quantized)."""

    bundle: Bundle
    backend: OnnxRuntimeBackend
    scheme: Scheme
    blocks: Sequence[BlockCandidate]
    chosen: tuple[frozenset[str], ...] = ()
    sums: _Sums | None = None
    step: int = 0
    name: str = "onnxruntime"
    lanes: int = 1
    keep: bool = True  # whether the blocks' mapped pages stay after use
    scratch: dict[str, np.ndarray] = field(default_factory=dict)
    loaded: dict[frozenset[str], OrtGraph] = field(default_factory=dict)
    conditioning: _Conditioning | None = None

    def graph(self, name: str, lane: int = 0, lanes: int = 1) -> OrtGraph | _CandidateGraph | _Conditioning:
        if name == "conditioning" and self.conditioning is not None:
            return self.conditioning
        for prefix in (MEASURED, MIXED):
            if name.startswith(prefix):
                return _CandidateGraph(self, int(name.removeprefix(prefix)), prefix == MEASURED)
        return self.backend.graph(name)

    def drop(self, *names: str) -> None:
        self.backend.drop(*names)

    def variant(self, linears: frozenset[str]) -> OrtGraph:
        """The block's graph in which these linears are quantized."""
        if linears not in self.loaded:
            if not linears:
                self.loaded[linears] = self.backend.graph("block")
            else:
                model = read_model(self.bundle, self.backend.own_name("block"))
                made = quantized(model, [n for n in LINEARS if n in linears], self.scheme, "cpu")
                self.loaded[linears] = self.backend.load("block_candidate", spec_of(made, ""), made.SerializeToString())
        return self.loaded[linears]

    def prepare(
        self,
        block: int,
        linears: frozenset[str],
        arrays: Mapping[str, np.ndarray],
        after: Callable[[], None] | None = None,
    ) -> _Variant:
        candidate = self.blocks[block]
        return _Variant(self.variant(linears), candidate.weights(linears), candidate.row_scale(linears), arrays, after)


class _CandidateGraph:
    """A block among the candidates."""

    def __init__(self, candidates: _Candidates, block: int, measured: bool):
        self._candidates, self._block, self._measured = candidates, block, measured
        self.spec = candidates.variant(frozenset()).spec

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise NotImplementedError("candidates are prepared")

    def prepare(self, arrays: Mapping[str, np.ndarray]) -> _Variant | _Comparison:
        candidates, block = self._candidates, self._block
        if not self._measured:
            release = None if candidates.keep else candidates.blocks[block].release
            return candidates.prepare(block, candidates.chosen[block], arrays, release)
        return _Comparison(candidates, block, arrays)


class _Conditioning:
    """The conditioning with weights of its own."""

    def __init__(self, graph: OrtGraph, weights: Mapping[str, np.ndarray]):
        self._graph, self._weights, self.spec = graph, weights, graph.spec

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._graph({**feeds, **self._weights})

    def prepare(self, arrays: Mapping[str, np.ndarray]) -> OrtCall:
        return self._graph.prepare({**arrays, **self._weights})


class _Variant:
    """A prepared call whose modulation rows are multiplied on the way in. `after`: called when it has run."""

    def __init__(
        self,
        graph: OrtGraph,
        weights: Mapping[str, np.ndarray],
        factors: np.ndarray | None,
        arrays: Mapping[str, np.ndarray],
        after: Callable[[], None] | None = None,
    ):
        self._after = after
        self._rows, self._factors = arrays["modulation"], factors
        self._scaled = self._rows if factors is None else np.empty_like(self._rows)
        self._call: OrtCall = graph.prepare({**arrays, **weights, "modulation": self._scaled})

    def bind(self, name: str, array: np.ndarray) -> None:
        self._call.bind(name, array)

    def __call__(self) -> None:
        if self._factors is not None:
            np.multiply(self._rows, self._factors, out=self._scaled)
        self._call()
        if self._after is not None:
            self._after()


class _Comparison:
    """Runs the float block into the loop's buffers, then the block with each linear quantized beside it."""

    def __init__(self, candidates: _Candidates, block: int, arrays: Mapping[str, np.ndarray]):
        self._candidates, self._block = candidates, block
        self._exact = candidates.prepare(block, frozenset(), arrays)
        self._video, scratch = arrays["video_out"], candidates.scratch
        for name in ("video_out", "text_out", "pose_out"):
            if name not in scratch or scratch[name].shape != arrays[name].shape:
                scratch[name] = np.empty_like(arrays[name])
        self._made = scratch["video_out"]
        beside = {**arrays, **scratch}
        self._alone = [candidates.prepare(block, frozenset({name}), beside) for name in LINEARS]

    def bind(self, name: str, array: np.ndarray) -> None:
        raise NotImplementedError("a comparison is bound once")

    def __call__(self) -> None:
        self._exact()
        sums, step = self._candidates.sums, self._candidates.step
        if sums is None:
            raise RuntimeError("nothing to compare into")
        for place, call in enumerate(self._alone):
            call()
            signal, noise = output_snr(self._video, self._made)
            sums.noise[self._block, place, step] += noise
        sums.signal[self._block, step] += signal
        self._candidates.blocks[self._block].release()
