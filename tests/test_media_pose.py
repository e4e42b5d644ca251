from __future__ import annotations

import tempfile
from bisect import bisect_right
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dynamictrl_edge.bundle.errors import InputError, UsageError
from dynamictrl_edge.runtime.media import FITS, Fit, as_rate, load_pose, pose_to_tensor
from dynamictrl_edge.runtime.media.timing import Shown, at_rate
from dynamictrl_edge.runtime.media.video import VideoFile
from tests.golden import case
from tests.media_samples import (
    Frames,
    corners,
    cut,
    noise,
    numbered,
    numbers,
    real_file,
    remove_time,
    set_display_matrix,
    shift_edit_list,
    write_sound,
    write_video,
)

FLAT = {"crf": "4"}
SIZE = (32, 48)


def write_folder(folder: Path, frames: Frames, pattern: str = "{:04d}.png") -> Path:
    folder.mkdir(exist_ok=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / pattern.format(number))
    return folder


# --- the published preprocessing ---------------------------------------------------------------------------------


def test_golden_pose_frames_come_through_untouched_and_scaled_like_the_published_ones(tmp_path: Path) -> None:
    for name in ("pipeline10_tiled_resized", "pipeline10_cfg3", "pipeline15_cfg3_f13"):
        tensors, _ = case(name)
        control = tensors["control_u8"]
        count, height, width, _ = control.shape
        folder = write_folder(tmp_path / name, control)
        for fit in FITS:
            clip = load_pose(folder, height, width, count, fit=fit)
            np.testing.assert_array_equal(clip.frames, control)
            assert clip.notices == () and clip.source_frames == count and not clip.longer
        tensor = pose_to_tensor(clip.frames)
        assert tensor.shape == (1, 3, count, height, width) and tensor.dtype == np.float32 and tensor.flags.c_contiguous
        first = tensors["control_video_first_frame"]  # [1, 1, 3, H, W]
        np.testing.assert_array_equal(tensor[:, :, 0], first[:, 0])


# --- resampling in time ------------------------------------------------------------------------------------------

RATES = st.fractions(min_value=1, max_value=120, max_denominator=1001)


def shown_at(times: list[Fraction], length: Fraction) -> list[Shown]:
    holds = [b - a for a, b in pairwise(times)] + [length]
    return [
        Shown(time, hold, lambda: pytest.fail("nothing is decoded here"))
        for time, hold in zip(times, holds, strict=True)
    ]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=30),
    st.integers(-5000, 5000),
    st.sampled_from([1000, 600, 90000]),
    RATES,
)
def test_each_output_frame_is_the_one_on_the_screen_at_its_time(
    gaps: list[int], start: int, clock: int, rate: Fraction
) -> None:
    times = [Fraction(start + sum(gaps[:number]), clock) for number in range(len(gaps))]
    frames = shown_at(times, Fraction(gaps[-1], clock))
    got = list(at_rate(frames, rate, Fraction(0)))
    end = times[-1] - times[0] + Fraction(gaps[-1], clock)
    count = -((-end * rate) // 1)  # output times k / rate before the end
    relative = [time - times[0] for time in times]
    assert [frames.index(frame) for frame in got] == [bisect_right(relative, k / rate) - 1 for k in range(count)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 40), RATES)
