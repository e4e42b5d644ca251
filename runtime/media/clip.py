"""Reads a finished clip back whole, frame for frame, for comparing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dynamictrl_edge.bundle.errors import InputError

from .frames import list_frames
from .image import BLACK, open_rgb
from .video import VideoFile

__all__ = ["MAX_CLIP_BYTES", "read_clip"]

MAX_CLIP_BYTES = 4 << 30
"""Clips that need more memory than this are refused while they are read."""


def read_clip(path: str | os.PathLike[str]) -> tuple[NDArray[np.uint8], Fraction | None]:
    """Every frame of a video file or of a folder of images: ([F, H, W, 3] uint8, frames per second).

    The rate is the one that the video states, None for a folder. Frames come one to one, upright, never resized.

    Raises:
        InputError: as for a pose clip; also a damaged video, frames that differ in size, more than 4 GiB of frames.
    """
    path = Path(path)
    if path.is_dir():
        return _stack(_folder_frames(path), path), None
    with VideoFile(path, "clip") as video:
        frames = _stack((np.asarray(shown.picture().image) for shown in video.shown()), path)
        damage = video.shortfall()
    if damage:
        raise InputError(damage)
    return frames, video.rate


def _folder_frames(folder: Path) -> Iterator[NDArray[np.uint8]]:
    for path in list_frames(folder, "clip folder"):
        yield np.asarray(open_rgb(path, "frame", BLACK))


def _stack(frames: Iterator[NDArray[np.uint8]], path: Path) -> NDArray[np.uint8]:
    kept: list[NDArray[np.uint8]] = []
    size = 0
    for frame in frames:
        if kept and frame.shape != kept[0].shape:
            (rows, columns), (rows0, columns0) = frame.shape[:2], kept[0].shape[:2]
            raise InputError(
                f"The frames of the clip {str(path)!r} differ in size: the first is {columns0}x{rows0} pixels, "
                f"frame {len(kept)} is {columns}x{rows}."
            )
        size += frame.nbytes
        if size > MAX_CLIP_BYTES:
            raise InputError(
                f"The clip {str(path)!r} is too long to compare: its frames need more than 4 GiB of memory."
            )
        kept.append(frame)
    return np.stack(kept)
