"""The held-out measures, on clips that are known to be right or wrong."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pocket.clips import FRAMES, LEAD, Clip, Pixels, make_clip
from pocket.evaluate import Codec, Report, contact_sheet, evaluate, table
from pocket.measures import background_colours, clothes_colours, identity, limb_errors, person_psnr


@pytest.fixture(scope="module")
def clip() -> Clip:
    return make_clip("held-out", 0, masking="none")


def test_the_truth_is_perfect_by_every_measure(clip: Clip) -> None:
    assert person_psnr(clip.truth, clip) > 90
    assert not limb_errors(clip.truth, clip).any()
    assert identity(clip.truth, clip) > 0.8
    assert all(clothes_colours(clip.truth, clip).values())
    assert all(background_colours(clip.truth, clip).values())


def test_a_moved_person_has_the_pose_error_of_the_move(clip: Clip) -> None:
    moved = np.roll(clip.truth, 2, axis=2)
    errors = limb_errors(moved, clip)
    assert errors.mean() == pytest.approx(2.0, abs=0.15)


def test_noise_alone_is_no_pose_error(clip: Clip) -> None:
    noise = np.random.default_rng(0).normal(0, 12, clip.truth.shape)
    noisy = np.clip(clip.truth + noise, 0, 255).astype(np.uint8)
    assert limb_errors(noisy, clip).mean() < 0.1


def test_a_still_picture_of_a_moving_person_has_a_large_pose_error(clip: Clip) -> None:
    assert limb_errors(np.repeat(clip.frames[:1], FRAMES, 0), clip).mean() > 2


def test_another_person_elsewhere_is_neither_alike_nor_of_the_named_colours(clip: Clip) -> None:
    other = make_clip("held-out", 50)
    assert identity(other.truth, clip) < 0.5
    assert not all(clothes_colours(other.truth, clip).values())
    assert not all(background_colours(other.truth, clip).values())


@pytest.fixture(scope="module")
def report() -> Report:
    """Of a model that paints whatever clip the pose belongs to, with a black pose the reference, and without any, noise."""
    known = {c.pose.tobytes(): c for c in (make_clip("held-out", i) for i in (0, 1, 1003, 1004))}

    def animate(reference: Pixels, pose: Pixels | None, caption: str, seed: int, guidance: float) -> Pixels:
        if pose is None:
            return np.random.default_rng(0).integers(256, size=(FRAMES, *reference.shape)).astype(np.uint8)
        found = known.get(pose.tobytes())
        return np.repeat(reference[None], FRAMES, 0) if found is None else found.truth

    def encode(frames: Pixels) -> NDArray[np.float32]:
        return frames.transpose(3, 0, 1, 2).astype(np.float32)

    codec = Codec(encode, lambda latents: latents.transpose(1, 2, 3, 0).astype(np.uint8))
    return evaluate(animate, codec, clips=2, masked=2)


def test_evaluation_tells_right_from_wrong(report: Report) -> None:
    rows = report.rows
    assert rows["animation"].mean("psnr") == 99 and rows["animation"].mean("pose_error") == 0
    assert rows["VAE alone"].mean("perceptual") == 0
    assert rows["copy of the reference"].mean("person_psnr") < 30
    assert rows["another pose"].mean("person_psnr") < 30 and rows["another pose"].mean("identity") < 0.6
    assert rows["black pose"].mean("pose_error") == rows["copy of the reference"].mean("pose_error") > 1
    assert rows["zeroed pose stream"].mean("pose_error") > 5 and rows["zeroed pose stream"].mean("psnr") < 15
    assert rows["masked, caption"].mean("colours") == 1


def test_table_and_sheet_show_every_row_and_clip(report: Report) -> None:
    text = table(report)
    assert all(f"| {name} |" in text for name in report.rows)
    assert len(report.strips) == 4 and report.strips[0][2].shape[0] == FRAMES
    sheet = contact_sheet(report.strips)
    assert sheet.dtype == np.uint8 and sheet.ndim == 3 and sheet.any()
    assert report.as_json()["rows"]["animation"]["psnr"]["count"] == 2
    assert make_clip("held-out", 0).pose[LEAD:].shape == report.strips[0][2].shape
