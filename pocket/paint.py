"""Painting shapes with soft edges and round shading into small pictures, the same bits on every machine (see `exact`).

Shapes are given per frame: points [F, 2] (columns, rows in pixels, the centre of the first pixel at 0.5) and sizes [F].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .exact import Floats

__all__ = ["Layer", "capsule", "ellipse", "trapezoid"]


@dataclass(frozen=True)
class Layer:
    """A shape over time, cut to the rectangle that it ever touches.

    cover: [F, h, w], 0..1. shade: [F, h, w], a factor on its colour. top, left: where the rectangle lies.
    """

    cover: Floats
    shade: Floats
    top: int
    left: int

    @property
    def area(self) -> tuple[slice, slice]:
        h, w = self.cover.shape[1:]
        return slice(self.top, self.top + h), slice(self.left, self.left + w)


def capsule(
    p: Floats, q: Floats, start: Floats | float, end: Floats | float, size: tuple[int, int], *, flat: bool = False
) -> Layer:
    """A round stick from p to q whose radius goes from `start` to `end`."""
    grid, (top, left) = _grid(np.concatenate([p, q]), _most(start, end) + 1.0, size)
    x, y, along, across, length = _axes(grid, p, q)
    t = np.clip(along / np.maximum(length * length, 1e-6), 0.0, 1.0)
    dx, dy = (q - p)[:, 0, None, None], (q - p)[:, 1, None, None]
    away = np.sqrt((x - t * dx) * (x - t * dx) + (y - t * dy) * (y - t * dy))
    radius = _per_frame(start) + t * (_per_frame(end) - _per_frame(start))
    cover = np.clip(radius - away + 0.5, 0.0, 1.0)
    return Layer(cover, _round(across / np.maximum(length, 1e-6) / radius, x, y, length, radius, flat), top, left)


def trapezoid(p: Floats, q: Floats, start: Floats | float, end: Floats | float, size: tuple[int, int]) -> Layer:
    """A band from p to q, `start` to `end` pixels wide to each side, with straight ends."""
    grid, (top, left) = _grid(np.concatenate([p, q]), _most(start, end) + 1.0, size)
    _, _, along, across, length = _axes(grid, p, q)
    length = np.maximum(length, 1e-6)
    t = along / length  # pixels
    share = np.clip(t / length, 0.0, 1.0)
    half = _per_frame(start) + share * (_per_frame(end) - _per_frame(start))
    u = across / length
    inside = np.clip(t + 0.5, 0.0, 1.0) * np.clip(length - t + 0.5, 0.0, 1.0)
    cover = inside * np.clip(half - np.abs(u) + 0.5, 0.0, 1.0)
    return Layer(cover, _shading(np.clip(u / half, -1.0, 1.0) * _lit_side(p, q)), top, left)


def ellipse(centre: Floats, across: Floats | float, down: Floats | float, size: tuple[int, int]) -> Layer:
    """An upright ellipse; the edge is as soft as a pixel, as far as its radii are alike."""
    grid, (top, left) = _grid(centre, _most(across, down) + 1.0, size)
    columns, rows = grid
    x = (columns - centre[:, 0, None, None]) / _per_frame(across)
    y = (rows - centre[:, 1, None, None]) / _per_frame(down)
    away = np.sqrt(x * x + y * y)
    cover = np.clip((1.0 - away) * _per_frame(np.minimum(across, down)) + 0.5, 0.0, 1.0)
    return Layer(cover, _shading(np.clip(0.8 * x + 0.6 * y, -1.0, 1.0)), top, left)


def _grid(points: Floats, reach: float, size: tuple[int, int]) -> tuple[tuple[Floats, Floats], tuple[int, int]]:
    """Pixel centres (columns [1, 1, w], rows [1, h, 1]) of the rectangle that the points reach, at least one pixel."""
    spans = []
    for axis, count in ((1, size[0]), (0, size[1])):
        low = min(max(int(np.floor(points[:, axis].min() - reach)), 0), count - 1)
        high = min(max(int(np.ceil(points[:, axis].max() + reach)), low + 1), count)
        spans.append((low, high))
    (top, bottom), (left, right) = spans
    columns = np.arange(left, right, dtype=np.float64) + 0.5
    rows = np.arange(top, bottom, dtype=np.float64) + 0.5
    return (columns[None, None, :], rows[None, :, None]), (top, left)


def _axes(grid: tuple[Floats, Floats], p: Floats, q: Floats) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """Offsets from p; dot and cross products with q - p; its length."""
    x, y = grid[0] - p[:, 0, None, None], grid[1] - p[:, 1, None, None]
    d = q - p
    dx, dy = d[:, 0, None, None], d[:, 1, None, None]
    return x, y, x * dx + y * dy, x * dy - y * dx, np.sqrt(dx * dx + dy * dy)


def _round(u: Floats, x: Floats, y: Floats, length: Floats, radius: Floats, flat: bool) -> Floats:
    if flat:
        return np.ones(np.broadcast_shapes(u.shape, x.shape, y.shape))
    # A stick seen along its axis is a ball: there the side that is lit is that of the picture, not that of the stick.
    share = np.clip(length / (2.0 * radius), 0.0, 1.0)
    return _shading(np.clip(share * u + (1.0 - share) * (0.8 * x + 0.6 * y) / radius, -1.0, 1.0))


def _shading(u: Floats) -> Floats:
    """Brightness over a round thing from its lit side (-1) to the other (1)."""
    away = u + 0.35
    return 1.08 - 0.30 * away * away


def _lit_side(p: Floats, q: Floats) -> Floats:
    """Which way `across` points, so that the left side of the picture is the lit one."""
    return np.where((q - p)[:, 1, None, None] > 0, 1.0, -1.0)


def _per_frame(value: Floats | float) -> Floats:
    return np.asarray(value, np.float64).reshape(-1, 1, 1)


def _most(*values: Floats | float) -> float:
    return max(float(np.max(value)) for value in values)
