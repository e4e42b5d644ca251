"""Measures a bundle on this machine: how long each stage, step and block of a clip takes, and how much memory it needs.

The photo is seeded noise and the pose clip a drawn figure that waves, so no media are needed. In every round the whole clip is made
as for a new prompt and a new schedule: neither embeddings nor the steps' tables of an earlier round are used.

Stages are timed by the process's clock, from their first call to their result; steps and blocks by the backend's own (`Timeline`).
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..bundle.config import Geometry, geometry
from ..bundle.errors import UsageError
from .animator import Animator, Run
from .measure import cores, machine, numpy_ceiling, peak_rss, versions
from .reuse.plan import StepPlan, step_flops
from .timeline import STEP, Part, Timeline, hidden_seconds

__all__ = ["PROMPT", "SEED", "STAGES", "BenchSettings", "bench", "pose_clip"]

SEED = 42
PROMPT = "a person waves with both arms"
STAGES = ("prepare", "text", "encode", "schedule", "denoise", "decode")  # in their order
MAX_ROUNDS = 1000
CEILING_SECONDS = 2.0

Heard = Callable[[str, int, int], None]  # what is done, how much of it, of how much


@dataclass(frozen=True)
class BenchSettings:
    """What is measured. size: width, height, frames; None: the bundle's. `rounds` count, after `warmup` that do not.

    threads: processor cores that the backend was given; None: all. The others are those of `Request`.

    Raises:
        UsageError: a number of rounds that is not possible.
    """

    size: tuple[int, int, int] | None = None
    steps: int = 25
    guidance: float = 3.0
    rounds: int = 3
    warmup: int = 1
    reuse: str = "off"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("warmup", 0)):
            if not least <= getattr(self, name) <= MAX_ROUNDS:
                raise UsageError(
                    f"--{name} {getattr(self, name)} is not possible: give a number from {least} to {MAX_ROUNDS}."
                )


@dataclass(frozen=True)
class _Round:
    """What one round was measured with. whole: seconds of all of it, what is between the stages too."""

    run: Run
    timeline: Timeline
    whole: float
    device_peak: int | None

    @property
    def seconds(self) -> dict[str, float]:
        """Of every stage."""
        found, schedule = self.run.seconds, self.timeline.schedule
        return {
            "prepare": found["media"] + found["verify"],
            "text": found["text"],
            "encode": found["encode"],
            "schedule": schedule,
            "denoise": found["denoise"] - schedule,
            "decode": found["decode"],
        }

    def parts(self, name: str) -> list[Part]:
        return [part for part in self.timeline.parts if part.name == name]


def bench(animator: Animator, settings: BenchSettings, heard: Heard | None = None) -> dict[str, Any]:
    """Makes the clip `warmup + rounds` times; returns all figures as `dynamictrl bench --json` prints them.

    Durations are in seconds and have a median, the smallest and the largest; sizes are in bytes.

    Raises:
        UsageError: a size or another value that the bundle cannot do.
        BundleError, DeviceError: as for any clip.
    """
    heard = heard or _unheard
    size = _size(animator, settings)
    arguments = {
        "image": np.random.default_rng(SEED).integers(0, 256, (size.height, size.width, 3), np.uint8),
        "pose": pose_clip(size.height, size.width, size.frames),
        "prompt": PROMPT,
        "seed": SEED,
        "height": size.height,
        "width": size.width,
        "frames": size.frames,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "reuse": settings.reuse,
    }
    rounds = []
    for number in range(settings.warmup + settings.rounds):
        late = number - settings.warmup
        label = (
            f"Round {late + 1} of {settings.rounds}" if late >= 0 else f"Warming up, {number + 1} of {settings.warmup}"
        )
        rounds.append(_round(animator, arguments, label, heard))
    memory = _memory(rounds)
    if animator.device_peak is None:
        heard("Measuring the processor", 0, 1)
    warm, measured = rounds[: settings.warmup], rounds[settings.warmup :]
    figures = {
        "stage_seconds": _stages(measured),
        "warmup_seconds": [one.whole for one in warm],
        "halves": _halves(measured[-1]),
        "loop_seconds": _loop(measured),
        "memory": memory,
        **_share(animator, size, measured, settings),
        "copies": _copies(measured),
        "reuse": None if measured[-1].run.reuse is None else measured[-1].run.reuse.as_json(),
    }
    manifest = animator.bundle.manifest
    config = manifest.transformer
    return {
        "name": "bench",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "settings": {
            "bundle": animator.bundle.root.name,  # a receipt says nothing of where things lie on a machine
            "precision": manifest.label,
            "width": config.width,
            "blocks": config.num_layers,
            "video_tokens": size.video_tokens,
            "text_tokens": config.max_text_seq_length,
            "size": f"{size.width}x{size.height}x{size.frames}",
            "steps": settings.steps,
            "guidance": settings.guidance,
            "reuse": settings.reuse,
            "rounds": settings.rounds,
            "warmup": settings.warmup,
            "backend": animator.backend.name,
            "threads": settings.threads or cores(),
            "memory_gb": animator.memory,
        },
        "seeds": [SEED],
        "figures": figures,
        "notices": list(measured[-1].run.notices),
    }


def _unheard(label: str, done: int, total: int) -> None:
    """Progress that nobody asked for."""


def _size(animator: Animator, settings: BenchSettings) -> Geometry:
    manifest = animator.bundle.manifest
    given = manifest.defaults
    width, height, frames = settings.size or (given.width, given.height, given.frames)
    try:
        return geometry(manifest.transformer, manifest.vae, height, width, frames)
    except UsageError as error:
        raise UsageError(f"--size {width}x{height}x{frames} does not go with this bundle. {error}") from error


def _round(animator: Animator, arguments: dict[str, Any], label: str, heard: Heard) -> _Round:
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "denoise":
            heard(label, done, total)

    animator.forget_schedule()
    timeline = Timeline()
    heard(label, 0, arguments["steps"])
    start = time.perf_counter()
    run, chunks = animator.start(progress=progress, timeline=timeline, **arguments)
    for _ in chunks:
        pass
    whole = time.perf_counter() - start
    return _Round(run, timeline, whole, animator.device_peak)


# Figures


def _spread(values: Iterable[float]) -> dict[str, float]:
    listed = list(values)
    return {"median": statistics.median(listed), "min": min(listed), "max": max(listed)}


def _stages(rounds: list[_Round]) -> dict[str, dict[str, float]]:
    found = {stage: _spread(one.seconds[stage] for one in rounds) for stage in STAGES}
    return {**found, "whole": _spread(one.whole for one in rounds)}


def _loop(rounds: list[_Round]) -> dict[str, Any]:
    """Steps, parts of steps, and blocks. A block's figure is that of one call, for one guidance half or for both together."""
    blocks = [part for one in rounds for part in one.parts("block")]
    reuse = rounds[-1].run.reuse
    steps = [one.parts(STEP) for one in rounds]
    kinds = ("full",) * len(steps[0]) if reuse is None else reuse.plan.kinds
    return {
        "step": _spread(part.seconds for of_round in steps for part in of_round),
        "stem": _spread(part.seconds for one in rounds for part in one.parts("stem")),
        "block": _spread(part.seconds for part in blocks),
        "head": _spread(part.seconds for one in rounds for part in one.parts("head")),
        "steps": [
            {"kind": kind, **_spread(of_round[index].seconds for of_round in steps)} for index, kind in enumerate(kinds)
        ],
        "blocks": [
            _spread(part.seconds for part in blocks if part.block == number)
            for number in sorted({part.block for part in blocks})
        ],
    }


