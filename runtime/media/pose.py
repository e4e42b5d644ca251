"""The pose clip: from a video, a folder of frames or an array to the model's input, of exactly the length asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dynamictrl_edge.bundle.errors import InputError, UsageError

from .fit import Fit, check_frame_size, fit_image
from .frames import ArrayClip, FolderClip
from .timing import Clip, Rate, Shown, as_rate, at_rate
from .video import VideoFile

__all__ = ["DEFAULT_FOLDER_FPS", "PoseClip", "load_pose", "pose_to_tensor"]

DEFAULT_FOLDER_FPS = Fraction(8)
"""The rate of a folder or an array of frames when nobody says one."""

# With its own rate kept, a frame may be this part of a frame early or late without another one being repeated for it.
_OWN_RATE_JITTER = Fraction(2, 5)


@dataclass(frozen=True, eq=False)
class PoseClip:
    """Pose frames of the wanted count, size and rate.

    frames: [F, H, W, 3] uint8 RGB.
    fps: frames per second of `frames`.
    source_frames: how many of `frames` come from the source; the others repeat the last of them.
    longer: whether the source has further frames after these.
    notices: sentences for the person who gave the clip.
    """

    frames: NDArray[np.uint8]
    fps: Fraction
    source_frames: int
    longer: bool
    notices: tuple[str, ...]


def load_pose(
    source: str | os.PathLike[str] | NDArray[np.uint8],
    height: int,
    width: int,
    frames: int,
    fps: Rate | None = None,
    fit: Fit = "cover",
    *,
    expected: int | None = None,
    skip_frames: int = 0,
    folder_fps: Rate | None = None,
) -> PoseClip:
    """Reads `frames` pose frames of [height, width].

    Args:
        source: a video file that PyAV opens, a folder of images (png, jpg, jpeg, webp, bmp; natural order of names,
            hidden files left out), or an array [F, H, W, 3] uint8.
        frames: how many frames the model is fed.
        fps: frames per second of the result. A video is resampled to it by its time stamps: output frame k is what is
            on the screen k / fps seconds after the first frame. None keeps the video's own frames and rate. A folder
            or an array gives one frame per output frame, whatever the rate (None: 8).
        fit: see `fit_image`. Frames that have the wanted size already come through untouched.
        expected: how many frames the person asked for, where `frames` is more because the model works at a raised
            length. Notices are about these only. Default: `frames`.
        skip_frames: how many frames (of the result's rate) at the beginning of the clip are left out.
        folder_fps: the rate at which a folder or an array was made; it is then resampled to `fps` like a video.

    A clip that is too short repeats its last frame, one that is too long is cut, and notices say so. A video is decoded
    only as far as it is used, and no more than two of its full-size frames are held at a time.

    Raises:
        InputError: the source is missing, not a video, without frames or video stream, of zero duration or damaged
            before its first frame; an empty folder, frames of mixed sizes; `skip_frames` leaves nothing.
        UsageError: counts, sizes, rates or an array that can never work.
    """
    check_frame_size(height, width, fit)
    expected = frames if expected is None else expected
    if not 1 <= expected <= frames:
        raise UsageError(f"A pose clip of {expected} frames out of {frames} is not possible; both must be at least 1.")
    if skip_frames < 0:
        raise UsageError(f"{skip_frames} frames cannot be skipped; give 0 or more.")
    wanted_rate = None if fps is None else as_rate(fps)
    stated_rate = None if folder_fps is None else as_rate(folder_fps)

    with _opened(source, stated_rate or wanted_rate or DEFAULT_FOLDER_FPS) as clip:
        rate = wanted_rate or clip.rate
        jitter = clip.jitter if wanted_rate else _OWN_RATE_JITTER / rate
        resampled = at_rate(clip.shown(), rate, jitter)
        skipped = sum(1 for _ in _first(resampled, skip_frames))
        result = np.empty((frames, height, width, 3), np.uint8)
        count = 0
        last: Shown | None = None
        for shown in _first(resampled, frames):
            if shown is last:
                result[count] = result[count - 1]
            else:
                picture = shown.picture()
                result[count] = fit_image(picture.image, height, width, fit, picture.pixel_aspect)
            last = shown
            count += 1
        if count == 0:
            raise InputError(
                f"The {clip.name} has {skipped} frames at {_number(rate)} frames/s, and {skip_frames} were to be "
                "skipped: nothing is left. Skip fewer."
            )
        longer = count == frames and next(resampled, None) is not None
        notices = _notices(clip, rate, count, expected, skipped, longer)
    result[count:] = result[count - 1]
    return PoseClip(result, rate, count, longer, notices)


def pose_to_tensor(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[F, H, W, 3] uint8 to [1, 3, F, H, W] float32 in -1..1: (x / 255 - 0.5) / 0.5, as the published implementation.

    May be called on a part of the frames.
    """
    half = np.float32(0.5)
    levels = (np.arange(256, dtype=np.float32) / np.float32(255) - half) / half
    return np.ascontiguousarray(levels[frames.transpose(3, 0, 1, 2)][None])


@contextlib.contextmanager
def _opened(source: str | os.PathLike[str] | NDArray[np.uint8], unstamped_rate: Fraction) -> Iterator[Clip]:
    """The source as a clip; `unstamped_rate` is for those that have no times of their own."""
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 4 or source.shape[-1] != 3 or source.size == 0:
            raise UsageError(
                f"A pose array must be uint8 with shape [F, H, W, 3]; this one is {source.dtype} {list(source.shape)}."
            )
        yield ArrayClip(source, unstamped_rate)
        return
    path = Path(source)
    if path.is_dir():
        yield FolderClip(path, unstamped_rate)
        return
    with VideoFile(path) as video:
        yield video


def _first(shown: Iterator[Shown], count: int) -> Iterator[Shown]:
    """At most `count` items. Unlike `zip`, takes none too many from the iterator."""
    for _ in range(count):
        item = next(shown, None)
        if item is None:
            return
        yield item


def _notices(clip: Clip, rate: Fraction, count: int, expected: int, skipped: int, longer: bool) -> tuple[str, ...]:
    at = f"at {_number(rate)} frames/s" + (f" after the {skipped} that are skipped" if skipped else "")
    if count > expected or longer:
        return (f"The {clip.name} has more than the {expected} frames asked for {at}: the rest is not used.",)
    if count == expected:
        return ()
    missing = expected - count
    times = "once" if missing == 1 else f"{missing} times"
    frames = "1 frame" if count == 1 else f"{count} frames"
    short = f"The {clip.name} has {frames} {at} where {expected} are asked for: the last one is repeated {times}."
    why = clip.shortfall()
    return (short,) if why is None else (why, short)


def _number(rate: Fraction) -> str:
    return f"{float(rate):.6g}"
