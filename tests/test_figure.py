"""The demo's drawn person and pose clip."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamictrl_edge.cli.figure import LIMBS, body, draw_photo, draw_pose_clip
from tests.golden import max_abs

HEIGHT, WIDTH, FRAMES = 160, 96, 17
SKY, MEADOW = (150, 190, 235), (90, 150, 70)


@settings(max_examples=25, deadline=None)
@given(st.integers(16, 300), st.integers(16, 300), st.integers(1, 5))
def test_every_size_gives_pictures_of_that_size(height: int, width: int, frames: int) -> None:
    photo, clip = draw_photo(height, width), draw_pose_clip(height, width, frames)
    assert (photo.shape, photo.dtype) == ((height, width, 3), np.uint8)
    assert (clip.shape, clip.dtype) == ((frames, height, width, 3), np.uint8)
    assert clip.any(axis=(1, 2, 3)).all()


def test_the_same_pictures_are_drawn_every_time() -> None:
    np.testing.assert_array_equal(draw_photo(HEIGHT, WIDTH), draw_photo(HEIGHT, WIDTH))
    np.testing.assert_array_equal(draw_pose_clip(HEIGHT, WIDTH, 3), draw_pose_clip(HEIGHT, WIDTH, 3))


def test_the_skeleton_is_drawn_in_many_colours_on_black() -> None:
    clip = draw_pose_clip(HEIGHT, WIDTH, FRAMES)
    drawn = np.any(clip, axis=-1)
    assert 0.02 < drawn.mean() < 0.25
    colours = {tuple(pixel) for pixel in clip[0][drawn[0]].tolist()}
    assert len(colours) >= len(LIMBS)
    assert not drawn[:, [0, -1]].any() and not drawn[:, :, [0, -1]].any()  # no limb is cut off


def test_limbs_join_points_that_exist_and_no_point_is_left_out() -> None:
    assert len(LIMBS) == 17 and len(set(LIMBS)) == 17
    assert {name for limb in LIMBS for name in limb} == set(body(0.0))
    assert len(body(0.0)) == 18  # OpenPose's body model


def test_one_wave_ends_where_it_began_and_moves_the_left_arm_most() -> None:
    clip = draw_pose_clip(HEIGHT, WIDTH, FRAMES)
    assert max_abs(clip[0], clip[-1]) == 0
    assert all((clip[i] != clip[i + 1]).any() for i in range(FRAMES - 1))
    phases = [body(i / 16) for i in range(17)]
    travel = {
        name: max(np.hypot(p[name][0] - phases[0][name][0], p[name][1] - phases[0][name][1]) for p in phases)
        for name in phases[0]
    }
    assert max(travel, key=lambda name: travel[name]) == "left wrist"
    assert travel["left wrist"] > 5 * max(value for name, value in travel.items() if name != "left wrist")


def test_the_person_stands_upright_and_symmetric() -> None:
    points = body(0.0)
    heights = [points[name][1] for name in ("nose", "neck", "right hip", "right knee", "right ankle")]
    assert heights == sorted(heights) and 0 < heights[0] < heights[-1] < 1
    for name in ("eye", "ear", "shoulder", "hip", "knee", "ankle"):
        assert points[f"left {name}"] == pytest.approx((-points[f"right {name}"][0], points[f"right {name}"][1]))


def test_the_photo_shows_the_person_in_the_pose_of_the_first_frame() -> None:
    photo, first = draw_photo(HEIGHT, WIDTH), draw_pose_clip(HEIGHT, WIDTH, 1)[0]
    background = (photo == SKY).all(axis=-1) | (photo == MEADOW).all(axis=-1)
    assert 0.5 < background.mean() < 0.95
    skeleton = first.any(axis=-1)
    assert (skeleton & ~background).sum() / skeleton.sum() > 0.8
