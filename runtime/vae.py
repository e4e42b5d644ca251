"""The video VAE over its one-chunk graphs: frames in, frames out, chunk by chunk and tile by tile.

The graphs take one time chunk and the state of the causal convolutions, and return a result and the next state. This file
decides what is a chunk, carries the states and cuts frames into tiles. Arrays are [1, C, F, H, W], float32; pixels lie in
-1..1; latents are unscaled (divided by the scaling factor, where it applies).
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
"""The outer loop of a tiled run. The numbers do not depend on it.

`time`: every chunk goes through all tiles before the next chunk starts. Frames leave early; the states of all tiles are alive
at once. `tiles`: every tile goes through all chunks before the next tile starts, the published order. One state is alive at a
time; the first frames leave when the last tile is done.
"""

_IN, _OUT = "state_in.", "state_out."
_State = dict[str, Any]
_Grid = list[list[tuple[slice, slice]]]


class Graph(Protocol):
    """A compiled graph, from whatever backend: named inputs to named outputs.

    Results are numpy arrays that belong to the caller: no later call writes into them. Outputs `state_out.NAME` are handed
    back as `state_in.NAME` untouched, so a backend may return device buffers for these.
    """

    def __call__(self, feeds: Mapping[str, Any]) -> Mapping[str, Any]: ...


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
    """A family of graphs, for first and later chunks, run over time and tiles.

    Args:
        graph: gives a graph by its name (one of `graphs`); asked for every call, so it should remember them.
        tiling: tile geometry; frames that one tile covers are not tiled. None: never.
        order: see `Order`.
        check: called before every graph call; what it raises ends the run (cancellation).
    """

    graphs: tuple[str, ...]  # the last one is for all chunks but the first
    source: str  # name of the graphs' data input
    result: str  # name of the graphs' result

    def __init__(
        self,
        graph: Callable[[str], Graph],
        *,
        tiling: Tiling | None = None,
        order: Order = "time",
        check: Callable[[], None] | None = None,
    ) -> None:
        self.graph = graph
        self.tiling = tiling
        self.order = order
        self.check = check

    def _first(self, frames: int) -> str:
        """The name of the graph for a first chunk of so many frames."""
        raise NotImplementedError

    def _scales(self, compression: int) -> tuple[int, int]:
        """Rows (columns) per latent, of the data and of the result."""
        raise NotImplementedError

    def _run(self, chunks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Results of the successive chunks [1, C, F, H, W] of one clip."""
        for head in chunks:  # one round: the loops below take the rest
            tiling, grid = self._layout(head)
            run = self._tiles_first if self.order == "tiles" else self._time_first
            for tiles in run(chain([head], chunks), grid):
                yield tiles[0][0] if tiling is None else stitch(tiles, tiling, self._scales(tiling.compression)[1])

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
        graph = self.graph(self._first(chunk.shape[2]) if state is None else self.graphs[-1])
        outputs = graph({self.source: np.ascontiguousarray(chunk, dtype=np.float32), **(state or {})})
        following = {_IN + name.removeprefix(_OUT): value for name, value in outputs.items() if name.startswith(_OUT)}
        return outputs[self.result], following

    def _layout(self, chunk: np.ndarray) -> tuple[Tiling | None, _Grid]:
        """The areas of a frame, in the units of `chunk`, that are coded separately, and the tiling if it is used."""
        tiling = self.tiling
        rows, columns = chunk.shape[3:]
        scale = 1 if tiling is None else self._scales(tiling.compression)[0]
        if tiling is None or tiling.covers(-(-rows // scale), -(-columns // scale)):
            return None, [[(slice(0, rows), slice(0, columns))]]
        if rows % scale or columns % scale:
            raise ValueError(f"frames of {columns}x{rows} pixels cannot be tiled; both sides must divide by {scale}")
        return tiling, tiling.grid(rows, columns, scale)


class VAEEncoder(_Coder):
    """Pixels [1, 3, F, H, W] to moments [1, 2*C, f, h, w] (mean, then log variance).

    `temporal_compression` is the VAE's (4, usually): F must be a multiple of it plus one. The rest as in `_Coder`.
    """

    graphs = ("vae_encoder_first", "vae_encoder_next")
    source, result = "pixels", "moments"

    def __init__(
        self,
        graph: Callable[[str], Graph],
        *,
        temporal_compression: int,
        tiling: Tiling | None = None,
        order: Order = "time",
        check: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(graph, tiling=tiling, order=order, check=check)
        self.temporal_compression = temporal_compression

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Encodes a whole clip (or an image: F = 1) at once."""
        return np.concatenate(list(self.encode_stream(_split(pixels, ENCODER_CHUNK))), axis=2)

    def encode_stream(self, chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Encodes a clip that arrives in time chunks of `time_chunks(F, ENCODER_CHUNK)` frames.

        Yields the moments of each chunk. Raises `ValueError` for a chunk of a length that cannot stand there.
        """
        return self._run(self._of_right_length(chunks))

    def _of_right_length(self, chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for index, chunk in enumerate(chunks):
            frames = chunk.shape[2]
            if index == 0 and (frames - 1) % self.temporal_compression:
                raise ValueError(
                    f"{frames} frames cannot begin a clip; a multiple of {self.temporal_compression} plus one can"
                )
            if index > 0 and frames != ENCODER_CHUNK:
                raise ValueError(f"time chunk {index} has {frames} frames, not {ENCODER_CHUNK}")
            yield chunk

    def _first(self, frames: int) -> str:
        return self.graphs[0]

    def _scales(self, compression: int) -> tuple[int, int]:
        return compression, 1


class VAEDecoder(_Coder):
    """Latents [1, C, f, h, w] to pixels [1, 3, F, H, W], not clamped. See `decoded_frames` for F."""

    graphs = ("vae_decoder_first", "vae_decoder_first_even", "vae_decoder_next")
    source, result = "latents", "pixels"

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Decodes a whole clip at once."""
        return np.concatenate(list(self.decode_stream(latents)), axis=2)

    def decode_stream(self, latents: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the frames [1, 3, n, H, W] of one time chunk after the other, as soon as they are known."""
        return self._run(_split(latents, DECODER_CHUNK))

    def _first(self, frames: int) -> str:
        return self.graphs[0] if frames % 2 else self.graphs[1]

    def _scales(self, compression: int) -> tuple[int, int]:
        return 1, compression


def _split(clip: np.ndarray, size: int) -> Iterator[np.ndarray]:
    if clip.ndim != 5 or clip.shape[0] != 1:
        raise ValueError(f"the VAE codes one clip [1, C, F, H, W] at a time, not an array of shape {list(clip.shape)}")
    start = 0
    for length in time_chunks(clip.shape[2], size):
        yield clip[:, :, start : start + length]
        start += length
