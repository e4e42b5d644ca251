"""Files and folders appear whole or not at all, and nothing else remains beside them."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamictrl_edge.bundle import atomic
from dynamictrl_edge.bundle.atomic import atomic_file, atomic_folder, check_output_place
from dynamictrl_edge.bundle.errors import InputError

Writer = Callable[..., contextlib.AbstractContextManager[Path]]
BOTH = pytest.mark.parametrize("writer", [atomic_file, atomic_folder])


def listing(folder: Path) -> dict[str, bytes | str | None]:
    """Everything below `folder`: bytes of files, targets of links, None for folders."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else None
        if path.is_dir()
        else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def fill(path: Path, writer: Writer, content: bytes = b"new") -> None:
    """What the body of a `with` does: a file, or a folder with a file in a folder."""
    if writer is atomic_folder:
        path = path / "in" / "it"
        path.parent.mkdir()
    path.write_bytes(content)


def interrupted(writer: Writer, out: Path, error: BaseException, *, name_it: bool = False, **options: Any) -> None:
    """Work that ends with `error` when everything is written; `name_it`: the error says which file it is about."""
    with writer(out, **options) as temporary:
        fill(temporary, writer)
        if name_it:
            error.filename = str(temporary)  # type: ignore[attr-defined]
        raise error


