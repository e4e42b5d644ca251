from __future__ import annotations

import errno
import os
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamictrl_edge.bundle import atomic
from dynamictrl_edge.bundle.errors import DeviceError, InputError, UsageError
from dynamictrl_edge.runtime.media import Rate, check_writer_target, load_pose, open_writer, read_clip
from tests.media_samples import Frames, cut, noise, numbered, numbers, write_video

KINDS = ["clip.mp4", "clip.webm", "clip"]


def write(path: Path | str, frames: Frames, fps: Rate = 16, chunk: int = 5) -> None:
    with open_writer(path, fps, *frames.shape[1:3]) as writer:
        for start in range(0, len(frames), chunk):
            writer.write(frames[start : start + chunk])
        assert writer.frames_written == len(frames)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# --- what is written ---------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(KINDS),
    count=st.integers(1, 20),
    chunk=st.integers(1, 20),
    fps=st.sampled_from([8, 16, 24, 30, 12.5, 23.976, Fraction(30000, 1001), 1, 60]),
    size=st.sampled_from([(32, 48), (48, 32), (16, 16), (34, 50)]),
)
def test_exactly_the_frames_given_come_back_at_the_rate_given(
    name: str, count: int, chunk: int, fps: Rate, size: tuple[int, int]
) -> None:
    frames = numbered(count, *size)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / name, frames, fps, chunk)
        assert names(Path(folder)) == [name]
        back, rate = read_clip(Path(folder) / name)
    assert back.shape == frames.shape and back.dtype == np.uint8 and numbers(back) == list(range(count))
    if name == "clip":
        np.testing.assert_array_equal(back, frames)
        assert rate is None
    else:
        assert rate is not None and abs(rate - Fraction(fps)) < Fraction(fps) / 1_000_000


def test_a_folder_holds_numbered_png_files(tmp_path: Path) -> None:
    frames = noise(3, 32, 48, 3)
    write(tmp_path / "out", frames, chunk=2)
    assert names(tmp_path / "out") == ["00000.png", "00001.png", "00002.png"]
    np.testing.assert_array_equal(load_pose(tmp_path / "out", 32, 48, 3).frames, frames)


def test_the_mp4_is_h264_yuv420p_with_the_index_in_front_and_tagged_colours(tmp_path: Path) -> None:
    write(tmp_path / "clip.mp4", numbered(9))
    data = (tmp_path / "clip.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        (stream,) = container.streams
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt, stream.frames, stream.average_rate) == ("h264", "yuv420p", 9, 16)
        assert stream.start_time == 0 and abs(container.duration - 9 / 16 * 1e6) < 1000
        assert (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range) == (1, 1, 1, 1)


def test_the_webm_is_vp9(tmp_path: Path) -> None:
    write(tmp_path / "clip.webm", numbered(9))
    with av.open(str(tmp_path / "clip.webm")) as container:
        (stream,) = container.streams
        assert stream.codec_context.name == "vp9" and container.format.name == "matroska,webm"
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (1, 1)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm"])
def test_colours_are_converted_by_bt709_limited_range(tmp_path: Path, name: str) -> None:
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128)], np.uint8)
    frames = np.ascontiguousarray(np.broadcast_to(colours[:, None, None], (6, 32, 32, 3)))
    write(tmp_path / name, frames)
    back, _ = read_clip(tmp_path / name)
    np.testing.assert_allclose(back[:, 16, 16], colours, atol=4)
    with av.open(str(tmp_path / name)) as container:
        for frame, (r, g, b) in zip(container.decode(video=0), colours / 255.0, strict=True):
            y = 0.2126 * r + 0.7152 * g + 0.0722 * b
            expected = (16 + 219 * y, 128 + 224 * (b - y) / 1.8556, 128 + 224 * (r - y) / 1.5748)
            planes = frame.to_ndarray()  # yuv420p: rows of Y, then U, then V
            np.testing.assert_allclose((planes[16, 16], planes[34, 4], planes[42, 4]), expected, atol=3)


@pytest.mark.parametrize(("name", "least"), [("clip.mp4", 36), ("clip.webm", 36)])
def test_the_picture_quality_is_high(tmp_path: Path, name: str, least: float) -> None:
    rows, columns = np.mgrid[0:64, 0:96] / 12.0
    frames = np.stack(
        [127 + 100 * np.stack([np.sin(columns + k / 4), np.sin(rows), np.cos(rows + columns)], -1) for k in range(6)]
    ).astype(np.uint8)
    write(tmp_path / name, frames)
    error = np.mean((read_clip(tmp_path / name)[0].astype(float) - frames) ** 2)
    assert 10 * np.log10(255**2 / error) > least


def test_an_existing_video_is_replaced_only_when_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write(path, numbered(3))
    with open_writer(path, 16, 32, 48) as writer:
        writer.write(numbered(5))
        assert len(read_clip(path)[0]) == 3
    assert len(read_clip(path)[0]) == 5 and names(tmp_path) == ["clip.mp4"]


def test_an_empty_folder_may_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", numbered(2))
    assert len(names(tmp_path / "out")) == 2 and names(tmp_path) == ["out"]


def test_the_kind_follows_the_name(tmp_path: Path) -> None:
    write(tmp_path / "CLIP.MP4", numbered(2))
    write(f"{tmp_path}/frames.mp4/", numbered(2))
    (tmp_path / "frames.v2").mkdir()
    write(tmp_path / "frames.v2", numbered(2))
    assert (tmp_path / "CLIP.MP4").is_file()
    assert (tmp_path / "frames.mp4" / "00001.png").is_file() and (tmp_path / "frames.v2" / "00001.png").is_file()


