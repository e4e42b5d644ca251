"""The sinusoidal embedding of timesteps (and of `ofs`), before its two linear layers."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["timestep_sinusoid"]


def timestep_sinusoid(timesteps: ArrayLike, width: int) -> NDArray[np.float32]:
    """[T] numbers -> [T, width] float32: cosines first, then sines, of t * exp(-ln(10000) i / (width / 2)).

    The published implementation makes the exponent, the frequency and the angle in float32. At t near 1000 that moves
    the angle by up to 6e-5, so the same three roundings are made here (with exact functions between them): ten times
    closer to its numbers than float64 throughout.

    Raises:
        ValueError: `width` is odd.
    """
    if width % 2:
        raise ValueError(f"the embedding's width must be even, not {width}")
    half = width // 2
    exponents = np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = np.multiply.outer(np.asarray(timesteps).astype(np.float32), frequencies).astype(np.float64)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