def test_the_own_rate_gives_every_frame_once_even_when_time_stamps_are_rounded(count: int, rate: Fraction) -> None:
    times = [Fraction(round(number / rate * 1000), 1000) for number in range(count)]
    frames = shown_at(times, Fraction(round(1000 / rate), 1000))
    assert list(at_rate(frames, rate, Fraction(2, 5) / rate)) == frames


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.sampled_from([8, 16, 24, 30, 50, 60]), st.booleans())
def test_rounded_time_stamps_neither_add_nor_lose_a_frame(count: int, rate: int, up: bool) -> None:
    times = [Fraction(round(Fraction(number * 1000, rate)), 1000) for number in range(count)]
    length = Fraction(-(-1000 // rate) if up else 1000 // rate, 1000)
    frames = shown_at(times, length)
    assert list(at_rate(frames, Fraction(rate), Fraction(1, 2000))) == frames


def test_the_own_rate_of_a_camera_with_an_unsteady_clock_gives_every_frame_once(tmp_path: Path) -> None:
    unsteady = [0, 41, 60, 110, 125, 171, 206, 231, 259, 308]  # milliseconds, about 30 frames/s
    options = {"bf": "0", **FLAT}
    path = write_video(tmp_path / "phone.mp4", numbered(10), stamps=unsteady, tick=Fraction(1, 1000), options=options)
    assert numbers(load_pose(path, *SIZE, 10).frames) == list(range(10))


def test_an_endless_gap_is_read_lazily() -> None:
    frames = shown_at([Fraction(0), Fraction(10**15)], Fraction(1))
    endless = at_rate(frames, Fraction(30), Fraction(0))
    assert all(next(endless) is frames[0] for _ in range(100))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    source=st.sampled_from([8, Fraction(25, 2), 15, 24, 25, 30, 60]),
    wanted=st.sampled_from([8, 12, 16, 24, 25, 30, 50]),
    count=st.integers(1, 40),
    skip=st.integers(0, 3),
)
def test_a_video_is_resampled_to_the_wanted_rate(source: Fraction, wanted: int, count: int, skip: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_video(Path(folder) / "clip.mp4", numbered(count), source, options=FLAT)
        available = -((-count * wanted / Fraction(source)) // 1)
        if skip >= available:
            return
        clip = load_pose(path, *SIZE, frames=available - skip + 2, fps=wanted, skip_frames=skip)
    expected = [int(k / Fraction(wanted) * source) for k in range(skip, available)]
    assert numbers(clip.frames) == expected + [expected[-1]] * 2
    assert clip.source_frames == available - skip and clip.fps == wanted and not clip.longer
    assert len(clip.notices) == 1 and "repeated 2 times" in clip.notices[0]


def test_rates_that_differ_by_a_thousandth_are_told_apart(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", numbered(20), Fraction(30000, 1001), options=FLAT)
    assert numbers(load_pose(path, *SIZE, 20, fps=30).frames) == [0, *range(19)]  # 1/30 s is just before frame 1
    assert numbers(load_pose(path, *SIZE, 20, fps=29.9).frames) == list(range(20))


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        (".mp4", "libx264", {"bf": "3", "b-pyramid": "strict", **FLAT}),
        (".mkv", "libx264", {"bf": "3", **FLAT}),
        (".webm", "libvpx-vp9", {"b": "1M", "cpu-used": "8"}),
        (".avi", "mpeg4", {"q": "2", "bf": "2"}),
        (".mov", "mjpeg", {"q": "2"}),
        (".ts", "libx264", FLAT),
        (".h264", "libx264", FLAT),
    ],
)
@pytest.mark.parametrize("rate", [30, 16])
def test_without_a_wanted_rate_a_video_comes_frame_by_frame(
    tmp_path: Path, suffix: str, codec: str, options: dict[str, str], rate: int
) -> None:
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write_video(tmp_path / f"clip{suffix}", numbered(20), rate, codec=codec, options=options, pixels=pixels)
    clip = load_pose(path, *SIZE, 20)
    assert numbers(clip.frames) == list(range(20)) and clip.notices == () and not clip.longer
    if suffix != ".h264":  # a bare stream has no clock
        assert clip.fps == rate


def test_a_variable_frame_rate_is_followed(tmp_path: Path) -> None:
    stamps = [0, 100, 150, 900, 1000, 1033]  # milliseconds; the last one lasts 33
    path = write_video(tmp_path / "vfr.mp4", numbered(6), stamps=stamps, tick=Fraction(1, 1000), options=FLAT)
    clip = load_pose(path, *SIZE, 11, fps=10)
    assert numbers(clip.frames) == [0, 1, 2, 2, 2, 2, 2, 2, 2, 3, 4] and clip.notices == ()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_clip_that_does_not_begin_at_zero_begins_with_its_first_frame(tmp_path: Path, suffix: str) -> None:
    path = write_video(
        tmp_path / f"late{suffix}", numbered(10), stamps=range(5000, 6000, 100), tick=Fraction(1, 1000), options=FLAT
    )
    assert numbers(load_pose(path, *SIZE, 5, fps=5).frames) == [0, 2, 4, 6, 8]


def test_frames_before_an_edit_list_begins_are_left_out(tmp_path: Path) -> None:
    path = write_video(tmp_path / "edited.mp4", numbered(20), 30, options=FLAT)
    shift_edit_list(path, 5 * 512)  # the muxer's clock is 15360 at 30 frames/s
    assert numbers(load_pose(path, *SIZE, 10).frames) == list(range(5, 15))


def test_a_long_film_is_decoded_only_as_far_as_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "film.mp4", numbered(240, 16, 16), 60, options={"preset": "ultrafast"})
    converted: list[Fraction] = []
    original = VideoFile.shown

    def spy(self: VideoFile):  # type: ignore[no-untyped-def]
        for shown in original(self):
            decoded.append(shown.time)
            yield Shown(shown.time, shown.duration, lambda s=shown: (converted.append(s.time), s.picture())[1])

    decoded: list[Fraction] = []
    monkeypatch.setattr(VideoFile, "shown", spy)
    clip = load_pose(path, 16, 16, 9, fps=15)
    assert clip.longer and clip.source_frames == 9
    assert len(converted) == 9  # of 60 frames/s only every fourth is turned into RGB
    assert len(decoded) <= 9 * 4 + 2


# --- geometry and colour -----------------------------------------------------------------------------------------

# matrix (a, b, c, d) of the track header: how the decoded [H, W, 3] has to be turned
TURNS = {
    "none": ((1, 0, 0, 1), lambda p: p),
    "90 clockwise": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "180": ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
    "90 counter-clockwise": ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda p: p[::-1]),
    "transposed": ((0, 1, 1, 0), lambda p: p.transpose(1, 0, 2)),
}


