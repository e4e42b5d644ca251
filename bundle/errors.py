"""Errors that a person reads, and the exit code that each one ends the command line with.

Every message is one readable paragraph: what was wrong, with which file or value, and what to do.
"""

from __future__ import annotations

import errno
from pathlib import Path

__all__ = [
    "BundleError",
    "DeviceError",
    "EdgeError",
    "InputError",
    "Interrupted",
    "UsageError",
    "from_os_error",
]


class EdgeError(Exception):
    """Base of all errors meant for the user. `exit_code` is the process's exit status."""

    exit_code = 1


class UsageError(EdgeError):
    """A value on the command line or an argument of the API that can never work (exit code 2)."""

    exit_code = 2


class InputError(EdgeError):
    """An image, video, prompt, checkpoint or output place that cannot be used (exit code 3)."""

    exit_code = 3


class BundleError(EdgeError):
    """A bundle or an engine set that is refused: missing, changed, escaping, unknown version (exit code 4)."""

    exit_code = 4


class DeviceError(EdgeError):
    """The device or its memory cannot do what was asked (exit code 5)."""

    exit_code = 5


class Interrupted(EdgeError):
    """The user or the host application cancelled the work (exit code 130)."""

    exit_code = 130


def from_os_error(error: OSError, doing: str, path: Path | str) -> InputError:
    """Turns an `OSError` met while `doing` something to `path` into an `InputError` with the remedy."""
    remedies = {
        errno.ENOSPC: "the disk is full; free some space or choose another place",
        errno.EDQUOT: "the disk quota is used up; free some space or choose another place",
        errno.EACCES: "permission denied; change its permissions, or choose another place",
        errno.EPERM: "permission denied; change its permissions, or choose another place",
        errno.EROFS: "the file system is read-only; choose another place",
        errno.ENOENT: "it does not exist",
        errno.ENOTDIR: "a part of the path is a file, not a folder",
        errno.EISDIR: "it is a folder, not a file",
    }
    why = remedies.get(error.errno or 0, error.strerror or str(error))
    return InputError(f"Cannot {doing} {str(path)!r}: {why}.")