# --- nothing is left behind --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ValueError("elsewhere"), OSError(5, "a weight file")])
def test_when_the_work_fails_nothing_is_left_and_the_failure_comes_out_as_it_is(
    tmp_path: Path, name: str, failure: BaseException
) -> None:

    def work() -> None:
        with open_writer(tmp_path / name, 16, 32, 48) as writer:
            writer.write(numbered(12))
            raise failure

    with pytest.raises(type(failure)) as caught:
        work()
    assert caught.value is failure and names(tmp_path) == []


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm"])
@pytest.mark.parametrize("count", [2, 300])  # full when the file is closed, full in the middle
def test_a_full_disk_is_said_clearly_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    original = atomic._temporary_name

    def onto_a_full_disk(path: Path) -> Path:
        temporary = original(path)
        temporary.symlink_to("/dev/full")
        return temporary

    monkeypatch.setattr(atomic, "_temporary_name", onto_a_full_disk)
    path = tmp_path / name
    with pytest.raises(InputError, match="the disk is full") as caught:
        write(path, noise(count, 64, 64, 3), chunk=2)
    assert str(path) in str(caught.value) and caught.value.exit_code == 3 and names(tmp_path) == []


def test_a_full_disk_in_a_png_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    original = Image.Image.save

    def save(self: Image.Image, place: Path, **options: int) -> None:
        if place.name == "00003.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, place, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(InputError, match=r"frames'.*disk is full"):
        write(tmp_path / "frames", numbered(6))
    assert names(tmp_path) == []


# --- refused before the work -------------------------------------------------------------------------------------


def refusals(folder: Path) -> dict[str, tuple[str, type[Exception], str]]:
    (folder / "full").mkdir()
    (folder / "full" / "something").touch()
    (folder / "directory.mp4").mkdir()
    (folder / "file").touch()
    return {
        "other suffix": (f"{folder}/clip.avi", UsageError, r"'\.avi'.*\.mp4 or \.webm.*slash"),
        "missing folder": (f"{folder}/nowhere/clip.mp4", InputError, "does not exist. Create it first"),
        "missing folder of a folder": (f"{folder}/nowhere/frames/", InputError, "does not exist"),
        "folder is a file": (f"{folder}/file/clip.mp4", InputError, "is a file, not a folder"),
        "not empty": (f"{folder}/full", InputError, "is not empty"),
        "a folder in place of a video": (f"{folder}/directory.mp4", InputError, "existing folder"),
        "a file in place of a folder": (f"{folder}/file", InputError, "existing file"),
    }


def test_each_bad_target_is_refused_before_the_work_and_left_as_it_was(tmp_path: Path) -> None:
    cases = refusals(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for name, (path, kind, reason) in cases.items():
        with pytest.raises(kind, match=reason):
            check_writer_target(path)
        with pytest.raises(kind, match=reason), open_writer(path, 16, 32, 48):
            pytest.fail(f"the work began: {name}")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", [*KINDS, "CLIP.MP4", "frames.dir/"])
def test_checking_a_good_target_leaves_nothing(tmp_path: Path, name: str) -> None:
    check_writer_target(f"{tmp_path}/{name}")
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", KINDS)
def test_a_read_only_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def refuse(*args: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match="read-only"):
        check_writer_target(tmp_path / name)


def test_a_missing_encoder_is_said_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str, mode: str) -> None:
        raise av.codec.codec.UnknownCodecError(name)

    monkeypatch.setattr(av, "Codec", unknown)
    with pytest.raises(DeviceError, match=r"no libx264 encoder.*PNG frames"):
        check_writer_target(tmp_path / "clip.mp4")


@pytest.mark.parametrize("name", KINDS)
def test_no_frames_at_all_is_an_error_and_writes_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="No frames"), open_writer(tmp_path / name, 16, 32, 48) as writer:
        writer.write(numbered(0))
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", KINDS)
def test_frames_of_another_shape_are_usage_errors(tmp_path: Path, name: str) -> None:
    for wrong in (noise(2, 48, 32, 3), noise(32, 48, 3), np.zeros((2, 32, 48, 3), np.float32)):
        with pytest.raises(UsageError, match=r"\[n, 32, 48, 3\]"), open_writer(tmp_path / name, 16, 32, 48) as writer:
            writer.write(wrong)
    assert names(tmp_path) == []


def test_odd_sizes_are_refused_for_videos_only(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"49x33.*even"), open_writer(tmp_path / "clip.mp4", 16, 33, 49):
        pytest.fail("the work began")
    write(tmp_path / "frames", noise(2, 33, 49, 3))


# --- reading back ------------------------------------------------------------------------------------------------


def test_a_damaged_clip_is_not_compared(tmp_path: Path) -> None:
    path = write_video(
        tmp_path / "cut.mp4", noise(20, 64, 64, 3), container_options={"movflags": "faststart"}, options={"bf": "0"}
    )
    with pytest.raises(InputError, match="damaged"):
        read_clip(cut(path, 0.7))


def test_a_clip_folder_of_mixed_sizes_is_refused(tmp_path: Path) -> None:
    from PIL import Image

    for number, width in enumerate((32, 32, 48)):
        Image.fromarray(noise(32, width, 3)).save(tmp_path / f"{number}.png")
    with pytest.raises(InputError, match="first is 32x32 pixels, frame 2 is 48x32"):
        read_clip(tmp_path)


def test_a_clip_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "clip", numbered(4))
    monkeypatch.setattr("dynamictrl_edge.runtime.media.clip.MAX_CLIP_BYTES", 3 * 32 * 48 * 3)
    with pytest.raises(InputError, match="too long to compare"):
        read_clip(tmp_path / "clip")