@pytest.mark.parametrize("turn", TURNS)
def test_rotation_and_mirroring_metadata_are_applied(tmp_path: Path, turn: str) -> None:
    matrix, turned = TURNS[turn]
    path = write_video(tmp_path / "phone.mp4", np.stack([corners(32, 48)] * 3), options=FLAT)
    set_display_matrix(path, matrix)
    expected = turned(corners(32, 48))
    height, width = expected.shape[:2]
    clip = load_pose(path, height, width, 3)
    for frame in clip.frames:
        for y, x in ((8, 8), (8, width - 8), (height - 8, 8), (height - 8, width - 8)):
            np.testing.assert_allclose(frame[y, x], expected[y, x], atol=8)


def test_pixels_that_are_not_square_are_accounted_for(tmp_path: Path) -> None:
    # 32x32 stored pixels, each twice as wide as high: shown 64x32.
    path = write_video(tmp_path / "wide.mp4", np.stack([corners(32, 32)] * 2), options=FLAT, aspect=Fraction(2))
    places = np.ix_([4, 10, 22, 28], [4, 20, 44, 60])  # away from the borders of the quarters
    np.testing.assert_allclose(load_pose(path, 32, 64, 2).frames[0][places], corners(32, 64)[places], atol=8)
    covered = load_pose(path, 32, 32, 2).frames[0]  # the middle half of the stored columns
    np.testing.assert_allclose(covered[8, [4, 28]], corners(32, 32)[8, [4, 28]], atol=8)
    contained = load_pose(path, 64, 64, 2, fit="contain").frames[0]
    assert contained[:14].max() == 0 and contained[50:].max() == 0 and contained[18:46].max(axis=2).min() > 60
    set_display_matrix(path, (0, 1, -1, 0))  # turned by 90 degrees the pixels are twice as high as wide
    turned = np.rot90(corners(32, 64), -1)
    np.testing.assert_allclose(load_pose(path, 64, 32, 2).frames[0][places[::-1]], turned[places[::-1]], atol=8)


@pytest.mark.parametrize("size", [(33, 47), (17, 31), (48, 35)])
def test_odd_sizes_are_fine(tmp_path: Path, size: tuple[int, int]) -> None:
    path = write_video(
        tmp_path / "odd.webm", numbered(3, *size), codec="libvpx-vp9", options={"b": "1M", "cpu-used": "8"}
    )
    assert numbers(load_pose(path, 32, 48, 3, fit="stretch").frames) == [0, 1, 2]


