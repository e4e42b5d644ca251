"""Rounding a weight matrix so that errors cancel: what one input channel's rounding did is made up for by the next ones.

After GPTQ (arXiv 2210.17323), with the second moments of the rows that the product will really see.
"""

from __future__ import annotations

import numpy as np

from .grids import Grid
from .pairs import room

__all__ = ["compensated", "second_moments"]

DAMPING = 0.01  # of the mean second moment: rows are fewer than channels in large models
BLOCK = 128


def second_moments(rows: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """[C, C] float64 of rows [R, C], damped by that share of their mean so that it can be inverted."""
    rows = rows.astype(np.float64)
    moments: np.ndarray = rows.T @ rows / max(1, len(rows))
    diagonal = np.einsum("ii->i", moments)
    diagonal += damping * max(float(diagonal.mean()), 1e-12)
    return moments


def compensated(
    weight: np.ndarray, scale: np.ndarray, moments: np.ndarray, grid: Grid, *, paired: bool = False
) -> np.ndarray:
    """Grid values [C, N] for `weight` [C, N] with output steps [N]; as good as rounding for uncorrelated inputs.

    `paired`: keep within what neighbouring channels may sum up to (see `pairs`).
    """
    # Channels that matter most are rounded first, while all others can still make up for them.
    order = np.argsort(-np.diag(moments), kind="stable")
    inverse = np.linalg.inv(moments[np.ix_(order, order)])
    factor = np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)  # upper
    left = weight[order].astype(np.float32)
    made = np.zeros_like(left)  # a partner that is not rounded yet leaves all the room
    partner = np.argsort(order)[order ^ 1] if paired else order
    for start in range(0, len(left), BLOCK):
        stop = min(start + BLOCK, len(left))
        errors = np.empty((stop - start, left.shape[1]), np.float32)
        for i in range(start, stop):
            least, most = room(made[partner[i]], grid.limit) if paired else (-grid.limit, grid.limit)
            made[i] = np.clip(grid.rounded(left[i] / scale), least, most)
            errors[i - start] = (left[i] - made[i] * scale) / factor[i, i]
            left[i + 1 : stop] -= factor[i, i + 1 : stop, None] * errors[i - start]
        left[stop:] -= factor[start:stop, stop:].T @ errors
    result = np.empty_like(made)
    result[order] = made
    return result
