"""The pocket model as it is shipped: whole, small enough, described, and it animates people it has never seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.receipt import ROOT
from dynamictrl_edge.bundle.tensors import sha256_of
from pocket import MODEL
from pocket.clips import FRAMES, Clip, Pixels, make_clip
from pocket.evaluate import Animate, of_bundle
from pocket.measures import clothes_colours, limb_errors, person_psnr

LIMIT = 20_000_000  # bytes of all its files
CLIPS = (12, 14)  # held-out ones that move a lot


@pytest.fixture(scope="module")
def animate(pocket_bundle: Path) -> Animate:
    return of_bundle(pocket_bundle, steps=10, threads=1)[0]


@pytest.fixture(scope="module")
def made(animate: Animate) -> list[tuple[Clip, Pixels]]:
    clips = [make_clip("held-out", index, masking="none") for index in CLIPS]
    return [(clip, animate(clip.reference, clip.pose, clip.caption, 0, 1.0)) for clip in clips]


def test_it_is_small_and_says_how_it_was_made() -> None:
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) < LIMIT
    spent = json.loads((MODEL / "training.json").read_text())
    card = (MODEL / "README.md").read_text()
    assert f"VAE: {spent['vae']['steps']} steps" in card
    assert "What it can not do" in card


def test_the_figures_of_its_card_are_of_these_weights() -> None:
    receipt = json.loads((ROOT / "benchmarks" / "results" / "pocket.json").read_text())
    weights = {str(path.relative_to(MODEL)): sha256_of(path) for path in MODEL.rglob("*.safetensors")}
    assert receipt["settings"]["weights"] == weights
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_people_it_has_never_seen_move_as_the_pose_says(animate: Animate, made: list[tuple[Clip, Pixels]]) -> None:
    for clip, frames in made:
        still = np.repeat(clip.reference[None], FRAMES, 0)
        assert person_psnr(frames, clip) > person_psnr(still, clip) + 1
        assert all(clothes_colours(frames, clip).values())


def test_without_its_pose_a_clip_is_another(animate: Animate, made: list[tuple[Clip, Pixels]]) -> None:
    clip, frames = made[0]
    lost = animate(clip.reference, np.zeros_like(clip.pose), clip.caption, 0, 1.0)
    assert person_psnr(lost, clip) < person_psnr(frames, clip) - 1
    assert limb_errors(lost, clip).mean() > limb_errors(frames, clip).mean() + 2


def test_a_pose_stream_of_zeros_is_not_a_black_pose_clip(animate: Animate, made: list[tuple[Clip, Pixels]]) -> None:
    clip, frames = made[0]
    black = animate(clip.reference, np.zeros_like(clip.pose), clip.caption, 0, 1.0)
    zeroed = animate(clip.reference, None, clip.caption, 0, 1.0)
    assert not np.array_equal(zeroed, black)
    assert limb_errors(zeroed, clip).mean() > limb_errors(frames, clip).mean() + 2
