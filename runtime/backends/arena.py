"""Arrays in device memory: pieces of one allocation, given out and taken back without asking the driver.

Everything that is computed runs in one stream, so a piece that is free again may be given out while earlier work still reads
it: what follows in the stream comes after. What another stream writes needs events (see `ring`).
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Sequence

import numpy as np

from ...bundle.errors import DeviceError

__all__ = ["ALIGNMENT", "Arena", "DeviceArray", "Piece", "aligned"]

ALIGNMENT = 256  # what CUDA's own allocations have, and TensorRT asks of every address


def aligned(nbytes: int) -> int:
    """Rounded up to what a piece takes."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Arena:
    """Hands out pieces of `nbytes` from `address`, the first place that is large enough.

    Pieces come back when nothing refers to them. `peak`: the most that was out at once, in bytes from the start. `seen`: the
    same memory as the processor sees it, [nbytes] uint8; None: it does not.
    """

    def __init__(self, address: int, nbytes: int, seen: np.ndarray | None = None):
        self.address, self.nbytes, self.seen = address, nbytes, seen
        self._free: list[tuple[int, int]] = [(0, nbytes)]  # (start, bytes), rising, never adjacent
        self._returned: deque[tuple[int, int]] = deque()  # by finalizers, which may come at any time
        self.peak = 0

    def take(self, nbytes: int, what: str) -> Piece:
        """Raises `DeviceError` if there is no such place: the plan was wrong, or something was not given back."""
        self._collect()
        wanted = aligned(max(nbytes, 1))
        for i, (start, size) in enumerate(self._free):
            if size < wanted:
                continue
            if size == wanted:
                del self._free[i]
            else:
                self._free[i] = (start + wanted, size - wanted)
            self.peak = max(self.peak, start + wanted)
            return Piece(self, start, wanted)
        largest = max((size for _, size in self._free), default=0)
        raise DeviceError(
            f"The GPU memory planned for this clip ({self.nbytes / 1e9:.3f} GB) is too small for {what}: "
            f"{wanted / 1e6:.1f} MB are needed at once, {largest / 1e6:.1f} MB are free. Give a larger --memory, or make a "
            "smaller or shorter clip."
        )

    def give_back(self, start: int, nbytes: int) -> None:
        self._returned.append((start, nbytes))

    @property
    def used(self) -> int:
        """Bytes that are out."""
        self._collect()
        return self.nbytes - sum(size for _, size in self._free)

    def _collect(self) -> None:
        while self._returned:
            insort(self._free, self._returned.popleft())
        joined: list[tuple[int, int]] = []
        for start, size in self._free:
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + size)
            else:
                joined.append((start, size))
        self._free = joined


class Piece:
    """A piece of an arena; goes back to it when it is collected."""

    def __init__(self, arena: Arena, start: int, nbytes: int):
        self._arena, self._start, self.nbytes = arena, start, nbytes

    @property
    def address(self) -> int:
        return self._arena.address + self._start

    @property
    def seen(self) -> np.ndarray | None:
        """[nbytes] uint8 as the processor sees it, which has to wait until the GPU is done with it."""
        seen = self._arena.seen
        return None if seen is None else seen[self._start : self._start + self.nbytes]

    def __del__(self) -> None:
        self._arena.give_back(self._start, self.nbytes)


class DeviceArray:
    """A C-contiguous array in device memory. `array[i]` and `array[a:b]` over the first axis are views."""

    def __init__(self, piece: Piece, shape: Sequence[int], dtype: np.dtype | type, offset: int = 0):
        self._piece, self._offset = piece, offset
        self.shape, self.dtype = tuple(int(n) for n in shape), np.dtype(dtype)

    @property
    def address(self) -> int:
        """Where it lies now."""
        return self._piece.address + self._offset

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_aligned(self) -> bool:
        """Whether engines take its address; views of narrow arrays may lie in between."""
        return self._offset % ALIGNMENT == 0

    def __getitem__(self, index: int | slice) -> DeviceArray:
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        if isinstance(index, slice):
            start, stop, step = index.indices(self.shape[0])
            if step != 1:
                raise IndexError("views of device arrays are contiguous")
            shape: tuple[int, ...] = (max(0, stop - start), *self.shape[1:])
        else:
            start, shape = range(self.shape[0])[index], self.shape[1:]
        return DeviceArray(self._piece, shape, self.dtype, self._offset + start * row)
