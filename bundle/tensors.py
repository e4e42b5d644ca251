"""Reading and writing safetensors files with numpy alone: lazily, tensor by tensor, hashed on the way out.

The format (a length, a JSON header, raw bytes) is that of huggingface/safetensors. Our files pad the header so that
the data starts at a multiple of 64 bytes, which keeps mapped matrices aligned for vector units and DMA.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import EdgeError, InputError, from_os_error
from .precision import DTYPES

__all__ = ["MappedTensors", "TensorInfo", "TensorWriter", "file_stamp", "read_header", "sha256_of"]

ALIGNMENT = 64
MAX_HEADER = 100_000_000  # the limit of the reference implementation
MAX_AXES = 32  # the limit of numpy 1
METADATA = "__metadata__"  # the header's one entry that is no tensor


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `offset` and `nbytes` count from the start of the file; `dtype` is the safetensors name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path, *, error: type[EdgeError] = InputError) -> dict[str, TensorInfo]:
    """The table of a safetensors file, checked: known dtypes, sizes that agree, no overlap, nothing outside the file.

    Raises `error` naming the file and what is wrong with it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER):
                raise error(f"{str(path)!r} is not a safetensors file, or it is cut short: its header is incomplete.")
            raw = file.read(length)
    except OSError as os_error:
        raise error(str(from_os_error(os_error, "read", path))) from os_error
    try:
        table = json.loads(raw)
        if not isinstance(table, dict):
            raise ValueError("it is not a JSON object")
        infos = [_info(name, entry, 8 + length) for name, entry in table.items() if name != METADATA]
    except (ValueError, RecursionError) as cause:
        raise error(f"{str(path)!r} has a damaged safetensors header: {cause}.") from cause
    end = 8 + length
    for info in sorted(infos, key=lambda i: (i.offset, i.nbytes)):  # empty tensors share their offset with the next
        if info.offset != end:
            raise error(f"{str(path)!r} is damaged: tensor {info.name!r} overlaps another or leaves a gap.")
        end += info.nbytes
    if end != size:
        raise error(f"{str(path)!r} is damaged or cut short: {size} bytes where the header describes {end}.")
    return {info.name: info for info in infos}


def _info(name: str, entry: Any, base: int) -> TensorInfo:
    """One entry of the header, every part of it checked; `ValueError` says which tensor it is about."""
    if not isinstance(entry, dict):
        raise ValueError(f"tensor {name!r} is not described by a JSON object")
    dtype, shape, offsets = entry.get("dtype"), _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} has dtype {dtype!r}, which is not one of {', '.join(DTYPES)}")
    if shape is None or len(shape) > MAX_AXES or math.prod(n or 1 for n in shape) >= 1 << 56:
        raise ValueError(f"tensor {name!r} has no shape that is possible: {_short(entry.get('shape'))}")
    if offsets is None or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has no two data_offsets: {_short(entry.get('data_offsets'))}")
    begin, end = offsets
    if math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"tensor {name!r} of shape {list(shape)} does not fill its {end - begin} bytes")
    return TensorInfo(name, dtype, shape, base + begin, end - begin)


def _counts(value: Any) -> tuple[int, ...] | None:
    """A list of whole numbers from 0 on, small enough for an array; None if it is anything else."""
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 1 << 48 for n in value):
        return None
    return tuple(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class TensorWriter:
    """Writes one safetensors file in the given order of tensors; only the tensor at hand is in memory.

    `sha256` and `nbytes` describe the whole file once it is closed.
    """

    def __init__(self, path: Path, tensors: Sequence[tuple[str, str, tuple[int, ...]]]):
        """`tensors` lists (name, safetensors dtype, shape) in the order in which `write` will be called.

        Raises `ValueError` if a name comes twice, `OSError` if the file cannot be written.
        """
        header: dict[str, Any] = {}
        offset = 0
        for name, dtype, shape in tensors:
            if name in header or name == METADATA:
                raise ValueError(f"{name!r} cannot be the name of one more tensor")
            nbytes = math.prod(shape) * DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
            offset += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        self._expected = deque((name, math.prod(shape) * DTYPES[dtype].itemsize) for name, dtype, shape in tensors)
        self._hash = hashlib.sha256()
        self._file = path.open("wb")
        self.nbytes = 0
        self._put(len(text).to_bytes(8, "little") + text)

    def _put(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._file.write(data)
        self.nbytes += len(data)

    def write(self, name: str, array: np.ndarray) -> None:
        """The next tensor's raw bytes, C order; `ValueError` if it is not the announced one."""
        if not self._expected:
            raise ValueError(f"all announced tensors are written already, got {name!r}")
        expected_name, nbytes = self._expected[0]
        if name != expected_name or array.nbytes != nbytes:
            raise ValueError(f"expected tensor {expected_name!r} of {nbytes} bytes, got {name!r} of {array.nbytes}")
        self._put(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._expected.popleft()

    def close(self) -> str:
        """Flushes and closes; returns the file's SHA-256 (hex). `ValueError` if tensors are missing."""
        if self._expected:
            raise ValueError(f"{len(self._expected)} announced tensors were not written")
        self._file.close()
        return self._hash.hexdigest()

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class MappedTensors(Mapping[str, np.ndarray]):
    """A read-only mapping name -> array over one mapped safetensors file. bfloat16 appears as uint16.

    Nothing is read until touched. `release()` gives the pages back to the system (they stay in its file cache),
    `prefetch()` asks for them ahead of use.
    """

    def __init__(self, path: Path, *, error: type[EdgeError] = InputError):
        self.path = path
        self.infos = read_header(path, error=error)
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._arrays = {
            name: np.frombuffer(self._map, DTYPES[i.dtype], math.prod(i.shape), i.offset).reshape(i.shape)
            for name, i in self.infos.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.infos.values())

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def _advise(self, advice: str) -> None:
        # Not every platform has madvise; without it the kernel decides alone.
        if hasattr(self._map, "madvise") and hasattr(mmap, advice):
            self._map.madvise(getattr(mmap, advice))

    def prefetch(self) -> None:
        self._advise("MADV_WILLNEED")

    def release(self) -> None:
        self._advise("MADV_DONTNEED")


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file, read in blocks of 4 MiB so that memory stays flat."""
    digest = hashlib.sha256()
    buffer = bytearray(1 << 22)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def file_stamp(path: Path) -> tuple[int, int, int]:
    """(bytes, modification time in ns, inode): changes whenever a file's content is rewritten in the ordinary way."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ino
