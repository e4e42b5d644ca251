"""`bundle.json`: what is written reads back, and whatever does not fit is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamictrl_edge.bundle.config import SizeDefaults
from dynamictrl_edge.bundle.errors import BundleError
from dynamictrl_edge.bundle.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    FileEntry,
    GraphSpec,
    Manifest,
    Port,
    inside,
    read_manifest,
    write_manifest,
)
from tests.bundle_samples import GRAPH, TEXT, TRANSFORMER, VAE, WEIGHTS, edit_manifest, small_bundle
from tests.golden import model_dir

words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\\\0"), min_size=1, max_size=8)
paths = st.lists(words.filter(lambda part: part not in (".", "..")), min_size=1, max_size=3).map("/".join)
entries = st.builds(FileEntry, st.text("0123456789abcdef", min_size=64, max_size=64), st.integers(0, 1 << 50))
ports = st.builds(Port, words, st.sampled_from(["float", "bfloat16"]), st.lists(st.integers(1, 9) | words).map(tuple))
scheduler_values = st.none() | st.booleans() | st.integers(-(1 << 50), 1 << 50) | st.floats(-1e9, 1e9) | words


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    files = draw(st.dictionaries(paths, entries, min_size=1, max_size=4))
    listed = st.sampled_from(sorted(files))
    graph = st.builds(
        GraphSpec, file=listed, inputs=st.tuples(ports), outputs=st.tuples(ports, ports), weights=st.none() | listed
    )
    return Manifest(
        format="dynamictrl-edge-bundle",
        version=FORMAT_VERSION,
        precision=draw(st.sampled_from(["fp32", "bf16", "fp16"])),
        transformer=msgspec.structs.replace(
            TRANSFORMER, num_layers=draw(st.integers(1, 99)), patch_size_t=draw(st.none() | st.just(2))
        ),
        vae=VAE,
        text=draw(st.none() | st.just(TEXT)),
        scheduler=draw(st.dictionaries(words, scheduler_values, max_size=3)),
        defaults=draw(
            st.builds(SizeDefaults, **{n: st.integers(1, 5000) for n in ("height", "width", "frames", "fps")})
        ),
        graphs=draw(st.dictionaries(words, graph, max_size=3)),
        files=files,
        provenance=draw(st.dictionaries(words, words, max_size=3)),
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not write into it."""
    return small_bundle(tmp_path_factory.mktemp("small") / "bundle")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return small_bundle(tmp_path / "bundle")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_what_is_written_reads_back(small: Path, data: st.DataObject) -> None:
    manifest = data.draw(manifests())
    folder = small.parent / "again"
    folder.mkdir(exist_ok=True)
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest
    assert manifest.total_bytes == sum(entry.bytes for entry in manifest.files.values())
    assert json.loads((folder / MANIFEST_NAME).read_text())["files"].keys() == manifest.files.keys()


def refusal(root: Path) -> str:
    with pytest.raises(BundleError) as caught:
        read_manifest(root)
    assert caught.value.exit_code == 4
    assert str(root) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- no bundle at all


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path / "none")
    assert "does not exist" in text
    assert "dynamictrl export" in text


def test_a_file_instead_of_a_folder_is_refused(bundle: Path) -> None:
    assert "it is a file" in refusal(bundle / MANIFEST_NAME)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path)
    assert "has no bundle.json" in text
    assert "dynamictrl export CHECKPOINT BUNDLE" in text


def test_a_checkpoint_is_refused_with_the_command_that_exports_it() -> None:
    checkpoint = model_dir("cogvideox10-tiny")
    text = refusal(checkpoint)
    assert "looks like a checkpoint" in text
    assert f"dynamictrl export {checkpoint}" in text


def test_a_folder_in_the_manifests_place_is_refused(bundle: Path) -> None:
    (bundle / MANIFEST_NAME).unlink()
    (bundle / MANIFEST_NAME).mkdir()
    assert "Cannot read" in refusal(bundle)


# --- a manifest that does not fit


def changed(**changes: Any) -> Callable[[Path], None]:
    return lambda bundle: edit_manifest(bundle, **changes)


def nested(field: str, **changes: Any) -> Callable[[Path], None]:
    """Changes inside one top-level object."""

    def change(bundle: Path) -> None:
        value = json.loads((bundle / MANIFEST_NAME).read_text())[field]
        edit_manifest(bundle, **{field: value | changes})

    return change


def raw(data: bytes) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        (bundle / MANIFEST_NAME).write_bytes(data)

    return change


