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
    if path.name in ("", ".."):
        raise InputError(
            f"The output {str(path)!r} is not a name of its own. Give one, for example {str(path / 'clip')!r}."
        )
    try:
        if not parent.exists():
            raise InputError(
                f"The output folder {str(parent)!r} does not exist. Create it first: mkdir -p {str(parent)!r}"
            )
        if not parent.is_dir():
            raise InputError(f"The output place {str(parent)!r} is a file, not a folder.")
    except OSError as error:
        raise from_os_error(error, "write to the output folder", parent) from error
    probe = parent / f".{path.name}.{secrets.token_hex(4)}.probe"
    try:
        try:
            # os.access() is not enough: root passes it on a read-only mount.
            os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        finally:
            probe.unlink(missing_ok=True)
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
    names = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    ours = any(place in (name, *name.parents) for name in names for place in (temporary, path))
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

    With `replace`, the old folder is moved aside first and comes back if the last move fails or is interrupted.
    """
    path = Path(path)
    check_output_place(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"The output {str(path)!r} is an existing file; a folder is written there.")
    if path.is_dir() and not replace:
        try:
            empty = not any(path.iterdir())
        except OSError as error:
            raise from_os_error(error, "look into the output folder", path) from error
        if not empty:
            raise InputError(f"The output folder {str(path)!r} is not empty. Remove it, or give another name.")
    temporary = _temporary_name(path)
    aside: Path | None = None
    try:
        temporary.mkdir()
        yield temporary
        if replace and path.is_dir():
            aside = _temporary_name(path)
            os.replace(path, aside)
        os.replace(temporary, path)
    except OSError as error:
        raise _explained(error, temporary, path) from error
    finally:
        _remove(temporary)
        if aside is not None and os.path.lexists(aside):
            if os.path.lexists(path):
                _remove(aside)
            else:  # the new folder never came
                os.replace(aside, path)
