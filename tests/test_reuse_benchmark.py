"""How the sweep of policies is judged: the front, the line of fewer steps, and presets by rule."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.receipt import RESULTS
from benchmarks.reuse import (
    PRESETS,
    STEPS_GROUP,
    Made,
    Row,
    Variant,
    baseline_at,
    measure,
    nearness_at,
    pareto,
    pick,
    plot,
    table,
    variants,
)
from benchmarks.reuse_caches import PATH, document
from dynamictrl_edge.runtime.reuse.policy import POLICIES, parse_policy

FULL = Row(STEPS_GROUP, "25 steps", 1.0, 1.0, 99, 30.0, 2.0)
FEWER = [Row(STEPS_GROUP, "12 steps", 0.5, 2.0, 35, 29.0, 2.1), Row(STEPS_GROUP, "6 steps", 0.25, 4.0, 30, 27.0, 2.4)]


def row(name: str, ratio: float, quality: float, error: float = 2.0, near: float = 40) -> Row:
    return Row("trunk", name, 1 / ratio, ratio, near, quality, error)


def test_the_front_is_what_nothing_beats_in_both() -> None:
    rows = [row("a", 2.0, 29.5), row("b", 2.0, 29.4), row("c", 1.5, 29.2), row("d", 3.0, 28.0)]
    assert [r.name for r in pareto([FULL, *FEWER, *rows])] == ["25 steps", "a", "d", "6 steps"]


def test_fewer_steps_are_a_line_between_those_that_were_measured() -> None:
    assert baseline_at(FEWER, FULL, 1.0) == 30.0
    assert baseline_at(FEWER, FULL, 3.0) == 28.0
    assert baseline_at(FEWER, FULL, 9.0) == 27.0


def test_fewer_steps_leave_the_full_run_on_a_line() -> None:
    assert nearness_at(FEWER, 3.0) == 32.5
    assert (nearness_at(FEWER, 1.2), nearness_at(FEWER, 9.0)) == (35, 30)  # nothing was measured there


def test_a_preset_is_the_nearest_that_is_fast_enough_and_nearer_than_fewer_steps() -> None:
    rows = [row("a", 2.1, 29.6, near=41), row("b", 2.5, 29.8), row("c", 1.5, 29.95), row("d", 3.2, 29.1, near=31)]
    assert pick([*FEWER, *rows], FULL) == {"quality": rows[2], "balanced": rows[0], "fast": None}
    late = row("late", 2.2, 29.99, error=2.3, near=45)  # the pose is lost
    blurred = row("blurred", 2.2, 29.4, near=45)  # and the truth
    assert pick([*FEWER, *rows, late, blurred], FULL)["balanced"] == rows[0]
    about, slower = row("about", 1.92, 29.6, near=42), row("slower", 1.88, 29.6, near=43)
    assert pick([*FEWER, *rows, about, slower], FULL)["balanced"] == about


def test_the_sweep_has_no_variant_that_reuses_nothing() -> None:
    guided, unguided = variants(25, guided=True), variants(25, guided=False)
    assert {v.group for v in guided} - {v.group for v in unguided} == {"guidance"}
    assert dataclasses.replace(guided[0], quantized=True).name == f"int8, {guided[0].name}"
    assert len({(v.reuse, v.steps) for v in guided}) == len(guided)
    counts = {v.group: [w.reuse.split("token_share=")[1][:3] for w in guided if w.group == v.group] for v in guided
              if v.group in ("tokens, even", "tokens, random")}  # fmt: skip
    assert counts["tokens, even"] == counts["tokens, random"] == ["0.2", "0.4"]


def test_every_variant_is_timed_beside_a_full_run(tmp_path: Path) -> None:
    clips = [SimpleNamespace(truth=np.full((2, 8, 8, 3), 100, np.uint8)) for _ in range(3)]
    full, half = Variant(STEPS_GROUP, "off", 4), Variant("trunk", "trunk", 4)
    ran: list[str] = []

    def run(clip: Any, variant: Variant, seed: int) -> Made:
        ran.append(variant.name)
        frames = clip.truth + np.uint8(2 if variant is full else 3)
        return Made(frames, 2.0 if variant is full else 1.0 + seed, 1.0 if variant is full else 0.5)

    whole, (made,) = measure(run, clips, [half], full, lambda frames, clip: float(frames.mean()))
    assert ran == ["4 steps", "4 steps", "trunk"] * 3
    assert (whole.ratio, whole.pose_error) == (1.0, 102.0)
    assert (made.ratio, made.flop_fraction, made.pose_error) == (1.0, 0.5, 103.0)
    assert made.psnr_full == pytest.approx(48.13, abs=0.01)
    text = table([made, *FEWER], dataclasses.replace(whole, psnr_truth=30.0))
    assert text.count("\n") == 2 + 1 + 3
    plot([made, *FEWER], whole, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size == (990, 414)


def test_the_presets_are_those_that_were_picked() -> None:
    figures = json.loads((RESULTS / "reuse.json").read_text())["figures"]
    rows, full = [Row(**row) for row in figures["rows"]], Row(**figures["full"])
    picked = {name: None if row is None else row.name for name, row in pick(rows, full).items()}
    assert picked == figures["presets"] and set(picked) == set(PRESETS)
    for name, text in picked.items():
        policy = None if text is None else parse_policy(text)
        assert POLICIES.get(name) == (None if policy is None else dataclasses.replace(policy, name=name))


def test_the_skeleton_chooses_better_than_chance() -> None:
    """Of as many active tokens, those that the pose touches leave the clip nearer to the full run."""
    figures = json.loads((RESULTS / "reuse.json").read_text())["figures"]
    rows = {row["name"]: row for row in figures["rows"]}
    for share in ("0.2", "0.4"):
        name = f"tokens,token_period=3,token_share={share}"
        for blind in ("even", "random"):
            other = rows[f"{name},token_choice={blind}"]
            assert rows[name]["psnr_full"] > other["psnr_full"] and rows[name]["psnr_truth"] > other["psnr_truth"]


def test_the_documented_bytes_are_those_of_the_code() -> None:
    assert document() == PATH.read_text()
