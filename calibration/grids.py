"""The numbers that a quantized tensor can hold, and how values are rounded to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..bundle.manifest import Scheme
from ..bundle.precision import Precision, widen

__all__ = ["FP8", "INT8", "Grid", "as_stored", "grid_of", "raised", "representable"]


@dataclass(frozen=True)
class Grid:
    """A number format for quantized values.

    limit: the largest magnitude that a scale is made for. unit: the constant scale of the graph, a power of two; grid
    values times `unit` lie within -1 and 1, so that a row of products never leaves float16. dtype: in a weight file.
    """

    name: str
    limit: float
    unit: float
    dtype: str
    rounded: Callable[[np.ndarray], np.ndarray]  # float32 -> the nearest grid values as float32, saturated
    encode: Callable[[np.ndarray], np.ndarray]  # grid values -> what a file holds


def _int8(x: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(x), -128, 127).astype(np.float32)


def _fp8_type() -> Any:
    import ml_dtypes

    return ml_dtypes.float8_e4m3fn


def _fp8(x: np.ndarray) -> np.ndarray:
    narrow: np.ndarray = np.clip(x, -448, 448).astype(np.float32).astype(_fp8_type())
    return narrow.astype(np.float32)


INT8 = Grid("int8", 127, 2.0**-7, "I8", _int8, lambda x: x.astype(np.int8))
FP8 = Grid("fp8", 448, 2.0**-9, "F8_E4M3", _fp8, lambda x: x.astype(_fp8_type()).view(np.uint8))


def grid_of(scheme: Scheme) -> Grid:
    return FP8 if scheme == "fp8" else INT8


def as_stored(values: np.ndarray, precision: Precision) -> np.ndarray:
    """float32 -> what a file of that precision holds (bfloat16 as uint16), rounded to nearest, ties to even."""
    if precision == "fp16":
        with np.errstate(over="ignore"):  # the caller looks for what is not finite
            return values.astype(np.float16)
    if precision == "bf16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype(np.float32)


def raised(values: np.ndarray, precision: Precision) -> np.ndarray:
    """Positive values a little up to some that `precision` has, as float32: steps that must not become smaller."""
    return representable(
        values * np.float32(1 + {"fp32": 0.0, "fp16": 2.0**-10, "bf16": 2.0**-7}[precision]), precision
    )


def representable(values: np.ndarray, precision: Precision) -> np.ndarray:
    """The nearest values that `precision` has, as float32."""
    return widen(as_stored(values, precision))
