"""How one tensor of the weight store is made from tensors of a checkpoint, as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..bundle.precision import Precision

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """One entry of the weight store. Several sources are concatenated along the OUTPUT axis (axis 0 of [out, in])."""

    target: str  # name in the weight store
    sources: tuple[str, ...]  # checkpoint names, joined before the transform
    shape: tuple[int, ...]  # shape in the weight store
    transpose: bool = False  # [out, in] -> [in, out]
    dtype: Precision | None = None  # None: the bundle's precision
    source_shapes: tuple[tuple[int, ...], ...] | None = None  # of each source; None: they follow from `shape`
    make: Callable[[Sequence[Tensor]], Tensor] | None = None  # replaces joining and transposing
