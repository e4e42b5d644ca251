"""CUDA's driver through pycuda, which only this file imports, when a device is opened.

The device's primary context is used: the one that PyTorch and every other user of CUDA's runtime share in a process. It is made
current for the length of each call and then put back, so that a host application finds its own context as it left it, in
whatever thread it calls. A `Device` retains it until `close`. Streams do not wait for CUDA's default stream.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from ...bundle.errors import DeviceError

__all__ = ["Allocation", "Device", "Event", "Pinned", "Recorded", "Stream", "open_device"]

INSTALL = "pip install pycuda (docs/gpu.md has the line for this kind of machine)"
_contexts: dict[int, Any] = {}  # by the GPU's number
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING, which pycuda has no name for
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads of the host application are not restricted
_LOST = (
    "launch",
    "illegal",
    "ECC",
    "lost",
    "destroyed",
    "device context",
    "hardware",
    "assert",
    "misaligned",
    "invalid pc",
    "unknown error",
)


def open_device(number: int = 0) -> Device:
    """Retains the primary context of a GPU.

    Raises:
        DeviceError: pycuda or NVIDIA's driver is missing, or there is no such GPU.
    """
    cuda = _load()
    with _told(cuda, "starting CUDA"):
        cuda.init()
        count = cuda.Device.count()
        if number >= count:
            raise DeviceError(f"CUDA finds {count} GPUs, numbered from 0; there is no GPU {number}.")
        device = cuda.Device(number)
        if number not in _contexts:
            _contexts[number] = device.retain_primary_context()
        return Device(cuda, device, _contexts[number])


def _load() -> ModuleType:
    try:
        import pycuda.driver as cuda
    except ModuleNotFoundError as error:
        raise DeviceError(
            f"The TensorRT backend needs {error.name}, which is not installed. Install it: {INSTALL}"
        ) from None
    except ImportError as error:
        if "libcuda" in str(error) or "nvcuda" in str(error):
            raise DeviceError(
                f"NVIDIA's driver is not installed, or not visible in this container ({error}). "
                "Install the driver: https://www.nvidia.com/drivers"
            ) from error
        raise DeviceError(
            f"pycuda is installed but cannot be loaded: {error}. It was built for another CUDA or another Python; build it "
            "again here: pip install --no-cache-dir --force-reinstall --no-binary pycuda pycuda"
        ) from error
    module: ModuleType = cuda
    return module


def _load_driver() -> Any:
    """The driver's own library, for graphs, which pycuda has not."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


