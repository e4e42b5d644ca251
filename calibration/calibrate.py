"""`calibrate`: the whole way from a bundle to a quantized bundle."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from ..bundle.atomic import atomic_folder, check_output_place
from ..bundle.config import geometry
from ..bundle.errors import BundleError, DeviceError, InputError, UsageError
from ..bundle.manifest import SCHEMES, FileEntry, Manifest, Scheme, read_manifest
from ..bundle.store import Bundle
from ..runtime.animator import Animator, Prepared
from ..runtime.backends.onnxruntime import OnnxRuntimeBackend
from ..runtime.scheduler import make_schedule
from .block_graph import LINEARS
from .blocks import Decisions, candidates, decide_blocks
from .choose import Choice, Kept, choose, graph_name, ranking
from .conditioning import NarrowedLinears, narrow_conditioning
from .decide import PERCENTILES, Settings
from .measure import Measurer, spread_steps
from .modulation import Narrowed, narrow_modulation
from .observe import Observations, Plan, observe, plan_rows
from .report import make_report
from .samples import Sample, fingerprint
from .text import narrow_text
from .work import Trajectory, Work, bundle_digest
from .write import Writer

__all__ = ["Calibration", "Options", "calibrate"]

MEASURED_STEPS = 5  # timesteps of sensitivity and quality
MEASURED_SAMPLES = 4
CONDITIONING_SAMPLES = 16
LEAST_BEYOND = 1  # values that must lie beyond the rarest percentile


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a person chooses.

    steps: of the observed loops. min_snr: decibels that the denoiser's output must have at every measured timestep;
    most_high_precision: linears that may stay as they are. text: whether the text encoder's weights may become int8.
    report: whether `calibration/report.html` is made, for which the first sample is animated twice.
    """

    settings: Settings = Settings()
    steps: int = 10
    guidance: float = 3.0
    min_snr: float | None = None
    most_high_precision: int | None = None
    text: bool = True
    report: bool = True


class Progress(Protocol):
    """Told what is being done."""

    def stage(self, name: str, total: float | None = None) -> None: ...

    def advance(self, amount: float = 1) -> None: ...


class _Silent:
    def stage(self, name: str, total: float | None = None) -> None: ...

    def advance(self, amount: float = 1) -> None: ...


