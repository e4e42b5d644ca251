"""What is kept of a tensor that was seen: bounded in memory however much is seen, and mergeable.

A `TensorStatistics` belongs to the input of one linear. Of every channel it keeps the range, of the whole tensor a
histogram of magnitudes with fixed edges, of every timestep the range for text and video tokens of either guidance half;
and a fixed number of whole rows, drawn evenly over all that will be seen, to try scales on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..bundle.errors import InputError

__all__ = ["BINS", "KINDS", "TensorStatistics", "bin_of", "edges", "percentile", "statistics_bytes"]

KINDS = ("text", "video")
HALVES = 2
# The magnitudes' histogram: 16 bins an octave from 2^-24 to 2^24, the first bin holds what is smaller, zeros too.
OCTAVES, PER_OCTAVE, LOWEST = 48, 16, -24
BINS = OCTAVES * PER_OCTAVE + 1
FIELDS = ("minimum", "maximum", "histogram", "ranges", "rows", "filled")


def bin_of(magnitudes: np.ndarray) -> np.ndarray:
    """Bin numbers, 0 to BINS - 1, of values from 0 on."""
    with np.errstate(divide="ignore"):
        places = np.floor((np.log2(magnitudes) - LOWEST) * PER_OCTAVE) + 1
    return np.clip(places, 0, BINS - 1).astype(np.int64)


def edges() -> np.ndarray:
    """Upper edges of the bins, [BINS] float64."""
    return 2.0 ** (LOWEST + np.arange(BINS) / PER_OCTAVE)


def percentile(histogram: np.ndarray, share: float) -> float:
    """The magnitude that `share` (0..1) of all values do not exceed, to within a bin (4 %)."""
    total = int(histogram.sum())
    place = int(np.searchsorted(np.cumsum(histogram), share * total))
    return float(edges()[min(place, BINS - 1)])


@dataclass
class TensorStatistics:
    """
    minimum, maximum: [C] float32. histogram: [BINS] int64 of magnitudes. ranges: [T, halves, kinds, 2] float32, the
    least and the greatest value per timestep. rows: [R, C] float32, of which `filled` have come.
    """

    minimum: np.ndarray
    maximum: np.ndarray
    histogram: np.ndarray
    ranges: np.ndarray
    rows: np.ndarray
    filled: int = 0

    @classmethod
    def empty(cls, channels: int, steps: int, rows: int) -> TensorStatistics:
        ranges = np.empty((steps, HALVES, len(KINDS), 2), np.float32)
        ranges[..., 0], ranges[..., 1] = np.inf, -np.inf
        return cls(
            np.full(channels, np.inf, np.float32),
            np.full(channels, -np.inf, np.float32),
            np.zeros(BINS, np.int64),
            ranges,
            np.zeros((rows, channels), np.float32),
        )

    def add(self, seen: np.ndarray, text: int, step: int, half: int, chosen: np.ndarray) -> None:
        """Takes in `seen` [S, C], whose first `text` rows are text tokens; `chosen` are the rows to keep.

        Raises `ValueError` where values are not finite; the caller knows which tensor this is.
        """
        least, most = seen.min(axis=0), seen.max(axis=0)
        if not (np.isfinite(least).all() and np.isfinite(most).all()):
            raise ValueError("values that are not finite")
        np.minimum(self.minimum, least, out=self.minimum)
        np.maximum(self.maximum, most, out=self.maximum)
        # Every fourth row is enough for a histogram, and each is a quarter of the work.
        self.histogram += np.bincount(bin_of(np.abs(seen[step % 4 :: 4])).ravel(), minlength=BINS)
        for kind, part in enumerate((seen[:text], seen[text:])):
            if part.size:
                place = self.ranges[step, half, kind]
                place[0], place[1] = min(place[0], part.min()), max(place[1], part.max())
        count = min(len(chosen), len(self.rows) - self.filled)
        self.rows[self.filled : self.filled + count] = seen[chosen[:count]]
        self.filled += count

    def merge(self, other: TensorStatistics) -> None:
        """Takes in what another one has seen; rows until the place is full."""
        np.minimum(self.minimum, other.minimum, out=self.minimum)
        np.maximum(self.maximum, other.maximum, out=self.maximum)
        self.histogram += other.histogram
        np.minimum(self.ranges[..., 0], other.ranges[..., 0], out=self.ranges[..., 0])
        np.maximum(self.ranges[..., 1], other.ranges[..., 1], out=self.ranges[..., 1])
        count = min(other.filled, len(self.rows) - self.filled)
        self.rows[self.filled : self.filled + count] = other.rows[:count]
        self.filled += count

    @property
    def absmax(self) -> np.ndarray:
        """[C] float32: the largest magnitude of every channel."""
        return np.maximum(np.abs(self.minimum), np.abs(self.maximum))

    @property
    def kept(self) -> np.ndarray:
        """The rows that have come, [filled, C]."""
        return self.rows[: self.filled]

    def check(self, where: str) -> None:
        """`InputError` about the tensor called `where` if a scale cannot be made of what was seen."""
        if self.filled == 0:
            raise InputError(f"Nothing was seen of {where}. The calibration set is empty.")
        if float(self.maximum.max()) == float(self.minimum.min()):
            raise InputError(
                f"{where} was {float(self.maximum.max()):g} everywhere in the whole calibration set: no scale can be made of a "
                "constant. Use photos and pose clips that show something, and check the checkpoint."
            )

    def arrays(self, prefix: str) -> dict[str, np.ndarray]:
        """Everything by name, to be stored."""
        return {f"{prefix}{field}": np.asarray(getattr(self, field)) for field in FIELDS}

    @classmethod
    def of(cls, stored: Mapping[str, np.ndarray], prefix: str) -> TensorStatistics:
        """What `arrays` gave."""
        minimum, maximum, histogram, ranges, rows, filled = (stored[f"{prefix}{field}"] for field in FIELDS)
        return cls(minimum, maximum, histogram, ranges, rows, int(filled))


def statistics_bytes(channels: int, steps: int, rows: int) -> int:
    """What one `TensorStatistics` holds in memory."""
    return 4 * channels * (rows + 2) + 8 * BINS + 4 * steps * HALVES * len(KINDS) * 2
