"""What reuse between steps costs and saves on a trained model: a sweep of policies against "just take fewer steps".

    python benchmarks/reuse.py BUNDLE [--clips 8] [--steps 25] [--guidance 3.0] [--only WORD] [--plot PNG] [--out FOLDER]

Held-out clips of `pocket` are animated with every variant. Each gives: share of the operations done; denoising time of the full
run over its own (median over the clips, each pair timed in turn on the same machine); PSNR to the full run's frames; PSNR
and pose error against the true clip. Fewer steps are variants too, and the line that every policy has to beat.

A preset is picked by this rule. Of the variants that are not mere step reduction, those count that are at least as fast as the
preset asks (`PRESETS`), lose at most its PSNR against the truth and grow the pose error by at most its share, and have a
better PSNR than fewer steps would have at the same latency (linear between the measured step counts). Of these, the one
with the best PSNR is the preset; if there is none, there is no such preset.
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
from PIL import Image, ImageDraw

sys.path.append(str(Path(__file__).resolve().parents[1]))  # so that this file also runs as a script

from benchmarks.receipt import RESULTS, ROOT, write_receipt
from dynamictrl_edge.runtime.metrics import psnr
from dynamictrl_edge.runtime.reuse import make_plan, parse_policy

__all__ = ["PRESETS", "Preset", "Row", "Variant", "baseline_at", "pareto", "pick", "plot", "table", "variants"]

STEPS_GROUP = "fewer steps"
FEWER_STEPS = (20, 16, 13, 10, 8, 6)


@dataclass(frozen=True)
class Variant:
    """One way to run the loop; `group` is what a line of the plot is made of."""

    group: str
    reuse: str
    steps: int

    @property
    def name(self) -> str:
        return f"{self.steps} steps" if self.group == STEPS_GROUP else self.reuse


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
    """What a preset must reach: times as fast, dB lost against the truth, growth of the pose error."""

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
    texts = [("guidance", f"guidance,guidance_period={p},guidance_decay={d}") for p in (2, 3, 5) for d in (1.0, 0.9)]
    for order, group in ((0, "trunk"), (1, "trunk, linear")):
        texts += [
            (group, f"trunk,trunk_order={order},trunk_period={p},warmup={w}") for p in (2, 3, 4, 5) for w in (2, 3, 5)
        ]
    texts += [("table", f"table,trunk_threshold={t},trunk_order={o}") for t in (0.05, 0.1, 0.2, 0.4) for o in (0, 1)]
    texts += [("adaptive", f"adaptive,trunk_threshold={t},trunk_order={o}") for t in (0.1, 0.2, 0.4) for o in (0, 1)]
    texts += [("tokens", f"tokens,token_period={p},token_share={s}") for p in (2, 3, 5) for s in (0.2, 0.4, 0.6)]
    # The same number of tokens, chosen with and without the pose.
    texts += [
        (f"tokens, {choice}", f"tokens,token_period=3,token_share={s},token_choice={choice}")
        for choice in ("even", "random")
        for s in (0.2, 0.4, 0.6)
    ]
    texts += [
        ("combined", f"combined,token_share={s},trunk_order={o},token_period={p},guidance_period={p}")
        for s in (0.2, 0.4)
        for o in (0, 1)
        for p in (4, 5)
    ]
    made = [Variant(STEPS_GROUP, "off", n) for n in FEWER_STEPS if n < steps]
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


def pick(rows: Sequence[Row], full: Row) -> dict[str, Row | None]:
    """Presets by the rule above."""
    found: dict[str, Row | None] = {}
    for name, wanted in PRESETS.items():
        eligible = [
            row
            for row in rows
            if row.group != STEPS_GROUP
            and row.ratio >= wanted.ratio
            and row.psnr_truth >= full.psnr_truth - wanted.loss
            and row.pose_error <= full.pose_error * (1 + wanted.growth)
            and row.psnr_truth > baseline_at(rows, full, row.ratio)
        ]
        found[name] = max(eligible, key=lambda row: (row.psnr_truth, row.ratio), default=None)
    return found


def table(rows: Sequence[Row], full: Row) -> str:
    """Markdown, by group; the Pareto front is bold."""
    front = set(pareto([full, *rows]))
    titles = (
        *("variant", "operations done", "times as fast", "PSNR to the full run dB"),
        *("PSNR to the truth dB", "than fewer steps dB", "pose error px"),
    )
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in [full, *sorted(rows, key=lambda row: (row.group, row.ratio))]:
        gain = row.psnr_truth - baseline_at(rows, full, row.ratio)
        cells = (
            f"**{row.name}**" if row in front else row.name,
            f"{row.flop_fraction:.0%}",
            f"{row.ratio:.2f}",
            "" if row is full else f"{row.psnr_full:.2f}",
            f"{row.psnr_truth:.2f}",
            "" if row.group == STEPS_GROUP else f"{gain:+.2f}",
            f"{row.pose_error:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


COLOURS = ("#5a6472", "#c0392b", "#2471a3", "#16a085", "#b9770e", "#7d3c98", "#2e7d32", "#d35488", "#795548", "#000000")
WIDTH, HEIGHT, MARGIN = 900, 560, 60


def plot(rows: Sequence[Row], full: Row, path: Path) -> None:
    """PSNR against the truth over the latency ratio; fewer steps are joined by a line, the Pareto front by another."""
    every = [full, *rows]
    low, high = min(r.psnr_truth for r in every), max(r.psnr_truth for r in every)
    low, high = low - 0.05 * (high - low) - 0.01, high + 0.05 * (high - low) + 0.01
    most = max(r.ratio for r in every) * 1.05

    def at(row: Row) -> tuple[float, float]:
        across = MARGIN + (WIDTH - 2 * MARGIN) * row.ratio / most
        return across, HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (row.psnr_truth - low) / (high - low)

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((MARGIN, MARGIN, WIDTH - MARGIN, HEIGHT - MARGIN), outline="#999999")
    for tick in np.linspace(low, high, 6):
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (tick - low) / (high - low)
        draw.text((8, y - 6), f"{tick:.2f}", fill="#333333")
    for tick in np.linspace(0, most, 7):
        draw.text(
            (MARGIN + (WIDTH - 2 * MARGIN) * tick / most - 10, HEIGHT - MARGIN + 8), f"{tick:.1f}x", fill="#333333"
        )
    draw.text((8, 16), "PSNR against the truth, dB", fill="#333333")
    draw.text((WIDTH // 2 - 90, HEIGHT - 24), "denoising: times as fast", fill="#333333")
    steps = sorted([full, *(r for r in rows if r.group == STEPS_GROUP)], key=lambda r: r.ratio)
    draw.line([at(r) for r in steps], fill=COLOURS[0], width=1)
    draw.line([at(r) for r in pareto(every)], fill="#bbbbbb", width=3)
    groups = list(dict.fromkeys([STEPS_GROUP, *(r.group for r in rows)]))
    for number, group in enumerate(groups):
        colour = COLOURS[number % len(COLOURS)]
        for row in every if number == 0 else rows:
            if row.group == group:
                x, y = at(row)
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
        draw.text((WIDTH - MARGIN - 130, MARGIN + 8 + 16 * number), group, fill=colour)
    image.save(path)


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
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "reuse.png")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the receipt")
    given = parser.parse_args()

    from dynamictrl_edge.runtime import Animator
    from pocket.clips import COLUMNS, FRAMES, ROWS, make_clip
    from pocket.measures import limb_errors

    animator = Animator.from_bundle(given.bundle, threads=given.threads, cache=False)

    def run(clip: Any, variant: Variant, seed: int) -> Made:
        made = animator(
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
    full = Variant(STEPS_GROUP, "off", given.steps)
    run(clips[0], full, 0)  # sessions and buffers are made
    whole, rows = measure(
        run, clips, sweep, full, lambda frames, clip: float(limb_errors(frames, clip).mean()), progress
    )
    print(file=sys.stderr)
    presets = pick(rows, whole)
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
            "front": [row.name for row in pareto([whole, *rows])],
            "presets": {name: None if row is None else row.name for name, row in presets.items()},
        },
        seeds=list(range(given.clips)),
        folder=given.out,
    )
    plot(rows, whole, given.plot)
    print(table(rows, whole))
    for name, row in presets.items():
        print(f"{name}: {'none' if row is None else f'{row.name} ({row.ratio:.2f} times as fast)'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