class Device:
    """A GPU and the process's context on it."""

    def __init__(self, cuda: Any, device: Any, context: Any):
        self._cuda, self._device, self._context = cuda, device, context
        self._depth = threading.local()
        with self.calling("asking the GPU what it is"):
            self.name: str = device.name()
            self.capability: tuple[int, int] = tuple(device.compute_capability())
            self.total: int = device.total_memory()
            self.unified = bool(device.get_attribute(cuda.device_attribute.INTEGRATED))
            # Whether the processor may write into memory while the GPU works on other parts of it, without copies in between.
            self.shared = self.unified and bool(device.get_attribute(cuda.device_attribute.CONCURRENT_MANAGED_ACCESS))

    @contextlib.contextmanager
    def calling(self, what: str) -> Iterator[None]:
        """Makes the context current, and tells CUDA's errors as `DeviceError`. `what` is being done, for a person."""
        depth = getattr(self._depth, "value", 0)
        with _told(self._cuda, what):
            if depth == 0:
                if self._context is None:
                    raise DeviceError("The GPU was given back already: this animator is closed.")
                self._context.push()
            self._depth.value = depth + 1
            try:
                yield
            finally:
                self._depth.value = depth
                if depth == 0:
                    self._cuda.Context.pop()

    def free_memory(self) -> int:
        """Bytes that nobody uses now, this process or another."""
        with self.calling("asking for the GPU's free memory"):
            free, _ = self._cuda.mem_get_info()
            return int(free)

    def allocate(self, nbytes: int) -> Allocation:
        """Device memory, which the processor may use as well if `shared`. Raises `DeviceError` if there is not so much."""
        with self.calling(f"taking {nbytes / 1e9:.2f} GB of GPU memory"):
            if not self.shared:
                return Allocation(self._cuda.mem_alloc(nbytes), nbytes)
            flags = int(self._cuda.mem_attach_flags.GLOBAL)
            return Allocation.seen(self._cuda.managed_empty(nbytes, np.uint8, mem_flags=flags))

    def pinned(self, nbytes: int) -> Pinned:
        """Host memory that the GPU copies from and to without the processor."""
        with self.calling(f"locking {nbytes / 1e9:.2f} GB of host memory"):
            return Pinned(self._cuda.pagelocked_empty(nbytes, np.uint8))

    def stream(self) -> Stream:
        with self.calling("making a stream"):
            return Stream(self._cuda, self._cuda.Stream(_NON_BLOCKING))

    def event(self, *, timed: bool = False) -> Event:
        """`timed`: `Event.milliseconds_to` may be asked of it."""
        flags = self._cuda.event_flags
        chosen = flags.BLOCKING_SYNC if timed else flags.BLOCKING_SYNC | flags.DISABLE_TIMING
        with self.calling("making an event"):
            return Event(self._cuda.Event(int(chosen)))

    def record(self, stream: Stream, work: Callable[[], None]) -> Recorded:
        """Makes a graph of what `work` enqueues into `stream`, which is not carried out now. Needs CUDA 11.4.

        Raises `DeviceError` if the driver refuses, or what `work` raises; the stream is as it was, in either case.
        """
        with self.calling("recording a CUDA graph"):
            try:
                calls = _Calls(self._cuda, _load_driver())
            except OSError as error:
                raise DeviceError(f"The driver's library cannot be opened ({error}).") from error
            graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
            calls("cuStreamBeginCapture_v2", ctypes.c_void_p(stream.handle), _THREAD_LOCAL)
            try:
                work()
            except BaseException:
                with contextlib.suppress(self._cuda.Error):  # it only says again that the recording failed
                    calls("cuStreamEndCapture", ctypes.c_void_p(stream.handle), ctypes.byref(graph))
                self._free_graph(calls, graph)
                raise
            calls("cuStreamEndCapture", ctypes.c_void_p(stream.handle), ctypes.byref(graph))
            try:
                calls("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
            finally:
                self._free_graph(calls, graph)
            return Recorded(calls, executable)

    def _free_graph(self, calls: _Calls, graph: ctypes.c_void_p) -> None:
        if graph.value:
            with contextlib.suppress(self._cuda.Error):
                calls("cuGraphDestroy", graph)

    def close(self) -> None:
        """Ends the use of the context. Everything that was made on it must be gone."""
        self._context = None


class _Calls:
    """Calls of the driver's functions by name; errors are pycuda's."""

    def __init__(self, cuda: Any, driver: Any):
        self._cuda, self._driver = cuda, driver

    def __call__(self, name: str, *arguments: Any) -> None:
        try:
            function = getattr(self._driver, name)
        except AttributeError:
            raise DeviceError(f"The driver is too old to record CUDA graphs: it has no {name}.") from None
        code = function(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(text))
            told = f"error {code}" if text.value is None else text.value.decode(errors="replace")
            raise self._cuda.LogicError(f"{name} failed: {told}")


class Recorded:
    """A CUDA graph, ready to be launched."""

    def __init__(self, calls: _Calls, executable: ctypes.c_void_p):
        self._calls, self._executable = calls, executable

    def launch(self, stream: Stream) -> None:
        """Puts all of it into the stream, on the addresses that it was recorded with."""
        self._calls("cuGraphLaunch", self._executable, ctypes.c_void_p(stream.handle))

    def free(self) -> None:
        if self._executable.value:
            executable, self._executable = self._executable, ctypes.c_void_p()
            self._calls("cuGraphExecDestroy", executable)


class Allocation:
    """A piece of device memory from the driver. `bytes`: [nbytes] uint8, what the processor sees of it; None: nothing."""

    def __init__(self, memory: Any, nbytes: int):
        self._memory, self.nbytes = memory, nbytes
        self.address = int(memory)
        self.bytes: np.ndarray | None = None

    @classmethod
    def seen(cls, array: np.ndarray) -> Allocation:
        """Of an array in memory that is managed."""
        made = cls(array.base, array.nbytes)
        made.bytes = array
        return made

    def free(self) -> None:
        if self._memory is not None:
            memory, self._memory, self.bytes = self._memory, None, None
            memory.free()


class Pinned:
    """Page-locked host memory; `bytes` [n] uint8."""

    def __init__(self, memory: np.ndarray):
        self.bytes: np.ndarray | None = memory

    def __getitem__(self, part: slice) -> np.ndarray:
        if self.bytes is None:
            raise RuntimeError("this memory was freed")
        return self.bytes[part]

    def free(self) -> None:
        if self.bytes is not None:
            owner: Any = self.bytes.base
            self.bytes = None
            owner.free()


class Event:
    """A point in a stream."""

    def __init__(self, event: Any):
        self._event = event
        self.recorded = False

    def record(self, stream: Stream) -> None:
        self._event.record(stream.raw)
        self.recorded = True

    def wait(self) -> None:
        """The calling thread waits, without using its processor, until the point is reached. At once if never recorded."""
        if self.recorded:
            self._event.synchronize()

    def milliseconds_to(self, later: Event) -> float:
        return float(self._event.time_till(later._event))


class Stream:
    """Work that the GPU does in order. Copies are of bytes, and return before they are done."""

    def __init__(self, cuda: Any, stream: Any):
        self._cuda, self.raw = cuda, stream
        self.handle = int(stream.handle)

    def wait_for(self, event: Event) -> None:
        """What follows in this stream begins after the point. Nothing to wait for if it was never recorded."""
        if event.recorded:
            self.raw.wait_for_event(event._event)

    def copy_in(self, address: int, source: np.ndarray) -> None:
        """From host memory; from pinned memory without waiting."""
        self._cuda.memcpy_htod_async(address, source, self.raw)

    def copy_out(self, target: np.ndarray, address: int) -> None:
        self._cuda.memcpy_dtoh_async(target, address, self.raw)

    def copy_within(self, target: int, source: int, nbytes: int) -> None:
        self._cuda.memcpy_dtod_async(target, source, nbytes, self.raw)

    def synchronize(self) -> None:
        self.raw.synchronize()


@contextlib.contextmanager
def _told(cuda: Any, what: str) -> Iterator[None]:
    try:
        yield
    except cuda.MemoryError as error:
        raise DeviceError(
            f"The GPU has no memory left for {what} ({_line(error)}). If another program holds it, end that; else give a "
            "smaller --memory, or make a smaller or shorter clip."
        ) from error
    except cuda.Error as error:
        text = _line(error)
        if "no CUDA-capable device" in text or "invalid device ordinal" in text:
            raise DeviceError(f"CUDA finds no GPU ({text}). Without one: --backend onnxruntime") from error
        if "driver version" in text or "forward compatibility" in text or "driver combination" in text:
            raise DeviceError(
                f"NVIDIA's driver is too old for this pycuda ({text}). Update it: https://www.nvidia.com/drivers"
            ) from error
        if any(sign in text for sign in _LOST):
            raise DeviceError(
                f"The GPU failed while {what} ({text}); it may have been noticed later than it happened. Nothing more can be "
                "computed on it in this process: start the program again."
            ) from error
        raise DeviceError(f"CUDA failed while {what} ({text}).") from error


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
