"""Every error for people has its exit code, and errors of the system become sentences with a remedy."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dynamictrl_edge.bundle import errors


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.EdgeError, 1),
        (errors.UsageError, 2),
        (errors.InputError, 3),
        (errors.BundleError, 4),
        (errors.DeviceError, 5),
        (errors.Interrupted, 130),
    ],
)
def test_exit_codes(kind: type[errors.EdgeError], code: int) -> None:
    assert kind.exit_code == code
    assert issubclass(kind, errors.EdgeError)
    assert not issubclass(kind, (OSError, KeyboardInterrupt))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "permission denied"),
        (errno.EPERM, "permission denied"),
        (errno.EROFS, "read-only"),
        (errno.ENOENT, "does not exist"),
        (errno.ENOTDIR, "a file, not a folder"),
        (errno.EISDIR, "a folder, not a file"),
        (errno.EIO, os.strerror(errno.EIO)),
        (errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG)),
    ],
)
def test_system_errors_become_sentences(number: int, words: str) -> None:
    error = errors.from_os_error(OSError(number, os.strerror(number)), "write", Path("out/clip.mp4"))
    assert type(error) is errors.InputError
    assert str(error).startswith("Cannot write 'out/clip.mp4': ")
    assert str(error).endswith(".")
    assert words in str(error)


def test_an_error_without_a_number_keeps_its_own_words() -> None:
    assert "moov atom not found" in str(errors.from_os_error(OSError("moov atom not found"), "read", "x.mp4"))
