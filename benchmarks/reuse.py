"""What reuse between steps costs and saves on a trained model: a sweep of policies against "just take fewer steps".

    python benchmarks/reuse.py BUNDLE [--clips 8] [--steps 25] [--guidance 3.0] [--only WORD] [--quantized BUNDLE]
                                      [--plot PNG] [--out FOLDER]

Held-out clips of `pocket` are animated with every variant. Each gives: share of the operations done; denoising time of the full
run over its own (median over the clips, each pair timed in turn on the same machine); PSNR to the full run's frames; PSNR
and pose error against the true clip. Fewer steps are variants too, and the line that every policy has to beat.

A preset is picked by this rule. Of the variants that are not mere step reduction, those count that are as fast as the preset
asks (`PRESETS`, less `UNCERTAIN`: the noise of a time is not to decide), lose at most its PSNR against the truth, grow the pose
error by at most its share, and are nearer to the full run (PSNR to its frames) than fewer steps would be at the same latency
(linear between the measured step counts). Of these, the one nearest to the full run is the preset; if there is none, there is no
such preset.

Against the truth, fewer steps are a line that a model may never cross from above: where 10 steps are nearer to the truth than 25
(as on the pocket model, whose fewer steps are smoother), nothing that imitates 25 steps can beat them. Whether a variant does
is a column of the table, and in the receipt ("beats_fewer_steps_against_truth").

`--quantized BUNDLE`: an int8 bundle of the same model, with which the full run, the presets and the front are run as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))  # so that this file also runs as a script

from benchmarks.receipt import RESULTS, ROOT, write_receipt
from dynamictrl_edge.runtime.metrics import psnr
from dynamictrl_edge.runtime.reuse import make_plan, parse_policy
from dynamictrl_edge.runtime.reuse.policy import OFF

__all__ = [
    *("PRESETS", "Preset", "Row", "Variant", "baseline_at", "nearness_at", "pareto", "pick", "plot", "table"),
    "variants",
]

STEPS_GROUP = "fewer steps"
UNCERTAIN = 0.05  # share of a latency ratio: 1.93 and 2.05 were found for one variant on one processor
FEWER_STEPS = (20, 16, 12, 10, 8, 5)  # none that stops short of the schedule's end


@dataclass(frozen=True)
class Variant:
    """One way to run the loop; `group` is what a colour of the plot is made of. quantized: with the int8 bundle."""

    group: str
    reuse: str
    steps: int
    quantized: bool = False

    @property
    def name(self) -> str:
        name = f"{self.steps} steps" if self.reuse == OFF else self.reuse
        return f"int8, {name}" if self.quantized else name


@dataclass(frozen=True)
class Row:
    """A variant, measured: means over the clips (PSNR in dB, pose error in pixels), median of the latency ratios."""

    group: str
    name: str
    flop_fraction: float
    ratio: float
    psnr_full: float
    psnr_truth: float
    pose_error: float


@dataclass(frozen=True)
class Preset:
    """What a preset must reach: about so many times as fast, dB lost against the truth, growth of the pose error."""

    ratio: float
    loss: float
    growth: float


PRESETS = {
    "quality": Preset(1.4, 0.1, 0.10),
    "balanced": Preset(2.0, 0.5, 0.10),
    "fast": Preset(3.0, 1.0, 0.10),
}


def variants(steps: int, *, guided: bool) -> list[Variant]:
    """The sweep: settings that reuse nothing (without guidance, say) are left out."""
    texts = [("guidance", f"guidance,guidance_period={p},guidance_decay={d}") for p, d in ((2, 1), (3, 0.9), (5, 1))]
    for order, group in ((0, "trunk"), (1, "trunk, linear")):
        texts += [(group, f"trunk,trunk_order={order},trunk_period={p},warmup={w}") for p in (2, 3, 4) for w in (2, 3)]
    texts += [
        ("trunk, guidance", f"trunk,trunk_period={p},warmup=2,guidance_period={2 * p},longest_run=7") for p in (2, 3, 4)
    ]
    texts += [("table", f"table,trunk_threshold={t},trunk_order={o}") for t in (0.05, 0.1) for o in (0, 1)]
    texts += [("adaptive", f"adaptive,trunk_threshold={t}") for t in (0.2, 0.3, 0.4)]
    texts += [("tokens", f"tokens,token_period={p},token_share={s}") for p in (2, 3, 5) for s in (0.2, 0.4)]
    texts += [
        ("tokens, changed", f"tokens,token_period=3,token_share={s},token_changed={c}")
        for s, c in ((0.2, 0.5), (0.4, 0.3))
    ]
    # The same number of tokens, chosen with and without the pose.
    texts += [
        (f"tokens, {choice}", f"tokens,token_period=3,token_share={s},token_choice={choice}")
        for choice in ("even", "random")
        for s in (0.2, 0.4)
    ]
    texts += [
        ("combined", f"combined,token_share={s},token_period={p},guidance_period={p},warmup={w},longest_run=7")
        for s in (0.2, 0.4)
        for p in (4, 6, 8)
        for w in (2, 3)
    ]
    made = [Variant(STEPS_GROUP, OFF, n) for n in FEWER_STEPS if n < steps]
    for group, text in texts:
        policy = parse_policy(text)
        if policy is None:
            continue
        # Where the steps follow from the model, they are not known yet.
        if policy.trunk_threshold > 0 or make_plan(policy, steps, guided=guided).reused:
            made.append(Variant(group, text, steps))
    return made


def pareto(rows: Iterable[Row]) -> list[Row]:
    """The rows that no other one beats in both latency and PSNR against the truth, slowest first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (-row.ratio, -row.psnr_truth)):
        if not front or row.psnr_truth > front[-1].psnr_truth:
            front.append(row)
    return front[::-1]


