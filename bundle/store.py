"""An opened bundle: verified files, graphs as bytes, weights as mapped arrays."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import BundleError
from .manifest import GraphSpec, Manifest, inside, read_manifest
from .tensors import MappedTensors, file_stamp, sha256_of

__all__ = ["Bundle", "cache_folder"]


def cache_folder() -> Path | None:
    """The folder for things that may be thrown away: `$DYNAMICTRL_CACHE`, else the user's cache folder.

    None if `$DYNAMICTRL_CACHE` is set to nothing, or if the user has no home: then no cache is kept.
    """
    if (chosen := os.environ.get("DYNAMICTRL_CACHE")) is not None:
        return Path(chosen) if chosen else None
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "dynamictrl-edge"
    except RuntimeError:  # a container's user without an entry in the list of users
        return None


class Bundle:
    """A bundle folder whose manifest has been read. Every file is checked against its SHA-256 before its first use.

    Hashing tens of gigabytes at each start would cost more than loading them, so a file that was found right is
    remembered by (size, modification time, inode) in the cache folder and is hashed again when any of these changes.
    """

    def __init__(self, root: Path | str):
        """Raises `BundleError` (exit code 4) if the manifest is missing, damaged, of another version or escaping."""
        self.root = Path(root)
        self.manifest: Manifest = read_manifest(self.root)
        self._seen = _VerifiedFiles()
        self._good: set[str] = set()

    def path(self, name: str) -> Path:
        """The path of a file that the manifest lists, verified; `BundleError` names it if missing or changed."""
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"The bundle {str(self.root)!r} does not list a file {name!r}.")
        path = inside(self.root, name)
        if name not in self._good:
            with _reading(path):
                stamp = file_stamp(path)  # before the hash: what changes meanwhile is hashed again next time
                right = stamp[0] == entry.bytes and (
                    self._seen.get(path, stamp) == entry.sha256 or sha256_of(path) == entry.sha256
                )
            if not right:
                raise BundleError(
                    f"The bundle file {str(path)!r} was changed after the export (its SHA-256 is not the one in "
                    "bundle.json). Copy the bundle again, or export the checkpoint again."
                )
            self._seen.put(path, stamp, entry.sha256)
            self._good.add(name)
        return path

    def verify(self, progress: Callable[[str], None] | None = None) -> None:
        """Checks every listed file; `progress` is called with each name before it is read."""
        for name in self.manifest.files:
            if progress is not None:
                progress(name)
            self.path(name)

    def graph(self, name: str) -> tuple[GraphSpec, bytes]:
        """A graph's description and its serialized ONNX model, read once and hashed from the same bytes."""
        spec = self.manifest.graphs.get(name)
        if spec is None:
            raise BundleError(
                f"The bundle {str(self.root)!r} has no graph {name!r} (it has {', '.join(self.manifest.graphs)}). "
                "Export the checkpoint again with this version."
            )
        path = self.path(spec.file)
        with _reading(path):
            data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.manifest.files[spec.file].sha256:
            raise BundleError(f"The bundle file {str(path)!r} changed while it was being read. Refused.")
        return spec, data

    def tensors(self, name: str) -> MappedTensors:
        """The weights in `weights/<name>.safetensors`, mapped."""
        return MappedTensors(self.path(f"weights/{name}.safetensors"), error=BundleError)

    def weights_digest(self, prefix: str) -> str:
        """A hash over the hashes of all weight files whose name starts with `prefix`: the identity of a component."""
        digest = hashlib.sha256()
        for name, entry in sorted(self.manifest.files.items()):
            if name.startswith(f"weights/{prefix}"):
                digest.update(f"{name}:{entry.sha256}\n".encode())
        return digest.hexdigest()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns errors of the system about the bundle file `path` into a `BundleError`."""
    try:
        yield
    except FileNotFoundError:
        raise BundleError(
            f"The bundle file {str(path)!r} is missing. Copy the bundle again, or export the checkpoint again."
        ) from None
    except OSError as error:
        raise BundleError(f"Cannot read the bundle file {str(path)!r}: {error.strerror}.") from error


class _VerifiedFiles:
    """Which files were found right before, one small JSON file each in the cache folder. Never an error: only a cache."""

    def __init__(self) -> None:
        base = cache_folder()
        self._folder = base / "verified" if base is not None else None

    def _entry(self, path: Path) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]

    def get(self, path: Path, stamp: tuple[int, ...]) -> str | None:
        """The SHA-256 that `path` had when it bore this stamp."""
        entry = self._entry(path)
        if entry is None:
            return None
        try:
            known = json.loads(entry.read_text())
            return str(known["sha256"]) if known["stamp"] == list(stamp) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def put(self, path: Path, stamp: tuple[int, ...], sha256: str) -> None:
        entry = self._entry(path)
        if entry is None or self.get(path, stamp) == sha256:
            return
        with contextlib.suppress(OSError):
            entry.parent.mkdir(parents=True, exist_ok=True)
            temporary = entry.with_name(f"{entry.name}.{secrets.token_hex(4)}")
            temporary.write_text(json.dumps({"sha256": sha256, "stamp": list(stamp)}))
            os.replace(temporary, entry)
