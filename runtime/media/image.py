"""Opens one picture as 8-bit RGB: turned upright, transparency filled, and refused with a reason when it is bad."""

from __future__ import annotations

import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dynamictrl_edge.bundle.errors import InputError, from_os_error

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "BLACK",
    "MAX_PIXELS",
    "MIN_SIDE",
    "WHITE",
    "check_picture_size",
    "check_readable",
    "decode_rgb",
    "open_rgb",
    "unreadable",
]

MIN_SIDE = 16
"""The shortest side, in pixels, that a picture or a video may have."""

MAX_PIXELS = 100_000_000
"""Pictures with more pixels are refused from their header, before anything is decoded."""

WHITE = (255, 255, 255)
BLACK = (0, 0, 0)

# What Pillow's decoders are known to raise on damaged files. Pillow names no common base.
_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError,
    RuntimeError, struct.error, zlib.error,
)  # fmt: skip

# Formats that Pillow hands to an external program (Ghostscript) or to the window system.
_EXTERNAL_FORMATS = ("EPS", "WMF")

_ORIENTATION_TAG = 0x0112


def check_readable(path: Path, role: str) -> None:
    """Raises `InputError` unless `path` is a regular, non-empty file that may be read. `role`: "photo", "video", …"""
    if path.is_dir():
        raise InputError(f"The {role} {str(path)!r} is a folder, not a file.")
    if not path.exists():
        raise InputError(f"The {role} {str(path)!r} does not exist.")
    if not path.is_file():
        raise InputError(f"The {role} {str(path)!r} is not a regular file.")
    try:
        with path.open("rb") as stream:
            empty = not stream.read(1)
    except OSError as error:
        raise unreadable(error, role, path) from error
    if empty:
        raise InputError(f"The {role} {str(path)!r} is an empty file.")


def unreadable(error: OSError, role: str, path: Path) -> InputError:
    """The error to raise when opening or listing `path` failed."""
    if isinstance(error, PermissionError):
        return InputError(f"The {role} {str(path)!r} may not be read: permission denied. Check its access rights.")
    return from_os_error(error, f"read the {role}", path)


def check_picture_size(width: int, height: int, name: str) -> None:
    """Raises `InputError` when a side is below `MIN_SIDE` or the area above `MAX_PIXELS`. `name`: "photo 'a.jpg'", …"""
    if min(width, height) < MIN_SIDE:
        raise InputError(
            f"The {name} is {width}x{height} pixels; each side must have at least {MIN_SIDE}. Give a larger one."
        )
    if width * height > MAX_PIXELS:
        raise InputError(
            f"The {name} is {width}x{height} pixels, more than the {MAX_PIXELS // 10**6} megapixels that are "
            "accepted. Make it smaller first."
        )


def open_rgb(path: Path, role: str, background: tuple[int, int, int]) -> Image.Image:
    """Reads a picture file that Pillow knows as an RGB image; of an animated file the first frame.

    Colours are taken as sRGB (embedded colour profiles are not applied, as in the published implementation).

    Raises:
        InputError: missing, empty, a folder, not readable, not a picture, damaged, too small or too large.
    """
    from PIL import Image, UnidentifiedImageError

    check_readable(path, role)
    name = f"{role} {str(path)!r}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on sizes below our own limit, and on oddities in metadata
            image = Image.open(path)
    except Image.DecompressionBombError as error:
        raise _too_large(name, error) from error
    except UnidentifiedImageError as error:
        heic = " (HEIC photos have to be converted first)" if path.suffix.lower() in (".heic", ".heif") else ""
        raise InputError(
            f"The {name} is not a picture that can be read. Give a JPEG, PNG or WebP file{heic}."
        ) from error
    except _DECODER_ERRORS as error:
        raise _damaged(name, error) from error
    with image:
        if image.format in _EXTERNAL_FORMATS:
            raise InputError(f"The {name} is a {image.format} drawing, not a picture. Give a JPEG, PNG or WebP file.")
        return decode_rgb(image, name, background)


def decode_rgb(image: Image.Image, name: str, background: tuple[int, int, int]) -> Image.Image:
    """Decodes an opened image to RGB: size checked first, EXIF orientation applied, transparency put on `background`.

    16-bit grey is scaled to 8 bits; palette, grey and CMYK images are converted.

    Raises:
        InputError: damaged, too small, too large, or of a pixel type that has no colours (32-bit float, Lab).
    """
    from PIL.Image import DecompressionBombError

    check_picture_size(*image.size, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            image = _upright(image)
            if image.mode == "I" or image.mode.startswith("I;16"):
                image = _eight_bits(image)
            if image.mode not in ("F", "LAB"):
                return _opaque(image, background)
    except DecompressionBombError as error:
        raise _too_large(name, error) from error
    except _DECODER_ERRORS as error:
        raise _damaged(name, error) from error
    raise InputError(f"The {name} stores its pixels as {image.mode!r}. Save it as an 8-bit RGB PNG or JPEG.")


def _too_large(name: str, error: Exception) -> InputError:
    # Pillow raises before it tells the size in any other way.
    found = re.search(r"\((\d+) pixels\)", str(error))
    size = f"{int(found[1]) // 10**6} megapixels, " if found else ""
    return InputError(
        f"The {name} is too large: {size}more than the {MAX_PIXELS // 10**6} megapixels that are accepted. "
        "Make it smaller first."
    )


def _damaged(name: str, error: Exception) -> InputError:
    detail = str(error).strip().rstrip(".") or type(error).__name__
    return InputError(f"The {name} cannot be decoded ({detail}). It is damaged or incomplete; copy or export it again.")


def _upright(image: Image.Image) -> Image.Image:
    from PIL import Image

    turn = Image.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    try:
        method = turns.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except _DECODER_ERRORS:
        return image  # a picture with broken EXIF data is still a picture
    return image if method is None else image.transpose(method)


def _eight_bits(image: Image.Image) -> Image.Image:
    from PIL import Image

    values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _opaque(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    base = Image.new("RGBA", image.size, (*background, 255))
    base.alpha_composite(image.convert("RGBA"))
    return base.convert("RGB")
