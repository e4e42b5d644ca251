"""One linear at a time: how much of the activations' spread moves into the weights, which scale, and rounded how.

What is tried is judged by the output: kept rows times weights, exactly and as the quantized graph computes it.

Notation: rows x [R, C], weight w [C, N]. The graph computes Q(x * in_scale) @ q * out_scale, everything but Q linear, with
in_scale = unit / (smooth * step) and out_scale = step * weight_step / unit^2. Both vectors are rounded to the bundle's
precision before anything is derived from them, so that storing them costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np

from ..bundle.manifest import Scheme
from ..bundle.precision import Precision
from .compensate import DAMPING, compensated, second_moments
from .grids import INT8, Grid, grid_of, raised, representable
from .pairs import PAIR_LIMIT, pair_sums
from .statistics import TensorStatistics

__all__ = ["Decision", "Quantized", "Settings", "decide", "decide_weights", "snr"]

ALPHAS = (None, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # None: no smoothing
PERCENTILES = (0.9999, 0.999)
CLIPS = tuple(np.linspace(1.0, 0.5, 11))  # shares of the range that the search for the least square error tries
MOST_COLUMNS = 512  # that candidates are compared on
SEARCHED = 256  # rows of the search for the least square error
EVALUATED = 4  # one row in so many is kept apart for judging


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a person may change. smooth: whether alpha is searched. compensate: whether rounding errors may be made up
    for; it is done where it pays."""

    scheme: Scheme = "int8"
    smooth: bool = True
    compensate: bool = True


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided about a linear, and how good it is. snr: decibels of the product's output on rows that the decision
    did not see; plain_snr: with the whole range as scale, no smoothing, plain rounding. tried: SNR of every method."""

    alpha: float | None
    method: str
    step: float  # of the activations, after smoothing; 0 where they are not quantized
    compensated: bool
    snr: float
    plain_snr: float
    tried: dict[str, float]


@dataclass(frozen=True)
class Quantized:
    """A quantized linear: grid values [C, N] as the file holds them, in_scale [C] (None: activations are not quantized) and
    out_scale [N], float32 but representable in the bundle's precision."""

    weight: np.ndarray
    in_scale: np.ndarray | None
    out_scale: np.ndarray


def snr(exact: np.ndarray, found: np.ndarray) -> float:
    """Signal to noise in decibels; infinite where both are the same."""
    noise = float(np.square(exact - found, dtype=np.float64).sum())
    signal = float(np.square(exact, dtype=np.float64).sum())
    return float("inf") if noise == 0 else 10 * float(np.log10(max(signal, 1e-300) / noise))


@dataclass(frozen=True)
class _Candidate:
    """Smoothing [C], activation step, weight steps [N], all as the graph will have them."""

    alpha: float | None
    method: str
    in_scale: np.ndarray
    out_scale: np.ndarray
    grid: Grid
    smooth: np.ndarray  # with the step taken out of in_scale
    step: float

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """What the product's integer input stands for, per integer: [R, C] grid values."""
        return self.grid.rounded(rows * (self.in_scale / np.float32(self.grid.unit)))

    def weight_steps(self) -> np.ndarray:
        return self.out_scale * np.float32(self.grid.unit**2 / self.step)

    def product(self, rows: np.ndarray, weight: np.ndarray, columns: slice = slice(None)) -> np.ndarray:
        """Rows on the grid times weights on the grid, in the output's units."""
        return (rows @ weight) * (self.out_scale[columns] * np.float32(self.grid.unit**2))


