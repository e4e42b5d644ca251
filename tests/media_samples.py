"""Pictures and videos made on the spot for the media tests; nothing binary is kept in the repository."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

Frames = NDArray[np.uint8]

REAL_MEDIA = Path(__file__).resolve().parents[2] / "shared" / "media"


def real_file(name: str) -> Path:
    """A real photo or video kept beside the repository; the test is skipped where there is none."""
    path = REAL_MEDIA / name
    if not path.is_file():
        pytest.skip(f"the real media file {name} is not on this machine")
    return path


def noise(*shape: int, seed: int = 0) -> Frames:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def corners(height: int, width: int) -> Frames:
    """Four flat quarters (red, green / blue, grey), so that every turn and mirroring looks different."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = (220, 30, 30)
    picture[: height // 2, width // 2 :] = (30, 200, 30)
    picture[height // 2 :, : width // 2] = (30, 30, 220)
    picture[height // 2 :, width // 2 :] = (150, 150, 150)
    return picture


def numbered(count: int, height: int = 32, width: int = 48) -> Frames:
    """Frames that tell their number: low hexadecimal digit as grey of the left half, high digit on the right."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    for number in range(count):
        frames[number, :, : width // 2] = number % 16 * 16 + 8
        frames[number, :, width // 2 :] = number // 16 % 16 * 16 + 8
    return frames


def numbers(frames: Frames) -> list[int]:
    """The numbers of `numbered` frames after encoding, decoding and scaling."""
    width = frames.shape[2]
    low = frames[:, :, width // 8 : width // 4].mean(axis=(1, 2, 3))
    high = frames[:, :, width * 3 // 4 : width * 7 // 8].mean(axis=(1, 2, 3))
    return [int(a // 16 + 16 * (b // 16)) for a, b in zip(low, high, strict=True)]


def write_video(
    path: Path,
    frames: Frames,
    rate: Fraction | int = 30,
    *,
    stamps: Sequence[int] | None = None,
    tick: Fraction | None = None,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    aspect: Fraction | None = None,
) -> Path:
    """Encodes [F, H, W, 3]. Frame i is shown at `stamps[i]` * `tick` seconds (default: i / rate)."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(rate), options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        stream.codec_context.time_base = tick or 1 / Fraction(rate)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = number if stamps is None else stamps[number]
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_sound(path: Path) -> Path:
    """A file with an audio track only."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _boxes(data: bytes | bytearray, kind: bytes) -> list[int]:
    """Where the contents of every MP4 box of this kind begin."""
    places, at = [], data.find(kind)
    while at >= 0:
        places.append(at + 4)
        at = data.find(kind, at + 4)
    return places


def set_display_matrix(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Writes (a, b, c, d) into an MP4's track header: a pixel (x, y) is shown at (a x + c y, b x + d y)."""
    data = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    (place,) = _boxes(data, b"tkhd")
    struct.pack_into(">9i", data, place + 40, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def shift_edit_list(path: Path, ticks: int) -> None:
    """Makes an MP4's edit list begin `ticks` of the media's clock later."""
    data = bytearray(path.read_bytes())
    (place,) = _boxes(data, b"elst")
    (media_time,) = struct.unpack_from(">i", data, place + 12)
    struct.pack_into(">i", data, place + 12, media_time + ticks)
    path.write_bytes(data)


def remove_time(path: Path) -> None:
    """Sets every duration in an MP4 to zero and hides its edit list."""
    data = bytearray(path.read_bytes().replace(b"edts", b"free"))
    for kind, offset in ((b"mvhd", 16), (b"mdhd", 16), (b"tkhd", 20)):
        for place in _boxes(data, kind):
            struct.pack_into(">I", data, place + offset, 0)
    for place in _boxes(data, b"stts"):
        (count,) = struct.unpack_from(">I", data, place + 4)
        for entry in range(count):
            struct.pack_into(">I", data, place + 8 + 8 * entry + 4, 0)
    path.write_bytes(data)


def cut(path: Path, part: float) -> Path:
    """Keeps only the first `part` (0..1) of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    return path


def write_png_header(path: Path, width: int, height: int) -> Path:
    """A PNG that claims a size and holds no pixels worth the name."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )
    return path
