"""Clips that are no video file: a folder of image frames, or an array of frames."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dynamictrl_edge.bundle.errors import InputError

from .image import BLACK, check_picture_size, open_rgb, unreadable
from .timing import Picture, Shown

__all__ = ["FRAME_SUFFIXES", "ArrayClip", "FolderClip", "list_frames"]

FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def list_frames(folder: Path, role: str) -> list[Path]:
    """The image files of a folder in natural order (`2.png` before `10.png`); hidden files are left out.

    Raises:
        InputError: the folder cannot be read, is empty, or holds no image.
    """
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        frames = [entry for entry in entries if entry.suffix.lower() in FRAME_SUFFIXES and entry.is_file()]
    except OSError as error:
        raise unreadable(error, role, folder) from error
    if not entries:
        raise InputError(f"The {role} {str(folder)!r} is empty.")
    if not frames:
        raise InputError(
            f"The {role} {str(folder)!r} holds no image frames: no file in it ends in {', '.join(FRAME_SUFFIXES)}."
        )
    return sorted(frames, key=_natural)


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    parts = re.split(r"([0-9]+)", path.name.casefold())
    return [(int(part), "") if part.isascii() and part.isdigit() else (-1, part) for part in parts], path.name


@dataclass(frozen=True)
class FolderClip:
    """Image files, `rate` frames per second. All that are read must have one size (`InputError` otherwise)."""

    folder: Path
    rate: Fraction

    jitter = Fraction(0)

    @property
    def name(self) -> str:
        return f"pose folder {str(self.folder)!r}"

    def shown(self) -> Iterator[Shown]:
        first: list[tuple[str, tuple[int, int]]] = []  # name and size of the first frame that was read
        for number, path in enumerate(list_frames(self.folder, "pose folder")):
            yield Shown(number / self.rate, 1 / self.rate, partial(self._picture, path, first))

    def _picture(self, path: Path, first: list[tuple[str, tuple[int, int]]]) -> Picture:
        # Transparent pose drawings are meant for a black ground: that is what pose models are trained on.
        image = open_rgb(path, "pose frame", BLACK)
        if not first:
            first.append((path.name, image.size))
        name, (columns, rows) = first[0]
        if image.size != (columns, rows):
            raise InputError(
                f"The frames of the pose folder {str(self.folder)!r} differ in size: {name!r} is {columns}x{rows} "
                f"pixels, {path.name!r} is {image.width}x{image.height}. Give frames of one size."
            )
        return Picture(image)

    def shortfall(self) -> str | None:
        return None


@dataclass(frozen=True)
class ArrayClip:
    """Frames [F, H, W, 3] uint8, `rate` frames per second."""

    frames: NDArray[np.uint8]
    rate: Fraction

    name = "pose array"
    jitter = Fraction(0)

    def shown(self) -> Iterator[Shown]:
        check_picture_size(self.frames.shape[2], self.frames.shape[1], self.name)
        for number, frame in enumerate(self.frames):
            yield Shown(number / self.rate, 1 / self.rate, partial(self._picture, frame))

    def _picture(self, frame: NDArray[np.uint8]) -> Picture:
        from PIL import Image

        return Picture(Image.fromarray(np.ascontiguousarray(frame)))

    def shortfall(self) -> str | None:
        return None
