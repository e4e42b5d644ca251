"""An opened bundle: changed and missing files are refused by name, and what was found right is not hashed again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamictrl_edge.bundle import store
from dynamictrl_edge.bundle.errors import BundleError
from dynamictrl_edge.bundle.store import Bundle, cache_folder
from tests.bundle_samples import (
    GRAPH,
    GRAPH_BYTES,
    TOKENIZER,
    TOKENIZER_BYTES,
    WEIGHTS,
    edit_manifest,
    entry_of,
    small_bundle,
)

NAMES = (GRAPH, WEIGHTS, TOKENIZER)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return small_bundle(tmp_path / "bundle")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of this test alone; it does not exist yet."""
    monkeypatch.setenv("DYNAMICTRL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hashed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were hashed, in order."""
    calls: list[str] = []
    real = store.sha256_of

    def noted(path: Path) -> str:
        calls.append(path.name)
        return real(path)

    monkeypatch.setattr(store, "sha256_of", noted)
    return calls


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(BundleError) as caught:
        call()
    assert caught.value.exit_code == 4
    return str(caught.value)


# --- what is right


def test_a_good_bundle_opens_and_everything_in_it_is_found(bundle: Path, cache: Path) -> None:
    opened = Bundle(str(bundle))
    told: list[str] = []
    opened.verify(told.append)
    assert told == [*opened.manifest.files]
    spec, data = opened.graph("block")
    assert data == GRAPH_BYTES
    assert spec.weights == WEIGHTS
    assert opened.tensors("block_00")["out_bias"].tolist() == [1, 2, 3]
    assert opened.path(TOKENIZER).read_bytes() == TOKENIZER_BYTES
    opened.verify()


def test_a_weights_digest_is_the_identity_of_a_component(bundle: Path) -> None:
    before = Bundle(bundle)
    assert before.weights_digest("block") == before.weights_digest("block_00")
    assert before.weights_digest("block") != before.weights_digest("text")
    files = json.loads((bundle / "bundle.json").read_text())["files"]
    for name, same in ((TOKENIZER, True), (WEIGHTS, False)):
        edit_manifest(bundle, files=files | {name: files[name] | {"sha256": "0" * 64}})
        assert (Bundle(bundle).weights_digest("block") == before.weights_digest("block")) == same


# --- what is not


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(NAMES), st.data())
def test_any_changed_byte_of_any_file_is_refused_by_name(
    bundle: Path, cache: Path, name: str, data: st.DataObject
) -> None:
    path = bundle / name
    good = path.read_bytes()
    bad = bytearray(good)
    bad[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bad)
    try:
        text = refusal(lambda: Bundle(bundle).path(name))
    finally:
        path.write_bytes(good)
    assert str(path) in text
    assert "was changed after the export" in text
    assert "Copy the bundle again" in text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "was changed"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "was changed"),
        (lambda path: path.write_bytes(b""), "was changed"),
        (lambda path: (path.unlink(), path.mkdir()), "was changed"),
        (lambda path: (path.unlink(), path.symlink_to("nothing")), "is missing"),
    ],
    ids=["missing", "longer", "shorter", "empty", "folder", "dangling-link"],
)
def test_a_spoilt_file_is_refused_by_name(
    bundle: Path, cache: Path, name: str, spoil: Callable[[Path], object], words: str
) -> None:
    spoil(bundle / name)
    opened = Bundle(bundle)
    for call in (lambda: opened.path(name), opened.verify):
        text = refusal(call)
        assert str(bundle / name) in text
        assert words in text


def test_a_longer_file_is_refused_without_reading_it(bundle: Path, hashed: list[str]) -> None:
    (bundle / WEIGHTS).write_bytes((bundle / WEIGHTS).read_bytes() * 2)
    refusal(lambda: Bundle(bundle).path(WEIGHTS))
    assert hashed == []