def failing(number: int, *, only: Callable[[str], bool] = lambda name: True) -> Callable[..., int]:
    """`os.open` on a file system that refuses to create files."""
    real = os.open

    def refused(path: Any, flags: int, *rest: Any, **keywords: Any) -> int:
        if flags & os.O_CREAT and only(os.fspath(path)):
            raise OSError(number, os.strerror(number), os.fspath(path))
        return real(path, flags, *rest, **keywords)

    return refused


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with something in it that every test must leave alone."""
    place = tmp_path / "place"
    place.mkdir()
    (place / "other.txt").write_bytes(b"other")
    yield place
    assert (place / "other.txt").read_bytes() == b"other"
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


# --- whole


def test_a_file_appears_whole(folder: Path) -> None:
    with atomic_file(folder / "clip.mp4") as temporary:
        assert temporary.parent == folder
        assert temporary.suffix == ".mp4"
        temporary.write_bytes(b"new")
        assert not (folder / "clip.mp4").exists()
    assert listing(folder) == {"clip.mp4": b"new", "other.txt": b"other"}


def test_a_file_is_replaced_only_at_the_end(folder: Path) -> None:
    (folder / "clip.mp4").write_bytes(b"old")
    with atomic_file(str(folder / "clip.mp4")) as temporary:
        temporary.write_bytes(b"new")
        assert (folder / "clip.mp4").read_bytes() == b"old"
    assert listing(folder) == {"clip.mp4": b"new", "other.txt": b"other"}


def test_a_link_is_replaced_and_what_it_led_to_stays(folder: Path) -> None:
    (folder / "link").symlink_to("other.txt")
    with atomic_file(folder / "link") as temporary:
        temporary.write_bytes(b"new")
    assert listing(folder) == {"link": b"new", "other.txt": b"other"}


@pytest.mark.parametrize("before", ["nothing", "empty"])
def test_a_folder_appears_whole(folder: Path, before: str) -> None:
    out = folder / "bundle"
    if before == "empty":
        out.mkdir()
    with atomic_folder(str(out)) as temporary:
        fill(temporary, atomic_folder)
        assert temporary.is_dir()
        assert before == "empty" or not out.exists()
    assert listing(folder) == {"bundle": None, "bundle/in": None, "bundle/in/it": b"new", "other.txt": b"other"}


def test_a_full_folder_is_replaced_when_that_is_wanted(folder: Path) -> None:
    (folder / "bundle" / "old").mkdir(parents=True)
    (folder / "bundle" / "old" / "file").write_bytes(b"old")
    with atomic_folder(folder / "bundle", replace=True) as temporary:
        fill(temporary, atomic_folder)
        assert (folder / "bundle" / "old" / "file").read_bytes() == b"old"
    assert listing(folder) == {"bundle": None, "bundle/in": None, "bundle/in/it": b"new", "other.txt": b"other"}


def test_replacing_a_link_to_a_folder_keeps_the_folder(folder: Path) -> None:
    (folder / "real").mkdir()
    (folder / "real" / "file").write_bytes(b"kept")
    (folder / "link").symlink_to("real")
    with atomic_folder(folder / "link", replace=True) as temporary:
        fill(temporary, atomic_folder)
    after = listing(folder)
    assert after["real/file"] == b"kept"
    assert after["link/in/it"] == b"new"
    assert len(after) == 6


def test_relative_names_are_taken_from_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with atomic_file("clip.mp4") as temporary:
        temporary.write_bytes(b"new")
    with atomic_folder("bundle") as temporary:
        fill(temporary, atomic_folder)
    assert sorted(listing(folder)) == ["bundle", "bundle/in", "bundle/in/it", "clip.mp4", "other.txt"]


# --- or not at all


@BOTH
@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
@pytest.mark.parametrize("old", [False, True])
def test_whatever_ends_the_work_leaves_everything_as_it_was(
    folder: Path, writer: Writer, error: BaseException, old: bool
) -> None:
    out = folder / "out"
    options = {}
    if old and writer is atomic_folder:
        out.mkdir()
        (out / "old").write_bytes(b"old")
        options = {"replace": True}
    elif old:
        out.write_bytes(b"old")
    before = listing(folder)
    with pytest.raises(type(error)) as caught:
        interrupted(writer, out, error, **options)
    assert caught.value is error
    assert listing(folder) == before


@BOTH
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("named", [True, False])
def test_a_full_disk_is_explained_and_nothing_remains(folder: Path, writer: Writer, number: int, named: bool) -> None:
    before = listing(folder)
    with pytest.raises(InputError) as caught:
        interrupted(writer, folder / "out", OSError(number, os.strerror(number)), name_it=named)
    assert str(folder / "out") in str(caught.value)
    assert "free some space" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert listing(folder) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_device_that_is_really_full_is_explained(folder: Path) -> None:
    before = listing(folder)
    with pytest.raises(InputError, match="disk is full"), atomic_file(folder / "out"), open("/dev/full", "wb") as file:
        file.write(b"x" * 100_000)
    assert listing(folder) == before


@BOTH
def test_an_error_about_the_output_is_explained(folder: Path, writer: Writer) -> None:
    with pytest.raises(InputError, match="permission denied") as caught, writer(folder / "out") as temporary:
        raise PermissionError(errno.EACCES, "Permission denied", str(temporary / "part"))
    assert str(folder / "out") in str(caught.value)
    assert ".part" not in str(caught.value)


@BOTH
@pytest.mark.parametrize("place", ["input.mp4", "out.mp4", "outer/out", "out-2/x", None, 7])
def test_an_error_about_something_else_passes_unchanged(folder: Path, writer: Writer, place: str | int | None) -> None:
    name = str(folder / place) if isinstance(place, str) else place
    error = OSError(errno.EIO, "Input/output error", *([] if name is None else [name]))
    before = listing(folder)
    with pytest.raises(OSError, match="Input/output error") as caught:
        interrupted(writer, folder / "out", error)
    assert caught.value is error
    assert listing(folder) == before


def test_a_missing_input_is_not_taken_for_the_output(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(FileNotFoundError), atomic_file("out"):
        open("output-of-yesterday.mp4").close()


# --- places that cannot be used


def refusal(writer: Writer, path: Path, **options: Any) -> str:
    """The message; the body must not have run."""
    with pytest.raises(InputError) as caught, writer(path, **options):
        pytest.fail("the work began")
    assert caught.value.exit_code == 3
    return str(caught.value)


@BOTH
def test_a_missing_folder_is_refused_with_the_command_that_makes_it(folder: Path, writer: Writer) -> None:
    text = refusal(writer, folder / "a" / "b" / "out")
    assert f"mkdir -p {str(folder / 'a' / 'b')!r}" in text
    assert "does not exist" in text


@BOTH
def test_a_file_in_the_folders_place_is_refused(folder: Path, writer: Writer) -> None:
    assert "is a file, not a folder" in refusal(writer, folder / "other.txt" / "out")


@BOTH
@pytest.mark.parametrize("name", ["/", ".", "..", "a/.."])
def test_a_name_that_is_no_name_is_refused(folder: Path, writer: Writer, name: str) -> None:
    (folder / "a").mkdir()
    assert "not a name of its own" in refusal(writer, folder / name if name != "." else Path("."))


@BOTH
@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EROFS, "read-only"), (errno.EACCES, "permission denied"), (errno.ENOSPC, "disk is full")],
)
def test_a_folder_that_takes_no_files_is_refused_before_any_work(
    folder: Path, writer: Writer, number: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listing(folder)
    monkeypatch.setattr(os, "open", failing(number))
    text = refusal(writer, folder / "out")
    assert words in text
    assert str(folder) in text
    monkeypatch.undo()
    assert listing(folder) == before


@BOTH
def test_a_folder_that_may_not_be_looked_into_is_refused(
    folder: Path, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hidden(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", hidden)
        text = refusal(writer, folder / "out")
    assert "permission denied" in text


@BOTH
def test_a_name_that_is_too_long_is_refused(folder: Path, writer: Writer) -> None:
    before = listing(folder)
    assert "File name too long" in refusal(writer, folder / ("x" * 300))
    assert listing(folder) == before


def test_a_file_is_not_written_over_a_folder(folder: Path) -> None:
    (folder / "out").mkdir()
    assert "existing folder; give a file name" in refusal(atomic_file, folder / "out")


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_is_not_written_over_a_file(folder: Path, replace: bool) -> None:
    assert "existing file" in refusal(atomic_folder, folder / "other.txt", replace=replace)


def test_a_folder_that_is_not_empty_is_refused(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "old").write_bytes(b"old")
    before = listing(folder)
    assert "is not empty. Remove it, or give another name" in refusal(atomic_folder, folder / "out")
    assert listing(folder) == before


def test_a_folder_whose_content_is_hidden_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(path: Path) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (folder / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", hidden)
        text = refusal(atomic_folder, folder / "out")
    assert "permission denied" in text
    assert str(folder / "out") in text


def test_the_check_alone_leaves_nothing(folder: Path) -> None:
    before = listing(folder)
    check_output_place(folder / "out")
    check_output_place(folder / "other.txt")
    assert listing(folder) == before


# --- the last move


def old_folder(folder: Path) -> dict[str, bytes | str | None]:
    (folder / "out").mkdir()
    (folder / "out" / "old").write_bytes(b"old")
    return listing(folder)


def test_a_file_keeps_its_old_content_when_the_move_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: Any, target: Any) -> None:
        raise OSError(errno.EACCES, "Permission denied", str(source), None, str(target))

    (folder / "out").write_bytes(b"old")
    before = listing(folder)
    monkeypatch.setattr(atomic.os, "replace", refused)
    with pytest.raises(InputError, match="permission denied"), atomic_file(folder / "out") as temporary:
        temporary.write_bytes(b"new")
    assert listing(folder) == before


@pytest.mark.parametrize("failing_move", [1, 2])
@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), KeyboardInterrupt()])
def test_the_old_folder_returns_when_a_move_fails(
    folder: Path, failing_move: int, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = old_folder(folder)
    real, moves = os.replace, []

    def move(source: Any, target: Any) -> None:
        moves.append(target)
        if len(moves) == failing_move:
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, str(source), None, str(target))
            raise error
        real(source, target)

    monkeypatch.setattr(atomic.os, "replace", move)
    expected = InputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected), atomic_folder(folder / "out", replace=True) as temporary:
        fill(temporary, atomic_folder)
    assert listing(folder) == before


def test_an_interruption_after_the_last_move_leaves_the_new_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_folder(folder)
    real = os.replace

    def move(source: Any, target: Any) -> None:
        real(source, target)
        if Path(target) == folder / "out":
            raise KeyboardInterrupt

    monkeypatch.setattr(atomic.os, "replace", move)
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder / "out", replace=True) as temporary:
        fill(temporary, atomic_folder)
    assert listing(folder) == {"other.txt": b"other", "out": None, "out/in": None, "out/in/it": b"new"}


def test_the_old_folder_is_never_removed_when_it_cannot_return(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old_folder(folder)
    real, moves = os.replace, []

    def move(source: Any, target: Any) -> None:
        moves.append(target)
        if len(moves) > 1:
            raise OSError(errno.EIO, "Input/output error", str(source), None, str(target))
        real(source, target)

    monkeypatch.setattr(atomic.os, "replace", move)
    with pytest.raises((InputError, OSError)), atomic_folder(folder / "out", replace=True) as temporary:
        fill(temporary, atomic_folder)
    assert b"old" in listing(folder).values()
    assert b"new" not in listing(folder).values()


@pytest.mark.parametrize(("kind", "replace"), [("file", False), ("file", True), ("folder", False)])
def test_what_appeared_meanwhile_stays(folder: Path, kind: str, replace: bool) -> None:
    def work() -> None:
        with atomic_folder(folder / "out", replace=replace) as temporary:
            fill(temporary, atomic_folder)
            if kind == "folder":
                (folder / "out").mkdir()
            (folder / "out" / "file" if kind == "folder" else folder / "out").write_bytes(b"of somebody else")

    with pytest.raises(InputError, match="out"):
        work()
    assert [content for content in listing(folder).values() if content] == [b"other", b"of somebody else"]