@pytest.mark.parametrize(
    ("height", "codec", "pixels"),
    [(32, "libx264", "yuv420p"), (32, "libx264", "yuv444p"), (32, "mjpeg", "yuvj420p"), (32, "ffv1", "bgr0")],
)
def test_colours_survive(tmp_path: Path, height: int, codec: str, pixels: str) -> None:
    colours = np.array(
        [(220, 30, 30), (30, 200, 30), (30, 30, 220), (255, 255, 255), (0, 0, 0), (120, 90, 60)], np.uint8
    )
    frames = np.broadcast_to(colours[:, None, None], (6, height, 48, 3))
    options = {"q": "2"} if codec == "mjpeg" else FLAT if codec == "libx264" else {}
    path = write_video(tmp_path / "colours.mkv", frames, codec=codec, pixels=pixels, options=options)
    np.testing.assert_allclose(load_pose(path, height, 48, 6).frames[:, 8, 8], colours, atol=5)


# --- how many frames ---------------------------------------------------------------------------------------------


def test_a_clip_that_is_too_long_is_cut_with_a_notice(tmp_path: Path) -> None:
    path = write_video(tmp_path / "long.mp4", numbered(20), 30, options=FLAT)
    clip = load_pose(path, *SIZE, 9, fps=30)
    assert numbers(clip.frames) == list(range(9)) and clip.longer and clip.source_frames == 9
    assert clip.notices == (
        f"The pose video {str(path)!r} has more than the 9 frames asked for at 30 frames/s: the rest is not used.",
    )


def test_a_clip_that_is_too_short_repeats_its_last_frame_with_a_notice() -> None:
    clip = load_pose(numbered(5), *SIZE, 9)
    assert numbers(clip.frames) == [0, 1, 2, 3, 4, 4, 4, 4, 4] and clip.source_frames == 5 and not clip.longer
    assert clip.notices == (
        "The pose array has 5 frames at 8 frames/s where 9 are asked for: the last one is repeated 4 times.",
    )
    assert "repeated once" in load_pose(numbered(8), *SIZE, 9).notices[0]
    assert "has 1 frame at" in load_pose(numbered(1), *SIZE, 9).notices[0]


@pytest.mark.parametrize(
    ("available", "said"),
    [(5, "repeated 4 times"), (9, ""), (11, "more than the 9"), (13, "more than the 9"), (20, "more than the 9")],
)
def test_a_raised_length_is_taken_from_the_clip_and_notices_speak_of_what_was_asked(available: int, said: str) -> None:
    clip = load_pose(numbered(available), *SIZE, 13, expected=9)
    assert numbers(clip.frames) == [min(k, available - 1) for k in range(13)]
    assert clip.source_frames == min(available, 13) and clip.longer == (available > 13)
    assert bool(clip.notices) == bool(said) and all(said in notice for notice in clip.notices)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 10), st.data())
def test_counts_always_add_up(available: int, frames: int, skip: int, data: st.DataObject) -> None:
    expected = data.draw(st.integers(1, frames))
    if skip >= available:
        with pytest.raises(InputError, match="nothing is left"):
            load_pose(numbered(available, 16, 16), 16, 16, frames, expected=expected, skip_frames=skip)
        return
    clip = load_pose(numbered(available, 16, 16), 16, 16, frames, expected=expected, skip_frames=skip)
    assert clip.frames.shape == (frames, 16, 16, 3) and clip.frames.dtype == np.uint8
    assert numbers(clip.frames) == [min(skip + k, available - 1) for k in range(frames)]
    assert clip.source_frames == min(frames, available - skip)
    assert bool(clip.notices) == (available - skip != expected)


