"""Outputs appear whole or not at all: written under a temporary name beside the target, then moved into place."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import InputError, from_os_error

__all__ = ["atomic_file", "atomic_folder", "check_output_place"]


def check_output_place(path: Path) -> None:
    """Raises `InputError` unless `path` can be created or replaced: its folder exists and may be written to.

    Called before long work, so that a mistyped output name costs nothing.
    """
    parent = path.parent
    if not parent.exists():
        raise InputError(f"The output folder {str(parent)!r} does not exist. Create it first: mkdir -p {str(parent)!r}")
    if not parent.is_dir():
        raise InputError(f"The output place {str(parent)!r} is a file, not a folder.")
    probe = parent / f".{path.name}.{secrets.token_hex(4)}.probe"
    try:
        # os.access() is not enough: root passes it on a read-only mount.
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        probe.unlink()
    except OSError as error:
        raise from_os_error(error, "write to the output folder", parent) from error


def _temporary_name(path: Path) -> Path:
    # The suffix stays last: encoders choose the container by it.
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _explained(error: OSError, temporary: Path, path: Path) -> Exception:
    """An `InputError` about `path` if the error came from writing it; otherwise the error itself."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    ours = any(name.startswith((str(temporary), str(path))) for name in names)
    return from_os_error(error, "write", path) if full or ours else error


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path in the same folder; on success it replaces `path`, on any error it is removed.

    Raises:
        InputError: the folder is missing or cannot be written to, `path` is a folder, or the disk is full.
    """
    path = Path(path)
    check_output_place(path)
    if path.is_dir():
        raise InputError(f"The output {str(path)!r} is an existing folder; give a file name.")
    temporary = _temporary_name(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise _explained(error, temporary, path) from error
    finally:
        _remove(temporary)


@contextlib.contextmanager
def atomic_folder(path: Path | str, *, replace: bool = False) -> Iterator[Path]:
    """Like `atomic_file`, for a folder. An existing non-empty `path` is refused unless `replace` is true.

    With `replace`, the old folder is moved aside first and comes back if the last move fails.
    """
    path = Path(path)
    check_output_place(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"The output {str(path)!r} is an existing file; a folder is written there.")
    if path.is_dir() and any(path.iterdir()) and not replace:
        raise InputError(f"The output folder {str(path)!r} is not empty. Remove it, or give another name.")
    temporary = _temporary_name(path)
    aside: Path | None = None
    try:
        temporary.mkdir()
        yield temporary
        if path.exists():
            aside = _temporary_name(path)
            os.replace(path, aside)
        try:
            os.replace(temporary, path)
        except OSError:
            if aside is not None:
                os.replace(aside, path)
                aside = None
            raise
    except OSError as error:
        raise _explained(error, temporary, path) from error
    finally:
        _remove(temporary)
        if aside is not None:
            _remove(aside)