def _halves(one: _Round) -> str:
    """How the guidance halves go through a block: one (there is no other), together, in turn, or side by side."""
    if not one.run.request.guided:
        return "one"
    if one.run.plan.batch == 2:
        return "together"
    return "side by side" if one.timeline.side_by_side else "in turn"


def _memory(rounds: list[_Round]) -> dict[str, Any]:
    plan = rounds[-1].run.plan
    return {
        "process_peak_bytes": peak_rss(),
        "planned_peak_bytes": plan.peak,
        "device_peak_bytes": rounds[-1].device_peak,
        "resident_blocks": plan.resident_blocks,
        "tiled": plan.tiled,
    }


def _share(animator: Animator, size: Geometry, rounds: list[_Round], settings: BenchSettings) -> dict[str, Any]:
    """What the denoising stage computes in a second, and the share that this is of what the machine can."""
    run = rounds[-1].run
    config, reuse, tokens = animator.bundle.manifest.transformer, run.reuse, size.video_tokens
    steps = (StepPlan("full", True),) * run.request.num_inference_steps if reuse is None else reuse.plan.steps
    active = tokens if reuse is None else reuse.active_tokens
    done = sum(step_flops(step, config, tokens, active, 2 if run.request.guided else 1) for step in steps)
    speed = done / statistics.median(one.seconds["denoise"] for one in rounds) / 1e9
    ceiling, note = None, "best float32 product of square matrices that numpy reaches with as many threads"
    if rounds[-1].device_peak is not None:
        note = "not measured: nothing that the runtime has multiplies matrices on a GPU but the engines themselves"
    elif (ceiling := numpy_ceiling(settings.threads or cores(), seconds=CEILING_SECONDS)) is None:
        note = "not measured: no second Python process could be started for it"
    return {
        "gflop": done / 1e9,
        "gflops": speed,
        "ceiling": None if ceiling is None else asdict(ceiling),
        "ceiling_note": note,
        "share_of_ceiling": None if ceiling is None else speed / ceiling.gflops,
    }