def test_skipped_frames_are_counted_at_the_rate_of_the_result(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", numbered(30), 30, options=FLAT)
    clip = load_pose(path, *SIZE, 6, fps=10, skip_frames=5)
    assert numbers(clip.frames) == [15, 18, 21, 24, 27, 27]
    assert "has 5 frames at 10 frames/s after the 5 that are skipped" in clip.notices[0]


# --- folders and arrays ------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_natural_order_without_hidden_and_other_files(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "poses", numbered(12), "frame_{}.png")  # frame_2 before frame_10
    (folder / ".thumbnail.png").write_bytes(b"hidden")
    (folder / "notes.txt").write_text("not a frame")
    (folder / "frame_0b.png").mkdir()
    clip = load_pose(folder, *SIZE, 12)
    assert numbers(clip.frames) == list(range(12)) and clip.fps == 8
    assert load_pose(folder, *SIZE, 12, fps=16).fps == 16  # still one per output frame
    assert numbers(load_pose(folder, *SIZE, 12, fps=16).frames) == list(range(12))


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "webp", "bmp"])
def test_folders_of_every_picture_kind(tmp_path: Path, suffix: str) -> None:
    folder = write_folder(tmp_path / "poses", numbered(3), "{}." + suffix)
    assert numbers(load_pose(folder, *SIZE, 3).frames) == [0, 1, 2]


def test_a_folder_made_at_a_known_rate_is_resampled_like_a_video(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "poses", numbered(30))
    assert numbers(load_pose(folder, *SIZE, 10, fps=10, folder_fps=30).frames) == list(range(0, 30, 3))
    assert load_pose(folder, *SIZE, 10, folder_fps=30).fps == 30
    assert numbers(load_pose(numbered(4), *SIZE, 8, fps=50, folder_fps=25).frames) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("fit", FITS)
def test_folder_frames_of_another_size_are_fitted_as_the_photo_is(tmp_path: Path, fit: Fit) -> None:
    from dynamictrl_edge.runtime.media import load_photo

    frames = noise(2, 40, 56, 3)
    clip = load_pose(write_folder(tmp_path / "poses", frames), 32, 32, 2, fit=fit)
    np.testing.assert_array_equal(clip.frames[1], load_photo(frames[1], 32, 32, fit))


def test_transparent_pose_frames_get_a_black_ground(tmp_path: Path) -> None:
    rgba = np.full((16, 16, 4), (0, 255, 0, 0), np.uint8)
    rgba[:8, :, 3] = 255
    (tmp_path / "poses").mkdir()
    Image.fromarray(rgba).save(tmp_path / "poses" / "0.png")
    frame = load_pose(tmp_path / "poses", 16, 16, 1).frames[0]
    assert (frame[:8] == (0, 255, 0)).all() and frame[8:].max() == 0


def test_frames_of_mixed_sizes_are_refused_with_both_names_and_sizes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "poses", numbered(4))
    Image.fromarray(noise(32, 64, 3)).save(folder / "0002.png")
    with pytest.raises(InputError, match=r"'0000\.png' is 48x32 pixels, '0002\.png' is 64x32") as caught:
        load_pose(folder, *SIZE, 4)
    assert str(folder) in str(caught.value)
    assert load_pose(folder, *SIZE, 2).longer  # frames that are not used are not looked at


# --- bad input ---------------------------------------------------------------------------------------------------


def video(path: Path, count: int = 20, **kwargs: object) -> Path:
    return write_video(path, noise(count, 64, 64, 3), **kwargs)  # type: ignore[arg-type]


