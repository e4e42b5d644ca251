"""A fake of pycuda's driver module: device memory as numpy arrays, streams with a clock, and a detector of races.

`FakeCuda().install(monkeypatch)` makes `import pycuda.driver` find it. It has the names and signatures that the program uses, as in
pycuda 2026.1's `wrap_cudadrv.cpp`, and no others.

Work is carried out when it is enqueued, which is one legal order. Whether another would be legal, too, is found with vector
clocks: every stream, and the host, counts what it has done, and knows of the others what events and synchronization told it. Two
accesses to the same bytes, of which one writes, must be ordered by that knowledge; else `Hazard` is raised. Page-locked memory that
the host changes while a copy from it may still be under way is found by its bytes.

Copies and runs take simulated time, so that a test can ask when the compute stream had nothing to do.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import pytest

__all__ = ["FakeCuda", "Hazard", "Span"]

HOST = 0
# All else, such as waiting and allocating, may end a recording.
_WHILE_RECORDING = {
    *("Context.push", "execute_async_v3", "memcpy_dtod_async"),
    *("cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags", "cuGraphDestroy"),
}
Clock = dict[int, int]
Span = tuple[int, int]  # addresses, first and behind the last


class Hazard(AssertionError):
    """Two accesses that nothing orders, or memory that is not there."""


@dataclass
class _Access:
    stream: int
    at: int
    write: bool
    what: str


@dataclass
class _Stream:
    number: int
    clock: Clock = field(default_factory=dict)
    time: float = 0.0
    idle: list[tuple[float, str]] = field(default_factory=list)  # gaps: seconds, before what


@dataclass
class _Sent:
    """A copy from page-locked memory that the host does not know to be done."""

    stream: int
    at: int
    source: np.ndarray
    bytes: bytes


@dataclass
class _Coming:
    """A copy to the host that it does not know to be done: until then it finds something else there."""

    stream: int
    at: int
    target: np.ndarray
    bytes: np.ndarray


@dataclass
class _Reading:
    """A read of memory that the host may write, which it does not know to be done."""

    stream: int
    at: int
    span: Span
    bytes: bytes
    what: str


class FakeCuda:
    """`calls`: names of driver calls in order. `retained`: how often the primary context was retained.
    `memory`, `locked`: bytes that are out. `live`: streams and events that exist.

    total: bytes of the GPU. others: bytes that other processes hold. copy_rate: bytes per second. fail: called with the name of
    each driver call before it is made; what it returns is raised. races: look for them (slow). integrated: the memory is the
    processor's. shared: which may use it while the GPU does.
    """

    def __init__(
        self,
        *,
        total: int = 8 << 30,
        others: int = 0,
        copy_rate: float = 20e9,
        races: bool = True,
        integrated: bool = False,
        shared: bool = False,
        capability: tuple[int, int] = (8, 9),
    ):
        self.total, self.others, self.copy_rate, self.races = total, others, copy_rate, races
        self.integrated, self.shared, self.capability = integrated, shared, capability
        self.calls: list[str] = []
        self.fail: Callable[[str], Exception | None] = lambda name: None
        self.memory = self.locked = self.retained = 0
        self.peak = 0
        self.live: Counter[str] = Counter()
        self._stacks: dict[int, list[str]] = {}
        self.thread = 0  # the one that retained the context
        self.host_clock: Clock = {}
        self.host_time = 0.0
        self.streams: dict[int, _Stream] = {}
        self._numbers = itertools.count(1)
        self._next_address = 0x7F0000000000
        self._starts: list[int] = []
        self._blocks: dict[int, np.ndarray] = {}
        self._accesses: dict[Span, list[_Access]] = {}
        self._sent: list[_Sent] = []
        self._coming: list[_Coming] = []
        self._reading: list[_Reading] = []
        self.recording: tuple[int, list[Callable[[], None]]] | None = None  # a stream, and what was enqueued there
        self.graphs: dict[int, list[Callable[[], None]]] = {}  # and executable ones, by handle
        self.module = _module(self)
        self.driver = _Driver(self)

    @property
    def stack(self) -> list[str]:
        """Contexts of the calling thread, the current one last."""
        return self._stacks.setdefault(threading.get_ident(), ["the host application's"])

    def ended(self, kind: str) -> None:
        """An object is collected: pycuda makes its context current for that, in the thread that retained it; else it leaks."""
        if self.stack[-1] == "ours" or threading.get_ident() == self.thread:
            self.live[kind] -= 1

    def install(self, patch: pytest.MonkeyPatch) -> FakeCuda:
        package = ModuleType("pycuda")
        package.driver = self.module  # type: ignore[attr-defined]
        package.__path__ = []
        patch.setitem(sys.modules, "pycuda", package)
        patch.setitem(sys.modules, "pycuda.driver", self.module)
        patch.setattr("dynamictrl_edge.runtime.backends.cuda._contexts", {})
        patch.setattr("dynamictrl_edge.runtime.backends.cuda._load_driver", lambda: self.driver)
        return self

    # --- calls ---

    def call(self, name: str, *, needs_context: bool = True) -> None:
        """Every driver call comes through here."""
        self.calls.append(name)
        if needs_context and self.stack[-1] != "ours":
            raise self.module.LogicError(f"{name} failed: invalid device context")
        if (error := self.fail(name)) is not None:
            try:
                raise error
            finally:
                del error  # pycuda's errors come from C++: no frame of theirs refers to them
        if self.recording is not None and name not in _WHILE_RECORDING:
            raise self.module.LogicError(f"{name} failed: operation not permitted when stream is capturing")

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Carries out what a stream is given, or keeps it for a graph."""
        if self.recording is not None and self.recording[0] == stream:
            self.recording[1].append(work)
        else:
            work()

    def error(self, text: str, kind: str = "LogicError") -> Exception:
        made: Exception = getattr(self.module, kind)(text)
        return made

    # --- memory ---

    def allocate(self, nbytes: int) -> int:
        if nbytes > self.total - self.others - self.memory:
            raise self.module.MemoryError("cuMemAlloc failed: out of memory")
        address, self._next_address = self._next_address, self._next_address + -(-nbytes // 512) * 512 + 512
        bisect.insort(self._starts, address)
        self._blocks[address] = np.full(nbytes, 0xAB, np.uint8)
        self.memory += nbytes
        self.peak = max(self.peak, self.memory)
        return address

    def release(self, address: int) -> None:
        self._starts.remove(address)
        self.memory -= self._blocks.pop(address).nbytes

    def bytes_at(self, address: int, nbytes: int) -> np.ndarray:
        """The device's memory, as a writable view; `Hazard` outside of allocations."""
        i = bisect.bisect_right(self._starts, address) - 1
        if i >= 0:
            start = self._starts[i]
            block = self._blocks[start]
            if address + nbytes <= start + block.nbytes:
                return block[address - start : address - start + nbytes]
        raise Hazard(f"{nbytes} bytes at {address:#x} are not the GPU's memory")

    # --- time and order ---

    @contextmanager
    def work(
        self,
        stream: int,
        seconds: float,
        what: str,
        reads: Sequence[Span] = (),
        writes: Sequence[Span] = (),
    ) -> Iterator[_Stream]:
        """Something that a stream does."""
        found = self.streams[stream]
        _merge(found.clock, self.host_clock)
        found.clock[stream] = found.clock.get(stream, 0) + 1
        start = max(found.time, self.host_time)
        if start > found.time:
            found.idle.append((start - found.time, what))
        found.time = start + seconds
        if self.races:
            self._check_sent()
            for write, spans in ((False, reads), (True, writes)):
                for span in spans:
                    self._order(found, span, write, what)
            if self.shared:
                self._read(found, reads, writes, what)
        yield found

    def _read(self, stream: _Stream, reads: Sequence[Span], writes: Sequence[Span], what: str) -> None:
        def written(span: Span) -> bool:
            return any(other[0] < span[1] and span[0] < other[1] for other in writes)

        # What the GPU itself writes later may change: that is ordered, or was found by `_order`.
        self._reading = [reading for reading in self._reading if not written(reading.span)]
        for span in reads:
            if not written(span):
                seen = self.bytes_at(span[0], span[1] - span[0]).tobytes()
                self._reading.append(_Reading(stream.number, stream.clock[stream.number], span, seen, what))

    def _order(self, stream: _Stream, span: Span, write: bool, what: str) -> None:
        for other, accesses in self._accesses.items():
            if other[0] < span[1] and span[0] < other[1]:
                for access in accesses:
                    known = stream.clock.get(access.stream, 0) >= access.at
                    if (write or access.write) and not known:
                        raise Hazard(f"{what} touches what {access.what} uses at the same time")
        kept = [a for a in self._accesses.get(span, []) if a.stream != stream.number or a.write != write]
        self._accesses[span] = [*kept, _Access(stream.number, stream.clock[stream.number], write, what)]

    def host_knows(self, clock: Clock, time: float) -> None:
        _merge(self.host_clock, clock)
        self.host_time = max(self.host_time, time)
        for coming in self._coming:
            if self.host_clock.get(coming.stream, 0) >= coming.at:
                coming.target[:] = coming.bytes
        self._coming = [c for c in self._coming if self.host_clock.get(c.stream, 0) < c.at]
        if self.races:
            self._check_sent()
            self._sent = [s for s in self._sent if self.host_clock.get(s.stream, 0) < s.at]
            self._reading = [r for r in self._reading if self.host_clock.get(r.stream, 0) < r.at]

    def send(self, stream: _Stream, source: np.ndarray) -> None:
        if self.races:
            self._sent.append(_Sent(stream.number, stream.clock[stream.number], source, source.tobytes()))

    def _check_sent(self) -> None:
        for sent in self._sent:
            if sent.source.tobytes() != sent.bytes:
                raise Hazard("page-locked memory was changed while it was being copied to the GPU")
        for reading in self._reading:
            if self.bytes_at(reading.span[0], reading.span[1] - reading.span[0]).tobytes() != reading.bytes:
                raise Hazard(f"memory was changed by the host while {reading.what} was reading it")

    def forget(self) -> None:
        """Forgets accesses, for a long run."""
        self._accesses.clear()


class _Driver:
    """The functions of libcuda that the program calls itself, through ctypes."""

    def __init__(self, fake: FakeCuda):
        self._fake = fake
        self._text = b""

    def _called(self, name: str) -> int:
        try:
            self._fake.call(name)
        except self._fake.module.Error as error:
            self._text = str(error).removeprefix(f"{name} failed: ").encode()
            return 1
        return 0

    def cuGetErrorString(self, code: int, text: Any) -> int:
        text._obj.value = self._text
        return 0

    def cuStreamBeginCapture_v2(self, stream: ctypes.c_void_p, mode: int) -> int:
        assert mode == 1, "other threads would be restricted"
        code = self._called("cuStreamBeginCapture_v2")
        if code == 0:
            assert self._fake.recording is None and stream.value is not None
            self._fake.recording = (stream.value, [])
        return code

    def cuStreamEndCapture(self, stream: ctypes.c_void_p, graph: Any) -> int:
        assert self._fake.recording is not None and self._fake.recording[0] == stream.value
        _, work = self._fake.recording
        self._fake.recording = None  # whatever the call returns
        if (code := self._called("cuStreamEndCapture")) == 0:
            graph._obj.value = self._made(work)
        return code

    def _made(self, work: list[Callable[[], None]]) -> int:
        handle = next(self._fake._numbers)
        self._fake.graphs[handle] = work
        return handle

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: ctypes.c_void_p, flags: ctypes.c_ulonglong) -> int:
        assert graph.value is not None and flags.value == 0
        if (code := self._called("cuGraphInstantiateWithFlags")) == 0:
            executable._obj.value = self._made(self._fake.graphs[graph.value])
        return code

    def cuGraphLaunch(self, executable: ctypes.c_void_p, stream: ctypes.c_void_p) -> int:
        assert executable.value is not None and stream.value is not None
        if (code := self._called("cuGraphLaunch")) == 0:
            for work in self._fake.graphs[executable.value]:
                work()
        return code

    def _destroyed(self, name: str, handle: ctypes.c_void_p) -> int:
        code = self._called(name)
        assert handle.value is not None
        del self._fake.graphs[handle.value]
        return code

    def cuGraphDestroy(self, graph: ctypes.c_void_p) -> int:
        return self._destroyed("cuGraphDestroy", graph)

    def cuGraphExecDestroy(self, executable: ctypes.c_void_p) -> int:
        return self._destroyed("cuGraphExecDestroy", executable)


