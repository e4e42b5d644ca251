"""The denoising loop of a whole model: ours on engines, in bf16 and int8, against the published one in PyTorch.

`benchmarks/gpu.py --only loop` runs this; with `--dry-run` there, ONNX Runtime and PyTorch on the processor do the same.

A checkpoint of random weights is exported in bf16 and, for int8, in fp16 and calibrated with one clip of noise, without the slow
parts that change numbers but no sizes and no speed (smoothing, error compensation, the report). So int8's difference says little
about real weights. PyTorch computes the same weights in bf16. Prompt embeddings and latents are drawn and given; neither text
encoder nor VAE runs. Every loop has a process of its own: a first time for what happens once (weights are read, engines opened,
kernels compiled), then the rounds that count.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.checkpoints import write_checkpoint
from benchmarks.loop import LEAST, SEED, Job, Worker, attempt, model_facts, relative_rms, spread, write_inputs
from dynamictrl_edge.bundle.config import TransformerConfig, VaeConfig
from dynamictrl_edge.bundle.errors import DeviceError
from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.calibration.calibrate import Options, calibrate, denoiser_bytes
from dynamictrl_edge.calibration.decide import Settings
from dynamictrl_edge.calibration.samples import Sample
from dynamictrl_edge.engines.engine_set import ClipSize
from dynamictrl_edge.engines.machine import look_at_machine
from dynamictrl_edge.engines.model_facts import facts_of
from dynamictrl_edge.engines.planner import pick_tile
from dynamictrl_edge.export.checkpoint import Checkpoint
from dynamictrl_edge.export.exporter import export_checkpoint
from dynamictrl_edge.runtime.measure import output

__all__ = ["PRECISIONS", "Wanted", "measure"]

PRESETS = ("quality", "balanced")
PRECISIONS = ("bf16", "int8")
# Rows and columns of the clip that is observed for int8; models with fewer channels need more.
OBSERVED = {"full": 32}
OBSERVED_ELSE = 64

Note = Callable[[], None]


@dataclass(frozen=True)
class Wanted:
    """What is measured. sizes: of clips. memory: budgets in GB, beside all that is free and the least. precisions: of `PRECISIONS`.

    keep: the folder's content serves again, and stays. dry: on the processor, where float32 stands for bf16 and for fp16.
    """

    spec: str
    sizes: tuple[ClipSize, ...]
    steps: int
    rounds: int
    memory: tuple[float, ...] = ()
    precisions: tuple[str, ...] = PRECISIONS
    keep: bool = False
    dry: bool = False

    @property
    def wide(self) -> str:
        """What bf16 is here."""
        return "fp32" if self.dry else "bf16"

    def cases(self) -> dict[str, dict[str, Any]]:
        """What runs in every precision; the first is what the others are compared with."""
        budgets: list[float | str] = [LEAST, *(() if self.dry else self.memory)]
        return {
            "exact": {},
            **{f"exact, {b if isinstance(b, str) else f'{b:g} GB'}": {"memory": b} for b in budgets},
            **{name: {"reuse": name} for name in PRESETS},
        }


def measure(wanted: Wanted, folder: Path, found: dict[str, Any], note: Note) -> dict[str, Any]:
    """Fills `found`, and returns it; `note()` is called whenever something was added.

    folder: for checkpoint, bundles and latents. What it has already is used (a `Wanted` with `keep` left it there).
    """
    if not wanted.dry and (machine := look_at_machine()).gpu is None:
        raise DeviceError(f"no NVIDIA GPU: {machine.no_gpu}")
    things = _Things(wanted, folder / wanted.spec, found.setdefault("prepared_seconds", {}))
    things.root.mkdir(parents=True, exist_ok=True)
    source = Checkpoint(things.checkpoint())
    config, vae = source.config("transformer", TransformerConfig), source.config("vae", VaeConfig)
    for size in wanted.sizes:
        pixels = (size.height, size.width, size.frames)
        write_inputs(things.inputs(size), config, vae, pixels)
        found[str(size)] = model_facts(config, vae, pixels)
    for size in wanted.sizes:
        found[str(size)]["torch"] = attempt(partial(_ran, things.job("torch", source.root, size, "torch"), wanted))
        print(f"{size} torch: {found[str(size)]['torch']}", file=sys.stderr, flush=True)
        note()
    for precision in wanted.precisions:
        name = wanted.wide if precision == "bf16" else precision
        bundle = things.root / name
        ready = attempt(partial(things.ready, name))
        for size in wanted.sizes:
            of_size = found[str(size)][name] = dict(ready)
            for label, changes in {} if "skipped" in ready else wanted.cases().items():
                job = replace(things.job("ours", bundle, size, f"{name}-{label}"), **changes)
                of_size[label] = attempt(partial(_compared, job, wanted, things, size, name))
                print(f"{size} {name} {label}: {of_size[label]}", file=sys.stderr, flush=True)
                note()
        note()
        things.drop(name)
    return found


def _compared(job: Job, wanted: Wanted, things: _Things, size: ClipSize, name: str) -> dict[str, Any]:
    """One of our cases, and how far its result is from the others'."""
    figures = _ran(job, wanted)
    return {**figures, **_differences(job.out, things.out(size, f"{name}-exact"), things.out(size, "torch"))}


