"""When the parts of a denoising loop ran, by the clock of whatever computes them. For measuring: a loop without one does none of
this.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .backends.base import Buffers, Clock

__all__ = ["STEP", "CopySpan", "Part", "Timeline", "hidden_seconds"]

STEP = "step"


class Part(NamedTuple):
    """A part of step number `step`: stem, head, one call of block number `block` for guidance half `half`, or the whole step.

    begin, end: seconds from the loop's start.
    """

    name: str
    step: int
    block: int
    half: int
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


class CopySpan(NamedTuple):
    """A copy of one block's weights; begin, end: seconds from the loop's start."""

    begin: float
    end: float
    nbytes: int


class Timeline:
    """One request's. `parts` and `copies` are there once the loop has ended; they stay empty if it did not.

    schedule: seconds that the steps' modulation tables took; 0.0 if they were known. side_by_side: guidance halves ran at once.
    """

    def __init__(self) -> None:
        self.schedule = 0.0
        self.side_by_side = False
        self.parts: list[Part] = []
        self.copies: list[CopySpan] = []
        self._clock: Clock | None = None
        self._marks: list[Part] = []  # whose begin and end are the clock's points
        self._step = 0

    @contextmanager
    def recording(self, buffers: Buffers) -> Iterator[None]:
        """Around a loop over these buffers; nothing computes any more when it ends."""
        with buffers.clock() as clock:
            self._clock = clock
            try:
                yield
                at = clock.seconds
                self.parts = [part._replace(begin=at(part.begin), end=at(part.end)) for part in self._marks]
                self.copies = [CopySpan(at(begin), at(end), nbytes) for begin, end, nbytes in clock.copies]
            finally:  # points belong to the clock
                self._clock, self._step = None, 0
                self._marks.clear()
                clock.copies.clear()

    @contextmanager
    def part(self, name: str, block: int = -1, half: int = 0) -> Iterator[None]:
        """Around the calls of a part; guidance halves may do this at the same time."""
        clock = self._clock
        if clock is None:
            raise RuntimeError("nothing is recorded outside a loop")
        step, begin = self._step, clock.mark()
        yield
        self._marks.append(Part(name, step, block, half, begin, clock.mark()))
        if name == STEP:
            self._step += 1

    def around(
        self, halves: Sequence[Sequence[Callable[[], None]]], *, side_by_side: bool
    ) -> list[list[Callable[[], None]]]:
        """The same calls, one per block of each guidance half, kept as parts."""
        self.side_by_side |= side_by_side
        return [
            [functools.partial(self._block, call, i, h) for i, call in enumerate(calls)]
            for h, calls in enumerate(halves)
        ]

    def _block(self, call: Callable[[], None], block: int, half: int) -> None:
        with self.part("block", block, half):
            call()


def hidden_seconds(timeline: Timeline) -> float:
    """Seconds of copies during which stem, blocks or head computed.

    Of a loop whose parts do not run at the same time as each other, as on a GPU.
    """
    busy = sorted((part.begin, part.end) for part in timeline.parts if part.name != STEP)
    hidden, first = 0.0, 0
    for copy in sorted(timeline.copies):
        while first < len(busy) and busy[first][1] <= copy.begin:
            first += 1
        for begin, end in busy[first:]:
            if begin >= copy.end:
                break
            hidden += min(end, copy.end) - max(begin, copy.begin)
    return hidden
