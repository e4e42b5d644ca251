"""The denoising loop: stem, the block's graph run over a store of weights, head; everything constant is computed before.

Buffers are allocated once per request; inside the loop nothing is, and numpy only draws the noise.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..bundle.config import TransformerConfig
from ..bundle.errors import DeviceError
from ..bundle.store import Bundle
from .backends.base import Backend, BlockWeights, Buffers, Call, Recording
from .backends.host import HOST, BlockStore
from .embeddings import timestep_sinusoid
from .noise import NoiseSource
from .rope import rope_table, split_halves, with_text_prefix
from .scheduler import Schedule
from .timeline import STEP, Timeline

__all__ = ["OFS", "OVERFLOW", "BlockStore", "Denoiser", "Latents", "Loop", "MakeLoop", "Step", "Turn"]

OFS = 2.0  # the value that the published pipeline feeds to 1.5-style models
MODULATION_ROWS = 15
OVERFLOW = "In fp16 this is an overflow: export with --precision fp32 (or bf16 on an NVIDIA GPU)."

Turn = Callable[[], None]  # what a block does for one guidance half: a `Call`, or several


@dataclass(frozen=True)
class Latents:
    """What conditions a clip. float32; image and pose latents [1, F, C, H, W], prompt embeddings [B, L, Dt].

    B is 2 (negative, positive) under guidance, else 1.
    """

    prompt_embeds: np.ndarray
    image: np.ndarray
    pose: np.ndarray


class Step:
    """State after one step, read when it is asked for: on a device that waits for the step to be done."""

    def __init__(self, index: int, timestep: int, loop: Loop):
        self.index, self.timestep = index, timestep
        self._buffers, self._latents, self._prediction = loop.buffers, loop.latents, loop.prediction

    @cached_property
    def latents(self) -> np.ndarray:
        """[1, F, C, H, W] float32. On the host this is the loop's own buffer: copy it to keep it."""
        return self._buffers.get(self._latents)

    @cached_property
    def prediction(self) -> np.ndarray:
        """[B, F, C, H, W] float32, likewise."""
        return self._buffers.get(self._prediction)

    def replace(self, latents: np.ndarray) -> None:
        """The next step, or what comes after the last, starts from these latents."""
        self._buffers.put(self._latents, np.broadcast_to(np.asarray(latents, np.float32), self._latents.shape))
        self.__dict__["latents"] = self._buffers.get(self._latents)


@contextmanager
def _at(place: str) -> Iterator[None]:
    """A device's fault is told with where it happened."""
    try:
        yield
    except DeviceError as error:
        raise DeviceError(f"{place}: {error}") from error


def _part(timeline: Timeline | None, name: str) -> AbstractContextManager[None]:
    """Around a part of a step, which `timeline` keeps."""
    return nullcontext() if timeline is None else timeline.part(name)


