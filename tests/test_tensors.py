"""Weight files: what is written reads back, the reference library agrees, and damage is refused by name."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import numpy as reference

from dynamictrl_edge.bundle.errors import BundleError, EdgeError, InputError
from dynamictrl_edge.bundle.precision import DTYPES, widen
from dynamictrl_edge.bundle.tensors import MappedTensors, TensorWriter, file_stamp, read_header, sha256_of

REFERENCE_DTYPES = ("F64", "F32", "F16", "I64", "I32", "I8", "U8", "BOOL")  # those that numpy has itself
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


def arrays(dtypes: tuple[str, ...]) -> st.SearchStrategy[dict[str, tuple[str, np.ndarray]]]:
    """Named arrays with the safetensors name of their dtype; every bit pattern occurs, NaN as well."""

    def filled(dtype: str, shape: tuple[int, ...]) -> st.SearchStrategy[tuple[str, np.ndarray]]:
        size = math.prod(shape) * DTYPES[dtype].itemsize
        top = 1 if dtype == "BOOL" else 255
        raw = st.lists(st.integers(0, top), min_size=size, max_size=size)
        return raw.map(lambda values: (dtype, np.array(values, np.uint8).view(DTYPES[dtype]).reshape(shape)))

    one = st.tuples(st.sampled_from(dtypes), shapes).flatmap(lambda made: filled(*made))
    return st.dictionaries(names, one, max_size=4)


def write(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> tuple[str, int]:
    with TensorWriter(path, [(name, dtype, array.shape) for name, (dtype, array) in tensors.items()]) as writer:
        for name, (_, array) in tensors.items():
            writer.write(name, array)
        return writer.close(), writer.nbytes


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensors")


# --- round trips


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(arrays(tuple(DTYPES)))
def test_what_is_written_reads_back(folder: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    path = folder / "own.safetensors"
    digest, nbytes = write(path, tensors)
    assert digest == sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert nbytes == path.stat().st_size
    found = MappedTensors(path)
    assert list(found) == list(tensors)
    assert len(found) == len(tensors)
    assert found.nbytes == sum(array.nbytes for _, array in tensors.values())
    for name, (dtype, array) in tensors.items():
        assert found.infos[name].dtype == dtype
        assert same(found[name], array)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(arrays(REFERENCE_DTYPES))
def test_the_reference_library_reads_our_files(folder: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    path = folder / "ours.safetensors"
    write(path, tensors)
    found = reference.load_file(path)
    assert found.keys() == tensors.keys()
    assert all(same(found[name], array) for name, (_, array) in tensors.items())


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    arrays(REFERENCE_DTYPES),
    st.none() | st.dictionaries(st.text("abc", min_size=1), st.text("xyz"), min_size=1, max_size=2),
)
def test_we_read_the_reference_librarys_files(
    folder: Path, tensors: dict[str, tuple[str, np.ndarray]], metadata: dict[str, str] | None
) -> None:
    path = folder / "reference.safetensors"
    reference.save_file({name: array for name, (_, array) in tensors.items()}, path, metadata)
    found = MappedTensors(path)
    assert found.keys() == tensors.keys()
    assert all(same(found[name], array) for name, (_, array) in tensors.items())


@settings(max_examples=60, deadline=None)
@given(st.lists(names, unique=True, max_size=6))
def test_the_data_starts_at_a_multiple_of_64_bytes(folder: Path, labels: list[str]) -> None:
    path = folder / "aligned.safetensors"
    write(path, {name: ("F32", np.ones(16, np.float32)) for name in labels})
    header = read_header(path)
    assert [info.offset % 64 for info in header.values()] == [0] * len(labels)
    assert (path.stat().st_size - 64 * len(labels)) % 64 == 0


def test_views_that_are_not_contiguous_are_written_in_c_order(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    views = {"t": array.T, "step": array[::2, 1:5], "back": array[::-1]}
    write(tmp_path / "f", {name: ("F32", view) for name, view in views.items()})
    found = MappedTensors(tmp_path / "f")
    assert all(np.array_equal(found[name], view) for name, view in views.items())


def test_bfloat16_travels_as_raw_bits_and_widens_exactly(tmp_path: Path) -> None:
    values = np.array([0.0, -1.5, 3.0e38, 1e-40, np.inf, -np.inf], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    write(tmp_path / "f", {"x": ("BF16", bits)})
    found = MappedTensors(tmp_path / "f")["x"]
    assert found.dtype == np.uint16
    assert np.array_equal(widen(found).view(np.uint32), bits.astype(np.uint32) << 16)
    assert widen(values) is values
    assert np.array_equal(widen(np.array([1.5, 65504], np.float16)), np.array([1.5, 65504], np.float32))


def test_mapped_arrays_are_read_only_and_survive_release_and_prefetch(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((300, 400)).astype(np.float32)
    write(tmp_path / "f", {"x": ("F32", array)})
    found = MappedTensors(tmp_path / "f")
    mapped = found["x"]
    with pytest.raises(ValueError, match="read-only"):
        mapped[0, 0] = 1
    for advise in (found.prefetch, found.release, found.release, found.prefetch):
        advise()
        assert np.array_equal(mapped, array)
        assert np.array_equal(found["x"], array)


def test_without_madvise_release_and_prefetch_do_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dynamictrl_edge.bundle import tensors

    write(tmp_path / "f", {"x": ("U8", np.arange(5, dtype=np.uint8))})
    found = MappedTensors(tmp_path / "f")
    monkeypatch.delattr(tensors.mmap, "MADV_DONTNEED", raising=False)
    monkeypatch.delattr(tensors.mmap, "MADV_WILLNEED", raising=False)
    found.release()
    found.prefetch()
    assert found["x"].tolist() == [0, 1, 2, 3, 4]


def test_an_unknown_name_is_a_key_error(tmp_path: Path) -> None:
    write(tmp_path / "f", {"x": ("U8", np.zeros(1, np.uint8))})
    with pytest.raises(KeyError):
        MappedTensors(tmp_path / "f")["y"]


def test_a_file_stamp_changes_with_the_content(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"one")
    before = file_stamp(path)
    assert file_stamp(path) == before
    other = tmp_path / "g"
    other.write_bytes(b"two")
    other.replace(path)
    assert file_stamp(path) != before


# --- misuse of the writer


def writer(path: Path) -> TensorWriter:
    return TensorWriter(path, [("a", "F32", (2,)), ("b", "I8", (3,))])


A, B = np.zeros(2, np.float32), np.zeros(3, np.int8)


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ([("b", B)], "expected tensor 'a' of 8 bytes, got 'b' of 3"),
        ([("a", np.zeros(3, np.float32))], "expected tensor 'a' of 8 bytes, got 'a' of 12"),
        ([("a", A), ("a", A)], "expected tensor 'b'"),
        ([("a", A), ("b", B), ("c", B)], "all announced tensors are written already, got 'c'"),
        ([("a", A)], "1 announced tensors were not written"),
        ([], "2 announced tensors were not written"),
    ],
)
def test_a_writer_that_is_used_wrongly_says_so(tmp_path: Path, calls: list[tuple[str, np.ndarray]], words: str) -> None:
    def use() -> None:
        with writer(tmp_path / "f") as made:
            for name, array in calls:
                made.write(name, array)
            made.close()

    with pytest.raises(ValueError, match=words):
        use()


def test_a_refused_array_can_be_followed_by_the_right_one(tmp_path: Path) -> None:
    with writer(tmp_path / "f") as made:
        for name, array in (("a", A), ("b", B)):
            with pytest.raises(ValueError, match="expected"):
                made.write(name, np.zeros(100))
            made.write(name, array)
        made.close()
    assert list(MappedTensors(tmp_path / "f")) == ["a", "b"]


@pytest.mark.parametrize("announced", [["a", "a"], ["__metadata__"]])
def test_a_name_that_cannot_be_read_back_is_refused(tmp_path: Path, announced: list[str]) -> None:
    with pytest.raises(ValueError, match="cannot be the name"):
        TensorWriter(tmp_path / "f", [(name, "U8", (1,)) for name in announced])


def test_an_unfinished_file_is_refused_when_read(tmp_path: Path) -> None:
    with writer(tmp_path / "f") as made:
        made.write("a", A)
    with pytest.raises(InputError, match="cut short"):
        read_header(tmp_path / "f")


# --- damage


def header_of(table: Any, data: bytes = b"") -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


EIGHT = b"\0" * 8
DAMAGE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a safetensors file"),
    "seven-bytes": (b"\0" * 7, "not a safetensors file"),
    "cut-in-the-header": (header_of({"x": entry()}, EIGHT)[:30], "header is incomplete"),
    "huge-header": (b"\xff" * 8 + b"{}", "header is incomplete"),
    "text": (b"# Weights\n\nThe weights are elsewhere.\n", "not a safetensors file"),
    "no-json": (header_of(b"{x: 1}"), "damaged safetensors header"),
    "no-utf8": (header_of(b'{"\xff": 1}'), "damaged safetensors header"),
    "deep-json": (header_of(b"[" * 200_000), "damaged safetensors header"),
    "list": (header_of([1, 2]), "not a JSON object"),
    "entry-number": (header_of({"x": 3}), "'x' is not described by a JSON object"),
    "entry-list": (header_of({"x": ["F32", [2], [0, 8]]}, EIGHT), "'x' is not described"),
    "no-dtype": (header_of({"x": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT), "'x' has dtype None"),
    "unknown-dtype": (header_of({"x": entry("C64", [1])}, EIGHT), "'x' has dtype 'C64'"),
    "dtype-number": (header_of({"x": entry(32)}, EIGHT), "'x' has dtype 32"),
    "dtype-list": (header_of({"x": entry(["F32"])}, EIGHT), "'x' has dtype"),
    "no-shape": (header_of({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT), "'x' has no shape"),
    "shape-number": (header_of({"x": entry(shape=2)}, EIGHT), "'x' has no shape"),
    "shape-text": (header_of({"x": entry(shape="2")}, EIGHT), "'x' has no shape"),
    "shape-fraction": (header_of({"x": entry(shape=[2.0])}, EIGHT), "'x' has no shape"),
    "shape-bool": (header_of({"x": entry(shape=[2, True])}, EIGHT), "'x' has no shape"),
    "negative-shape": (header_of({"x": entry(shape=[-1, -2])}, EIGHT), "'x' has no shape"),
    "infinite-shape": (header_of(b'{"x": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}'), "no shape"),
    "many-axes": (header_of({"x": entry(shape=[1] * 100)}, EIGHT), "'x' has no shape"),
    "empty-and-huge": (header_of({"x": entry(shape=[0, 1 << 40, 1 << 40], offsets=[0, 0])}), "'x' has no shape"),
    "no-offsets": (header_of({"x": {"dtype": "F32", "shape": [2]}}, EIGHT), "'x' has no two data_offsets"),
    "one-offset": (header_of({"x": entry(offsets=[8])}, EIGHT), "'x' has no two data_offsets"),
    "three-offsets": (header_of({"x": entry(offsets=[0, 4, 8])}, EIGHT), "'x' has no two data_offsets"),
    "offset-text": (header_of({"x": entry(offsets=["0", "8"])}, EIGHT), "'x' has no two data_offsets"),
    "offset-object": (header_of({"x": entry(offsets={"0": 8})}, EIGHT), "'x' has no two data_offsets"),
    "negative-offset": (header_of({"x": entry(offsets=[-8, 0])}, EIGHT), "'x' has no two data_offsets"),
    "offsets-reversed": (header_of({"x": entry(offsets=[8, 0])}, EIGHT), "does not fill its -8 bytes"),
    "size-wrong": (header_of({"x": entry(shape=[3])}, EIGHT), "does not fill its 8 bytes"),
    "cut-in-the-data": (header_of({"x": entry()}, EIGHT[:5]), "cut short"),
    "bytes-at-the-end": (header_of({"x": entry()}, EIGHT + b"\0"), "damaged or cut short"),
    "gap": (
        header_of({"x": entry(), "y": entry(offsets=[12, 20])}, b"\0" * 20),
        "'y' overlaps another or leaves a gap",
    ),
    "gap-at-the-start": (header_of({"x": entry(offsets=[4, 12])}, b"\0" * 12), "'x' overlaps another or leaves a gap"),
    "overlap": (header_of({"x": entry(), "y": entry(offsets=[4, 12])}, b"\0" * 12), "'y' overlaps"),
    "twice-the-same-bytes": (header_of({"x": entry(), "y": entry()}, EIGHT), "overlaps"),
    "outside": (
        header_of({"x": entry(offsets=[1 << 40, (1 << 40) + 8])}, EIGHT),
        "'x' overlaps another or leaves a gap",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("error", [InputError, BundleError])
def test_damage_is_refused_with_the_wanted_error(tmp_path: Path, kind: str, error: type[EdgeError]) -> None:
    data, words = DAMAGE[kind]
    path = tmp_path / "weights.safetensors"
    path.write_bytes(data)
    for read in (read_header, MappedTensors):
        with pytest.raises(error, match=r"weights\.safetensors") as caught:
            read(path, error=error)
        assert words in str(caught.value)
        assert len(str(caught.value)) < 600


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_change_of_the_header_is_read_or_refused_but_never_worse(folder: Path, data: st.DataObject) -> None:
    path = folder / "fuzzed.safetensors"
    write(path, {"one": ("F32", np.ones((2, 3), np.float32)), "two": ("F16", np.ones(5, np.float16))})
    raw = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        found = MappedTensors(path)
    except InputError:
        return
    assert sum(array.nbytes for array in found.values()) <= len(raw)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "folder"),
    ],
)
def test_a_file_that_cannot_be_opened_is_refused(tmp_path: Path, make: Callable[[Path], Any], words: str) -> None:
    path = tmp_path / "weights.safetensors"
    make(path)
    with pytest.raises(BundleError, match=words):
        read_header(path, error=BundleError)
