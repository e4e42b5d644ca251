"""Training clips: drawn by several processes, and kept in one file on disk, to be looked at again and again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..clips import COLUMNS, POSE_FRAMES, ROWS, Clip, make_clip

__all__ = ["DrawnClips", "training_clips"]

FEW = 50  # clips that one process draws sooner than others start


def training_clips(first: int, end: int, workers: int = 1) -> Iterator[tuple[int, Clip]]:
    """Training clips `first` to `end`, which is not among them, in order with their numbers; many by `workers` processes."""
    numbers = range(first, end)
    if workers == 1 or len(numbers) < FEW:
        yield from ((i, make_clip("train", i)) for i in numbers)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        # A part at a time, or all that was drawn would wait in memory for a slow taker.
        for start in range(first, end, FEW):
            part = range(start, min(start + FEW, end))
            yield from zip(part, pool.map(partial(make_clip, "train"), part, chunksize=2), strict=True)


class DrawnClips:
    """The first `count` training clips: frames and pose [count, 2, F, H, W, 3] uint8, drawn as far as they are missing.

    Clips are drawn in order and the file says how many there are; `ensure` goes on where a kill has ended the last run.
    """

    def __init__(self, folder: Path, count: int, workers: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._workers = workers
        self._done = folder / "drawn.json"
        path = folder / "drawn.u8"
        shape = (count, 2, POSE_FRAMES, ROWS, COLUMNS, 3)
        size = int(np.prod(shape))
        with path.open("ab") as file:
            file.truncate(size)
        self.pixels: NDArray[np.uint8] = np.memmap(path, np.uint8, "r+", shape=shape)
        self.count = min(json.loads(self._done.read_text())["count"], count) if self._done.exists() else 0

    def ensure(self, count: int) -> None:
        """Draws until there are `count` clips."""
        for i, clip in training_clips(self.count, min(count, len(self.pixels)), self._workers):
            self.pixels[i, 0], self.pixels[i, 1] = clip.frames, clip.pose
            self.count = i + 1
            if self.count % 50 == 0 or self.count == count:
                self._done.write_text(json.dumps({"count": self.count}))