class Denoiser:
    """The transformer of one bundle, ready to denoise clips of any size that it can make."""

    def __init__(self, bundle: Bundle, backend: Backend):
        """Maps the weights; nothing is read yet.

        `side_by_side`: whether guidance halves may run at once where the backend gains from it. `together`: whether they go
        through a block as one batch. `timeline`: what the next loop's parts are measured with; None: they are not.
        `record`: from the second step on, a device repeats what it was shown once (a CUDA graph), if all weights stay;
        `not_recorded`: why the last loop was not, "" if it was or was not asked to be. `check_steps`: a step whose latents are not
        finite ends the loop (`_check_finite`).
        """
        self.side_by_side, self.together, self.check_steps = True, False, False
        self.timeline: Timeline | None = None
        self.record, self.not_recorded = False, ""
        self.config: TransformerConfig = bundle.manifest.transformer
        self._backend = backend
        self._bundle = bundle
        self.buffers: Buffers = getattr(backend, "buffers", HOST)
        self._blocks: BlockWeights = self.buffers.weights(bundle, self.config.num_layers)
        self._shared = bundle.tensors("denoiser")
        self.block_graphs = bundle.manifest.block_graphs  # the graph that runs each block
        self._tables: tuple[tuple[int, ...], np.ndarray, np.ndarray] | None = None

    def modulation(self, schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
        """(blocks [T, layers, 15, D], head [T, 2, D]) float32 for all timesteps; kept for the next clip with the same steps."""
        key = tuple(int(t) for t in schedule.timesteps)
        if self._tables is None or self._tables[0] != key:
            start = time.perf_counter()
            config = self.config
            feeds: dict[str, np.ndarray] = {"time_sinusoid": timestep_sinusoid(schedule.timesteps, config.width)}
            if config.ofs_embed_dim is not None:
                feeds["ofs_sinusoid"] = timestep_sinusoid([OFS], config.ofs_embed_dim)
            feeds.update(self._shared)
            graph = self._backend.graph("modulation")
            table = np.empty((len(key), config.num_layers, MODULATION_ROWS, config.width), np.float32)
            for i in range(config.num_layers):
                weights = self._bundle.tensors(f"modulation_{i:02d}")
                table[:, i] = graph({**feeds, **weights})["table"]
                weights.release()  # needed once per schedule only
            head = self._backend.graph("head_modulation")(feeds)["table"]
            self._tables = (key, table, head)
            if self.timeline is not None:
                self.timeline.schedule += time.perf_counter() - start
        return self._tables[1], self._tables[2]

    def use_tables(self, schedule: Schedule, blocks: np.ndarray, head: np.ndarray) -> None:
        """Takes these tables, as `modulation` would return them, for this schedule's timesteps."""
        self._tables = (tuple(int(t) for t in schedule.timesteps), blocks, head)

    def forget_schedule(self) -> None:
        """Frees the modulation tables; the next clip computes them anew."""
        self._tables = None

    def rope(self, grid: tuple[int, int, int], text_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Rotary tables for [text; video] in the half-split layout, each [S, head_dim / 2] float32."""
        config = self.config
        half = config.attention_head_dim // 2
        if config.patch_size_t is None:
            base = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
            tables = rope_table(grid, "linspace", base=base, head_dim=config.attention_head_dim)
        else:
            tables = rope_table(grid, "slice", head_dim=config.attention_head_dim)
        cos, sin = (split_halves(table)[:, :half] for table in tables)
        cos, sin = with_text_prefix(cos, sin, text_tokens)
        return np.ascontiguousarray(cos), np.ascontiguousarray(sin)

    def denoise(
        self,
        latents: Latents,
        initial: np.ndarray,
        schedule: Schedule,
        guidance: float,
        noise: NoiseSource,
        grid: tuple[int, int, int],
        check: Callable[[], None] = lambda: None,
        make_loop: MakeLoop | None = None,
    ) -> Iterator[Step]:
        """Yields one `Step` per timestep; the last one's latents are the result, before division by the scaling factor.

        `initial`: [1, F, C, H, W] float32 pure noise. `check` is called between blocks and may raise to cancel.
        `make_loop`: None for a loop that computes every step in full.
        """
        tables, timeline = self.modulation(schedule), self.timeline
        recording = nullcontext() if timeline is None else timeline.recording(self.buffers)
        with recording, closing(self._loop(make_loop or Loop, latents, initial, grid)) as loop:
            blocks, head = map(self.buffers.hold, tables)
            self.not_recorded = "steps reuse what earlier ones computed" if self.record and make_loop else ""
            for index, (timestep, step) in enumerate(zip(schedule.timesteps, schedule.steps, strict=True)):
                with _at(f"Step {index + 1} of {len(schedule)}"), _part(timeline, STEP):
                    # The first step brought the weights, and whatever a device does when a graph first runs.
                    if self.record and index == 1 and not make_loop:
                        self.not_recorded = loop.record()
                    if loop.recorded:
                        check()
                    else:
                        loop.run_blocks(blocks[index], check)
                    for _ in range(step.draws - 1):
                        noise.skip(initial.shape)  # of two draws the published scheduler uses the second
                    drawn = noise.normal(initial.shape)
                    if loop.recorded:
                        loop.repeat(blocks[index], head[index], guidance, step.as_array(), drawn)
                    else:
                        loop.run_head(head[index], guidance, step.as_array(), drawn)
                if self.check_steps:
                    with _at(f"Step {index + 1} of {len(schedule)}"):
                        self._check_finite(loop)
                done = Step(index, int(timestep), loop)
                if index + 1 == len(schedule):
                    _ = done.latents  # the buffers are gone when the caller looks at the last step
                yield done

    def _check_finite(self, loop: Loop) -> None:
        """Raises `DeviceError` if latents are not finite. Of a device's, one row in the middle is read, which waits for the step.

        A token that is not finite makes all tokens so in the next block, by attention. So the row finds it in the step where it
        came up or, if that was in the last block, in the next one that sends all tokens through the blocks. At the loop's end
        the animator looks at all latents.
        """
        sample = loop.latents
        if not isinstance(sample, np.ndarray):
            for length in loop.latents.shape[:-1]:
                sample = sample[length // 2]
        if not np.isfinite(self.buffers.get(sample)).all():
            raise DeviceError(f"The latents are not finite (NaN or infinite). {OVERFLOW}")

    def _loop(self, make_loop: MakeLoop, latents: Latents, initial: np.ndarray, grid: tuple[int, int, int]) -> Loop:
        try:
            return make_loop(self, latents, initial, grid)
        except BaseException:  # what is not there cannot give back the blocks' room
            self.buffers.settle()
            self._blocks.close()
            raise

    @property
    def resident_blocks(self) -> int:
        """How many blocks keep their weights in memory between steps; the others are read anew in every step."""
        return self._blocks.resident

    @resident_blocks.setter
    def resident_blocks(self, count: int) -> None:
        self._blocks.resident = max(0, min(count, len(self._blocks)))


class Loop:
    """Buffers and prepared calls of one request."""

    def __init__(self, denoiser: Denoiser, latents: Latents, initial: np.ndarray, grid: tuple[int, int, int]):
        config, backend, buffers = denoiser.config, denoiser._backend, denoiser.buffers
        self.buffers, self._blocks = buffers, denoiser._blocks
        shared = {name: buffers.hold(array) for name, array in denoiser._shared.items()}
        batch, text_tokens, _ = latents.prompt_embeds.shape
        conditions = buffers.keep(
            backend.graph("conditioning"),
            {
                "prompt_embeds": latents.prompt_embeds,
                "image_latents": latents.image,
                "pose_latents": latents.pose,
                **shared,
            },
        )
        text, pose = conditions["text"], conditions["pose"]
        self._rope_tables = denoiser.rope(grid, text_tokens)
        cos, sin = map(buffers.hold, self._rope_tables)
        tokens = pose.shape[1]
        rows, d = MODULATION_ROWS, config.width
        dtype = pose.dtype

        self._denoiser, self._backend, self._shared = denoiser, backend, shared
        self._timeline = denoiser.timeline
        start = initial.astype(np.float32)  # a copy: the loop writes here
        self.latents, self._x0 = buffers.hold(start), buffers.hold(np.zeros_like(start))
        self._next, self._x0_next, self._noise = (buffers.empty(start.shape, np.float32) for _ in range(3))
        self._coefficients = buffers.empty((7,), np.float32)
        self.prediction = buffers.empty((batch, *start.shape[1:]), np.float32)
        self._row = buffers.empty((len(self._blocks), rows, d), np.float32)
        self._head_row = buffers.empty((2, d), np.float32)

        stem_video = buffers.empty((1, tokens, d), dtype)
        video = [buffers.empty((batch, tokens, d), dtype) for _ in range(2)]
        texts = [buffers.empty(text.shape, dtype) for _ in range(2)]
        self._stem_video, self._video, self._texts = stem_video, video, texts
        self._text, self._pose, self._rope = text, pose, (cos, sin)
        self._poses: list[list[Any]] = []  # of each half
        self._stem = backend.graph("stem").prepare(
            {"latents": self.latents, "image_tokens": conditions["image_tokens"], "video": stem_video, **shared}
        )
        # Each guidance half is a row of calls at batch 1. Side by side, each on its share of the cores, they need no
        # barrier between operators; one after the other they need the activations of one. Together they are one row.
        self._rows_of = [slice(0, batch)] if denoiser.together else [slice(h, h + 1) for h in range(batch)]
        self._spread = video[0] if len(self._rows_of) < batch else None  # where the stem's tokens go for every half
        self._first_video = stem_video if self._spread is None else self._spread
        self.lanes = min(batch, backend.lanes) if denoiser.side_by_side else 1
        self._pool = ThreadPoolExecutor(self.lanes - 1, "denoiser") if self.lanes > 1 else None
        self._halves: list[list[Call]] = []
        self._blocks.open()
        poses: list[Any] = []
        for h in range(len(self._rows_of)):
            graphs = [backend.graph(name, h % self.lanes, self.lanes) for name in denoiser.block_graphs]
            if not poses or self.lanes > 1:  # halves that take turns write the same tokens
                poses = [buffers.empty(pose.shape, dtype) for _ in range(2)]
            self._poses.append(poses)
            self._halves.append([graph.prepare(self._block_arrays(h, i)) for i, graph in enumerate(graphs)])
        self._recording: Recording | None = None
        self._final = video[len(self._blocks) % 2]  # [B, N, D]: what the last block writes
        self._head = backend.graph("head").prepare(
            {**self._head_arrays(), "video": self._final, "prediction": self.prediction}
        )

    def _block_arrays(self, h: int, i: int) -> dict[str, Any]:
        """What block `i` of row `h` of calls reads and writes."""
        half, poses = self._rows_of[h], self._poses[h]
        return {
            "video": self._video[i % 2][half] if i else self._first_video,
            "text": (self._texts[i % 2] if i else self._text)[half],
            "pose": poses[i % 2] if i else self._pose,
            "modulation": self._row[i],
            "rope_cos": self._rope[0],
            "rope_sin": self._rope[1],
            "video_out": self._video[(i + 1) % 2][half],
            "text_out": self._texts[(i + 1) % 2][half],
            "pose_out": poses[(i + 1) % 2],
            **self._blocks[i],
        }

    def _head_arrays(self) -> dict[str, Any]:
        """What the head reads and writes, but for the tokens and the prediction."""
        return {
            "modulation": self._head_row,
            "latents": self.latents,
            "x0_old": self._x0,
            "noise": self._noise,
            "coefficients": self._coefficients,
            "latents_out": self._next,
            "x0": self._x0_next,
            **self._shared,
        }

    def run_blocks(self, rows: np.ndarray, check: Callable[[], None]) -> None:
        """Stem and all blocks; `rows` [layers, 15, D]."""
        self._run_stem(rows)
        self._run(self._halves, check)

    def _run_stem(self, rows: np.ndarray) -> None:
        self.buffers.put(self._row, rows)
        self._enqueue_stem()

    def _enqueue_stem(self) -> None:
        with _at("stem"), _part(self._timeline, "stem"):
            self._stem()
        if self._spread is not None:
            for h in range(self._spread.shape[0]):
                self.buffers.put(self._spread[h : h + 1], self._stem_video)

    def _run(self, halves: Sequence[Sequence[Turn]], check: Callable[[], None]) -> None:
        """A call per block of each of these guidance halves."""
        pool = self._pool if len(halves) > 1 else None
        if self._timeline is not None:
            halves = self._timeline.around(halves, side_by_side=pool is not None)
        if pool is None:
            self._take_turns(halves, check)
        else:
            self._side_by_side(pool, halves, check)

    def _take_turns(self, halves: Sequence[Sequence[Turn]], check: Callable[[], None]) -> None:
        for i, calls in enumerate(zip(*halves, strict=True)):
            check()
            with _at(f"block {i}"):
                self._blocks.ahead(i)
                for call in calls:
                    call()
                self._blocks.done(i)

    def _side_by_side(
        self, pool: ThreadPoolExecutor, halves: Sequence[Sequence[Turn]], check: Callable[[], None]
    ) -> None:
        stop = threading.Event()

        def run(calls: Sequence[Turn]) -> None:
            for call in calls:
                if stop.is_set():
                    return
                check()
                call()

        others = [pool.submit(run, calls) for calls in halves[1:]]
        try:
            run(halves[0])
        except BaseException:
            stop.set()  # an interruption reaches this thread only: the others must not go on into freed buffers
            wait(others)
            raise
        for other in others:
            other.result()

    def close(self) -> None:
        """Ends the threads, and waits for what still runs on the buffers."""
        if self._pool is not None:
            self._pool.shutdown()
        self.buffers.settle()
        if self._recording is not None:
            self._recording.close()
            self._recording = None
        self._blocks.close()

    def run_head(self, row: np.ndarray, guidance: float, coefficients: np.ndarray, noise: np.ndarray) -> None:
        """Head, guidance and the scheduler's update; `self.latents` holds the result."""
        self._run_head(self._head, row, guidance, coefficients, noise)

    def _run_head(
        self, head: Call, row: np.ndarray, guidance: float, coefficients: np.ndarray, noise: np.ndarray
    ) -> None:
        self._put_head_inputs(row, guidance, coefficients, noise)
        with _at("head"), _part(self._timeline, "head"):
            head()
        self._take_over()

    def _put_head_inputs(self, row: np.ndarray, guidance: float, coefficients: np.ndarray, noise: np.ndarray) -> None:
        put = self.buffers.put
        put(self._head_row, row)
        put(self._coefficients, np.array([guidance, *coefficients], np.float32))
        put(self._noise, noise)

    def _take_over(self) -> None:
        """The next step starts from what the head wrote."""
        self.buffers.put(self.latents, self._next)
        self.buffers.put(self._x0, self._x0_next)

    # --- recorded steps ---

    @property
    def recorded(self) -> bool:
        """Whether `repeat` computes a step."""
        return self._recording is not None

    def record(self) -> str:
        """Shows the device a whole step, after one that ran. Returns why that could not be, or ""."""
        if not self._blocks.settled:
            return "not all weights stay in the GPU's memory"
        calls = [call for calls in zip(*self._halves, strict=True) for call in calls]
        timeline, self._timeline = self._timeline, None  # a recorded step has no points to be timed at

        def step() -> None:
            self._enqueue_stem()
            for call in calls:
                call()
            self._head()
            self._take_over()

        try:
            self._recording = self.buffers.record(step, [self._stem, *calls, self._head])
        except DeviceError as error:
            return str(error)
        finally:
            self._timeline = timeline
        return ""

    def repeat(
        self, rows: np.ndarray, row: np.ndarray, guidance: float, coefficients: np.ndarray, noise: np.ndarray
    ) -> None:
        """A whole step as it was recorded; the arguments are those of `run_blocks` and `run_head`."""
        if self._recording is None:
            raise RuntimeError("no step was recorded")
        self.buffers.put(self._row, rows)
        self._put_head_inputs(row, guidance, coefficients, noise)
        self._recording()


MakeLoop = Callable[[Denoiser, Latents, np.ndarray, tuple[int, int, int]], Loop]
