"""What all blocks together add to the stem's tokens, kept from the last one or two steps in which they ran.

It is a function of the noise level, so that a line through the last two values is drawn over the solver's own variable,
l = ln(a / (1 - a)) / 2 (half the logarithm of the signal-to-noise ratio), in which its steps are of like size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..scheduler import Schedule, alphas_cumprod, half_log_snr

__all__ = ["TrunkState", "step_times"]


def step_times(schedule: Schedule) -> list[float]:
    """l of every step, rising; -infinity where nothing but noise is left."""
    table = alphas_cumprod(schedule.config)
    return [half_log_snr(float(table[t])) for t in schedule.timesteps]


class TrunkState:
    """The residuals of one guidance half: `residuals`, 1 or 2 buffers [1, N, D], written in turn, and the times they are of."""

    def __init__(self, residuals: Sequence[Any]):
        self._residuals = residuals
        self.reset()

    def reset(self) -> None:
        """Nothing is kept."""
        self._times: list[float] = []  # newest first
        self._slot = 0

    @property
    def places(self) -> tuple[int, int]:
        """Of `newest` and `before` among the residuals."""
        return self._slot, (self._slot - 1) % len(self._residuals) if len(self._times) > 1 else self._slot

    @property
    def newest(self) -> Any:
        return self._residuals[self._slot]

    @property
    def before(self) -> Any:
        """The residual before the newest; the newest itself where only one is kept, or known."""
        return self._residuals[self.places[1]]

    def keep(self, time: float) -> Any:
        """A residual of this time is about to be written into the returned buffer."""
        self._slot = (self._slot + 1) % len(self._residuals)
        self._times = [time, *self._times][: len(self._residuals)]
        return self.newest

    def weights(self, time: float) -> tuple[float, float]:
        """Weights of `newest` and `before` in the residual at `time`: (1, 0) as long as no line can be drawn."""
        if not self._times:
            raise RuntimeError("no residual has been kept")
        if len(self._times) < 2:
            return 1.0, 0.0
        newest, before = self._times
        span, ahead = newest - before, time - newest
        if span == 0.0 or not math.isfinite(span) or not math.isfinite(ahead):
            return 1.0, 0.0
        slope = ahead / span
        return 1.0 + slope, -slope