def test_a_wrong_hash_is_never_remembered(bundle: Path, hashed: list[str]) -> None:
    data = bytearray((bundle / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (bundle / WEIGHTS).write_bytes(data)
    for count in (1, 2):
        refusal(lambda: Bundle(bundle).path(WEIGHTS))
        assert len(hashed) == count


def test_a_link_made_after_opening_is_refused(bundle: Path) -> None:
    opened = Bundle(bundle)
    opened.path(WEIGHTS)
    (bundle / WEIGHTS).rename(bundle.parent / "elsewhere")
    (bundle / WEIGHTS).symlink_to(bundle.parent / "elsewhere")
    assert "link that leaves the folder" in refusal(lambda: opened.path(WEIGHTS))


def test_names_that_the_manifest_does_not_list_are_refused(bundle: Path) -> None:
    (bundle / "weights" / "extra.safetensors").write_bytes((bundle / WEIGHTS).read_bytes())
    opened = Bundle(bundle)
    assert "does not list a file 'weights/extra.safetensors'" in refusal(lambda: opened.tensors("extra"))
    assert "does not list a file '../bundle.json'" in refusal(lambda: opened.path("../bundle.json"))
    text = refusal(lambda: opened.graph("stem"))
    assert "has no graph 'stem' (it has block)" in text
    assert "Export the checkpoint again" in text


def test_weights_with_a_right_hash_but_no_safetensors_are_refused(bundle: Path) -> None:
    (bundle / WEIGHTS).write_bytes(b"not weights")
    files = json.loads((bundle / "bundle.json").read_text())["files"]
    entry = entry_of(b"not weights")
    edit_manifest(bundle, files=files | {WEIGHTS: {"sha256": entry.sha256, "bytes": entry.bytes}})
    text = refusal(lambda: Bundle(bundle).tensors("block_00"))
    assert "not a safetensors file" in text
    assert str(bundle / WEIGHTS) in text


def test_a_graphs_bytes_are_checked_again_as_they_are_read(bundle: Path) -> None:
    opened = Bundle(bundle)
    opened.graph("block")
    (bundle / GRAPH).write_bytes(GRAPH_BYTES[::-1])
    text = refusal(lambda: opened.graph("block"))
    assert "changed while it was being read" in text
    assert str(bundle / GRAPH) in text
    (bundle / GRAPH).unlink()
    assert "is missing" in refusal(lambda: opened.graph("block"))


def test_a_file_that_cannot_be_read_is_refused(bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(store, "sha256_of", broken)
    text = refusal(lambda: Bundle(bundle).path(GRAPH))
    assert "Permission denied" in text
    assert str(bundle / GRAPH) in text


# --- remembering what was found right


def test_a_second_opening_hashes_nothing(bundle: Path, hashed: list[str]) -> None:
    Bundle(bundle).verify()
    assert sorted(hashed) == sorted(Path(name).name for name in NAMES)
    Bundle(bundle).verify()
    Bundle(bundle).graph("block")
    assert len(hashed) == len(NAMES)


def test_one_opening_looks_at_each_file_once(bundle: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle(bundle)
    opened.verify()
    monkeypatch.setenv("DYNAMICTRL_CACHE", "")
    opened.verify()
    assert len(hashed) == len(NAMES)


@pytest.mark.parametrize("touch", ["time", "copy", "content"])
def test_a_touched_file_is_hashed_again(bundle: Path, hashed: list[str], touch: str) -> None:
    Bundle(bundle).verify()
    hashed.clear()
    path = bundle / WEIGHTS
    status = path.stat()
    if touch == "time":
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))
    elif touch == "copy":  # same bytes and times in another file
        shutil.copy2(path, bundle / "copy")
        (bundle / "copy").replace(path)
    else:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    if touch == "content":
        assert "was changed" in refusal(Bundle(bundle).verify)
    else:
        Bundle(bundle).verify()
    assert hashed == [path.name]


def test_another_manifest_is_not_satisfied_by_what_was_remembered(bundle: Path, hashed: list[str]) -> None:
    Bundle(bundle).verify()
    files = json.loads((bundle / "bundle.json").read_text())["files"]
    edit_manifest(bundle, files=files | {GRAPH: files[GRAPH] | {"sha256": "0" * 64}})
    assert "was changed" in refusal(lambda: Bundle(bundle).path(GRAPH))


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = store.sha256_of

    def slow(path: Path) -> str:
        digest = real(path)
        path.write_bytes(GRAPH_BYTES[::-1])
        os.utime(path, ns=(1, 1))
        return digest

    monkeypatch.setattr(store, "sha256_of", slow)
    Bundle(bundle).path(GRAPH)
    monkeypatch.setattr(store, "sha256_of", real)
    assert "was changed" in refusal(lambda: Bundle(bundle).path(GRAPH))


def test_each_bundle_has_its_own_memory(bundle: Path, hashed: list[str]) -> None:
    Bundle(bundle).verify()
    other = shutil.copytree(bundle, bundle.parent / "other")
    hashed.clear()
    Bundle(other).verify()
    assert len(hashed) == len(NAMES)


CORRUPT = {
    "empty": b"",
    "binary": b"\xff\xfe\0",
    "list": b"[]",
    "text": b'"right"',
    "number": b"7",
    "no-stamp": b'{"sha256": "0"}',
    "no-hash": b'{"stamp": [1, 2, 3]}',
    "deep": b"[" * 200_000,
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_corrupt_entries_of_the_cache_are_ignored_and_replaced(
    bundle: Path, cache: Path, hashed: list[str], kind: str
) -> None:
    Bundle(bundle).verify()
    entries = sorted((cache / "verified").iterdir())
    assert len(entries) == len(NAMES)
    for path in entries:
        path.write_bytes(CORRUPT[kind])
    hashed.clear()
    Bundle(bundle).verify()
    assert len(hashed) == len(NAMES)
    Bundle(bundle).verify()
    assert len(hashed) == len(NAMES)
    assert sorted((cache / "verified").iterdir()) == entries


def test_entries_that_are_folders_are_ignored(bundle: Path, cache: Path, hashed: list[str]) -> None:
    Bundle(bundle).verify()
    for path in sorted((cache / "verified").iterdir()):
        path.unlink()
        path.mkdir()
    Bundle(bundle).verify()
    assert len(hashed) == 2 * len(NAMES)


def test_a_cache_that_cannot_be_written_is_no_error(
    bundle: Path, cache: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_bytes(b"a file where the folder would be")
    Bundle(bundle).verify()
    assert len(hashed) == len(NAMES)
    monkeypatch.setenv("DYNAMICTRL_CACHE", "/proc/nothing/can/be/made/here")
    Bundle(bundle).verify()
    assert len(hashed) == 2 * len(NAMES)


def test_a_full_disk_in_the_cache_is_no_error(
    bundle: Path, cache: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    Bundle(bundle).verify()
    assert len(hashed) == len(NAMES)


def test_an_empty_setting_keeps_no_cache(
    bundle: Path, hashed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNAMICTRL_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() is None
    for count in (1, 2):
        Bundle(bundle).verify()
        assert len(hashed) == count * len(NAMES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_the_cache_is_where_the_user_keeps_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYNAMICTRL_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "dynamictrl-edge"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "dynamictrl-edge"
    monkeypatch.setenv("DYNAMICTRL_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_a_user_without_a_home_keeps_no_cache(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DYNAMICTRL_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder() is None
    assert np.array_equal(Bundle(bundle).tensors("block_00")["out_bias"], [1, 2, 3])