def decide(
    seen: TensorStatistics, weight: np.ndarray, settings: Settings, precision: Precision, *, stored: bool
) -> tuple[Decision, Quantized]:
    """Decides weights and activations of one linear.

    Args:
        weight: [C, N] float32. stored: whether in_scale will be a vector of the bundle's precision (of `out` and `ff_out`;
            for the others it goes into the modulation table, in float32).
    """
    grid = grid_of(settings.scheme)
    rows, held = _split(seen.kept)
    columns = slice(None, None, max(1, -(-weight.shape[1] // MOST_COLUMNS)))
    exact = held @ weight[:, columns]
    tried: dict[str, float] = {}
    best: tuple[float, _Candidate] | None = None
    for candidate in _candidates(seen, rows, weight, settings, grid, precision, stored):
        rounded = _rounded(weight[:, columns], candidate, columns)
        quality = snr(exact, candidate.product(candidate.rows(held), rounded, columns))
        tried[f"{'none' if candidate.alpha is None else candidate.alpha} {candidate.method}"] = round(quality, 3)
        if best is None or quality > best[0]:
            best = quality, candidate
    if best is None:
        raise RuntimeError("nothing was tried")
    quality, chosen = best
    values = _rounded(weight, chosen)
    used = False
    if settings.compensate:
        seen_rows = chosen.rows(rows)
        smoothed = weight * chosen.smooth[:, None]
        moments = second_moments(seen_rows)
        improved = compensated(smoothed, chosen.weight_steps(), moments, grid, paired=grid is INT8)
        better = snr(exact, chosen.product(chosen.rows(held), improved[:, columns], columns))
        if better > quality:
            values, quality, used = improved, better, True
    decision = Decision(
        alpha=chosen.alpha,
        method=chosen.method,
        step=chosen.step,
        compensated=used,
        snr=round(quality, 3),
        plain_snr=tried["none range"],
        tried=tried,
    )
    return decision, Quantized(grid.encode(values), chosen.in_scale, chosen.out_scale)


def decide_weights(
    rows: np.ndarray, weight: np.ndarray, settings: Settings, precision: Precision, damping: float = DAMPING
) -> tuple[Decision, Quantized]:
    """Decides the weights alone; `rows` [R, C] are what they will be multiplied with. `damping`: see `second_moments`."""
    grid = grid_of("int8-weights")
    unit = np.float32(grid.unit)
    rows, held = _split(rows)
    exact = held @ weight
    out_scale = raised(_steps(weight, grid) / unit, precision)
    steps = out_scale * unit
    values = np.maximum(grid.rounded(weight / steps), -grid.limit)
    plain = snr(exact, held @ (values * steps))
    quality, used = plain, False
    if settings.compensate:
        improved = compensated(weight, steps, second_moments(rows, damping), grid)
        better = snr(exact, held @ (improved * steps))
        if better > quality:
            values, quality, used = improved, better, True
    decision = Decision(
        alpha=None,
        method="weights",
        step=0.0,
        compensated=used,
        snr=round(quality, 3),
        plain_snr=round(plain, 3),
        tried={},
    )
    return decision, Quantized(grid.encode(values), None, out_scale)


def _split(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows to decide with and rows to judge by; with very few, the same."""
    if len(rows) < 2 * EVALUATED:
        return rows, rows
    held = np.arange(len(rows)) % EVALUATED == EVALUATED - 1
    return rows[~held], rows[held]


def _steps(weight: np.ndarray, grid: Grid, paired: bool = False) -> np.ndarray:
    """Per output channel: the step with which its largest weight, or pair of weights, just fits."""
    steps = np.maximum(np.abs(weight).max(axis=0), 1e-12) / grid.limit
    if paired:  # both may be rounded up by a half
        steps = np.maximum(steps, pair_sums(weight).max(axis=0) / (PAIR_LIMIT - 1))
    return steps.astype(np.float32)


def _rounded(weight: np.ndarray, candidate: _Candidate, columns: slice = slice(None)) -> np.ndarray:
    grid = candidate.grid
    values = grid.rounded(weight * candidate.smooth[:, None] / candidate.weight_steps()[columns])
    return np.clip(values, -grid.limit, grid.limit)


def _smoothings(
    absmax: np.ndarray, weight: np.ndarray, settings: Settings
) -> Iterator[tuple[float | None, np.ndarray]]:
    yield None, np.ones_like(absmax)
    if not settings.smooth:
        return
    spread = np.maximum(absmax, 1e-5 * float(absmax.max()))
    largest = np.abs(weight).max(axis=1)
    largest = np.maximum(largest, 1e-5 * max(float(largest.max()), 1e-12))
    for alpha in ALPHAS:
        if alpha is not None:
            smooth = spread**alpha / largest ** (1 - alpha)
            # Their common size is the step's business.
            yield alpha, (smooth / np.exp(np.log(smooth).mean())).astype(np.float32)


def _candidates(
    seen: TensorStatistics,
    rows: np.ndarray,
    weight: np.ndarray,
    settings: Settings,
    grid: Grid,
    precision: Precision,
    stored: bool,
) -> Iterator[_Candidate]:
    for alpha, smooth in _smoothings(seen.absmax, weight, settings):
        outputs = _steps(weight * smooth[:, None], grid, paired=grid is INT8)
        for method, step in _activation_steps(rows / smooth, float((seen.absmax / smooth).max()), grid):
            in_scale = (np.float32(grid.unit) / (smooth * np.float32(step))).astype(np.float32)
            if stored:
                in_scale = representable(in_scale, precision)
            exact = np.float32(grid.unit) / (in_scale * np.float32(step))
            out_scale = raised(outputs * np.float32(step / grid.unit**2), precision)
            yield _Candidate(alpha, method, in_scale, out_scale, grid, exact, step)


def _activation_steps(rows: np.ndarray, largest: float, grid: Grid) -> Iterator[tuple[str, float]]:
    """(method, step): the whole range that was seen anywhere, percentiles, and the least square error of the rows."""
    whole = largest / grid.limit
    yield "range", whole
    magnitudes = np.abs(rows)
    for share in PERCENTILES:
        clipped = float(np.quantile(magnitudes, share))
        if 0 < clipped < largest:
            yield f"percentile {100 * share:g}", clipped / grid.limit
    some = rows[:: max(1, len(rows) // SEARCHED)]
    errors = [float(np.square(grid.rounded(some / (whole * c)) * (whole * c) - some).mean()) for c in CLIPS]
    if (least := int(np.argmin(errors))) > 0:
        yield "mse", whole * float(CLIPS[least])
