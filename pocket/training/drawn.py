"""Many clips drawn once into one file on disk, so that training can look at them again and again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..clips import COLUMNS, POSE_FRAMES, ROWS, make_clip

__all__ = ["DrawnClips"]


class DrawnClips:
    """The first `count` training clips: frames and pose [count, 2, F, H, W, 3] uint8, drawn as far as they are missing.

    Clips are drawn in order and the file says how many there are; `ensure` goes on where a kill has ended the last run.
    """

    def __init__(self, folder: Path, count: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
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
        for i in range(self.count, min(count, len(self.pixels))):
            clip = make_clip("train", i)
            self.pixels[i, 0], self.pixels[i, 1] = clip.frames, clip.pose
            self.count = i + 1
            if self.count % 50 == 0 or self.count == count:
                self._done.write_text(json.dumps({"count": self.count}))
