"""Frames in time: what is shown when, and the same clip at another frame rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

from dynamictrl_edge.bundle.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Clip", "Picture", "Rate", "Shown", "as_rate", "at_rate"]

Rate = int | float | Fraction
"""Frames per second."""

MAX_RATE = 1000


@dataclass(frozen=True)
class Picture:
    """One decoded, upright RGB image. `pixel_aspect` is the width of its pixels over their height."""

    image: Image.Image
    pixel_aspect: float = 1.0


@dataclass(frozen=True)
class Shown:
    """A frame and when it is on the screen: from `time` on, in seconds; the last one for `duration` seconds.

    `picture()` decodes or converts; frames that nobody asks for cost nothing more.
    """

    time: Fraction
    duration: Fraction
    picture: Callable[[], Picture]


class Clip(Protocol):
    """A source of frames in time."""

    @property
    def name(self) -> str:
        """How messages call it: "pose video 'dance.mp4'"."""

    @property
    def rate(self) -> Fraction:
        """Its own frames per second."""

    @property
    def jitter(self) -> Fraction:
        """How far, in seconds, its time stamps may be from the true ones (rounding of the container)."""

    def shown(self) -> Iterator[Shown]:
        """Its frames in the order of presentation, times rising."""

    def shortfall(self) -> str | None:
        """After `shown` is exhausted: a sentence saying why frames are missing at the end, if any are."""


def as_rate(rate: Rate) -> Fraction:
    """Frames per second as an exact fraction. Raises `UsageError` unless it is above 0 and at most 1000."""
    try:
        exact = Fraction(rate).limit_denominator(1001)
    except (ValueError, OverflowError, TypeError) as error:  # NaN, infinity, something else
        raise UsageError(
            f"A frame rate of {rate!r} is not possible; give frames per second, for example 16."
        ) from error
    if not 0 < exact <= MAX_RATE:
        raise UsageError(f"A frame rate of {rate} is not possible; it must be above 0 and at most {MAX_RATE}.")
    return exact


def at_rate(shown: Iterable[Shown], rate: Fraction, jitter: Fraction) -> Iterator[Shown]:
    """For each output time k / `rate` the frame that is on the screen then; time starts with the first frame.

    The same object comes again when a frame stays on the screen, and is passed over when it was too short to be seen.
    Time stamps are trusted to ± `jitter` seconds. Lazy: reads one frame further than it yields.
    """
    step = 1 / rate
    now = jitter
    origin: Fraction | None = None
    current: Shown | None = None
    for following in shown:
        if origin is None:
            origin = following.time
        if current is not None:
            while now < following.time - origin:
                yield current
                now += step
        current = following
    if current is None or origin is None:
        return
    end = current.time - origin + current.duration - jitter
    while now < end:
        yield current
        now += step
