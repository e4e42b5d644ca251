"""Rotary positions of the video tokens (RoPE, Su et al. 2021, arXiv 2104.09864) on three axes: time, rows, columns.

A head's channels are shared out: a quarter for time, three eighths for rows, three eighths for columns (64 = 16 + 24 +
24). Tokens run over time, then rows, then columns. Two styles of positions exist, named as in diffusers:

- "linspace" (CogVideoX 1.0): rows and columns are positions in the base grid that the model was trained on: the grid's
  shape is fitted into the base, centred, and its rows and columns lie evenly spaced in that box. Time counts 0, 1, 2.
- "slice" (CogVideoX 1.5): positions are 0, 1, 2, ... on every axis, whatever the base.

Tables come in the published layout, "interleaved": channels 2i and 2i + 1 are a pair that turns by one angle, so every
value stands twice in a row. Exported weights have the pairs (i, i + head_dim / 2) instead, so that a rotation needs no
strided access; `split_halves` gives the table for those.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bundle.errors import BundleError

__all__ = ["RopeStyle", "axis_table", "crop_region", "rope_table", "split_halves", "with_text_prefix"]

RopeStyle = Literal["linspace", "slice"]

Floats = NDArray[np.float32]


def crop_region(grid: tuple[int, int], base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The box ((top, left), (bottom, right)) got by fitting `grid` (rows, columns) into `base`, centred.

    Every rounding is half to even (Python's `round`), in the published order of operations.
    """
    rows, columns = grid
    base_rows, base_columns = base
    if rows / columns > base_rows / base_columns:
        height, width = base_rows, round(base_rows / rows * columns)
    else:
        height, width = round(base_columns / columns * rows), base_columns
    top, left = round((base_rows - height) / 2.0), round((base_columns - width) / 2.0)
    return (top, left), (top + height, left + width)


def axis_table(positions: ArrayLike, dim: int, theta: float = 10000.0) -> tuple[Floats, Floats]:
    """Cosine and sine tables of one axis, each [positions, dim] float32, every frequency twice in a row.

    Frequencies and angles are rounded to float32 as the published implementation has them; the functions are exact.
    """
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    powers = np.power(theta, exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / powers
    angles = np.multiply.outer(np.asarray(positions, dtype=np.float32), frequencies).astype(np.float64)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return np.repeat(cos, 2, axis=1), np.repeat(sin, 2, axis=1)


def rope_table(
    grid: tuple[int, int, int],
    style: RopeStyle,
    *,
    base: tuple[int, int] | None = None,
    head_dim: int = 64,
    theta: float = 10000.0,
) -> tuple[Floats, Floats]:
    """The rotary tables of a video: (cos, sin), each [N, head_dim] float32, interleaved, N = product of `grid`.

    Args:
        grid: tokens along time, rows and columns. In time the 1.0 style counts latent frames, the 1.5 style patches.
        style: "linspace" for 1.0-style models (no `patch_size_t`), "slice" for 1.5-style ones.
        base: for "linspace" only, and needed there: the transformer's (sample_height, sample_width) over its patch
            size.
        head_dim: channels of one attention head; a multiple of 16.

    Raises:
        BundleError: the model's head size or style is not one of these, or the grid is empty.
    """
    if head_dim <= 0 or head_dim % 16:
        raise BundleError(
            f"The model's head size {head_dim} does not divide into rotary axes; it must be a multiple of 16."
        )
    if min(grid) < 1:
        raise BundleError(f"The token grid {grid} is empty along one axis.")
    frames, rows, columns = grid
    if style == "linspace":
        if base is None or min(base) < 1:
            raise BundleError(f"Rotary positions of the 'linspace' style need the model's sample size; it is {base}.")
        (top, left), (bottom, right) = crop_region((rows, columns), base)
        row_positions = np.linspace(top, bottom, rows, endpoint=False)
        column_positions = np.linspace(left, right, columns, endpoint=False)
    elif style == "slice":
        row_positions, column_positions = np.arange(rows, dtype=float), np.arange(columns, dtype=float)
    else:
        raise BundleError(f"Rotary positions of style {style!r} are not known; 'linspace' and 'slice' are.")

    time_dim, space_dim = head_dim // 4, head_dim // 8 * 3
    per_axis = (
        axis_table(np.arange(frames), time_dim, theta),
        axis_table(row_positions, space_dim, theta),
        axis_table(column_positions, space_dim, theta),
    )
    cos, sin = (np.empty((frames, rows, columns, head_dim), dtype=np.float32) for _ in range(2))
    for which, table in enumerate((cos, sin)):
        time, row, column = (axis[which] for axis in per_axis)
        table[..., :time_dim] = time[:, None, None, :]
        table[..., time_dim : time_dim + space_dim] = row[None, :, None, :]
        table[..., time_dim + space_dim :] = column[None, None, :, :]
    return cos.reshape(-1, head_dim), sin.reshape(-1, head_dim)


def split_halves(table: Floats) -> Floats:
    """Interleaved [N, D] -> half-split [N, D]: the even channels first, then the odd ones."""
    return np.concatenate([table[:, 0::2], table[:, 1::2]], axis=1)


def with_text_prefix(cos: Floats, sin: Floats, text_tokens: int) -> tuple[Floats, Floats]:
    """Prepends `text_tokens` rows that rotate nothing (cosine 1, sine 0), for attention over [text; video]."""
    still = (text_tokens, cos.shape[1])
    return (
        np.concatenate([np.ones(still, dtype=np.float32), cos]),
        np.concatenate([np.zeros(still, dtype=np.float32), sin]),
    )
