"""Writes a clip as it is made: an MP4, a WebM or a folder of PNG files, whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from dynamictrl_edge.bundle.atomic import atomic_file, atomic_folder, check_output_place
from dynamictrl_edge.bundle.errors import DeviceError, InputError, UsageError, from_os_error

from .timing import Rate, as_rate

if TYPE_CHECKING:
    import av
    from av.video.stream import VideoStream

__all__ = ["FrameWriter", "check_writer_target", "open_writer"]

_BT709 = 1  # in AVColorSpace, AVColorPrimaries and AVColorTransferCharacteristic
_LIMITED, _FULL = 1, 2  # AVColorRange

# SWS_BICUBIC | SWS_FULL_CHR_H_INP | SWS_ACCURATE_RND: swscale's quick path rounds down.
_SWSCALE = 0x4 | 0x4000 | 0x40000


@dataclass(frozen=True)
class _Encoding:
    container: str
    codec: str
    codec_options: dict[str, str]
    container_options: dict[str, str]


_ENCODINGS = {
    ".mp4": _Encoding("mp4", "libx264", {"crf": "18", "preset": "medium"}, {"movflags": "+faststart"}),
    ".webm": _Encoding(
        "webm", "libvpx-vp9", {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"}, {}
    ),
}


class FrameWriter(Protocol):
    """Where finished frames go."""

    frames_written: int

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Appends frames [n, H, W, 3] uint8 (n may be 0). Raises `UsageError` on another shape or type."""


def check_writer_target(path: str | os.PathLike[str]) -> None:
    """Raises what `open_writer` would raise for this name. For calling before long work; leaves nothing behind.

    Raises:
        UsageError: a file type that is not written.
        InputError: the folder above is missing or cannot be written to, a folder in place of a file or the reverse,
            a folder that is not empty.
        DeviceError: this installation of PyAV lacks the encoder.
    """
    target = Path(path)
    encoding = _encoding_of(path)
    check_output_place(target)
    if encoding is not None:
        if target.is_dir():
            raise InputError(f"The output {str(target)!r} is an existing folder; give a file name.")
        _check_encoder(encoding)
    elif target.exists() and not target.is_dir():
        raise InputError(f"The output {str(target)!r} is an existing file; a folder of PNG frames is written there.")
    elif target.is_dir() and any(target.iterdir()):
        raise InputError(f"The output folder {str(target)!r} is not empty. Remove it, or give another name.")


@contextlib.contextmanager
def open_writer(path: str | os.PathLike[str], fps: Rate, height: int, width: int) -> Iterator[FrameWriter]:
    """A writer for frames [n, height, width, 3], chosen by the name of `path`:

    - `.mp4`: H.264 (libx264, CRF 18), yuv420p, BT.709 limited range and tagged so, index in front (faststart);
    - `.webm`: VP9 (CRF 24), the same colours;
    - no suffix, or a name that ends with a slash: a folder of lossless `00000.png`, `00001.png`, …

    Everything is written under a temporary name beside `path` and moved into place when the context ends without an
    exception; otherwise, Ctrl-C included, it is removed and `path` stays as it was.

    Raises:
        UsageError: another suffix, an impossible rate or size, or no frame written by the end.
        InputError: as `check_writer_target`; the disk is full or writing fails.
        DeviceError: this installation of PyAV lacks the encoder.
    """
    rate = as_rate(fps)
    encoding = _encoding_of(path)
    if height < 1 or width < 1 or (encoding is not None and (height % 2 or width % 2)):
        raise UsageError(
            f"Frames of {width}x{height} pixels cannot be written to {str(path)!r}: "
            "both sides must be positive, and even in a video file."
        )
    check_writer_target(path)
    failure: BaseException | None = None
    with contextlib.suppress(_Abandoned), contextlib.ExitStack() as stack:
        writer: _VideoWriter | _FolderWriter
        if encoding is None:
            writer = _FolderWriter(stack.enter_context(atomic_folder(Path(path))), Path(path), height, width)
        else:
            file = stack.enter_context(atomic_file(Path(path)))
            writer = _VideoWriter(file, Path(path), encoding, rate, height, width)
        stack.callback(writer.close)
        try:
            yield writer
        except BaseException as error:
            # What went wrong between two writes is not about this file: it must come out as it is.
            failure = error
            raise _Abandoned from None
        if writer.frames_written == 0:
            raise UsageError(f"No frames were given for {os.fspath(path)!r}, so it was not written.")
        writer.finish()
    if failure is not None:
        raise failure


