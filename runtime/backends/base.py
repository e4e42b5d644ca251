"""What the runtime asks of a backend: graphs by name, called with arrays or prepared once with everything bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from ...bundle.manifest import GraphSpec

__all__ = ["Backend", "Call", "Graph"]


class Call(Protocol):
    """A graph with all inputs and outputs bound to fixed buffers; running it allocates nothing and returns nothing."""

    def bind(self, name: str, array: np.ndarray) -> None:
        """Points an input at another buffer of the same dtype (C-contiguous; kept alive by the call)."""

    def __call__(self) -> None: ...


class Graph(Protocol):
    """One loaded graph."""

    spec: GraphSpec

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs with `feeds` by input name; returns outputs by name. Raises `DeviceError` naming the graph."""

    def prepare(self, arrays: Mapping[str, np.ndarray]) -> Call:
        """Binds `arrays` to the inputs and outputs of these names."""


class Backend(Protocol):
    """A way to execute the graphs of one bundle."""

    name: str
    lanes: int  # how many graphs gain from running at once, each on its share of the processor; 1: they take turns

    def graph(self, name: str, lane: int = 0, lanes: int = 1) -> Graph:
        """Loads a graph, or returns it if it is loaded already. Graphs of different lanes may run at the same time."""

    def drop(self, *names: str) -> None:
        """Frees graphs and their memory; `graph` loads them again."""
