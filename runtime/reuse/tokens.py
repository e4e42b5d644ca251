"""Which video tokens are active: those nearest to the drawn skeleton, or a comparison of the same number."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...bundle.config import Geometry
from .policy import ReusePolicy

__all__ = ["Tokens", "Touched", "active_count", "choose_tokens", "distances", "drawn_tokens", "token_changes"]

BLACK = 16  # of 255: what compression leaves of black is below
REACH_IN_TIME = 1  # token times before and after one whose skeleton counts for it: the person is on the way
SEED = 0  # of the lot for the comparison
GOLDEN = 0.6180339887498949

Tokens = NDArray[np.int64]
Touched = NDArray[np.bool_]


def active_count(policy: ReusePolicy, tokens: int) -> int:
    """How many of the video tokens are active in a token step: at least one."""
    return max(1, min(tokens, round(policy.token_share * tokens)))


def drawn_tokens(pose: NDArray[np.uint8], size: Geometry, temporal_compression: int) -> Touched:
    """Tokens whose patch a pose drawing touches, [times, rows, columns].

    pose: [F, H, W, 3] frames of the clip's size. Frame 0 is latent frame 0; each `temporal_compression` frames after it
    are one more.
    """
    times, rows, columns = size.grid
    drawn = pose.max(axis=-1) > BLACK  # [F, H, W]
    frames = drawn.reshape(len(drawn), rows, -1, columns, drawn.shape[2] // columns).any(axis=(2, 4))
    touched = np.zeros((times, rows, columns), bool)
    patch = size.latent_frames // times
    for number, frame in enumerate(frames):
        latent = -(-number // temporal_compression)
        touched[min(latent // patch, times - 1)] |= frame
    return touched


def distances(touched: Touched) -> NDArray[np.float64]:
    """Distance of every token to the nearest touched one at its time (or one time before or after), in tokens, [N].

    Infinite where nothing is drawn at those times.
    """
    times, rows, columns = touched.shape
    result = np.full((times, rows, columns), np.inf)
    row, column = np.mgrid[:rows, :columns]
    for t in range(times):
        near = touched[max(0, t - REACH_IN_TIME) : t + REACH_IN_TIME + 1].any(axis=0)
        at = np.argwhere(near)
        if len(at):
            # One touched row at a time keeps the table small.
            for r in np.unique(at[:, 0]):
                across = np.abs(column[0][:, None] - at[at[:, 0] == r, 1]).min(axis=1)  # [columns]
                np.minimum(result[t], np.hypot(row - r, across), out=result[t])
    return result.reshape(-1)


def token_changes(before: NDArray[np.float32], now: NDArray[np.float32], size: Geometry) -> NDArray[np.float32]:
    """How far the prediction of every token moved, [N]: squares summed over its patch. Predictions: [F, C, H, W]."""
    times, rows, columns = size.grid
    moved = np.square(now - before).sum(axis=1)  # [F, H, W]
    patches = moved.reshape(times, -1, rows, size.latent_height // rows, columns, size.latent_width // columns)
    return patches.sum(axis=(1, 3, 5)).reshape(-1)


def choose_tokens(policy: ReusePolicy, touched: Touched, changes: NDArray[np.float32] | None = None) -> Tokens:
    """The active tokens, [A] rising; `active_count` of them. Of equally near ones, those that lie spread are taken.

    changes: of every token's prediction (`token_changes`), for policies that follow them; None: not known yet.
    """
    count, tokens = active_count(policy, touched.size), touched.size
    if policy.token_choice == "random":
        order = np.random.default_rng(SEED).permutation(tokens)
    else:
        spread = np.arange(tokens) * GOLDEN % 1.0  # multiples of the golden section fill an interval evenly
        order = np.lexsort((spread, distances(touched))) if policy.token_choice == "pose" else np.argsort(spread)
    if changes is not None:
        rest = order[count - round(policy.token_changed * count) :]  # a view
        rest[:] = rest[np.argsort(-changes[rest], kind="stable")]
    return np.sort(order[:count]).astype(np.int64)
