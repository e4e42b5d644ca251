"""The process that builds one engine: a job as JSON on stdin, progress and the result as JSON lines on stdout.

A process of its own gives the compiler's memory back, and turns a crash of its native code into a message. It ends when
its parent does, however that ended: stdin is then at its end.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec

from ..bundle.errors import BundleError, DeviceError, EdgeError, InputError, Interrupted, UsageError, from_os_error
from .builder import EngineJob, Product, build_engine
from .report import write_report

__all__ = ["Answer", "Failure", "main", "peak_rss"]

_PERIOD = 0.1  # seconds between two messages about progress


class Failure(msgspec.Struct, frozen=True):
    """An error for people, by the exit code of its class."""

    exit_code: int
    text: str

    def error(self) -> EdgeError:
        known = {kind.exit_code: kind for kind in (UsageError, InputError, BundleError, DeviceError, Interrupted)}
        return known.get(self.exit_code, EdgeError)(self.text)


class Answer(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One line of the worker's output: progress, or its last word (`product` or `failure`)."""

    phase: str = ""
    done: int = 0
    total: int = 0
    product: Product | None = None
    failure: Failure | None = None
    peak_rss: int = 0


def main() -> int:
    """Reads the job, builds, answers; returns 0 when it could answer."""
    channel = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever native code prints must not get between the answers
    job = msgspec.json.decode(_first_line(), type=EngineJob)
    cancelled = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: cancelled.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to parent and child; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    last = 0.0

    def answer(message: Answer) -> None:
        channel.write(msgspec.json.encode(message) + b"\n")

    def progress(phase: str, done: int, total: int) -> bool:
        nonlocal last
        now = time.monotonic()
        if phase and now - last >= _PERIOD:
            last = now
            answer(Answer(phase=phase, done=done, total=total))
        return not cancelled.is_set()

    try:
        product, report = build_engine(job, progress)
        write_report(Path(job.report), report)
        answer(Answer(product=product, peak_rss=peak_rss()))
    except EdgeError as error:
        answer(Answer(failure=Failure(error.exit_code, str(error))))
    except MemoryError:
        answer(Answer(failure=Failure(DeviceError.exit_code, f"Out of memory while building {job.graph!r}.")))
    except OSError as error:
        known = from_os_error(error, "write the engine", job.engine)
        answer(Answer(failure=Failure(known.exit_code, str(known))))
    return 0


def peak_rss() -> int:
    """Largest resident memory of this program so far, bytes; 0 where the system does not say.

    On Linux `getrusage` would also count what the process was before it became this program: a copy of its parent.
    """
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _first_line() -> bytes:
    line = b""
    while not line.endswith(b"\n") and (piece := os.read(0, 1 << 16)):
        line += piece
    return line


def _end_with_parent() -> None:
    # The descriptor, not the buffered stream: Python cannot shut down while a thread waits inside of that.
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