def _copies(rounds: list[_Round]) -> dict[str, Any] | None:
    """Of weights to the device during a clip's loop: medians over the rounds. `hidden_share`: of their time, while stem, blocks or
    head computed. None where weights are used in place."""
    if rounds[-1].device_peak is None:
        return None
    of_rounds = [one.timeline for one in rounds]
    seconds = [sum(copy.end - copy.begin for copy in one.copies) for one in of_rounds]
    moved = [sum(copy.nbytes for copy in one.copies) for one in of_rounds]
    hidden = [hidden_seconds(one) for one in of_rounds]
    shares = [part / whole for part, whole in zip(hidden, seconds, strict=True) if whole > 0]
    rates = [nbytes / whole for nbytes, whole in zip(moved, seconds, strict=True) if whole > 0]
    return {
        "count": statistics.median(len(one.copies) for one in of_rounds),
        "bytes": statistics.median(moved),
        "seconds": statistics.median(seconds),
        "bytes_per_second": statistics.median(rates) if rates else None,
        "hidden_seconds": statistics.median(hidden),
        "hidden_share": statistics.median(shares) if shares else None,
    }


# The pose clip

# Joints as (across, down) in units of the figure's height, the figure's middle at 0: shoulder, elbow, wrist hang from the neck.
NECK, HIPS, FEET = (0.0, 0.2), (0.07, 0.52), (0.09, 0.97)
SHOULDER, ARM = (0.11, 0.23), (0.15, 0.14)
COLOURS = ((255, 0, 0), (255, 170, 0), (170, 255, 0), (0, 255, 85), (0, 170, 255), (85, 0, 255), (255, 0, 170))


def pose_clip(height: int, width: int, frames: int) -> np.ndarray:
    """[frames, height, width, 3] uint8: lines of a body on black that waves with both arms, as DWPose would draw it."""
    from PIL import Image, ImageDraw

    tall = 0.9 * min(height, 2 * width)
    thick = max(1, round(tall / 40))
    clip = np.zeros((frames, height, width, 3), np.uint8)

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return width / 2 + tall * point[0], 0.05 * height + tall * point[1]

    for number in range(frames):
        picture = Image.fromarray(clip[number])
        draw = ImageDraw.Draw(picture)
        angle = np.pi / 2 * np.sin(2 * np.pi * number / 16)
        for k, side in enumerate((-1, 1)):
            shoulder, hip, foot = ((side * x, y) for x, y in (SHOULDER, HIPS, FEET))
            elbow = (shoulder[0] + side * ARM[0] * np.cos(angle), shoulder[1] - ARM[0] * np.sin(angle))
            wrist = (elbow[0] + side * ARM[1] * np.cos(1.5 * angle), elbow[1] - ARM[1] * np.sin(1.5 * angle))
            for joints, colour in (((NECK, shoulder, elbow, wrist), COLOURS[k]), ((NECK, hip, foot), COLOURS[4 + k])):
                draw.line([at(joint) for joint in joints], fill=colour, width=thick)
        left, top = at((-0.05, 0.06))
        draw.ellipse([left, top, left + 0.1 * tall, top + 0.1 * tall], outline=COLOURS[6], width=thick)
        clip[number] = np.asarray(picture)
    return clip
