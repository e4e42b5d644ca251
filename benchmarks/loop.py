"""A denoising loop in a process of its own, ours or the published one in PyTorch, on the same weights and inputs.

What `exact_loop`, `int8_latency` and `gpu_loop` share: inputs of a size, a `Job` that says what runs where, and the `Worker` that
runs it. Whatever a side took of a GPU's memory is given back when its process ends. Nothing of the package is imported before it
is needed, so that this file also loads where the package is not installed.

    python benchmarks/loop.py JOB    # a worker; it reads a line for every loop and answers with a line of JSON
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # so that this file also runs as a script

__all__ = [
    *("GUIDANCE", "LEAST", "SEED", "STEPS", "Given", "Job", "Ours", "Published", "Worker"),
    *("attempt", "model_facts", "relative_rms", "write_inputs"),
]

STEPS, GUIDANCE, SEED = 10, 3.0, 42
LEAST = "least"  # as a budget: what the planner says is the least


@dataclass(frozen=True)
class Job:
    """A loop to run.

    model: a bundle, for torch a checkpoint. inputs: file of `write_inputs`. out: .npy file for the final latents
    [1, F, C, H, W] float32. timed: every step is timed, too.
    device, dtype: where PyTorch computes ("cpu", "cuda") and in which type ("float32", "bfloat16").
    backend: ours, onnxruntime or tensorrt. memory: GB of the GPU that may be used, or `LEAST`; None: what is free. On the processor
    any budget means that no block stays in memory. reuse: as in `animate --reuse`; no policy that reuses tokens.
    """

    side: Literal["ours", "torch"]
    model: Path
    inputs: Path
    out: Path
    steps: int = STEPS
    timed: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    backend: str = "onnxruntime"
    memory: float | str | None = None
    reuse: str = "off"

    def as_text(self) -> str:
        return json.dumps(dataclasses.asdict(self), default=str)

    @classmethod
    def of_text(cls, text: str) -> Job:
        values = json.loads(text)
        return cls(**{**values, **{name: Path(values[name]) for name in ("model", "inputs", "out")}})


class Given(NamedTuple):
    """What a loop starts from. prompt_embeds [2, L, D], image, pose, initial [1, F, C, H, W], all float32; size: height, width and
    frames in pixels."""

    prompt_embeds: np.ndarray
    image: np.ndarray
    pose: np.ndarray
    initial: np.ndarray
    size: tuple[int, int, int]

    @classmethod
    def load(cls, path: Path) -> Given:
        with np.load(path) as arrays:
            height, width, frames = (int(n) for n in arrays["size"])
            prompt_embeds, image, pose, initial = (arrays[name] for name in cls._fields[:-1])
            return cls(prompt_embeds, image, pose, initial, (height, width, frames))


def write_inputs(path: Path, config: Any, vae: Any, size: tuple[int, int, int]) -> None:
    """Draws what a loop starts from, for the transformer `config` and a clip of this height, width and number of frames."""
    from dynamictrl_edge.bundle.config import geometry

    made = geometry(config, vae, *size)
    generator = np.random.default_rng(SEED)
    shape = (1, made.latent_frames, config.latent_channels, made.latent_height, made.latent_width)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    image = np.zeros(shape, np.float32)
    image[:, :1] = normal(1, 1, *shape[2:])
    np.savez(
        path,
        prompt_embeds=normal(2, config.max_text_seq_length, config.text_embed_dim),
        image=image,
        pose=normal(*shape),
        initial=normal(*shape),
        size=np.array(size),
    )


def model_facts(config: Any, vae: Any, size: tuple[int, int, int]) -> dict[str, Any]:
    """Width, blocks, tokens and GFLOP of a step with both guidance halves."""
    from dynamictrl_edge.bundle.config import geometry

    tokens = geometry(config, vae, *size).video_tokens
    n = tokens + config.max_text_seq_length
    flops = 2 * config.num_layers * (24 * n * config.width**2 + 4 * n * n * config.width)
    return {
        "width": config.width,
        "blocks": config.num_layers,
        "video_tokens": tokens,
        "text_tokens": config.max_text_seq_length,
        "gflop_per_step": flops / 1e9,
    }


def relative_rms(ours: np.ndarray, theirs: np.ndarray) -> float:
    """RMS of the difference over the RMS of `theirs`."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


