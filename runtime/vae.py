"""The video VAE over its one-chunk graphs: frames in, frames out, chunk by chunk and tile by tile.

The graphs (`vae_encoder_first/next`, `vae_decoder_first/next`) take one time chunk and the state of the causal
convolutions, and return a result and the next state. This file decides what is a chunk, carries the states, and cuts
frames into tiles. Arrays are [1, C, F, H, W], float32; pixels lie in -1..1; latents are unscaled (not times the scaling
factor).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, Literal, Protocol

import numpy as np

from .tiling import Tiling, stitch

__all__ = [
    "DECODER_CHUNK",
    "ENCODER_CHUNK",
    "Graph",
    "Order",
    "VAEDecoder",
    "VAEEncoder",
    "decoded_frames",
    "latent_frames",
    "sample_posterior",
    "time_chunks",
]

ENCODER_CHUNK = 8  # frames per call, as in the published implementation: norm statistics are those of a chunk
DECODER_CHUNK = 2  # latent frames per call, likewise

Order = Literal["time", "tiles"]
"""What the outer loop of a tiled run is.

`time`: every chunk goes through all tiles before the next chunk starts, so frames leave early, and the states of all tiles
are alive at once. `tiles`: every tile goes through all chunks before the next tile starts (the published order): one state
is alive at a time, and the frames come when the last tile is done. The numbers are the same.
"""

_IN, _OUT = "state_in.", "state_out."
_State = dict[str, Any]
_Grid = list[list[tuple[slice, slice]]]


class Graph(Protocol):
    """A compiled graph, from whatever backend.

    Values named `state_out.NAME` are handed back as `state_in.NAME` untouched: they may be device buffers instead of
    arrays. All returned values belong to the caller; a later call does not write into them.
    """

    @property
    def inputs(self) -> Mapping[str, tuple[Any, tuple[int | str, ...]]]:
        """Name -> dtype and shape, in the graph's order."""

    @property
    def outputs(self) -> Mapping[str, tuple[Any, tuple[int | str, ...]]]:
        """Name -> dtype and shape, in the graph's order."""

    def __call__(self, feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        """Runs the graph once."""


def time_chunks(count: int, size: int) -> list[int]:
    """Lengths of the time chunks of `count` frames: `size` each; the first also takes the remainder."""
    if count < 1:
        raise ValueError(f"a clip needs at least one frame, not {count}")
    return [count] if count < size else [size + count % size] + [size] * (count // size - 1)


def latent_frames(frames: int, temporal_compression: int) -> int:
    """Number of latent frames that `frames` frames are encoded to."""
    return -(-frames // temporal_compression)


def decoded_frames(latents: int, temporal_compression: int) -> int:
    """Number of frames that `latents` latent frames are decoded to: with an odd count, the first stands for one frame."""
    return temporal_compression * latents - (temporal_compression - 1) * (latents % 2)


def sample_posterior(moments: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Draws latents [1, C, f, h, w] from moments [1, 2*C, f, h, w] (mean, then log variance) with standard normal `noise`."""
    mean, log_variance = np.split(moments, 2, axis=1)
    if noise.shape != mean.shape:
        raise ValueError(f"noise of shape {noise.shape} does not fit latents of shape {mean.shape}")
    return mean + np.exp(0.5 * np.clip(log_variance, -30.0, 20.0)) * noise


class _Coder:
    """A pair of graphs, for the first and for later chunks, run over time and tiles.

    Args:
        first, following: the graphs for the first chunk and for each later one.
        tiling: tile geometry; frames that one tile covers are not tiled. None: never.
        order: see `Order`.
        check: called before every graph call; what it raises ends the run (cancellation).
    """

    source: str  # name of the graphs' data input
    result: str  # name of the graphs' result
    encodes: bool

    def __init__(
        self,
        first: Graph,
        following: Graph,
        *,
        tiling: Tiling | None = None,
        order: Order = "time",
        check: Callable[[], None] | None = None,
    ) -> None:
        self.first = first
        self.following = following
        self.tiling = tiling
        self.order = order
        self.check = check

    def _run(self, chunks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Results of the successive chunks [1, C, F, H, W] of one clip."""
        head = next(chunks)
        tiling, grid = self._layout(head)
        run = self._tiles_first if self.order == "tiles" else self._time_first
        for tiles in run(chain([head], chunks), grid):
            yield tiles[0][0] if tiling is None else stitch(tiles, tiling, 1 if self.encodes else tiling.compression)

    def _time_first(self, chunks: Iterable[np.ndarray], grid: _Grid) -> Iterator[list[list[np.ndarray]]]:
        states: list[list[_State | None]] = [[None] * len(row) for row in grid]
        for chunk in chunks:
            tiles: list[list[np.ndarray]] = [[] for _ in grid]
            for i, row in enumerate(grid):
                for j, area in enumerate(row):
                    tile, states[i][j] = self._step(chunk[..., area[0], area[1]], states[i][j])
                    tiles[i].append(tile)
            yield tiles

    def _tiles_first(self, chunks: Iterable[np.ndarray], grid: _Grid) -> Iterator[list[list[np.ndarray]]]:
        clip = list(chunks)
        results: list[list[list[np.ndarray]]] = [[[] for _ in grid] for _ in clip]
        for i, row in enumerate(grid):
            for area in row:
                state = None
                for chunk, tiles in zip(clip, results, strict=True):
                    tile, state = self._step(chunk[..., area[0], area[1]], state)
                    tiles[i].append(tile)
        yield from results

    def _step(self, chunk: np.ndarray, state: _State | None) -> tuple[np.ndarray, _State]:
        """One graph call: the result, and the state that the next chunk of the same tile takes."""
        if self.check is not None:
            self.check()
        graph = self.first if state is None else self.following
        outputs = graph({self.source: np.ascontiguousarray(chunk, dtype=np.float32), **(state or {})})
        following = {_IN + name.removeprefix(_OUT): value for name, value in outputs.items() if name.startswith(_OUT)}
        return outputs[self.result], following

    def _layout(self, chunk: np.ndarray) -> tuple[Tiling | None, _Grid]:
        """The areas of a frame, in the units of `chunk`, that are coded separately, and the tiling if it is used."""
        tiling = self.tiling
        rows, columns = chunk.shape[3:]
        scale = tiling.compression if tiling is not None and self.encodes else 1
        if tiling is None or tiling.covers(-(-rows // scale), -(-columns // scale)):
            return None, [[(slice(0, rows), slice(0, columns))]]
        if rows % scale or columns % scale:
            raise ValueError(f"frames of {columns}x{rows} pixels cannot be tiled; both sides must divide by {scale}")
        return tiling, tiling.grid(rows, columns, scale)


class VAEEncoder(_Coder):
    """Pixels [1, 3, F, H, W] to moments [1, 2*C, f, h, w] (mean, then log variance)."""

    source, result, encodes = "pixels", "moments", True

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Encodes a whole clip (or an image: F = 1) at once."""
        return np.concatenate(list(self.encode_stream(_split(pixels, ENCODER_CHUNK))), axis=2)

    def encode_stream(self, chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Encodes a clip that arrives in time chunks of `time_chunks(frames, ENCODER_CHUNK)` frames.

        Yields the moments of each chunk. Raises `ValueError` for a later chunk of another length than `ENCODER_CHUNK`.
        """
        return self._run(_of_length(chunks, ENCODER_CHUNK))


class VAEDecoder(_Coder):
    """Latents [1, C, f, h, w] to pixels [1, 3, F, H, W], not clamped."""

    source, result, encodes = "latents", "pixels", False

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Decodes a whole clip at once. See `decoded_frames` for the number of frames."""
        return np.concatenate(list(self.decode_stream(latents)), axis=2)

    def decode_stream(self, latents: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the frames [1, 3, n, H, W] of one time chunk after the other, as soon as they are known."""
        return self._run(_split(latents, DECODER_CHUNK))


def _split(clip: np.ndarray, size: int) -> Iterator[np.ndarray]:
    if clip.ndim != 5 or clip.shape[0] != 1:
        raise ValueError(f"the VAE codes one clip [1, C, F, H, W] at a time, not an array of shape {list(clip.shape)}")
    start = 0
    for length in time_chunks(clip.shape[2], size):
        yield clip[:, :, start : start + length]
        start += length


def _of_length(chunks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    for index, chunk in enumerate(chunks):
        if index > 0 and chunk.shape[2] != size:
            raise ValueError(f"time chunk {index} has {chunk.shape[2]} frames; all but the first must have {size}")
        yield chunk
