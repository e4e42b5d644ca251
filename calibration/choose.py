"""Which linears stay in the bundle's own precision: the most sensitive ones, until the wanted quality is met.

The distinct graphs are few: where blocks would need many mixtures, some keep a linear more than they must.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..bundle.errors import InputError
from .block_graph import LINEARS

__all__ = ["MOST_GRAPHS", "Choice", "choose", "graph_name", "merged", "ranking"]

MOST_GRAPHS = 4  # mixtures of one bundle, the fully quantized one among them

Linear = tuple[int, str]  # block, name
Kept = tuple[frozenset[str], ...]  # per block: linears in high precision


@dataclass(frozen=True)
class Choice:
    """kept: per block, the linears in high precision. snr: [steps] decibels of the denoiser's output with it."""

    kept: Kept
    snr: np.ndarray

    @property
    def quantized(self) -> tuple[frozenset[str], ...]:
        return tuple(frozenset(LINEARS) - kept for kept in self.kept)

    @property
    def count(self) -> int:
        """Linears in high precision."""
        return sum(map(len, self.kept))


def ranking(snr: np.ndarray) -> list[Linear]:
    """All linears, the most sensitive first. `snr`: [blocks, linears, steps]; a linear is as good as its mean noise."""
    noise = np.mean(10 ** (-snr / 10), axis=-1)
    places = np.argsort(-noise, axis=None, kind="stable")
    return [(int(place) // len(LINEARS), LINEARS[int(place) % len(LINEARS)]) for place in places]


def graph_name(kept: Iterable[str]) -> str:
    """ "block" where all linears are quantized, else what stays: "block_keeps_ff_out"."""
    names = [name for name in LINEARS if name in set(kept)]
    return "block" if not names else "block_keeps_" + ("all" if len(names) == len(LINEARS) else "_".join(names))


def merged(kept: Sequence[frozenset[str]], most: int = MOST_GRAPHS) -> Kept:
    """At most `most` distinct sets: the two whose union costs the fewest further linears become one, and so on."""
    made = list(kept)
    while len(distinct := sorted(set(made), key=sorted)) > most:
        pairs = [(a, b) for i, a in enumerate(distinct) for b in distinct[i + 1 :]]
        costs = [sum(len((a | b) - one) for one in made if one in (a, b)) for a, b in pairs]
        a, b = pairs[costs.index(min(costs))]
        made = [a | b if one in (a, b) else one for one in made]
    return tuple(made)


def choose(
    order: Sequence[Linear],
    blocks: int,
    measure: Callable[[Kept], np.ndarray],
    *,
    min_snr: float | None = None,
    most: int | None = None,
) -> Choice:
    """Keeps the first of `order` in high precision, as few as give `min_snr` decibels at every measured timestep.

    Without `min_snr`, the first `most` are kept (None: none). With both, `most` is the limit.

    Raises:
        InputError: the quality cannot be had within the limit; the text says what can.
    """
    limit = len(order) if most is None else min(most, len(order))

    def kept(count: int) -> Kept:
        return merged([frozenset(name for block, name in order[:count] if block == i) for i in range(blocks)])

    def allowed(count: int) -> Kept:
        while sum(map(len, made := kept(count))) > limit:  # merging added some
            count -= 1
        return made

    if min_snr is None:
        made = allowed(limit if most is not None else 0)
        return Choice(made, measure(made))
    tried: dict[int, Choice] = {}

    def good(count: int) -> bool:
        made = allowed(count)
        tried[count] = Choice(made, measure(made))
        return float(tried[count].snr.min()) >= min_snr

    low, high = 0, limit
    if good(low):
        return tried[low]
    if limit == 0 or not good(high):
        best = max(tried.values(), key=lambda choice: float(choice.snr.min()))
        raise InputError(
            f"--min-snr {min_snr:g} cannot be had with {limit} linears in high precision: {float(best.snr.min()):.1f} dB is "
            f"what {best.count} of {len(order)} give. Raise --max-high-precision, or ask for less."
        )
    while high - low > 1:
        middle = (low + high) // 2
        if good(middle):
            high = middle
        else:
            low = middle
    return tried[high]
