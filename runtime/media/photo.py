"""The photo of the person: from a file, a Pillow image or an array to the model's input."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dynamictrl_edge.bundle.errors import UsageError

from .fit import Fit, check_frame_size, fit_image
from .image import WHITE, decode_rgb, open_rgb

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["load_photo", "photo_to_tensor"]


def load_photo(
    source: str | os.PathLike[str] | Image.Image | NDArray[np.uint8],
    height: int,
    width: int,
    fit: Fit = "cover",
) -> NDArray[np.uint8]:
    """The photo as [height, width, 3] uint8 RGB.

    `source` is a file that Pillow opens (JPEG, PNG, WebP, …; of an animated file the first frame), a Pillow image,
    or a uint8 array [H, W, 3], [H, W, 4] or [H, W]. EXIF orientation is applied, transparent parts become **white**,
    palette, grey, 16-bit and CMYK pictures are converted. For `fit` see `fit_image`.

    Raises:
        InputError: the file is missing, not a picture, damaged, under 16 pixels on a side or above 100 megapixels.
        UsageError: an array of another type or shape, an unknown `fit`, a size below 1.
    """
    from PIL import Image

    check_frame_size(height, width, fit)
    if isinstance(source, Image.Image):
        image = decode_rgb(source, "photo", WHITE)
    elif isinstance(source, np.ndarray):
        image = decode_rgb(_image_of(source), "photo", WHITE)
    else:
        image = open_rgb(Path(source), "photo", WHITE)
    return fit_image(image, height, width, fit)


def photo_to_tensor(photo: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[H, W, 3] uint8 to [1, 3, H, W] float32 in -1..1: x / 127.5 - 1, as the published implementation does."""
    levels = np.arange(256, dtype=np.float32) / np.float32(127.5) - np.float32(1)
    return np.ascontiguousarray(levels[photo.transpose(2, 0, 1)][None])


def _image_of(array: NDArray[np.uint8]) -> Image.Image:
    from PIL import Image

    channels = array.shape[2:] if array.ndim in (2, 3) else None
    if array.dtype != np.uint8 or channels not in ((), (3,), (4,)) or array.size == 0:
        raise UsageError(
            f"A photo array must be uint8 with shape [H, W, 3], [H, W, 4] or [H, W]; "
            f"this one is {array.dtype} {list(array.shape)}."
        )
    return Image.fromarray(np.ascontiguousarray(array))
