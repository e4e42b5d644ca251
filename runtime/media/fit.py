"""Brings a picture to the size that the model works at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dynamictrl_edge.bundle.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["FITS", "Fit", "check_frame_size", "fit_image"]

Fit = Literal["cover", "contain", "stretch"]
FITS: tuple[Fit, ...] = get_args(Fit)


def check_frame_size(height: int, width: int, fit: str) -> None:
    """Raises `UsageError` unless both sides are positive and `fit` is one of `FITS`."""
    if height < 1 or width < 1:
        raise UsageError(f"A frame of {width}x{height} pixels is not possible: both sides must be at least 1.")
    if fit not in FITS:
        raise UsageError(f"Unknown fit {fit!r}; choose one of {', '.join(FITS)}.")


def fit_image(image: Image.Image, height: int, width: int, fit: Fit, pixel_aspect: float = 1.0) -> NDArray[np.uint8]:
    """Scales an RGB image to [height, width, 3] uint8 with Pillow's Lanczos filter (antialiased when shrinking).

    - `cover`: the frame is filled; what sticks out is cut off equally on both sides.
    - `contain`: the whole picture is visible; the rest of the frame is black.
    - `stretch`: plain `image.resize((width, height), LANCZOS)`, as the published pipeline does.

    `pixel_aspect` is the width of a source pixel over its height (1.0 for photos and for most videos).
    A picture of square pixels that has the wanted size already comes through untouched, whatever `fit` is.
    """
    from PIL import Image

    check_frame_size(height, width, fit)
    columns, rows = image.size
    if (columns, rows) == (width, height) and (pixel_aspect == 1.0 or fit == "stretch"):
        return np.array(image, dtype=np.uint8)
    if fit == "stretch":
        return np.array(image.resize((width, height), Image.Resampling.LANCZOS))
    if fit == "cover":
        # One resampling from the centred part of the source that becomes the frame, at fractions of a pixel.
        scale = max(width / (columns * pixel_aspect), height / rows)
        cut_x = max(0.0, columns - width / scale / pixel_aspect) / 2
        cut_y = max(0.0, rows - height / scale) / 2
        box = (cut_x, cut_y, columns - cut_x, rows - cut_y)
        return np.array(image.resize((width, height), Image.Resampling.LANCZOS, box=box))
    scale = min(width / (columns * pixel_aspect), height / rows)
    inner = (
        min(width, max(1, round(columns * pixel_aspect * scale))),
        min(height, max(1, round(rows * scale))),
    )
    frame = Image.new("RGB", (width, height))  # black
    frame.paste(image.resize(inner, Image.Resampling.LANCZOS), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return np.array(frame)
