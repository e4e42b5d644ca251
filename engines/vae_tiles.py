"""Which pieces of a frame the VAE may work on at once, best first."""

from __future__ import annotations

from typing import NamedTuple

from .engine_set import ClipSize
from .model_facts import ModelFacts

__all__ = ["Tile", "clipped", "tiles_of"]

LEAST_TILE = 16  # latents; below that, overlaps and seams grow out of proportion
FRACTIONS = (1.0, 5 / 6, 2 / 3, 1 / 2)  # of the published tile


class Tile(NamedTuple):
    """Size of a VAE tile in latents. `whole`: it covers the frame, which is then not tiled."""

    rows: int
    columns: int
    whole: bool

    @property
    def overlap(self) -> tuple[int, int]:
        """Rows and columns that it shares with its neighbours: the published sixth and fifth, rounded up."""
        rows, columns = self.rows, self.columns
        return min(rows - 1, rows - int(rows * (1 - 1 / 6))), min(columns - 1, columns - int(columns * (1 - 1 / 5)))


def tiles_of(facts: ModelFacts, size: ClipSize) -> tuple[Tile, ...]:
    """VAE tiles for a clip, best first: the whole frame, the published tile (half of the VAE's sample size each way), and
    smaller shares of that down to 16 latents a side. None is larger than the frame.

    The overlaps keep their published shares whatever the tile (`Tile.overlap`).
    """
    vae = facts.vae
    scale = vae.spatial_compression
    published = max(1, vae.sample_height // 2 // scale), max(1, vae.sample_width // 2 // scale)
    tiles = [clipped(facts, size, (size.height, size.width))]
    for fraction in FRACTIONS:
        rows, columns = (max(min(side, LEAST_TILE), int(side * fraction)) for side in published)
        tile = clipped(facts, size, (rows, columns))
        if tile not in tiles:
            tiles.append(tile)
    return tuple(tiles)


def clipped(facts: ModelFacts, size: ClipSize, tile: tuple[int, int]) -> Tile:
    """`tile` (rows, columns), cut to the clip's frame."""
    scale = facts.vae.spatial_compression
    frame = size.height // scale, size.width // scale
    rows, columns = min(tile[0], frame[0]), min(tile[1], frame[1])
    return Tile(rows, columns, (rows, columns) == frame)
