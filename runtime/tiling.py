"""Spatial tiles of the video VAE: where they lie and how their results are blended.

Tiles overlap; each one is coded alone, then blended linearly into its neighbours above and to the left, which are
themselves already blended (as the published implementation does it, `AutoencoderKLCogVideoX.tiled_decode` in diffusers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Tiling", "stitch"]

# The published overlaps, as shares of a tile's rows and columns.
_OVERLAP_ROWS = 1 / 6
_OVERLAP_COLUMNS = 1 / 5


@dataclass(frozen=True)
class Tiling:
    """Tile sizes and overlaps, in latents; one latent stands for `compression` x `compression` pixels.

    The first tile starts at the first row (column), each further one `rows - overlap_rows` (`columns - overlap_columns`)
    later; the last tiles are as small as what is left for them.

    Raises:
        ValueError: a size is not positive, or an overlap is not less than its tile.
    """

    rows: int
    columns: int
    overlap_rows: int
    overlap_columns: int
    compression: int

    def __post_init__(self) -> None:
        for size, overlap in ((self.rows, self.overlap_rows), (self.columns, self.overlap_columns)):
            if not 0 <= overlap < size:
                raise ValueError(f"a tile of {size} latents cannot overlap its neighbour by {overlap}")
        if self.compression < 1:
            raise ValueError(f"the spatial compression must be positive, not {self.compression}")

    @classmethod
    def published(cls, sample_height: int, sample_width: int, compression: int) -> Tiling:
        """The published geometry: tiles of half the VAE's sample size (pixels), overlapping by 1/6 and 1/5.

        Equal to the published formulas wherever these fit together (tile sizes in latents that divide by 6 and 5, as for
        every published sample size). Elsewhere those would give frames of a wrong size; here strides are then rounded
        down to whole latents.
        """
        rows, columns = max(1, sample_height // 2 // compression), max(1, sample_width // 2 // compression)
        return cls(
            rows,
            columns,
            min(rows - 1, rows - int(rows * (1 - _OVERLAP_ROWS))),
            min(columns - 1, columns - int(columns * (1 - _OVERLAP_COLUMNS))),
            compression,
        )

    @property
    def pixel_rows(self) -> int:
        """Height of a tile in pixels."""
        return self.rows * self.compression

    @property
    def pixel_columns(self) -> int:
        """Width of a tile in pixels."""
        return self.columns * self.compression

    def covers(self, rows: int, columns: int) -> bool:
        """Whether one tile holds a whole frame of so many latent rows and columns, so that nothing is tiled."""
        return rows <= self.rows and columns <= self.columns

    def grid(self, rows: int, columns: int, scale: int = 1) -> list[list[tuple[slice, slice]]]:
        """Row and column ranges of the tiles of a frame of `rows` x `columns`, of which `scale` make a latent."""
        down = [
            slice(start, min(start + scale * self.rows, rows))
            for start in range(0, rows, scale * (self.rows - self.overlap_rows))
        ]
        right = [
            slice(start, min(start + scale * self.columns, columns))
            for start in range(0, columns, scale * (self.columns - self.overlap_columns))
        ]
        return [[(y, x) for x in right] for y in down]


def stitch(tiles: Sequence[Sequence[np.ndarray]], tiling: Tiling, scale: int) -> np.ndarray:
    """Blends a grid of tiles [1, C, F, h, w] into one array; `scale` is its resolution per latent.

    Writes into `tiles`: every tile is blended in place, with the tile above first, then with the tile to its left, and
    what its right and lower neighbours see is the blended one.
    """
    down, right = tiling.overlap_rows * scale, tiling.overlap_columns * scale
    keep_rows, keep_columns = tiling.rows * scale - down, tiling.columns * scale - right
    bands = []
    for i, row in enumerate(tiles):
        for j, tile in enumerate(row):
            if i > 0:
                _blend(tiles[i - 1][j], tile, down, axis=3)
            if j > 0:
                _blend(row[j - 1], tile, right, axis=4)
        bands.append(np.concatenate([tile[..., :keep_rows, :keep_columns] for tile in row], axis=4))
    return np.concatenate(bands, axis=3)


def _blend(before: np.ndarray, tile: np.ndarray, extent: int, axis: int) -> None:
    """Fades from the end of `before` into the start of `tile`, in place: weights 0, 1/extent, 2/extent, ..."""
    extent = min(before.shape[axis], tile.shape[axis], extent)
    if extent == 0:
        return
    weight = np.arange(extent) / extent
    weight = weight[:, None] if axis == 3 else weight
    end = [slice(None)] * 5
    start = list(end)
    end[axis], start[axis] = slice(-extent, None), slice(0, extent)
    faded = before[tuple(end)] * (1 - weight).astype(tile.dtype)
    tile[tuple(start)] = faded + tile[tuple(start)] * weight.astype(tile.dtype)