@dataclass(frozen=True)
class Calibration:
    """What came out. sensitivity: [blocks, linears, steps] decibels of each linear alone; timesteps: the measured ones."""

    scheme: Scheme
    decisions: list[Decisions]
    sensitivity: np.ndarray
    choice: Choice
    timesteps: tuple[int, ...]
    denoiser_bytes: tuple[int, int]  # before and after
    modulation: Narrowed
    conditioning: NarrowedLinears
    text: Narrowed | None  # None: not asked for

    def facts(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {
            "scheme": self.scheme,
            "timesteps": list(self.timesteps),
            "output_snr_db": [round(float(x), 3) for x in self.choice.snr],
            "graphs": dict(Counter(map(graph_name, self.choice.kept))),
            "high_precision": self.choice.count,
            "modulation": msgspec.to_builtins(self.modulation),
            "conditioning": msgspec.to_builtins(self.conditioning),
            "text_encoder": msgspec.to_builtins(self.text),
            "denoiser_bytes": {"before": self.denoiser_bytes[0], "after": self.denoiser_bytes[1]},
            "linears": [
                {
                    "block": block,
                    "linear": name,
                    "kept": name in self.choice.kept[block],
                    "alone_snr_db": [round(float(x), 3) for x in self.sensitivity[block, place]],
                    **msgspec.to_builtins(decisions[name]),
                }
                for block, decisions in enumerate(self.decisions)
                for place, name in enumerate(LINEARS)
            ],
        }


def calibrate(
    bundle: Path | str,
    output: Path | str,
    samples: Sequence[Sample],
    options: Options | None = None,
    *,
    observe_with: Path | str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Writes the quantized form of `bundle` to the new folder `output`.

    `observe_with`: the same checkpoint exported in float32, which is computed with instead: for bf16, which processors do not
    compute.

    The source is only read. Statistics and decisions are kept beside the output until it is complete, so that a calibration
    that was interrupted goes on where it was.

    Raises:
        BundleError: the bundle is damaged, or quantized already.
        InputError: the calibration set is empty or too small, activations are not finite or constant, a quality cannot be
            had, or the output cannot be written.
        UsageError: an option that can never work.
        DeviceError: the bundle cannot be run here.
    """
    options, output = options or Options(), Path(output)
    _check_options(options)
    source = Bundle(bundle)
    _check_source(source)
    _check_output(source, output)
    animator = _observer(source, observe_with, threads)
    runs = source if observe_with is None else animator.bundle
    schedule = make_schedule(animator.scheduler, options.steps)
    rows = plan_rows(source.manifest.transformer, len(schedule))
    plan = Plan(len(samples), schedule, options.guidance, rows)
    _check_samples(source, samples, plan)
    work = Work.open(output, _key(source, runs, samples, options))
    job = _Job(source, runs, animator, samples, options, plan, work, progress or _Silent())
    seen = job.observed()
    decided = job.decided(seen)
    measured = job.measured(decided)
    with atomic_folder(output) as folder:
        made = job.written(folder, decided, measured, _ranges(seen), threads)
    work.remove()
    return made


@dataclass(frozen=True)
class _Decided:
    """What was decided before anything was measured at the denoiser's output; the weights are in the work folder."""

    blocks: list[Decisions]
    modulation: Narrowed
    conditioning: NarrowedLinears
    text: Narrowed | None


@dataclass(frozen=True)
class _Measured:
    steps: tuple[int, ...]  # places in the schedule
    sensitivity: np.ndarray
    choice: Choice


@dataclass(frozen=True)
class _Job:
    """One calibration, stage by stage. `source` is quantized; `runs` is computed with, the same or its float32 export."""

    source: Bundle
    runs: Bundle
    animator: Animator
    samples: Sequence[Sample]
    options: Options
    plan: Plan
    work: Work
    progress: Progress

    @property
    def layers(self) -> int:
        return self.source.manifest.transformer.num_layers

    @property
    def backend(self) -> OnnxRuntimeBackend:
        if not isinstance(self.animator.backend, OnnxRuntimeBackend):
            raise RuntimeError("calibration runs on ONNX Runtime")
        return self.animator.backend

    def _request(self, number: int) -> dict[str, Any]:
        return self.samples[number].request(self.options.steps, self.options.guidance)

    def observed(self) -> Observations:
        self.progress.stage("Observing", self.plan.samples * len(self.plan.schedule))

        def prepared(number: int) -> Prepared:
            return self.animator.prepare(**self._request(number))

        return observe(self.animator, prepared, self.plan, self.work, self.progress.advance)

    def decided(self, seen: Observations) -> _Decided:
        progress, settings = self.progress, self.options.settings
        progress.stage("Choosing scales", self.layers * len(LINEARS))
        blocks = decide_blocks(self.source, seen, settings, self.work, progress.advance)
        progress.stage("Modulation", self.layers)
        timesteps = self.animator.scheduler.num_train_timesteps
        modulation = narrow_modulation(
            self.source, self.runs, self.backend, timesteps, settings, self.work, progress.advance
        )
        requests = [Trajectory.load(self.work.trajectory(i)).conditions for i in self._chosen(CONDITIONING_SAMPLES)]
        conditioning = narrow_conditioning(self.source, self.runs, self.backend, requests, settings, self.work)
        return _Decided(blocks, modulation, conditioning, self._text())

    def _chosen(self, most: int) -> tuple[int, ...]:
        """At most `most` of the samples."""
        return spread_steps(self.plan.samples, most)

    def _text(self) -> Narrowed | None:
        config = self.source.manifest.text
        if not self.options.text or config is None:
            return None
        self.progress.stage("Text encoder", config.num_layers)
        prompts = [text for sample in self.samples for text in (sample.prompt, sample.negative_prompt)]
        return narrow_text(
            self.source, self.runs, self.backend, prompts, self.options.settings, self.work, self.progress.advance
        )

    def _tables(self, decided: _Decided) -> list[Path] | None:
        """Files of the modulation with int8 weights; None where it stays as it is."""
        return [self.work.modulation(i) for i in range(self.layers)] if decided.modulation.narrow else None

    def measured(self, decided: _Decided) -> _Measured:
        progress, options, schedule = self.progress, self.options, self.plan.schedule
        steps = spread_steps(len(schedule), MEASURED_STEPS)
        blocks = candidates(self.runs, self.work, wide=self.runs is not self.source)
        measurer = Measurer(self.runs, self.backend, options.settings.scheme, blocks, schedule, options.guidance, steps)
        trajectories = [Trajectory.load(self.work.trajectory(i)) for i in self._chosen(MEASURED_SAMPLES)]
        progress.stage("Measuring each linear", len(trajectories) * len(steps))
        sensitivity = measurer.alone(trajectories, progress.advance)
        tables = self._tables(decided)
        if tables is not None:
            measurer.use_modulation(tables)
        if decided.conditioning.linears:
            measurer.use_conditioning(self.work.shared, decided.conditioning.linears)

        def quality(kept: Kept) -> np.ndarray:
            progress.stage("Measuring the whole", len(trajectories) * len(steps))
            return measurer.mixture(trajectories, [frozenset(LINEARS) - one for one in kept], progress.advance)

        order = ranking(sensitivity)
        choice = choose(order, self.layers, quality, min_snr=options.min_snr, most=options.most_high_precision)
        return _Measured(steps, sensitivity, choice)

    def written(
        self,
        folder: Path,
        decided: _Decided,
        measured: _Measured,
        ranges: list[dict[str, Any]],
        threads: int | None,
    ) -> Calibration:
        """Fills the folder of the new bundle."""
        manifest, choice, scheme = self.source.manifest, measured.choice, self.options.settings.scheme
        self.progress.stage("Writing", manifest.total_bytes)
        writer = Writer(self.source, folder, self.progress.advance)
        blocks = candidates(self.source, self.work)
        names = writer.blocks(scheme, blocks, choice)
        factors = [block.row_scale(linears) for block, linears in zip(blocks, choice.quantized, strict=True)]
        writer.modulation(factors, self._tables(decided))
        if decided.conditioning.linears:
            writer.conditioning(decided.conditioning.linears, self.work.shared)
        if decided.text is not None and decided.text.narrow and manifest.text is not None:
            writer.text([self.work.text_block(i) for i in range(manifest.text.num_layers)])
        writer.rest()
        made = Calibration(
            scheme,
            decided.blocks,
            measured.sensitivity,
            choice,
            tuple(int(self.plan.schedule.timesteps[i]) for i in measured.steps),
            (denoiser_bytes(manifest.files), denoiser_bytes(writer.files)),
            decided.modulation,
            decided.conditioning,
            decided.text,
        )
        facts = {**made.facts(), "options": msgspec.to_builtins(self.options)}
        writer.data("calibration/calibration.json", msgspec.json.format(msgspec.json.encode(facts), indent=1))
        writer.data("calibration/ranges.json", msgspec.json.encode(ranges))
        provenance = _provenance(self.source, self.samples)
        complete = writer.manifest(scheme, names, provenance)
        if self.options.report:
            self._report(folder, writer, facts, ranges, complete, threads)
            writer.manifest(scheme, names, provenance)
        return made

    def _report(
        self,
        folder: Path,
        writer: Writer,
        facts: dict[str, Any],
        ranges: list[dict[str, Any]],
        made: Manifest,
        threads: int | None,
    ) -> None:
        """Adds the page, with a clip of the source and one of the new bundle where both can be computed here."""
        strips = {}
        if self.runs is self.source:
            self.progress.stage("Report", 2)
            for title, animator in (("source", self.animator), (made.label, _opened(folder, threads))):
                strips[title] = animator(**self._request(0)).frames
                self.progress.advance()
        timesteps = [int(t) for t in self.plan.schedule.timesteps]
        page = make_report(facts, ranges, timesteps, _sizes(self.source.manifest, made), strips)
        writer.data("calibration/report.html", page.encode())


def _opened(folder: Path | str, threads: int | None) -> Animator:
    return Animator.from_bundle(folder, backend="onnxruntime", threads=threads)


def _sizes(before: Manifest, after: Manifest) -> dict[str, tuple[int, int]]:
    """Part of the bundle -> bytes of its weights before and after."""
    parts = {
        "denoiser, blocks": "weights/block_",
        "denoiser, modulation": "weights/modulation_",
        "denoiser, shared": "weights/denoiser.",
        "text encoder": "weights/text",
        "VAE": "weights/vae_",
    }

    def count(manifest: Manifest, prefix: str) -> int:
        return sum(entry.bytes for name, entry in manifest.files.items() if name.startswith(prefix))

    return {part: (count(before, prefix), count(after, prefix)) for part, prefix in parts.items()}


def denoiser_bytes(files: Mapping[str, FileEntry]) -> int:
    """Bytes of the transformer's weights."""
    parts = ("weights/block_", "weights/modulation_", "weights/denoiser.")
    return sum(entry.bytes for name, entry in files.items() if name.startswith(parts))


def _check_source(source: Bundle) -> None:
    if source.manifest.quantization is not None:
        raise BundleError(
            f"The bundle {str(source.root)!r} is quantized already ({source.manifest.label}). Calibrate the bundle that it "
            "was made from."
        )


def _observer(source: Bundle, observe_with: Path | str | None, threads: int | None) -> Animator:
    """What the calibration set is run with: the source, or the float32 export of the same checkpoint."""
    if observe_with is None:
        if source.manifest.precision == "bf16":
            raise DeviceError(
                f"The bundle {str(source.root)!r} is bf16, which processors do not compute. Export the checkpoint in fp32 as "
                "well, and give that to compute with: --observe-with BUNDLE"
            )
        return _opened(source.root, threads)
    other, manifest = read_manifest(Path(observe_with)), source.manifest
    if other.label != "fp32":
        raise UsageError(f"--observe-with {str(observe_with)!r} is {other.label}; a bundle in fp32 is needed.")
    configs = [{k: v for k, v in one.provenance.items() if k.startswith("sha256")} for one in (other, manifest)]
    if configs[0] != configs[1] or other.transformer != manifest.transformer:
        raise BundleError(
            f"--observe-with {str(observe_with)!r} is another checkpoint than {str(source.root)!r}: export both from one."
        )
    return _opened(Path(observe_with), threads)


def _check_options(options: Options) -> None:
    if options.report and importlib.util.find_spec("matplotlib") is None:
        raise DeviceError(
            "The report needs the package 'matplotlib'. Install it: pip install \"dynamictrl-edge[calibrate]\", or go without "
            "the report: --no-report"
        )
    if options.settings.scheme not in SCHEMES:
        raise UsageError(f"--precision {options.settings.scheme!r} is not known; use one of {', '.join(SCHEMES)}.")
    if options.min_snr is not None and not np.isfinite(options.min_snr):
        raise UsageError(f"--min-snr {options.min_snr} is not possible: give decibels.")
    if options.most_high_precision is not None and options.most_high_precision < 0:
        raise UsageError(f"--max-high-precision {options.most_high_precision} is not possible: give 0 or more.")


def _check_output(source: Bundle, output: Path) -> None:
    """Before long work: the output can be written, is new, and does not lie in the source."""
    check_output_place(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"The output {str(output)!r} exists already. Remove it, or give another name.")
    if source.root.resolve() in (output.resolve(), *output.resolve().parents):
        raise InputError(
            f"The output {str(output)!r} lies in the source bundle, which stays as it is. Give another name."
        )


def _check_samples(source: Bundle, samples: Sequence[Sample], plan: Plan) -> None:
    if not samples:
        raise InputError("The calibration set is empty: there is nothing to calibrate with.")
    manifest, first = source.manifest, samples[0]
    size = geometry(
        manifest.transformer,
        manifest.vae,
        first.height or manifest.defaults.height,
        first.width or manifest.defaults.width,
        first.frames or manifest.defaults.frames,
    )
    tokens = manifest.transformer.max_text_seq_length + size.video_tokens
    values = min(plan.rows, plan.calls * tokens) * manifest.transformer.width
    rarest = 1 - max(PERCENTILES)
    if values * rarest < LEAST_BEYOND:
        raise InputError(
            f"{len(samples)} samples with {len(plan.schedule)} steps give about {values} values per tensor, too few for the "
            f"{100 * max(PERCENTILES):g} % percentile: raise --steps, or give more samples."
        )


def _key(source: Bundle, runs: Bundle, samples: Sequence[Sample], options: Options) -> str:
    """What statistics and decisions depend on; the budget of quality is not part of it."""
    parts = [
        "2",  # form of the files
        bundle_digest(source.manifest),
        bundle_digest(runs.manifest),
        fingerprint(samples),
        repr((options.settings, options.steps, options.guidance)),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _ranges(seen: Observations) -> list[dict[str, Any]]:
    """Least and greatest value of every tensor by timestep, over guidance halves and kinds of tokens."""
    return [
        {
            "block": block,
            "linear": name,
            "least": tensor.ranges[..., 0].min(axis=(1, 2)).tolist(),
            "greatest": tensor.ranges[..., 1].max(axis=(1, 2)).tolist(),
            "histogram": tensor.histogram.tolist(),
        }
        for (block, name), tensor in seen.tensors.items()
    ]


def _provenance(source: Bundle, samples: Sequence[Sample]) -> dict[str, str]:
    found = {
        "calibrated from": bundle_digest(source.manifest),
        "calibrated with": f"{len(samples)} samples, {fingerprint(samples)}",
        "calibrated by python": platform.python_version(),
    }
    for name in ("dynamictrl-edge", "onnx", "onnxruntime", "numpy"):
        found[f"calibrated by {name}"] = metadata.version(name)
    return found