def baseline_at(rows: Sequence[Row], full: Row, ratio: float) -> float:
    """PSNR against the truth that fewer steps have when they are `ratio` times as fast; beyond the fewest steps, theirs."""
    points = sorted([(full.ratio, full.psnr_truth), *((r.ratio, r.psnr_truth) for r in rows if r.group == STEPS_GROUP)])
    return float(np.interp(ratio, [x for x, _ in points], [y for _, y in points]))


def nearness_at(rows: Sequence[Row], ratio: float) -> float:
    """PSNR to the full run that fewer steps have when they are `ratio` times as fast; outside of what was measured, the
    nearest."""
    points = sorted((r.ratio, r.psnr_full) for r in rows if r.group == STEPS_GROUP)
    return float(np.interp(ratio, [x for x, _ in points], [y for _, y in points]))


def pick(rows: Sequence[Row], full: Row) -> dict[str, Row | None]:
    """Presets by the rule above."""
    found: dict[str, Row | None] = {}
    for name, wanted in PRESETS.items():
        eligible = [
            row
            for row in rows
            if row.group != STEPS_GROUP
            and row.ratio >= wanted.ratio * (1 - UNCERTAIN)
            and row.psnr_truth >= full.psnr_truth - wanted.loss
            and row.pose_error <= full.pose_error * (1 + wanted.growth)
            and row.psnr_full > nearness_at(rows, row.ratio)
        ]
        found[name] = max(eligible, key=lambda row: (row.psnr_full, row.ratio), default=None)
    return found