def bad_clips(folder: Path) -> dict[str, tuple[Path, str]]:
    (folder / "empty folder").mkdir()
    (folder / "hidden").mkdir()
    (folder / "hidden" / ".DS_Store").touch()
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").touch()
    broken = write_folder(folder / "broken", numbered(2))
    (broken / "0001.png").write_bytes((broken / "0001.png").read_bytes()[:60])
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("I am not a video\n" * 99)
    (folder / "text.txt").write_text("FFmpeg plays text files as videos\n" * 99)
    (folder / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    Image.fromarray(noise(64, 64, 3)).save(folder / "photo.jpg")
    (folder / "photo.mp4").write_bytes((folder / "photo.jpg").read_bytes())
    fast = {"movflags": "faststart"}
    still = video(folder / "still.mp4", 1, options={"bf": "0"})
    remove_time(still)
    frozen = video(folder / "frozen.mp4", 5, options={"bf": "0"})
    remove_time(frozen)
    index_only = video(folder / "index.mp4", container_options=fast)
    data = index_only.read_bytes()
    index_only.write_bytes(data[: data.index(b"mdat") + 4])
    return {
        "missing": (folder / "missing.mp4", "does not exist"),
        "empty file": (folder / "empty.mp4", "empty file"),
        "text": (folder / "text.mp4", "not a video that can be read"),
        "text as text": (folder / "text.txt", "not a video"),
        "playlist": (folder / "list.m3u8", "not a video|no video|no frames"),
        "photo": (folder / "photo.jpg", "not a video. Give a video file"),
        "photo named video": (folder / "photo.mp4", "not a video. Give a video file"),
        "sound": (write_sound(folder / "sound.m4a"), "holds only sound"),
        "sound in mp4": (write_sound(folder / "sound.mp4"), "holds only sound"),
        "no index": (cut(video(folder / "cut.mp4"), 0.6), "not a video that can be read, or its beginning is damaged"),
        "header only": (cut(video(folder / "head.mp4", container_options=fast), 0.001), "not a video|no video"),
        "no frames": (index_only, "no frames that can be decoded"),
        "zero duration": (still, "zero duration"),
        "zero duration, several frames": (frozen, "zero duration"),
        "tiny": (write_video(folder / "tiny.mp4", noise(3, 8, 64, 3)), "64x8 pixels; each side must have at least 16"),
        "empty folder": (folder / "empty folder", "is empty"),
        "only hidden files": (folder / "hidden", "is empty"),
        "no images": (folder / "texts", "holds no image frames"),
    }


def test_each_bad_clip_is_refused_by_name_with_the_reason(tmp_path: Path) -> None:
    for name, (path, reason) in bad_clips(tmp_path).items():
        with pytest.raises(InputError, match=reason) as caught:
            load_pose(path, 64, 64, 9, fps=16)
        message = str(caught.value)
        assert repr(str(path)) in message and "\n" not in message and caught.value.exit_code == 3, name


def test_a_folder_that_may_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match=r"pose folder .* may not be read: permission denied\."):
        load_pose(tmp_path, *SIZE, 3)


def test_a_damaged_frame_in_a_folder_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "poses", numbered(3))
    (folder / "0001.png").write_bytes((folder / "0001.png").read_bytes()[:60])
    with pytest.raises(InputError, match=r"pose frame .*0001\.png.*damaged"):
        load_pose(folder, *SIZE, 3)


@pytest.mark.parametrize(
    ("suffix", "codec", "part"),
    [(".mp4", "libx264", 0.6), (".webm", "libvpx-vp9", 0.6), (".mkv", "libx264", 0.6), (".avi", "mpeg4", 0.6)],
)
def test_of_a_truncated_video_the_complete_frames_are_used_with_a_notice(
    tmp_path: Path, suffix: str, codec: str, part: float
) -> None:
    frames = numbered(40, 64, 64) + noise(40, 64, 64, 3) % 12 - 6  # noise, so that every frame takes some bytes
    options = {"movflags": "faststart"} if suffix == ".mp4" else {}
    path = write_video(tmp_path / f"cut{suffix}", frames, codec=codec, options={"b": "2M"}, container_options=options)
    cut(path, part)
    clip = load_pose(path, 64, 64, 40)
    count = clip.source_frames
    assert 5 <= count < 40
    assert numbers(clip.frames) == list(range(count)) + [count - 1] * (40 - count)
    damage, short = clip.notices
    assert str(path) in damage and str(count) in damage and ("damaged" in damage or "cut off" in damage)
    assert f"has {count} frames" in short and f"repeated {40 - count} times" in short