def attempt(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The part's figures, or why there are none: on a borrowed machine the other parts must not be lost."""
    try:
        return part()
    except Exception as error:  # whatever a library that does not fit raises
        print(f"skipped: {error}", file=sys.stderr, flush=True)
        return {"skipped": f"{type(error).__name__}: {error}"}


# The two sides


class Side(Protocol):
    """A loop that is ready to run."""

    def run(self) -> np.ndarray:
        """One whole loop; the final latents [1, F, C, H, W] float32."""

    def facts(self) -> dict[str, Any]:
        """About the last loop, for the receipt: seconds of its steps where they were timed, and memory in bytes."""

    def close(self) -> None: ...


class Ours:
    """Our denoiser, without text encoder and VAE. Every loop computes conditioning, modulation and rotary tables anew."""

    def __init__(self, job: Job):
        from dynamictrl_edge.bundle.config import geometry
        from dynamictrl_edge.bundle.store import Bundle
        from dynamictrl_edge.runtime.backends.base import Backend, DeviceBackend
        from dynamictrl_edge.runtime.denoiser import Denoiser, Latents
        from dynamictrl_edge.runtime.reuse.policy import parse_policy
        from dynamictrl_edge.runtime.scheduler import SchedulerConfig, make_schedule

        self._job, given = job, Given.load(job.inputs)
        bundle = Bundle(job.model)
        self._manifest = manifest = bundle.manifest
        self._size = geometry(manifest.transformer, manifest.vae, *given.size)
        self._schedule = make_schedule(SchedulerConfig.from_dict(manifest.scheduler), job.steps)
        self._policy = parse_policy(job.reuse)
        self._latents = Latents(given.prompt_embeds, given.image, given.pose)
        self._initial = given.initial
        backend: Backend
        if job.backend == "tensorrt":
            from dynamictrl_edge.runtime.backends.gpu_backend import TensorRTBackend

            backend = TensorRTBackend.open(bundle)
        else:
            from dynamictrl_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend

            backend = OnnxRuntimeBackend(bundle)
        self._device: DeviceBackend | None = backend if isinstance(backend, DeviceBackend) else None
        self._plan: Any = None if self._device is None else self._planned(self._device)
        self._denoiser = Denoiser(bundle, backend)
        if self._plan is not None:
            self._denoiser.resident_blocks = self._plan.resident_blocks
            self._denoiser.side_by_side = self._plan.budget is None
            self._denoiser.together = self._plan.batch == 2
        elif job.memory is not None:
            self._denoiser.resident_blocks, self._denoiser.side_by_side = 0, False
        self._timeline: Any = None
        self._reuse: Any = None

    def _planned(self, device: Any) -> Any:
        """The plan for a clip of this size; loops run in its memory, though there is room in it for text encoder and VAE."""
        from dynamictrl_edge.runtime.request import Request

        size, memory = self._size, self._job.memory
        request = Request.of(
            image=np.zeros((1, 1, 3), np.uint8),
            pose=np.zeros((1, 1, 1, 3), np.uint8),
            prompt="",
            steps=self._job.steps,
            guidance=GUIDANCE,
            reuse=self._job.reuse,
        )
        if memory == LEAST:
            # A plan names the least budget; rounded up, so that it is not missed by a byte.
            memory = (device.plan(size, request, None).smallest_budget + 1) / 1e9
        return device.plan(size, request, memory)

    def run(self) -> np.ndarray:
        from dynamictrl_edge.runtime.noise import NoiseSource
        from dynamictrl_edge.runtime.reuse.loop import Reuse
        from dynamictrl_edge.runtime.timeline import Timeline

        denoiser = self._denoiser
        if self._device is not None:
            self._device.begin(self._plan)
        denoiser.forget_schedule()
        denoiser.timeline = self._timeline = Timeline() if self._job.timed else None
        if self._policy is not None:
            table, _ = denoiser.modulation(self._schedule)
            self._reuse = Reuse.of(self._policy, self._size, self._schedule, table, guided=True)
        make_loop = None if self._reuse is None else self._reuse.make_loop
        noise, grid = NoiseSource(SEED), self._size.grid
        for step in denoiser.denoise(
            self._latents, self._initial, self._schedule, GUIDANCE, noise, grid, make_loop=make_loop
        ):
            last = step
        return last.latents

    def facts(self) -> dict[str, Any]:
        from dynamictrl_edge.runtime.timeline import STEP, hidden_seconds

        denoiser, plan, timeline = self._denoiser, self._plan, self._timeline
        found: dict[str, Any] = {"resident_blocks": denoiser.resident_blocks}
        if timeline is not None:
            found["step_seconds"] = [part.seconds for part in timeline.parts if part.name == STEP]
        if self._reuse is not None:
            report = self._reuse.report(denoiser.config, self._manifest.precision)
            found.update(
                step_kinds=list(report.plan.kinds),
                flop_fraction=report.flop_fraction,
                cache_bytes=report.cache_bytes,
            )
        if self._device is not None:
            found.update(
                device_peak_bytes=self._device.peak,
                planned_peak_bytes=plan.peak,
                budget_bytes=plan.budget,
                ring=plan.ring,
            )
            if timeline is not None:
                found["copies"] = {
                    "bytes": sum(copy.nbytes for copy in timeline.copies),
                    "seconds": sum(copy.end - copy.begin for copy in timeline.copies),
                    "hidden_seconds": hidden_seconds(timeline),
                }
        return found

    def close(self) -> None:
        """Gives a GPU back, and keeps the kernels that were compiled on it."""
        if self._device is not None:
            self._device.close()


class Published:
    """The published loop in PyTorch."""

    def __init__(self, job: Job):
        import torch

        from benchmarks.published_torch import load_scheduler, load_transformer

        self._torch, self._job, given = torch, job, Given.load(job.inputs)
        self._cuda = job.device == "cuda"
        self._model = load_transformer(job.model / "transformer", dtype=getattr(torch, job.dtype), device=job.device)
        self._scheduler = load_scheduler(job.model / "scheduler")
        self._size = (given.size[0], given.size[1], given.initial.shape[1])
        self._given = {
            "prompt_embeds": given.prompt_embeds,
            "latents": given.initial,
            "image_latents": given.image,
            "pose_latents": given.pose,
        }
        self._seconds: list[float] = []

    def run(self) -> np.ndarray:
        from benchmarks.published_torch import denoise, rotary_tables

        torch, device = self._torch, self._job.device
        self._seconds, ends = [], [time.perf_counter()]

        def ended(*_: Any) -> None:
            if self._job.timed:
                if self._cuda:
                    torch.cuda.synchronize()
                ends.append(time.perf_counter())
                self._seconds.append(ends[-1] - ends[-2])

        with torch.inference_mode():
            cos, sin = rotary_tables(self._model.config, *self._size)
            final = denoise(
                self._model,
                self._scheduler,
                **{name: torch.from_numpy(array).to(device) for name, array in self._given.items()},
                rotary=(cos.to(device), sin.to(device)),
                steps=self._job.steps,
                guidance=GUIDANCE,
                generator=torch.Generator().manual_seed(SEED),
                on_step=ended,
            )
            latents: np.ndarray = final.cpu().numpy()
        return latents

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = {"step_seconds": self._seconds} if self._job.timed else {}
        if self._cuda:
            found["device_peak_bytes"] = self._torch.cuda.max_memory_allocated()
            found["device_reserved_bytes"] = self._torch.cuda.max_memory_reserved()
        return found

    def close(self) -> None:
        """The process's end gives everything back."""


# Processes


class Server:
    """Runs a job's loops."""

    def __init__(self, job: Job):
        self._job = job
        self._side: Side | None = None

    def answer(self) -> dict[str, Any]:
        """One loop: its seconds, this process's peak memory, and the side's facts; or the error. The first one sets up."""
        from dynamictrl_edge.runtime.measure import peak_rss

        try:
            side = self._side = self._side or (Ours(self._job) if self._job.side == "ours" else Published(self._job))
            start = time.perf_counter()
            final = side.run()
            seconds = time.perf_counter() - start
            np.save(self._job.out, final)
            return {"seconds": seconds, "rss": peak_rss(), **side.facts()}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    def close(self) -> None:
        if self._side is not None:
            self._side.close()


def serve(job: Job) -> None:
    """An answer for every line on stdin. Answers have standard output to themselves: libraries print to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = Server(job)
    for _ in sys.stdin:
        print(json.dumps(server.answer()), file=answers, flush=True)
    server.close()


class Worker:
    """A job in a process of its own, which lives until `close`."""

    def __init__(self, job: Job):
        command = [sys.executable, str(Path(__file__).resolve()), job.as_text()]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.last: dict[str, Any] = {}

    def run(self) -> float:
        """Seconds of one loop; `last` has everything that is known of it. Raises `RuntimeError` where it failed."""
        self.last = self._answer()
        if "error" in self.last:
            raise RuntimeError(self.last["error"])
        return float(self.last["seconds"])

    def _answer(self) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the worker has no pipes")
        with suppress(BrokenPipeError):  # the process has ended; its answer is missing
            stdin.write("run\n")
            stdin.flush()
        if not (line := stdout.readline()):
            return {"error": f"the loop's process ended with code {self._process.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> int:
        """Ends the process; returns its peak resident bytes."""
        with suppress(BrokenPipeError):
            self._process.communicate()
        return int(self.last.get("rss", 0))

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


if __name__ == "__main__":
    serve(Job.of_text(sys.argv[1]))
