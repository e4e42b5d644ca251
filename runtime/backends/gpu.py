"""One NVIDIA GPU as everything that runs on it shares it: streams, memory, and what carries arrays in and out.

One allocation, the arena, is made for a request or kept from the last one; from then on nothing is allocated. All computing is
in one stream, in the order of the calls; a second stream copies the blocks' weights. Only `Gpu.download` waits for the GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ...bundle.errors import DeviceError
from ..memory import GB, physical_memory
from .arena import Arena, DeviceArray, Piece
from .base import Copy
from .cuda import Allocation, Device, Event, Pinned, Stream

__all__ = ["CHUNK", "Gpu", "GpuClock", "GpuRecording"]

KEPT_SHARE = 0.25  # of the host's memory may be locked for streamed blocks
CHUNK = 16 << 20  # bytes of a page-locked buffer for arrays on their way


class Gpu:
    """One GPU with its two streams, the arena, and page-locked memory for what comes and goes."""

    def __init__(self, device: Device):
        self.device = device
        self.compute, self.copying = device.stream(), device.stream()
        self.fence = device.event()
        self.ring = 0  # slots for streamed blocks, by the plan
        # Bytes of host memory that may be locked for streamed blocks. None where it is the GPU's: that would be a second copy.
        self.lockable = 0 if device.unified else int(KEPT_SHARE * (physical_memory() or 0))
        self.arena: Arena | None = None
        self.kept: Arena | None = None  # for blocks that stay from one request to the next
        self.clock: GpuClock | None = None  # while something is measured
        self._events: list[Event] = []  # of clocks; they serve again
        self._memory: Allocation | None = None
        self._kept_memory: Allocation | None = None
        self._staging: list[tuple[Pinned, Event]] = []
        self._turn = 0

    def begin(self, nbytes: int, ring: int, *, kept: int = 0) -> None:
        """Makes the arena ready for a request: all of it is free, whatever became of earlier requests.

        `kept`: bytes for blocks that stay; what is in them stays too, as long as requests ask for the same.

        Raises:
            DeviceError: the GPU has not so much; the text says how much there is.
        """
        self.ring = ring
        with self.device.calling("preparing the GPU's memory"):
            for stream in (self.copying, self.compute):
                stream.synchronize()
            if not self._staging:
                self._staging = [(self.device.pinned(CHUNK), self.device.event()) for _ in range(2)]
            if kept != (0 if self._kept_memory is None else self._kept_memory.nbytes):
                self._release()
            if self._memory is None or self._memory.nbytes < nbytes:
                self._release_arena()
                self._check_free(nbytes + (kept if self._kept_memory is None else 0))
                self._memory = self.device.allocate(nbytes)
            if kept and self._kept_memory is None:
                self._kept_memory = self.device.allocate(kept)
                self.kept = Arena(self._kept_memory.address, kept, self._kept_memory.bytes)
            # A new one, so that pieces which an error's traceback still holds on to do not count.
            self.arena = Arena(self._memory.address, self._memory.nbytes, self._memory.bytes)

    def _check_free(self, nbytes: int) -> None:
        free = self.device.free_memory()
        if free < nbytes:
            raise DeviceError(
                f"The clip needs {nbytes / GB:.2f} GB of GPU memory at once; {self.device.name} has "
                f"{free / GB:.2f} GB free of {self.device.total / GB:.2f} GB. End what else uses it, or give "
                f"--memory {max(free / GB, 0.01):.2f} or less."
            )

    @property
    def held(self) -> int:
        """Bytes that are taken from the driver."""
        return sum(memory.nbytes for memory in (self._memory, self._kept_memory) if memory is not None)

    def take(self, nbytes: int, what: str) -> Piece:
        if self.arena is None:
            raise RuntimeError("a request must begin before anything runs")
        return self.arena.take(nbytes, what)

    def empty(self, shape: Sequence[int], dtype: np.dtype | type, what: str = "a buffer") -> DeviceArray:
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        return DeviceArray(self.take(nbytes, what), shape, dtype)

    def upload(self, target: DeviceArray, array: np.ndarray) -> None:
        """In the compute stream, through page-locked memory; `array` is free again when this returns."""
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        with self.device.calling("copying to the GPU"):
            for start in range(0, raw.nbytes, CHUNK):
                part = raw[start : start + CHUNK]
                memory, sent = self._next_staging()
                np.copyto(memory[: part.nbytes], part)
                self.compute.copy_in(target.address + start, memory[: part.nbytes])
                sent.record(self.compute)

    def download(self, source: DeviceArray) -> np.ndarray:
        """The values, once everything before is done."""
        found = np.empty(source.shape, source.dtype)
        raw = found.reshape(-1).view(np.uint8)
        with self.device.calling("copying from the GPU"):
            for start in range(0, raw.nbytes, CHUNK):
                part = raw[start : start + CHUNK]
                memory, sent = self._next_staging()
                self.compute.copy_out(memory[: part.nbytes], source.address + start)
                sent.record(self.compute)
                sent.wait()
                np.copyto(part, memory[: part.nbytes])
        return found

    def _next_staging(self) -> tuple[Pinned, Event]:
        memory, sent = self._staging[self._turn % len(self._staging)]
        self._turn += 1
        sent.wait()
        return memory, sent

    @contextlib.contextmanager
    def copying_weights(self, nbytes: int) -> Iterator[None]:
        """Around a copy in the copy stream: a clock that runs keeps when it was."""
        if self.clock is None:
            yield
            return
        begin = self.clock.mark_in(self.copying)
        yield
        self.clock.copies.append(Copy(begin, self.clock.mark_in(self.copying), nbytes))

    @contextlib.contextmanager
    def measuring(self) -> Iterator[GpuClock]:
        """A clock that runs until the context ends."""
        self.clock = GpuClock(self, self._events)
        try:
            yield self.clock
        finally:
            self.clock = None

    def settle(self) -> None:
        """Waits for both streams. After a fault the driver refuses that too, and there is nothing left to wait for."""
        for stream in (self.copying, self.compute):
            with contextlib.suppress(DeviceError), self.device.calling("waiting for the GPU"):
                stream.synchronize()

    def _release(self) -> None:
        self._release_arena()
        self.kept = None
        if self._kept_memory is not None:
            memory, self._kept_memory = self._kept_memory, None
            memory.free()

    def _release_arena(self) -> None:
        self.arena = None
        if self._memory is not None:
            memory, self._memory = self._memory, None
            memory.free()

    def close(self) -> None:
        """Gives all memory back; the streams have settled. After a fault it may be called again, for the rest."""
        with contextlib.suppress(DeviceError), self.device.calling("giving memory back"):
            self._release()
            while self._staging:
                self._staging.pop()[0].free()
            self._events.clear()
        with contextlib.suppress(DeviceError), self.device.calling("giving streams back"):
            for name in ("fence", "compute", "copying"):
                self.__dict__.pop(name, None)


class GpuClock:
    """`base.Clock` by the GPU's own: points are events in its streams. They are taken from `events`, which grows."""

    def __init__(self, gpu: Gpu, events: list[Event]):
        self.copies: list[Copy] = []
        self._gpu, self._events, self._used = gpu, events, 0
        self._start = self.mark()
        with gpu.device.calling("measuring"):
            self._start.wait()  # so that no later point is before it, whatever its stream

    def mark(self) -> Event:
        return self.mark_in(self._gpu.compute)

    def mark_in(self, stream: Stream) -> Event:
        device = self._gpu.device
        with device.calling("measuring"):
            if self._used == len(self._events):
                self._events.append(device.event(timed=True))
            event = self._events[self._used]
            self._used += 1
            event.record(stream)
        return event

    def seconds(self, point: Event) -> float:
        with self._gpu.device.calling("measuring"):
            point.wait()
            return self._start.milliseconds_to(point) / 1e3


class GpuRecording:
    """`base.Recording` as a CUDA graph. At most two of its runs wait in the stream: cancelling waits for them."""

    def __init__(self, gpu: Gpu, work: Callable[[], None]):
        self._gpu, self._turn = gpu, 0
        self._fences = [gpu.device.event() for _ in range(2)]
        # Last: nobody would free it if an event could not be made.
        self._recorded = gpu.device.record(gpu.compute, work)

    def __call__(self) -> None:
        fence = self._fences[self._turn % 2]
        self._turn += 1
        with self._gpu.device.calling("running a CUDA graph"):
            fence.wait()
            self._recorded.launch(self._gpu.compute)
            fence.record(self._gpu.compute)

    def close(self) -> None:
        with contextlib.suppress(DeviceError), self._gpu.device.calling("freeing a CUDA graph"):
            self._fences.clear()
            self._recorded.free()
