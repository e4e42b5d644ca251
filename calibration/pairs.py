"""Weights that processors without VNNI multiply exactly.

Their kernels for unsigned activations (0 to 255) and signed weights add two neighbouring products in 16 bits and saturate
there: 255 * (a + b) must stay within 32767. So of input channels 2 k and 2 k + 1, weights of one sign may sum up to 128.
That costs a slightly larger step (a quarter, for weights that are normally distributed) and makes ONNX Runtime's fastest
integer kernel give the same integers as every other machine, TensorRT's among them.
"""

from __future__ import annotations

import numpy as np

__all__ = ["PAIR_LIMIT", "fits", "pair_sums", "room"]

PAIR_LIMIT = 128  # 255 * 128 = 32640


def pair_sums(weight: np.ndarray) -> np.ndarray:
    """[C, N] -> [C / 2, N]: the larger of the sums of a pair's positive and of its negative parts."""
    pairs = weight.reshape(len(weight) // 2, 2, -1)
    return np.maximum(np.maximum(pairs, 0).sum(axis=1), np.maximum(-pairs, 0).sum(axis=1))


def fits(values: np.ndarray) -> bool:
    """Whether int8 values [C, N] can be multiplied exactly everywhere."""
    return int(pair_sums(values.astype(np.int32)).max(initial=0)) <= PAIR_LIMIT


def room(partner: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """(least, most) [N] that a channel's values may be beside its partner's [N]; `limit` without one."""
    most = np.minimum(limit, PAIR_LIMIT - np.maximum(partner, 0))
    least = np.maximum(-limit, -PAIR_LIMIT - np.minimum(partner, 0))
    return least, most