def _merge(into: Clock, other: Clock) -> None:
    for stream, at in other.items():
        into[stream] = max(into.get(stream, 0), at)


def _raw(array: np.ndarray) -> np.ndarray:
    if not array.flags.c_contiguous:
        raise ValueError("ndarray is not C-contiguous")
    return array.reshape(-1).view(np.uint8)


class _Locked(np.ndarray):
    """pycuda's arrays have their allocation for a base."""

    _owner: Any = None

    @property
    def base(self) -> Any:  # type: ignore[override]
        return self._owner


def _module(fake: FakeCuda) -> Any:
    """The names that pycuda.driver has, of those that the program uses."""

    class Error(Exception):
        pass

    class MemoryError(Error):
        pass

    class LogicError(Error):
        pass

    class LaunchError(Error):
        pass

    class RuntimeError(Error):
        pass

    def init(flags: int = 0) -> None:
        fake.call("init", needs_context=False)

    class device_attribute:
        INTEGRATED = 18
        CONCURRENT_MANAGED_ACCESS = 89

    class mem_attach_flags:
        GLOBAL, HOST, SINGLE = 1, 2, 4

    class event_flags:
        DEFAULT, BLOCKING_SYNC, DISABLE_TIMING = 0, 1, 2

    class Device:
        def __init__(self, number: int) -> None:
            fake.call("Device", needs_context=False)

        @staticmethod
        def count() -> int:
            fake.call("Device.count", needs_context=False)
            return 1

        def name(self) -> str:
            fake.call("Device.name", needs_context=False)
            return "Fake GPU"

        def compute_capability(self) -> tuple[int, int]:
            return fake.capability

        def total_memory(self) -> int:
            return fake.total

        def get_attribute(self, attribute: int) -> int:
            known = {
                device_attribute.INTEGRATED: fake.integrated,
                # Graphics cards have it as well; but their memory is not the processor's.
                device_attribute.CONCURRENT_MANAGED_ACCESS: fake.shared or not fake.integrated,
            }
            return int(known[attribute])

        def retain_primary_context(self) -> Context:
            fake.call("Device.retain_primary_context", needs_context=False)
            fake.thread = threading.get_ident()
            return Context()

    class Context:
        def __init__(self) -> None:
            fake.retained += 1

        def push(self) -> None:
            fake.call("Context.push", needs_context=False)
            fake.stack.append("ours")

        @staticmethod
        def pop() -> None:
            assert fake.stack.pop() == "ours", "popped a context that is not ours"

    class _Made:
        """What exists until it is collected, which needs the context."""

        kind = ""

        def _begin(self) -> None:
            fake.call(self.kind)
            fake.live[self.kind] += 1
            self.made = True

        def __del__(self) -> None:
            if getattr(self, "made", False):
                fake.ended(self.kind)

    class Stream(_Made):
        kind = "Stream"

        def __init__(self, flags: int = 0) -> None:
            self._begin()
            assert flags == 1, "a stream that waits for the default stream"
            self.handle = next(fake._numbers)
            fake.streams[self.handle] = _Stream(self.handle)

        def synchronize(self) -> None:
            fake.call("Stream.synchronize")
            stream = fake.streams[self.handle]
            fake.host_knows(stream.clock, stream.time)

        def wait_for_event(self, evt: Event) -> None:
            fake.call("Stream.wait_for_event")
            stream = fake.streams[self.handle]
            _merge(stream.clock, evt.clock)
            stream.time = max(stream.time, evt.time)

    class Event(_Made):
        kind = "Event"

        def __init__(self, flags: int = 0) -> None:
            assert isinstance(flags, int)
            self.flags, self.time = flags, 0.0
            self.clock: Clock = {}
            self._begin()

        def record(self, stream: Stream | None = None) -> Event:
            assert stream is not None, "recorded in the default stream"
            fake.call("Event.record")
            found = fake.streams[stream.handle]
            self.clock, self.time = dict(found.clock), found.time
            return self

        def synchronize(self) -> Event:
            fake.call("Event.synchronize")
            fake.host_knows(self.clock, self.time)
            return self

        def time_till(self, end: Event) -> float:
            assert not (self.flags | end.flags) & event_flags.DISABLE_TIMING
            return (end.time - self.time) * 1e3

    class DeviceAllocation:
        def __init__(self, nbytes: int) -> None:
            self.address, self.held = fake.allocate(nbytes), True
            fake.live["DeviceAllocation"] += 1

        def __int__(self) -> int:
            return self.address

        def free(self) -> None:
            fake.call("DeviceAllocation.free")
            self.__del__()

        def __del__(self) -> None:
            if getattr(self, "held", False):
                self.held = False
                fake.release(self.address)
                fake.ended("DeviceAllocation")

    class ManagedAllocation(DeviceAllocation):
        pass

    class PagelockedHostAllocation:
        def __init__(self, nbytes: int) -> None:
            self.nbytes = nbytes
            fake.locked += nbytes

        def free(self) -> None:
            fake.call("PagelockedHostAllocation.free")
            self.__del__()

        def __del__(self) -> None:
            fake.locked -= self.nbytes
            self.nbytes = 0

    def mem_alloc(bytes: int) -> DeviceAllocation:
        fake.call("mem_alloc")
        return DeviceAllocation(bytes)

    def managed_empty(shape: int, dtype: type, order: str = "C", mem_flags: int = 0) -> np.ndarray:
        assert fake.shared and dtype is np.uint8 and mem_flags == mem_attach_flags.GLOBAL
        fake.call("managed_empty")
        owner = ManagedAllocation(shape)
        made = fake.bytes_at(owner.address, shape).view(_Locked)
        made._owner = owner
        return made

    def mem_get_info() -> tuple[int, int]:
        fake.call("mem_get_info")
        return fake.total - fake.others - fake.memory, fake.total

    def pagelocked_empty(shape: int, dtype: type, order: str = "C", mem_flags: int = 0) -> np.ndarray:
        fake.call("pagelocked_empty")
        made = np.empty(shape, dtype).view(_Locked)
        made._owner = PagelockedHostAllocation(made.nbytes)
        return made

    def memcpy_htod_async(dest: int, src: np.ndarray, stream: Stream | None = None) -> None:
        assert stream is not None
        fake.call("memcpy_htod_async")
        raw = _raw(np.asarray(src))
        span = (dest, dest + raw.nbytes)
        with fake.work(stream.handle, raw.nbytes / fake.copy_rate, "a copy to the GPU", writes=[span]) as found:
            fake.bytes_at(dest, raw.nbytes)[:] = raw
            fake.send(found, raw)

    def memcpy_dtoh_async(dest: np.ndarray, src: int, stream: Stream | None = None) -> None:
        assert stream is not None
        fake.call("memcpy_dtoh_async")
        raw = _raw(np.asarray(dest))
        span = (src, src + raw.nbytes)
        with fake.work(stream.handle, raw.nbytes / fake.copy_rate, "a copy from the GPU", reads=[span]) as found:
            raw[:] = 0xCD
            arrived = fake.bytes_at(src, raw.nbytes).copy()
            fake._coming.append(_Coming(stream.handle, found.clock[stream.handle], raw, arrived))

    def memcpy_dtod_async(dest: int, src: int, size: int, stream: Stream | None = None) -> None:
        assert stream is not None
        fake.call("memcpy_dtod_async")
        handle, reads, writes = stream.handle, [(src, src + size)], [(dest, dest + size)]

        def copy() -> None:
            with fake.work(handle, size / 400e9, "a copy on the GPU", reads, writes):
                fake.bytes_at(dest, size)[:] = fake.bytes_at(src, size)

        fake.submit(handle, copy)

    module = ModuleType("pycuda.driver")
    for value in (
        *(Error, MemoryError, LogicError, LaunchError, RuntimeError),
        *(init, device_attribute, event_flags, mem_attach_flags, Device, Context, Stream, Event),
        *(
            mem_alloc,
            managed_empty,
            mem_get_info,
            pagelocked_empty,
            memcpy_htod_async,
            memcpy_dtoh_async,
            memcpy_dtod_async,
        ),
    ):
        setattr(module, value.__name__, value)
    module.fake = fake  # type: ignore[attr-defined]  # for tests
    return module