def _ran(job: Job, wanted: Wanted) -> dict[str, Any]:
    """One case: seconds of loops and of steps, and memory in bytes."""
    job.out.unlink(missing_ok=True)  # of an earlier call
    before = None if wanted.dry else _gpu_bytes()
    with Worker(job) as worker:
        first = worker.run()
        rounds, steps = [], []
        for _ in range(wanted.rounds):
            rounds.append(worker.run())
            steps += worker.last["step_seconds"]
        # Neither side gives memory back to the driver between loops, so that what it holds now is what it held at most.
        now = None if wanted.dry else _gpu_bytes()
        rest = {name: value for name, value in worker.last.items() if name not in ("seconds", "step_seconds", "rss")}
        found = {"first_loop_seconds": first, "loop_seconds": spread(rounds), "step_seconds": spread(steps), **rest}
    found["peak_rss_bytes"] = worker.last["rss"]
    if before is not None and now is not None:
        found["driver_bytes"] = now - before
    return found


def _gpu_bytes() -> int | None:
    """Bytes of all GPUs that the driver has given out, contexts included; None where it does not tell."""
    told = output("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")
    try:
        return None if told is None else sum(int(line) << 20 for line in told.splitlines())
    except ValueError:  # "[N/A]", on Jetson
        return None


def _differences(out: Path, exact: Path, torch: Path) -> dict[str, Any]:
    """Of the final latents from those of our whole loop in the same precision and those of PyTorch, as far as these ran."""
    found: dict[str, Any] = {}
    made = np.load(out)
    if out != exact and exact.exists():
        other = np.load(exact)
        found.update(relative_rms_to_exact=relative_rms(made, other), same_numbers=bool(np.array_equal(made, other)))
    if torch.exists():
        found["relative_rms_to_torch"] = relative_rms(made, np.load(torch))
    return found


class _Told:
    """Says on standard error what export and calibration are at."""

    def stage(self, name: str, total: float | None = None) -> None:
        print(f"  {name}", file=sys.stderr, flush=True)

    def rename(self, name: str) -> None: ...

    def advance(self, amount: float = 1) -> None: ...


@dataclass(frozen=True)
class _Things:
    """Files of a measurement, made when they are first asked for. seconds: what making them took."""

    wanted: Wanted
    root: Path
    seconds: dict[str, float]

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        path = self.root / name
        if not path.exists():  # all of these appear whole or not at all
            print(f"making {name}", file=sys.stderr, flush=True)
            start = time.perf_counter()
            make(path)
            self.seconds[name] = time.perf_counter() - start
        return path

    def checkpoint(self) -> Path:
        return self._made("checkpoint", lambda path: write_checkpoint(path, self.wanted.spec, t5_layers=1))

    def bundle(self, precision: str) -> Path:
        """The bundle of this precision. That of int8 has been calibrated, and its source is gone."""
        if precision == "int8":
            return self._made("int8", self._calibrate)
        kind: Any = precision
        told = _Told()
        return self._made(
            precision, lambda path: export_checkpoint(self.checkpoint(), path, precision=kind, progress=told)
        )

    def _calibrate(self, path: Path) -> None:
        edge = OBSERVED.get(self.wanted.spec, OBSERVED_ELSE)
        frames = np.random.default_rng(SEED).integers(0, 256, (9, edge, edge, 3), np.uint8)
        sample = Sample(frames[0], frames, "noise", seed=SEED, height=edge, width=edge, frames=len(frames))
        quick = Options(
            settings=Settings(smooth=False, compensate=False), steps=2, guidance=1.0, report=False, text=False
        )
        # ONNX Runtime observes on the processor, which has no bf16 products.
        source = self.bundle("fp32" if self.wanted.dry else "fp16")
        calibrate(source, path, [sample], quick, progress=_Told())
        self.drop(source.name, whatever=not self.wanted.dry)

    def ready(self, name: str) -> dict[str, Any]:
        """Makes the bundle with this name and, where a GPU computes, engines for all sizes; facts of it."""
        bundle = self.bundle(name)
        if not self.wanted.dry:
            self._build(bundle)
        return {"denoiser_bytes": denoiser_bytes(Bundle(bundle).manifest.files)}

    def _build(self, bundle: Path) -> None:
        from dynamictrl_edge.cli.main import run

        machine = look_at_machine()
        # The VAE does not run; but its engines must not be what decides how little memory a clip takes.
        budget = round(1e9 * min(self.wanted.memory, default=6))
        capability = None if machine.gpu is None else machine.gpu.capability
        manifest = Bundle(bundle).manifest
        rows, columns = pick_tile(facts_of(manifest), self.wanted.sizes, budget=budget, capability=capability)
        scale = manifest.vae.spatial_compression
        line = [
            "build",
            str(bundle),
            "--target",
            "local",
            "--batch",
            "1",
            "--tile",
            f"{scale * columns}x{scale * rows}",
        ]
        line += ["--steps", str(max(100, self.wanted.steps))]
        line += [word for size in self.wanted.sizes for word in ("--size", str(size))]
        start = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            if run(line) != 0:
                raise RuntimeError(f"the engines of {bundle.name} were not built")
        self.seconds[f"engines of {bundle.name}"] = time.perf_counter() - start

    def drop(self, name: str, *, whatever: bool = False) -> None:
        """Removes what is not needed any more, unless it is to be kept; `whatever`: then, too."""
        if whatever or not (self.wanted.keep or self.wanted.dry):
            shutil.rmtree(self.root / name, ignore_errors=True)

    def inputs(self, size: ClipSize) -> Path:
        return self.root / f"{size}-inputs.npz"

    def out(self, size: ClipSize, label: str) -> Path:
        return self.root / f"{size}-{label}.npy"

    def job(self, side: Any, model: Path, size: ClipSize, label: str) -> Job:
        dry = self.wanted.dry
        return Job(
            side,
            model,
            self.inputs(size),
            self.out(size, label),
            self.wanted.steps,
            timed=True,
            device="cpu" if dry else "cuda",
            dtype="float32" if dry else "bfloat16",
            backend="onnxruntime" if dry else "tensorrt",
        )
