"""The drawn clips: the same bits everywhere, and what is said of a clip is what is seen in it."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from pocket.body import POINTS
from pocket.clips import COLUMNS, FRAMES, LEAD, POSE_FRAMES, ROWS, Clip, make_clip
from pocket.exact import Stream, cosine, sine
from pocket.figure import HUES, PARTS
from pocket.wardrobe import COLOURS, MOTIONS

# SHA-256 over frames, pose, parts, reference and caption of the first clips: a change here changes every training set.
DIGEST = "8bd278a5828b3fad7b564eeebdd38d8fb713fb5a1b80e65a0ec9f6daf5de1e71"


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [make_clip("held-out", 40 + i, motion=motion) for i, motion in enumerate(MOTIONS)]


def test_clips_are_the_same_bits_on_every_machine() -> None:
    digest = hashlib.sha256()
    for clip in (make_clip("train", 0), make_clip("train", 7), make_clip("held-out", 0)):
        for pixels in (clip.frames, clip.pose, clip.parts, clip.reference):
            digest.update(np.ascontiguousarray(pixels).tobytes())
        digest.update(clip.caption.encode())
    assert digest.hexdigest() == DIGEST


def test_the_random_stream_is_splitmix64() -> None:
    stream = Stream(0)
    assert [stream.bits() for _ in range(3)] == [0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    draws = [stream.whole(5) for _ in range(2000)]
    assert set(draws) == set(range(5)) and min(draws.count(i) for i in range(5)) > 300


def test_sine_and_cosine_are_those_of_the_library_to_a_billionth() -> None:
    angles = np.linspace(-40, 40, 4001)
    np.testing.assert_allclose(sine(angles), np.sin(angles), atol=2e-9)
    np.testing.assert_allclose(cosine(angles), np.cos(angles), atol=2e-9)


def test_splits_share_nothing(clips: list[Clip]) -> None:
    for i in range(3):
        train, held = make_clip("train", 40 + i), make_clip("held-out", 40 + i)
        assert not np.array_equal(train.frames, held.frames)
    assert len({clip.frames.tobytes() for clip in clips}) == len(clips)


def test_shapes_and_captions(clips: list[Clip]) -> None:
    for clip in clips:
        assert clip.frames.shape == clip.pose.shape == (POSE_FRAMES, ROWS, COLUMNS, 3)
        assert clip.parts.shape == (POSE_FRAMES, ROWS, COLUMNS) and clip.truth.shape == (FRAMES, ROWS, COLUMNS, 3)
        assert clip.joints.shape == (POSE_FRAMES, 18, 2) and clip.seen.shape == (POSE_FRAMES, 18)
        assert clip.frames.dtype == clip.pose.dtype == clip.parts.dtype == np.uint8
        for words in (clip.look.top_colour, clip.look.hair, clip.place.upper, clip.place.lower, MOTIONS[clip.motion]):
            assert words in clip.caption


def test_people_fill_most_of_the_height_and_move(clips: list[Clip]) -> None:
    for clip in clips:
        rows = np.nonzero((clip.parts[0] != 0).any(1))[0]
        assert rows.max() - rows.min() > (0.6 if clip.motion == "squat" else 0.72) * ROWS
        assert (clip.parts[LEAD] != clip.parts[-1]).mean() > 0.01


def test_joints_lie_on_the_person_and_the_pose_shows_them_in_their_hues(clips: list[Clip]) -> None:
    on_person = in_hue = total = 0
    for clip in clips:
        for f in range(0, POSE_FRAMES, 5):
            for i in range(POINTS.index("right wrist") + 1):
                column, row = (int(v) for v in clip.joints[f, i])
                if not (clip.seen[f, i] and 0 <= row < ROWS and 0 <= column < COLUMNS):
                    continue
                total += 1
                on_person += clip.parts[f, row, column] != 0
                in_hue += np.abs(clip.pose[f, row, column].astype(int) - HUES[i]).max() < 60
    assert on_person / total > 0.97
    assert in_hue / total > 0.75  # later points are drawn over earlier ones


def test_a_face_turned_away_has_no_face_points() -> None:
    clip = make_clip("held-out", 3, motion="turn")
    face = [POINTS.index(name) for name in ("nose", "right eye", "left eye")]
    assert clip.seen[:, face].any() and not clip.seen[:, face].all()


@pytest.mark.parametrize(("masking", "kinds"), [("background", {"background"}), ("clothes", {"top", "bottom"})])
def test_a_masked_reference_is_black_there_and_untouched_elsewhere(
    clips: list[Clip], masking: str, kinds: set[str]
) -> None:
    for clip in clips[:3]:
        masked = make_clip(clip.split, clip.index, masking=masking, motion=clip.motion)  # type: ignore[arg-type]
        hidden = np.isin(masked.parts[0], [PARTS.index(kind) for kind in kinds])
        assert hidden.sum() > 100
        assert not masked.reference[hidden].any()
        np.testing.assert_array_equal(masked.reference[~hidden], masked.frames[0][~hidden])


def test_half_of_the_references_are_masked_either_way() -> None:
    # The masking is drawn before anything is painted, but a clip is only to be had whole: few, and wide limits.
    kinds = [make_clip("train", 500 + i).masking for i in range(24)]
    assert 5 <= kinds.count("none") <= 19 and "background" in kinds and "clothes" in kinds


def test_garments_have_about_the_colour_that_the_caption_names(clips: list[Clip]) -> None:
    for clip in clips:
        top = clip.frames[clip.parts == PARTS.index("top")].mean(0)
        nearest = min(COLOURS, key=lambda name: float(np.linalg.norm(top - np.array(COLOURS[name]))))
        assert nearest == clip.look.top_colour


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        make_clip("train", -1)
