"""What a measurement says of the machine: what it is, which libraries it has, how much memory was used, how fast it multiplies.

Imports nothing of this package, so that it works where only numpy is installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "NumpyCeiling",
    "cores",
    "machine",
    "median_seconds",
    "numpy_ceiling",
    "numpy_product",
    "output",
    "peak_rss",
    "physical_memory",
    "versions",
]

LIBRARIES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnx",
    "torch",
    "diffusers",
    "transformers",
    "tokenizers",
    "safetensors",
    "av",
    "pillow",
    "tensorrt",
    "tensorrt_rtx",
    "pycuda",
)
THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)  # what the libraries behind numpy's products listen to


def machine() -> dict[str, Any]:
    """CPU model, cores that this process may use, memory in bytes, system, Python, and the GPUs with their driver."""
    query = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    gpus = output(*query) or ""
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory_bytes": physical_memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "gpus": [line.strip() for line in gpus.splitlines() if line.strip()],
    }


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def physical_memory() -> int | None:
    """The machine's memory in bytes; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def versions() -> dict[str, str]:
    """Versions of the installed libraries that a figure may depend on."""
    import importlib.metadata  # takes long to import

    found = {}
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)
    return found


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def output(*command: str) -> str | None:
    """Standard output of a command, stripped; None when it does not exist or fails."""
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None


def peak_rss() -> int:
    """The most resident memory that this process has had, in bytes.

    Read from the kernel's high-water mark of this program, where there is one: `ru_maxrss` of a process that was
    started by a large one begins at the size of its parent.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # which Windows lacks

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def median_seconds(call: Callable[[], object], budget: float) -> float:
    """Median duration of a call over about `budget` seconds, at least three calls after a warm one."""
    call()
    durations: list[float] = []
    while len(durations) < 3 or sum(durations) < budget:
        start = time.perf_counter()
        call()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


def numpy_product(size: int) -> Callable[[], object]:
    """A float32 product of two square matrices, into the same memory each time."""
    generator = np.random.default_rng(0)
    a, b = (generator.random((size, size), np.float32) for _ in range(2))
    out = np.empty_like(a)
    return lambda: np.matmul(a, b, out=out)


@dataclass(frozen=True)
class NumpyCeiling:
    """The best float32 product of square matrices that numpy reaches with so many threads. `by_size`: median GFLOP/s by rows."""

    gflops: float
    by_size: dict[str, float]
    threads: int


def numpy_ceiling(threads: int, *, seconds: float = 2.0, sizes: Sequence[int] = (1024, 2048)) -> NumpyCeiling | None:
    """Measures it for about so many seconds, in a process of its own: the library behind numpy takes its number of threads when it
    is loaded, and its memory does not count as ours. None where no such process can be started.
    """
    # The same places as here, and not the working directory, which Python would add.
    program = (
        f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import _measure_products; "
        f"_measure_products({seconds!r}, {tuple(sizes)!r})"
    )
    environment = {**os.environ, **dict.fromkeys(THREADS, str(threads))}
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment
        )
        by_size = {str(size): float(gflops) for size, gflops in json.loads(done.stdout).items()}
    except (OSError, ValueError):
        return None
    return NumpyCeiling(max(by_size.values()), by_size, threads)


def _measure_products(seconds: float, sizes: Sequence[int]) -> None:
    """Prints GFLOP/s by size."""
    share = seconds / len(sizes)
    print(json.dumps({n: 2 * n**3 / median_seconds(numpy_product(n), share) / 1e9 for n in sizes}))