def cut(bundle: Path) -> None:
    data = (bundle / MANIFEST_NAME).read_bytes()
    (bundle / MANIFEST_NAME).write_bytes(data[: len(data) // 2])


PORT = {"name": "x", "dtype": "float", "shape": ["B"]}
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty-file": (raw(b""), "damaged"),
    "no-json": (raw(b"bundle: yes"), "damaged"),
    "cut": (cut, "damaged"),
    "no-utf8": (raw(b'{"format": "\xff"}'), "damaged"),
    "deep-json": (raw(b"[" * 200_000), "damaged"),
    "list": (raw(b"[]"), "not the manifest"),
    "other-json": (raw(b'{"name": "left-pad"}'), "not the manifest"),
    "other-format": (changed(format="zip"), "not the manifest"),
    "no-format": (changed(format=None), "not the manifest"),
    "newer-version": (changed(version=FORMAT_VERSION + 1), f"format version {FORMAT_VERSION + 1}"),
    "version-text": (changed(version="1"), "format version '1'"),
    "no-version": (changed(version=None), "format version None"),
    "unknown-field": (changed(colour="red"), "`colour`"),
    "unknown-precision": (changed(precision="int3"), "precision 'int3' is not one of fp32, bf16, fp16"),
    "precision-number": (changed(precision=32), "`$.precision`"),
    **{
        f"no-{field}": (changed(**{field: None}), f"`{field}`")
        for field in ("precision", "transformer", "vae", "scheduler", "defaults", "graphs", "files", "provenance")
    },
    "missing-config-field": (changed(transformer={"num_layers": 1}), "`$.transformer`"),
    "no-layers": (nested("transformer", num_layers=0), "`$.transformer.num_layers`"),
    "patch-zero": (nested("transformer", patch_size=0), "`$.transformer.patch_size`"),
    "vae-without-levels": (nested("vae", block_out_channels=[]), "`$.vae.block_out_channels`"),
    "vae-scale-zero": (nested("vae", scaling_factor=0), "`$.vae.scaling_factor`"),
    "default-height-zero": (nested("defaults", height=0), "`$.defaults.height`"),
    "file-without-hash": (nested("files", **{GRAPH: {"bytes": 3}}), "`sha256`"),
    "file-field": (nested("files", **{GRAPH: {"bytes": 3, "sha256": "", "mode": 7}}), "`mode`"),
    "graph-field": (
        changed(graphs={"block": {"file": GRAPH, "inputs": [], "outputs": [], "device": "cpu"}}),
        "`device`",
    ),
    "port-without-name": (
        changed(graphs={"block": {"file": GRAPH, "inputs": [{"dtype": "float", "shape": []}], "outputs": []}}),
        "`name`",
    ),
    "axis-fraction": (
        changed(graphs={"block": {"file": GRAPH, "inputs": [PORT | {"shape": [1.5]}], "outputs": []}}),
        "shape",
    ),
    "unlisted-graph": (
        changed(graphs={"block": {"file": "graphs/other.onnx", "inputs": [], "outputs": []}}),
        "graph 'block' uses 'graphs/other.onnx'",
    ),
    "unlisted-weights": (
        changed(graphs={"block": {"file": GRAPH, "inputs": [], "outputs": [], "weights": "weights/x.safetensors"}}),
        "graph 'block' uses 'weights/x.safetensors'",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_manifest_that_does_not_fit_is_refused(bundle: Path, kind: str) -> None:
    spoil, expected = REFUSED[kind]
    spoil(bundle)
    text = refusal(bundle)
    assert expected in text
    assert str(bundle / MANIFEST_NAME) in text


@pytest.mark.parametrize(
    "name", ["../x", "graphs/../../x", "/etc/passwd", "..", "", ".", "graphs\\x", "..\\x", "a\0b", "graphs/../x"]
)
def test_a_name_that_leaves_the_folder_is_refused(bundle: Path, name: str) -> None:
    entry = {"sha256": "0" * 64, "bytes": 1}
    nested("files", **{name: entry})(bundle)
    assert f"{name!r}, which lies outside its folder" in refusal(bundle)


def test_a_link_that_leaves_the_folder_is_refused(bundle: Path) -> None:
    outside = bundle.parent / "outside.onnx"
    (bundle / GRAPH).rename(outside)
    (bundle / GRAPH).symlink_to(outside)
    assert f"{GRAPH!r} is a link that leaves the folder" in refusal(bundle)


def test_a_linked_folder_that_leaves_is_refused(bundle: Path) -> None:
    (bundle / "weights").rename(bundle.parent / "weights")
    (bundle / "weights").symlink_to(bundle.parent / "weights")
    assert f"{WEIGHTS!r} is a link that leaves the folder" in refusal(bundle)


def test_a_link_that_leads_to_itself_is_refused_or_found_missing(bundle: Path) -> None:
    (bundle / GRAPH).unlink()
    (bundle / GRAPH).symlink_to(bundle / GRAPH)
    try:  # what resolving such a link does depends on the version of Python
        path = inside(bundle, GRAPH)
    except BundleError:
        return
    assert not path.exists()


def test_a_link_inside_the_folder_and_a_linked_bundle_are_fine(bundle: Path) -> None:
    (bundle / GRAPH).rename(bundle / "graphs" / "real.onnx")
    (bundle / GRAPH).symlink_to("real.onnx")
    (bundle.parent / "link").symlink_to(bundle)
    for root in (bundle, bundle.parent / "link"):
        assert inside(root, GRAPH) == root / GRAPH
        assert GRAPH in read_manifest(root).files


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["a", "/", ".", "..", "\\", "\0", "graphs", "~", " "]), max_size=6).map("".join))
def test_no_name_leads_outside(small: Path, name: str) -> None:
    try:
        path = inside(small, name)
    except BundleError:
        return
    assert small in path.parents
    assert small.resolve() in path.resolve().parents


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_change_of_bytes_is_read_or_refused_but_never_worse(small: Path, data: st.DataObject) -> None:
    folder = small.parent / "fuzzed"
    folder.mkdir(exist_ok=True)
    content = bytearray((small / MANIFEST_NAME).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / MANIFEST_NAME).write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        manifest = read_manifest(folder)
    except BundleError:
        return
    assert manifest.transformer.patch_size >= 1