def table(rows: Sequence[Row], full: Row) -> str:
    """Markdown, by group; what no other row beats in latency and PSNR against the truth is bold."""
    front = {row.name for row in pareto([full, *rows])}
    titles = (
        *("variant", "operations done", "times as fast", "PSNR to the full run dB", "than fewer steps dB"),
        *("PSNR to the truth dB", "than fewer steps dB", "pose error px"),
    )
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in [full, *sorted(rows, key=lambda row: (row.group, row.ratio))]:
        mere = row.group == STEPS_GROUP
        cells = (
            f"**{row.name}**" if row.name in front else row.name,
            f"{row.flop_fraction:.0%}",
            f"{row.ratio:.2f}",
            "" if row is full else f"{row.psnr_full:.2f}",
            "" if mere else f"{row.psnr_full - nearness_at(rows, row.ratio):+.2f}",
            f"{row.psnr_truth:.2f}",
            "" if mere else f"{row.psnr_truth - baseline_at(rows, full, row.ratio):+.2f}",
            f"{row.pose_error:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], full: Row, path: Path) -> None:
    """PSNR against the truth and to the full run, over the latency ratio; fewer steps are joined by a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    truth, nearness = figure.subplots(1, 2)
    groups = list(dict.fromkeys(row.group for row in rows))
    for axis, value, label in ((truth, "psnr_truth", "against the truth"), (nearness, "psnr_full", "to the full run")):
        for number, group in enumerate(groups):
            own = sorted((row for row in rows if row.group == group), key=lambda row: row.ratio)
            points = [row.ratio for row in own], [getattr(row, value) for row in own]
            style = {"marker": "o", "markersize": 4, "color": f"C{number}" if group != STEPS_GROUP else "black"}
            axis.plot(*points, linestyle="-" if group == STEPS_GROUP else "none", label=group, **style)
        axis.set(xlabel="denoising: times as fast", ylabel=f"PSNR {label}, dB")
        axis.grid(alpha=0.3)
    truth.axhline(full.psnr_truth, color="grey", linestyle=":", label=full.name)
    truth.legend(fontsize=7)
    figure.savefig(path, dpi=90)


@dataclass(frozen=True)
class Made:
    """One clip of one variant."""

    frames: np.ndarray
    seconds: float
    flop_fraction: float


def measure(
    run: Callable[[Any, Variant, int], Made],
    clips: Sequence[Any],
    sweep: Sequence[Variant],
    full: Variant,
    pose_error: Callable[[np.ndarray, Any], float],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Row, list[Row]]:
    """The full run's row, and the others'. The full run is timed anew beside every variant, since machines drift."""
    truth: dict[Variant, list[tuple[float, ...]]] = {variant: [] for variant in (full, *sweep)}

    def quality(frames: np.ndarray, other: np.ndarray) -> float:
        return float(np.minimum(psnr(frames, other), 99).mean())

    done, total = 0, len(clips) * len(sweep)
    for seed, clip in enumerate(clips):
        whole = run(clip, full, seed)
        truth[full].append((1.0, 1.0, 99.0, quality(whole.frames, clip.truth), pose_error(whole.frames, clip)))
        for variant in sweep:
            before = run(clip, full, seed)
            made = run(clip, variant, seed)
            truth[variant].append(
                (
                    made.flop_fraction,
                    before.seconds / made.seconds,
                    quality(made.frames, whole.frames),
                    quality(made.frames, clip.truth),
                    pose_error(made.frames, clip),
                )
            )
            done += 1
            progress(done, total)

    def row(variant: Variant) -> Row:
        fraction, ratio, to_full, to_truth, error = zip(*truth[variant], strict=True)
        means = [float(np.mean(values)) for values in (to_full, to_truth, error)]
        return Row(variant.group, variant.name, float(np.mean(fraction)), float(np.median(ratio)), *means)

    return row(full), [row(variant) for variant in sweep]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--first", type=int, default=0, help="number of the first held-out clip")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--only", default="", help="variants whose group or name holds this word, and fewer steps")
    parser.add_argument("--quantized", type=Path, help="int8 bundle of the same model")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "reuse.png")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the receipt")
    given = parser.parse_args()

    from dynamictrl_edge.runtime import Animator
    from pocket.clips import COLUMNS, FRAMES, ROWS, make_clip
    from pocket.measures import limb_errors

    bundles = {False: given.bundle} | ({True: given.quantized} if given.quantized else {})
    animators = {q: Animator.from_bundle(path, threads=given.threads, cache=False) for q, path in bundles.items()}

    def run(clip: Any, variant: Variant, seed: int) -> Made:
        made = animators[variant.quantized](
            image=clip.reference,
            pose=clip.pose,
            prompt=clip.caption,
            seed=seed,
            guidance_scale=given.guidance,
            num_inference_steps=variant.steps,
            height=ROWS,
            width=COLUMNS,
            num_frames=FRAMES,
            reuse=variant.reuse,
        )
        share = variant.steps / given.steps if made.reuse is None else made.reuse.flop_fraction
        return Made(made.frames, made.seconds["denoise"], share)

    def progress(done: int, total: int) -> None:
        print(f"\r{done} of {total}, {time.perf_counter() - start:.0f} s", end="", file=sys.stderr, flush=True)

    start = time.perf_counter()
    sweep = [
        variant
        for variant in variants(given.steps, guided=given.guidance > 1)
        if variant.group == STEPS_GROUP or given.only in f"{variant.group} {variant.name}"
    ]
    clips = [make_clip("held-out", given.first + i, masking="none") for i in range(given.clips)]
    full = Variant(STEPS_GROUP, OFF, given.steps)

    def measured(some: Sequence[Variant]) -> tuple[Row, list[Row]]:
        for quantized in {variant.quantized for variant in (full, *some)}:
            run(clips[0], dataclasses.replace(full, quantized=quantized), 0)  # sessions and buffers are made
        found = measure(run, clips, some, full, lambda f, clip: float(limb_errors(f, clip).mean()), progress)
        print(file=sys.stderr)
        return found

    whole, rows = measured(sweep)
    presets, front = pick(rows, whole), pareto([whole, *rows])
    narrow: list[Row] = []
    if given.quantized:
        names = {row.name for row in (*front, *presets.values()) if row is not None}
        again = [full, *(variant for variant in sweep if variant.name in names)]
        _, narrow = measured([dataclasses.replace(v, quantized=True, group="int8") for v in again])
    better = [r.name for r in rows if r.group != STEPS_GROUP and r.psnr_truth > baseline_at(rows, whole, r.ratio)]
    write_receipt(
        "reuse",
        {
            "steps": given.steps,
            "guidance": given.guidance,
            "clips": given.clips,
            "first": given.first,
            "only": given.only,
        },
        {
            "full": whole,
            "rows": [dataclasses.asdict(row) for row in rows],
            "int8": [dataclasses.asdict(row) for row in narrow],
            "front": [row.name for row in front],
            "beats_fewer_steps_against_truth": better,
            "presets": {name: None if row is None else row.name for name, row in presets.items()},
        },
        seeds=list(range(given.clips)),
        folder=given.out,
    )
    plot([*rows, *narrow], whole, given.plot)
    print(table([*rows, *narrow], whole))
    for name, row in presets.items():
        print(f"{name}: {'none' if row is None else f'{row.name} ({row.ratio:.2f} times as fast)'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
