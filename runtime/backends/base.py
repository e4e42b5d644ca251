"""What the runtime asks of a backend: graphs by name, called with arrays or prepared once with everything bound.

Where a backend computes in memory of its own, a loop's arrays must live there too: its attribute `buffers` says how (`Buffers`).
A backend without that attribute computes in the process's memory (`host.HOST`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from ...bundle.config import Geometry
from ...bundle.manifest import GraphSpec
from ...bundle.store import Bundle

if TYPE_CHECKING:
    from ..request import Request
    from ..tiling import Tiling

__all__ = [
    *("Backend", "BlockWeights", "Buffers", "Call", "Clock", "Copy", "DeviceBackend", "Graph", "Plan", "Recording"),
]


class Call(Protocol):
    """A graph with all inputs and outputs bound to fixed buffers; running it allocates nothing and returns nothing."""

    def bind(self, name: str, array: Any) -> None:
        """Points an input at another buffer of the same dtype (C-contiguous; kept alive by the call)."""

    def __call__(self) -> None: ...


class Graph(Protocol):
    """One loaded graph."""

    spec: GraphSpec

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Runs with `feeds` by input name; returns outputs by name. Raises `DeviceError` naming the graph."""

    def prepare(self, arrays: Mapping[str, Any]) -> Call:
        """Binds `arrays` to the inputs and outputs of these names."""


class Backend(Protocol):
    """A way to execute the graphs of one bundle."""

    name: str
    lanes: int  # how many graphs gain from running at once, each on its share of the processor; 1: they take turns

    def graph(self, name: str, lane: int = 0, lanes: int = 1) -> Graph:
        """Loads a graph, or returns it if it is loaded already. Graphs of different lanes may run at the same time."""

    def drop(self, *names: str) -> None:
        """Frees graphs and their memory; `graph` loads them again."""


class Plan(Protocol):
    """What was decided about a request's memory, in bytes. `budget`: None: no limit. `batch`: guidance halves that go through a
    block as one. `tiled`: the VAE works in tiles."""

    @property
    def budget(self) -> int | None: ...
    @property
    def peak(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def resident_blocks(self) -> int: ...
    @property
    def tiled(self) -> bool: ...


@runtime_checkable
class DeviceBackend(Backend, Protocol):
    """A backend that computes in a memory of its own, and plans it."""

    buffers: Buffers

    def plan(self, size: Geometry, request: Request, memory: float | None) -> Any:
        """A `Plan` for one clip. `memory`: budget in GB (1e9 bytes); None: what is free. Raises if it cannot be made."""

    def begin(self, plan: Any) -> None:
        """Makes everything ready for the request that was planned so."""

    def tiling(self, plan: Any) -> Tiling | None:
        """The VAE's tiles in this plan."""

    @property
    def peak(self) -> int:
        """Bytes of the device's memory that the last request used at once, of what this backend gives out itself."""

    def close(self) -> None:
        """Gives the device back."""


class BlockWeights(Protocol):
    """The weights of all blocks, of which `resident` stay where they are used and the others come anew for every step."""

    resident: int

    @property
    def settled(self) -> bool:
        """Whether all blocks are where they are used and stay there: `ahead` and `done` have nothing left to do."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """The buffers of block `index` by name, to be bound; they hold its weights between `ahead` and `done`."""

    def open(self) -> None:
        """Takes the room that `resident` asks for. Raises `DeviceError` if there is none."""

    def ahead(self, index: int) -> None:
        """Called before block `index` runs."""

    def done(self, index: int) -> None:
        """Called after block `index` ran."""

    def close(self) -> None:
        """Gives the room back."""


class Recording(Protocol):
    """Work that a device was shown once and repeats as one piece."""

    def __call__(self) -> None:
        """Enqueues all of it, on whatever is in the buffers then."""

    def close(self) -> None:
        """Frees it; nothing may be running."""


class Copy(NamedTuple):
    """A copy of weights to a device: points of a `Clock` when it began and ended, and its bytes."""

    begin: Any
    end: Any
    nbytes: int


class Clock(Protocol):
    """Tells when what was called really ran, for measuring. `copies`: of weights, since the clock was started."""

    copies: list[Copy]

    def mark(self) -> Any:
        """A point behind everything that the calling thread called before."""

    def seconds(self, point: Any) -> float:
        """From the clock's start to this point; on a device it waits until the point is reached."""


class Buffers(Protocol):
    """Where the arrays of a loop live. A buffer has `shape` and `dtype`; `buffer[i]` and `buffer[a:b]` are views of it, which
    graphs take only if they begin at a place that the device likes: arrays of few bytes must be buffers of their own."""

    def empty(self, shape: Sequence[int], dtype: np.dtype | type) -> Any:
        """A new buffer, of whatever content. Raises `DeviceError` if there is no room."""

    def hold(self, array: np.ndarray) -> Any:
        """A buffer with the values of `array`; `array` itself where buffers are arrays."""

    def put(self, buffer: Any, values: Any) -> None:
        """Copies `values`, an array or a buffer, after what was called before; `values` may change once this has returned."""

    def get(self, buffer: Any) -> np.ndarray:
        """The values, once everything that was called before is done; the buffer itself where buffers are arrays."""

    def keep(self, graph: Graph, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Calls `graph` (feeds may be buffers); the outputs are buffers."""

    def weights(self, bundle: Bundle, count: int) -> BlockWeights:
        """The weights of the first `count` blocks."""

    def record(self, work: Callable[[], None], calls: Sequence[Call]) -> Recording:
        """Shows the device what `work` enqueues, which is not carried out now: calls of prepared graphs (`calls` has them all),
        which ran before with these shapes, and `put` between buffers.

        Raises `DeviceError` with the reason where that cannot be; what comes then works as before.
        """

    def settle(self) -> None:
        """Waits until nothing uses any buffer. Raises nothing: it is also called after a fault."""

    def clock(self) -> AbstractContextManager[Clock]:
        """A clock that starts now; its points may be asked about until the context ends."""