def test_a_recording_that_begins_in_the_middle_begins_with_its_first_whole_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "cut.ts", numbered(40), options={"g": "10", "bf": "0", "sc_threshold": "0", **FLAT})
    data = path.read_bytes()
    path.write_bytes(data[len(data) // 3 // 188 * 188 :])
    got = numbers(load_pose(path, *SIZE, 10).frames)
    assert got[0] in (10, 20) and got == list(range(got[0], got[0] + 10))


def test_no_whole_frame_before_the_damage_is_lost(tmp_path: Path) -> None:
    frames = numbered(40, 64, 64) + noise(40, 64, 64, 3) % 12 - 6
    options = {"bf": "3", "movflags": "faststart"}
    path = write_video(tmp_path / "cut.mp4", frames, options=options, container_options=options)
    kept = int(path.stat().st_size * 0.7)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    last = max(packet.pts // 512 for packet in packets if packet.pos + packet.size <= kept)
    clip = load_pose(cut(path, 0.7), 64, 64, 40)
    assert 5 < last < 39 and numbers(clip.frames)[clip.source_frames - 1] == last


def test_a_codec_that_nobody_knows_is_said(tmp_path: Path) -> None:
    path = write_video(tmp_path / "exotic.mkv", numbered(3), options=FLAT)
    path.write_bytes(path.read_bytes().replace(b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/XYZ"))
    with pytest.raises(InputError, match=r"cannot decode\. Convert it to MP4"):
        load_pose(path, *SIZE, 3)


def test_damage_after_the_frames_that_are_used_is_nobodys_business(tmp_path: Path) -> None:
    path = video(tmp_path / "cut.mp4", 40, container_options={"movflags": "faststart"}, options={"bf": "0"})
    assert "more than the 5" in load_pose(cut(path, 0.7), 64, 64, 5).notices[0]


@cache
def _small_video() -> bytes:
    """Encoded once: the encoder's threads do not give the same bytes every time, and the examples depend on them."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_video(Path(folder) / "v.mp4", noise(6, 16, 32, 3), container_options={"movflags": "faststart"})
        return path.read_bytes()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_a_damaged_video_gives_an_input_error_or_frames_and_nothing_else(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "v.mp4"
        content = bytearray(_small_video())
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
        try:
            assert load_pose(path, 16, 32, 9, fps=16).frames.shape == (9, 16, 32, 3)
        except InputError as error:
            assert str(path) in str(error)


def test_a_name_that_ffmpeg_would_take_for_a_pattern_or_a_protocol_is_a_plain_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("clip %03d.mp4", "http:clip.mp4", "concat:a|b.mp4"):
        write_video(tmp_path / "plain.mp4", numbered(2), options=FLAT).rename(tmp_path / name)
        assert numbers(load_pose(name, *SIZE, 2).frames) == [0, 1]


@pytest.mark.parametrize("fps", [0, -8, float("nan"), float("inf"), 1e9, "fast"])
def test_impossible_rates_are_usage_errors(fps: float) -> None:
    with pytest.raises(UsageError, match="frame rate"):
        load_pose(numbered(2), *SIZE, 2, fps=fps)


def test_rates_are_exact() -> None:
    assert (
        as_rate(29.97) == Fraction(2997, 100)
        and as_rate(16) == 16
        and as_rate(Fraction(30000, 1001)) == Fraction(30000, 1001)
    )


@pytest.mark.parametrize(
    "wrong",
    [{"frames": 0}, {"frames": 5, "expected": 6}, {"frames": 5, "expected": 0}, {"frames": 5, "skip_frames": -1}],
)
def test_impossible_counts_are_usage_errors(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        load_pose(numbered(2), *SIZE, **wrong)


@pytest.mark.parametrize("shape", [(2, 32, 48), (2, 32, 48, 4), (0, 32, 48, 3)])
def test_arrays_of_another_shape_are_usage_errors(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="uint8 with shape"):
        load_pose(np.zeros(shape, np.uint8), *SIZE, 2)
    with pytest.raises(UsageError, match="uint8 with shape"):
        load_pose(np.zeros((2, 32, 48, 3), np.float32), *SIZE, 2)


def test_a_real_pose_video() -> None:
    path = real_file("motion1.mp4")  # 1080x1920, 30 frames/s, 83 frames, with sound
    clip = load_pose(path, 256, 160, 9, fps=16)
    assert clip.frames.shape == (9, 256, 160, 3) and clip.longer and clip.fps == 16
    short = load_pose(path, 32, 16, 4, fps=1)  # to the end of its 2.77 s
    assert short.source_frames == 3 and "repeated once" in short.notices[0]
