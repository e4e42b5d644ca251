"""Backgrounds with structure: hills, a city, a beach; walls of bricks, stripes and tiles."""

from __future__ import annotations

import numpy as np

from .exact import Floats, Stream, sine
from .wardrobe import PLACES, RGB, Place

__all__ = ["draw_scenery"]


def draw_scenery(stream: Stream, place: Place, size: tuple[int, int]) -> tuple[Floats, float]:
    """([H, W, 3] in 0..255, the row of the horizon or of the wall's foot)."""
    _, uppers, lowers = PLACES[place.kind]
    upper, lower = _near(stream, uppers[place.upper]), _near(stream, lowers[place.lower])
    height, width = size
    row = np.arange(height, dtype=np.float64)[:, None] + 0.5
    column = np.arange(width, dtype=np.float64)[None, :] + 0.5
    unit = height / 96
    line = stream.between(0.62, 0.76) * height

    sky = upper * (1.06 - 0.16 * (row / height))[..., None] + np.zeros((height, width, 1))
    ground = lower * (0.86 + 0.22 * (row - line) / (height - line))[..., None] + np.zeros((height, width, 1))
    edge = np.clip(row - line + 0.5, 0.0, 1.0)[..., None] + np.zeros((height, width, 1))
    if place.kind == "hills":
        for depth, raise_ in ((0.72, 0.22), (0.88, 0.1)):
            phase, length = stream.between(0.0, 6.28), stream.between(0.7, 1.6)
            crest = line - raise_ * height * (0.75 + 0.25 * sine(phase + length * 6.28 * column / width))
            sky = _over(sky, lower * depth, np.clip(row - crest + 0.5, 0.0, 1.0))
    elif place.kind == "city":
        left = -stream.between(0.0, 8.0) * unit
        while left < width:
            broad, high = stream.between(9.0, 16.0) * unit, stream.between(0.25, 0.6) * height
            tone = lower * stream.between(0.62, 0.85)
            block = _box(row, column, line - high, line, left, left + broad)
            sky = _over(sky, tone, block)
            panes = _bars(row - line, 7.0 * unit, 3.0 * unit) * _bars(column - left - 1.0, 4.5 * unit, 2.0 * unit)
            lit = _box(row, column, line - high + 2.0, line - 2.0, left + 1.5 * unit, left + broad - 1.5 * unit)
            sky = _over(sky, tone * 0.55 + 100.0, panes * lit)
            left += broad + stream.between(0.0, 3.0) * unit
    elif place.kind == "beach":
        sea = np.array([70.0, 130.0, 165.0])
        sky = _over(
            sky, sea, np.clip(row - (line - stream.between(0.14, 0.22) * height) + 0.5, 0.0, 1.0) + 0.0 * column
        )
        x, y, r = (
            stream.between(0.15, 0.85) * width,
            stream.between(0.1, 0.28) * height,
            stream.between(4.0, 7.0) * unit,
        )
        away = np.sqrt((column - x) * (column - x) + (row - y) * (row - y))
        sky = _over(sky, np.array([250.0, 240.0, 190.0]), np.clip(r - away + 0.5, 0.0, 1.0))
    elif place.kind == "bricks":
        tall, broad = stream.between(6.0, 8.0) * unit, stream.between(12.0, 16.0) * unit
        odd = np.floor(row / tall) - 2.0 * np.floor(np.floor(row / tall) / 2.0)
        joints = np.maximum(_bars(row, tall, 1.2) + 0.0 * column, _bars(column + 0.5 * broad * odd, broad, 1.2))
        sky = _over(sky, upper * 0.78 + 10.0, joints)
    elif place.kind == "stripes":
        period = stream.between(8.0, 14.0) * unit
        sky = _over(sky, upper * 0.82, _bars(column + stream.between(0.0, 9.0), period, 0.5 * period) + 0.0 * row)
    else:  # tiles
        period = stream.between(10.0, 15.0) * unit
        first = np.floor(row / period) + np.floor(column / period)
        dark = first - 2.0 * np.floor(first / 2.0)
        sky = _over(sky, upper * 0.86, dark)
    if place.kind in ("bricks", "stripes", "tiles"):
        board = np.clip(row - (line - 3.0 * unit) + 0.5, 0.0, 1.0) + 0.0 * column
        sky = _over(sky, lower * 0.7, board)
        ground = _over(ground, lower * 0.8, _bars(row - line, 5.0 * unit, 0.8) * 0.6 + 0.0 * column)
    else:
        ground = _over(ground, lower * 0.78, 0.5 * _speckles(stream, row, column, line, height, width))
    return np.clip(sky + edge * (ground - sky), 0.0, 255.0), line


def _near(stream: Stream, colour: RGB) -> Floats:
    """A shade of the colour: a little lighter or darker, a little off."""
    light = stream.between(-12.0, 12.0)
    return np.array([c + light + stream.between(-6.0, 6.0) for c in colour])


def _over(under: Floats, colour: Floats, cover: Floats) -> Floats:
    return under + cover[..., None] * (colour - under)


def _box(row: Floats, column: Floats, top: float, bottom: float, left: float, right: float) -> Floats:
    down = np.clip(row - top + 0.5, 0.0, 1.0) * np.clip(bottom - row + 0.5, 0.0, 1.0)
    return down * (np.clip(column - left + 0.5, 0.0, 1.0) * np.clip(right - column + 0.5, 0.0, 1.0))


def _bars(x: Floats, period: float, thick: float) -> Floats:
    """Soft bars of `thick` pixels, one per period."""
    place = x - period * np.floor(x / period)
    return np.clip(0.5 * thick - np.abs(place - 0.5 * period) + 0.5, 0.0, 1.0)


def _speckles(stream: Stream, row: Floats, column: Floats, line: float, height: int, width: int) -> Floats:
    """A few flat tufts or stones on the ground."""
    cover = np.zeros((height, width))
    for _ in range(7):
        x, y = stream.between(0.0, width), stream.between(line + 2.0, height)
        broad = stream.between(3.0, 6.0)
        dx, dy = (column - x) / broad, (row - y) / 1.2
        cover = np.maximum(cover, np.clip((1.0 - np.sqrt(dx * dx + dy * dy)) * 1.2 + 0.5, 0.0, 1.0))
    return cover