class _Abandoned(Exception):
    """Leaves the atomic contexts without moving anything into place."""


class _FolderWriter:
    def __init__(self, folder: Path, target: Path, height: int, width: int) -> None:
        self.frames_written = 0
        self._folder = folder
        self._target = target
        self._size = (height, width)

    def write(self, frames: NDArray[np.uint8]) -> None:
        from PIL import Image

        _check_frames(frames, self._size)
        for frame in frames:
            place = self._folder / f"{self.frames_written:05d}.png"
            try:
                Image.fromarray(np.ascontiguousarray(frame)).save(place, compress_level=3)  # quick; lossless anyway
            except OSError as error:
                raise from_os_error(error, "write", self._target) from error
            self.frames_written += 1

    def finish(self) -> None:
        """Nothing is left to do: each frame is a whole file."""

    def close(self) -> None:
        """Nothing is held open."""


class _VideoWriter:
    def __init__(self, file: Path, target: Path, encoding: _Encoding, rate: Fraction, height: int, width: int) -> None:
        import av

        self.frames_written = 0
        self._target = target
        self._size = (height, width)
        self._tick = 1 / rate
        with _readable_errors(target):
            self._container = av.open(
                f"file:{file}", mode="w", format=encoding.container, options=encoding.container_options
            )
        added = self._container.add_stream(encoding.codec, rate=rate, options=encoding.codec_options)
        stream = cast("VideoStream", added)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        codec = stream.codec_context
        codec.time_base = self._tick
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _LIMITED
        self._stream = stream

    def write(self, frames: NDArray[np.uint8]) -> None:
        import av

        _check_frames(frames, self._size)
        for rgb in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=_BT709,
                src_color_range=_FULL,
                dst_color_range=_LIMITED,
                interpolation=_SWSCALE,
                threads=1,
            )
            frame.pts, frame.time_base = self.frames_written, self._tick
            self._mux(frame)
            self.frames_written += 1

    def finish(self) -> None:
        """Writes what the encoder still holds, and the index."""
        self._mux(None)
        with _readable_errors(self._target):
            self._container.close()

    def close(self) -> None:
        """Lets go of the file; harmless after `finish`."""
        import av

        with contextlib.suppress(av.FFmpegError):
            self._container.close()

    def _mux(self, frame: av.VideoFrame | None) -> None:
        with _readable_errors(self._target):
            self._container.mux(self._stream.encode(frame))


def _encoding_of(path: str | os.PathLike[str]) -> _Encoding | None:
    """How to encode for this name; None for a folder of PNG files."""
    text = os.fspath(path)
    target = Path(text)
    if text.endswith(("/", os.sep)) or not target.suffix:
        return None
    encoding = _ENCODINGS.get(target.suffix.lower())
    if encoding is None and not target.is_dir():
        raise UsageError(
            f"The output {text!r} ends in {target.suffix!r}, which is not written. Give a name that ends in "
            f"{' or '.join(_ENCODINGS)}, or one that ends with a slash for a folder of PNG frames."
        )
    return encoding


def _check_encoder(encoding: _Encoding) -> None:
    import av

    try:
        av.Codec(encoding.codec, "w")
    except ValueError as error:  # av.codec.codec.UnknownCodecError
        raise DeviceError(
            f"This installation of PyAV has no {encoding.codec} encoder. Install the wheel from PyPI "
            "(pip install --force-reinstall av), or write a folder of PNG frames: end the output name with a slash."
        ) from error


def _check_frames(frames: NDArray[np.uint8], size: tuple[int, int]) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (*size, 3):
        raise UsageError(
            f"Frames to write must be uint8 with shape [n, {size[0]}, {size[1]}, 3]; "
            f"these are {frames.dtype} {list(frames.shape)}."
        )


@contextlib.contextmanager
def _readable_errors(target: Path) -> Iterator[None]:
    import av

    try:
        yield
    except av.FFmpegError as error:
        if isinstance(error, OSError):
            raise from_os_error(error, "write", target) from error
        raise InputError(f"The video {str(target)!r} could not be encoded: {error.strerror}.") from error
