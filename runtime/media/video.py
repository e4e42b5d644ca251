"""A video file as frames in time: upright, with the right colours, decoded no further than asked."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from dynamictrl_edge.bundle.errors import InputError

from .image import check_picture_size, check_readable
from .timing import MAX_RATE, Picture, Shown

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.sidedata.sidedata import SideData
    from av.video.stream import VideoStream

__all__ = ["VideoFile"]

# Only files are read: a playlist inside a "video" must not fetch anything from the network.
_OPTIONS = {"protocol_whitelist": "file"}

# Demuxers that make a "video" of a still picture or of a text file.
_STILL_FORMATS = ("image2", "tty")

_UNSPECIFIED, _BT709, _BT601 = 2, 1, 5  # AVColorSpace
_HD_ROWS = 720  # untagged videos from this height on are taken as BT.709, as players do
_COARSE_TICK = Fraction(1, 500)

# SWS_BICUBIC | SWS_FULL_CHR_H_INT | SWS_ACCURATE_RND: swscale's quick path darkens by more than one level.
_SWSCALE = 0x4 | 0x2000 | 0x40000
_ASSUMED_RATE = Fraction(25)  # for streams that tell no rate at all


class VideoFile:
    """An opened video (any that PyAV opens), as a `Clip`. Use it as a context manager.

    Handles frames stored in another order than shown (B-frames), variable frame rates, a start other than zero, edit
    lists, rotation and mirroring metadata, pixels that are not square, BT.601 / BT.709 and limited / full range.

    Where the file is damaged, the frames before the damage come out and `shortfall` says so afterwards.

    Raises:
        InputError: missing, a folder, empty, unreadable, not a video, audio only, no frames, zero duration.
    """

    def __init__(self, path: Path, role: str = "pose video") -> None:
        check_readable(path, role)
        self.path = path
        self.name = f"{role} {str(path)!r}"
        self._container = _open(path, self.name)
        try:
            self._stream = _video_stream(self._container, self.name)
            check_picture_size(self._stream.codec_context.width, self._stream.codec_context.height, self.name)
        except BaseException:
            self.close()
            raise
        self.rate = _stream_rate(self._container, self._stream)
        tick = Fraction(self._stream.time_base or 0)
        # Containers round time stamps to their clock (WebM: 1 ms). A clock that ticks once a frame is exact.
        self.jitter = tick / 2 if tick <= _COARSE_TICK else Fraction(0)
        self._damage: str | None = None
        self._decoded = 0
        self._end = Fraction(0)  # of the last decoded frame, seconds after the first

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._container.close()

    def shown(self) -> Iterator[Shown]:
        """The frames in presentation order. `picture()` converts one to RGB."""
        step = 1 / self.rate
        origin: Fraction | None = None
        previous: Fraction | None = None
        first_stamp: Fraction | None = None
        time_passes = False  # whether any two frames are shown at different times, or a single one lasts
        for frame in self._frames():
            stamp = None if frame.pts is None or frame.time_base is None else frame.pts * Fraction(frame.time_base)
            time = stamp
            if time is None or (previous is not None and time <= previous):
                time = Fraction(0) if previous is None else previous + step  # no time stamp, or one that goes back
            if origin is None:
                origin, first_stamp = time, stamp
                time_passes = stamp is None or self._stream.duration != 0
            elif stamp != first_stamp:
                time_passes = True
            elif self._stream.duration == 0 and not time_passes:
                break
            hold = self._hold(frame, stamp) or step
            previous = time
            self._end = time - origin + hold
            yield Shown(time, hold, partial(self._picture, frame))
        if not self._decoded:
            why = f": {self._damage}" if self._damage else ""
            raise InputError(f"The {self.name} has no frames that can be decoded{why}. Give another file.")
        if not time_passes:
            raise InputError(
                f"The {self.name} has zero duration: all its frames are shown at the same moment. Give a video, or a "
                "folder of image frames."
            )

    def shortfall(self) -> str | None:
        """Why the clip ended where it did, when it ended early: damaged data, or a file that was cut off."""
        if self._damage:
            return f"The {self.name} is damaged ({self._damage}): only the {self._decoded} frames before it are used."
        stated = self._stated_duration()
        if stated is not None and stated - self._end > max(stated / 10, 2 / self.rate):
            return (
                f"The {self.name} should last {float(stated):.2f} s but ends after {float(self._end):.2f} s: "
                f"it seems to be cut off after {self._decoded} frames."
            )
        return None

    def _frames(self) -> Iterator[av.VideoFrame]:
        """Decoded frames in presentation order. Damage ends them, unless no good one came before."""
        import av

        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError as error:
                self._damage = _reason(error)
                break
            if packet is None:
                return  # the decoder was flushed by the demuxer's last, empty packet
            if packet.is_corrupt:
                self._damage = "incomplete data"
                if self._decoded:
                    break
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                self._damage = _reason(error)
                if self._decoded:
                    break
                continue
            for frame in frames:
                if not frame.is_corrupt:
                    self._damage = None
                    self._decoded += 1
                    yield frame
                else:
                    self._damage = "incomplete data"
                    if self._decoded:
                        return
        try:
            waiting = self._stream.codec_context.decode(None)  # complete frames that the decoder still holds
        except av.FFmpegError:
            return
        for frame in waiting:
            if frame.is_corrupt:
                return
            self._decoded += 1
            yield frame

    def _hold(self, frame: av.VideoFrame, stamp: Fraction | None) -> Fraction | None:
        """How long the frame would be shown if it is the last one, where the file says."""
        if not frame.duration or frame.time_base is None:
            return None
        hold = frame.duration * Fraction(frame.time_base)
        stream = self._stream
        if stamp is not None and stream.duration and stream.start_time is not None and stream.time_base is not None:
            # With B-frames and a variable rate a frame's own duration can be too long.
            left = (stream.start_time + stream.duration) * Fraction(stream.time_base) - stamp
            hold = min(hold, left) if left > 0 else hold
        return hold

    def _stated_duration(self) -> Fraction | None:
        if self._stream.duration and self._stream.time_base is not None:
            return self._stream.duration * Fraction(self._stream.time_base)
        if self._container.duration and not self._container.streams.audio:  # sound may be longer than the picture
            return Fraction(self._container.duration, 1_000_000)
        return None

    def _picture(self, frame: av.VideoFrame) -> Picture:
        from PIL import Image

        aspect = Fraction(self._stream.sample_aspect_ratio or 1)
        if not Fraction(1, 16) <= aspect <= 16:
            aspect = Fraction(1)
        rgb, turned = _upright(_rgb(frame), frame)
        return Picture(Image.fromarray(rgb), float(1 / aspect if turned else aspect))


def _open(path: Path, name: str) -> InputContainer:
    import av

    try:
        # "file:" keeps names with a colon or a percent sign from being read as a protocol or a pattern.
        container = av.open(f"file:{path}", mode="r", options=_OPTIONS, metadata_errors="replace")
    except av.FFmpegError as error:
        raise InputError(
            f"The {name} is not a video that can be read, or its beginning is damaged ({_reason(error)}). Give a video "
            "file such as MP4 or WebM, or a folder of image frames."
        ) from error
    formats = container.format.name.split(",")
    if any(form in _STILL_FORMATS or form.endswith("_pipe") for form in formats):
        container.close()
        raise InputError(
            f"The {name} is not a video. Give a video file such as MP4 or WebM, or a folder of image frames."
        )
    return container


def _video_stream(container: InputContainer, name: str) -> VideoStream:
    # A cover picture in a music file is stored as a video stream too.
    streams = [stream for stream in container.streams.video if not _is_cover(stream)]
    if streams:
        best = container.streams.best("video")
        stream = next((stream for stream in streams if stream is best), streams[0])
        if stream.codec_context is None:
            raise InputError(
                f"The {name} is stored in a format that this installation cannot decode. Convert it to MP4."
            )
        return stream
    if container.streams.audio:
        raise InputError(f"The {name} holds only sound, no video. Give a file with a video track.")
    raise InputError(f"The {name} holds no video: it is damaged, cut off at the beginning, or not a video at all.")


def _is_cover(stream: VideoStream) -> bool:
    from av.stream import Disposition

    return bool(stream.disposition & Disposition.attached_pic)


def _stream_rate(container: InputContainer, stream: VideoStream) -> Fraction:
    rates = [stream.average_rate, stream.guessed_rate]
    if stream.duration is None and container.duration is None:
        rates.reverse()  # a bare stream: its average is FFmpeg's assumption, the guess comes from the coded frames
    for rate in rates:
        if rate is not None and 0 < Fraction(rate) <= MAX_RATE:
            return Fraction(rate)
    return _ASSUMED_RATE


def _reason(error: av.FFmpegError) -> str:
    return (error.strerror or type(error).__name__).lower()


def _rgb(frame: av.VideoFrame) -> NDArray[np.uint8]:
    if frame.colorspace == _UNSPECIFIED:
        frame.colorspace = _BT709 if frame.height >= _HD_ROWS else _BT601
    converted = frame.to_ndarray(format="rgb24", interpolation=_SWSCALE, threads=1)
    return converted.astype(np.uint8, copy=False)  # it is uint8; this says so to the type checker


def _upright(rgb: NDArray[np.uint8], frame: av.VideoFrame) -> tuple[NDArray[np.uint8], bool]:
    """Applies the display matrix, to the nearest right angle. Also says whether rows and columns changed places."""
    matrix = _display_matrix(frame)
    if matrix is None:
        return rgb, False
    (xx, xy), (yx, yy) = matrix  # shown x = xx * x + yx * y, shown y = xy * x + yy * y
    turned = abs(xy) + abs(yx) > abs(xx) + abs(yy)
    if turned:
        rgb, mirrored, upside_down = rgb.transpose(1, 0, 2), yx < 0, xy < 0
    else:
        mirrored, upside_down = xx < 0, yy < 0
    if mirrored:
        rgb = rgb[:, ::-1]
    if upside_down:
        rgb = rgb[::-1]
    return np.ascontiguousarray(rgb), turned


def _display_matrix(frame: av.VideoFrame) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The 2x2 part of the frame's display matrix (FFmpeg stores nine int32, row by row), or None."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    m = np.frombuffer(bytes(cast("SideData", data)), dtype=np.int32)
    return (int(m[0]), int(m[1])), (int(m[3]), int(m[4]))
