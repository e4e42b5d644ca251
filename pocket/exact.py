"""Numbers that are the same on every machine: a random stream and a sine.

Clips are drawn with nothing but integers and with IEEE 754 additions, subtractions, multiplications, divisions, square
roots, roundings and comparisons of float64, element by element. The standard fixes the result of each of these to the last
bit, and numpy does each as a step of its own. Left out is what a library may compute as it likes: sin, cos, exp, power;
sums, dot products and means, whose order of adding varies with the processor; and numpy's random distributions, which
change between releases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "Stream", "cosine", "sine"]

Floats = NDArray[np.float64]
T = TypeVar("T")

_MASK = (1 << 64) - 1
_TURN = 6.283185307179586
# sin(x) = x * (1 - x^2/3! + x^4/5! - ...), good to 1e-9 in -pi/2..pi/2
_TAYLOR = (1.0, -1 / 6, 1 / 120, -1 / 5040, 1 / 362880, -1 / 39916800, 1 / 6227020800)


class Stream:
    """A seeded stream of random numbers: SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom generators")."""

    def __init__(self, seed: int) -> None:
        self._state = seed & _MASK
        self.bits()  # neighbouring seeds part

    def bits(self) -> int:
        """The next 64 bits."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return z ^ (z >> 31)

    def unit(self) -> float:
        """In [0, 1), a multiple of 2**-53."""
        return (self.bits() >> 11) / (1 << 53)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.unit()

    def whole(self, count: int) -> int:
        """In 0..count-1."""
        return (self.bits() >> 32) * count >> 32

    def chance(self, share: float) -> bool:
        return self.unit() < share

    def choice(self, items: Sequence[T]) -> T:
        return items[self.whole(len(items))]

    def two(self, items: Sequence[T]) -> tuple[T, T]:
        """Two different items."""
        first = self.whole(len(items))
        second = (first + 1 + self.whole(len(items) - 1)) % len(items)
        return items[first], items[second]


def sine(angle: Floats | float) -> Floats:
    """sin of an angle in radians, to about 1e-9; the same bits everywhere."""
    x = np.asarray(angle, np.float64)
    x = x - _TURN * np.floor(x / _TURN + 0.5)  # -pi..pi
    x = np.where(x > _TURN / 4, _TURN / 2 - x, np.where(x < -_TURN / 4, -_TURN / 2 - x, x))
    square = x * x
    result = np.full_like(x, _TAYLOR[-1])
    for factor in _TAYLOR[-2::-1]:
        result = result * square + factor
    return result * x


def cosine(angle: Floats | float) -> Floats:
    """cos of an angle in radians; see `sine`."""
    return sine(np.asarray(angle, np.float64) + _TURN / 4)
