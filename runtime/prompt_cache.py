"""Prompt embeddings kept on disk, so that a prompt is encoded once and a device need not hold the text encoder.

One file per prompt: a .npy array followed by the SHA-256 of everything before it. Files appear whole (written aside,
then moved), so several processes may share a folder; whatever is damaged is a miss and gets overwritten. A cache never
fails the work: where it cannot write, it keeps nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..bundle.atomic import atomic_file
from ..bundle.errors import EdgeError
from ..bundle.store import cache_folder

__all__ = ["PromptCache", "prompt_key"]

Floats = npt.NDArray[np.float32]

LIMIT = 256_000_000  # bytes; a full-size prompt takes 3.7 MB
DIGEST = hashlib.sha256().digest_size
ABANDONED = 3600.0  # seconds after which a half-written file belongs to a process that died


def prompt_key(text: str, length: int, identity: str) -> str:
    """The cache key of a prompt, 64 hex digits: `length` tokens through what `identity` names."""
    digest = hashlib.sha256()
    for part in (text, str(length), identity):
        raw = part.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


class PromptCache:
    """float32 arrays by key, in one folder, the least recently used ones removed beyond `limit` bytes."""

    def __init__(self, folder: Path | str | None, *, limit: int = LIMIT):
        """`folder` is created when first written to; None keeps nothing."""
        self.folder = None if folder is None else Path(folder)
        self.limit = limit

    @classmethod
    def default(cls) -> PromptCache:
        """In `prompts/` under `$DYNAMICTRL_CACHE` or the user's cache folder; off if that is set to nothing."""
        try:
            base = cache_folder()
        except RuntimeError:  # no home folder
            base = None
        return cls(None if base is None else base / "prompts")

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{key}.npy"

    def get(self, key: str) -> Floats | None:
        """The array kept under `key`, marked as used now; None if there is none or its file is damaged."""
        path = self._path(key)
        if path is None:
            return None
        try:
            raw = path.read_bytes()
            if len(raw) <= DIGEST or hashlib.sha256(raw[:-DIGEST]).digest() != raw[-DIGEST:]:
                return None
            array = np.load(io.BytesIO(raw[:-DIGEST]), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        if not isinstance(array, np.ndarray) or array.dtype != np.float32:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return array

    def put(self, key: str, array: Floats) -> bool:
        """Keeps `array` under `key`; False if that failed (read-only folder, full disk, larger than `limit`)."""
        path = self._path(key)
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(array, np.float32), allow_pickle=False)
        data = buffer.getvalue()
        data += hashlib.sha256(data).digest()
        if path is None or len(data) > self.limit:
            return False
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with atomic_file(path) as temporary:
                temporary.write_bytes(data)
        except (OSError, EdgeError):
            return False
        self._trim(keep=path)
        return True

    def _trim(self, keep: Path) -> None:
        """Removes what dead processes left, then the files unused for longest until the rest fits. `keep` stays."""
        entries: list[tuple[float, int, Path]] = []
        for path in keep.parent.glob("*.npy"):
            with contextlib.suppress(OSError):  # another process may remove it meanwhile
                status = path.stat()
                if not path.name.startswith("."):
                    entries.append((status.st_mtime, status.st_size, path))
                elif time.time() - status.st_mtime > ABANDONED:
                    path.unlink()
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.limit:
                return
            if path != keep:
                with contextlib.suppress(OSError):
                    path.unlink()
                total -= size

    def embeddings(
        self, prompts: Sequence[str], encode: Callable[[Sequence[str]], Floats], *, length: int, identity: str
    ) -> Floats:
        """float32 [B, length, Dt] for `prompts`; `encode` is called at most once, with the different ones not kept yet.

        `identity` names what the numbers depend on besides the text (hashes of tokenizer, weights and graph).
        """
        keys = {prompt: prompt_key(prompt, length, identity) for prompt in prompts}
        found: dict[str, Floats] = {}
        for prompt, key in keys.items():
            array = self.get(key)
            if array is not None and array.ndim == 2 and len(array) == length:
                found[prompt] = array
        missing = [prompt for prompt in keys if prompt not in found]
        if missing:
            for prompt, array in zip(missing, encode(missing), strict=True):
                found[prompt] = array
                self.put(keys[prompt], array)
        return np.stack([found[prompt] for prompt in prompts])
