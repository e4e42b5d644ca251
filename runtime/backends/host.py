"""The buffers of backends that compute in the process's own memory: numpy arrays, and weights used where they are mapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...bundle.store import Bundle
from ...bundle.tensors import MappedTensors
from .base import Graph

__all__ = ["HOST", "BlockStore", "HostBuffers"]


class BlockStore:
    """The blocks' weight files, mapped; at most `resident` of them keep their pages after use.

    The loop passes over the blocks in a circle, where dropping the least recently used would drop every one: so the
    first `resident` blocks stay and the others are streamed.
    """

    def __init__(self, bundle: Bundle, count: int):
        self._files = [bundle.tensors(f"block_{i:02d}") for i in range(count)]
        self.resident = count

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

    def settle(self) -> None:
        """Nothing runs on when a call has returned."""


HOST = HostBuffers()
