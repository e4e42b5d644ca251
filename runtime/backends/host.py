"""The buffers of backends that compute in the process's own memory: numpy arrays, and weights used where they are mapped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from ...bundle.errors import DeviceError
from ...bundle.store import Bundle
from ...bundle.tensors import MappedTensors
from .base import Call, Copy, Graph, Recording

__all__ = ["HOST", "BlockStore", "HostBuffers", "HostClock"]


class BlockStore:
    """The blocks' weight files, mapped; at most `resident` of them keep their pages after use.

    The loop passes over the blocks in a circle, where dropping the least recently used would drop every one: so the
    first `resident` blocks stay and the others are streamed.
    """

    def __init__(self, bundle: Bundle, count: int):
        self._files = [bundle.tensors(f"block_{i:02d}") for i in range(count)]
        self.resident = count

    @property
    def settled(self) -> bool:
        return self.resident >= len(self._files)

    def __getitem__(self, index: int) -> MappedTensors:
        return self._files[index]

    def __len__(self) -> int:
        return len(self._files)

    def open(self) -> None:
        """Nothing: mapped files need no room of their own."""

    def ahead(self, index: int) -> None:
        """Called before block `index` runs: asks for the next streamed block's pages."""
        following = (index + 1) % len(self._files)
        if following >= self.resident:
            self._files[following].prefetch()

    def done(self, index: int) -> None:
        """Called after block `index` ran."""
        if index >= self.resident:
            self._files[index].release()

    def close(self) -> None:
        """Nothing, likewise."""


class HostClock:
    """`base.Clock` by the process's own: calls return when their work is done. Mapped weights are not copied."""

    def __init__(self) -> None:
        self.copies: list[Copy] = []
        self._start = time.perf_counter()

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, point: float) -> float:
        return point - self._start


class HostBuffers:
    """`base.Buffers` over numpy: every buffer is an array."""

    def empty(self, shape: Sequence[int], dtype: np.dtype | type) -> np.ndarray:
        return np.empty(tuple(shape), dtype)

    def hold(self, array: np.ndarray) -> np.ndarray:
        return array

    def put(self, buffer: np.ndarray, values: np.ndarray) -> None:
        np.copyto(buffer, values)

    def get(self, buffer: np.ndarray) -> np.ndarray:
        return buffer

    def keep(self, graph: Graph, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return graph(feeds)

    def weights(self, bundle: Bundle, count: int) -> BlockStore:
        return BlockStore(bundle, count)

    def record(self, work: Callable[[], None], calls: Sequence[Call]) -> Recording:
        raise DeviceError("the processor has none")

    def settle(self) -> None:
        """Nothing runs on when a call has returned."""

    def clock(self) -> AbstractContextManager[HostClock]:
        return nullcontext(HostClock())


HOST = HostBuffers()
