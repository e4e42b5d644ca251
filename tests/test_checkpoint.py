"""Reading checkpoint folders: tensors exactly as stored, from one file or many, and never a pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="checkpoints are read by the extra 'export'")

import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from dynamictrl_edge.bundle.config import TransformerConfig, VaeConfig
from dynamictrl_edge.bundle.errors import InputError
from dynamictrl_edge.export.checkpoint import Checkpoint, ComponentTensors
from tests.checkpoint_samples import WEIGHTS, copied, edit_json, split
from tests.golden import model_dir

GOLDEN = model_dir("cogvideox10-tiny")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return copied(tmp_path)


def refusal(call: Callable[[], object], *words: str) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.exit_code == 3
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


# --- the folder


@pytest.mark.parametrize("name", ["cogvideox10-tiny", "cogvideox15-tiny"])
def test_golden_checkpoints_open(name: str) -> None:
    source = Checkpoint(str(model_dir(name)))
    assert source.config("transformer", TransformerConfig).num_layers == 3
    assert source.config("vae", VaeConfig).scaling_factor == 0.7
    assert source.json("scheduler", "scheduler_config.json")["num_train_timesteps"] == 1000


def test_a_missing_folder_and_a_file_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    refusal(lambda: Checkpoint(tmp_path / "none"), str(tmp_path / "none"), "no checkpoint folder")
    path = checkpoint / "model_index.json"
    refusal(lambda: Checkpoint(path), str(path), "no checkpoint folder")


def test_a_folder_without_model_index_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model_index.json").unlink()
    refusal(lambda: Checkpoint(checkpoint), str(checkpoint), "no model_index.json", "diffusers layout")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b'{"transformer": ', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b"[]", "transformer is None"),
        (b"{}", "transformer is None"),
    ],
)
def test_a_broken_model_index_is_refused(checkpoint: Path, content: bytes, words: str) -> None:
    (checkpoint / "model_index.json").write_bytes(content)
    refusal(lambda: Checkpoint(checkpoint), str(checkpoint / "model_index.json"), words)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder", "scheduler"])
@pytest.mark.parametrize("entry", [["diffusers", "Other"], ["diffusers", None], [], "Other", None, 7, {"a": "b"}])
def test_other_classes_are_refused_by_the_component(checkpoint: Path, component: str, entry: Any) -> None:
    edit_json(checkpoint / "model_index.json", **{component: entry})
    refusal(lambda: Checkpoint(checkpoint), "model_index.json", f"{component} is ", "a DynamiCtrl checkpoint has")


def test_both_names_of_the_scheduler_are_accepted(checkpoint: Path) -> None:
    edit_json(checkpoint / "model_index.json", scheduler=["diffusers", "CogVideoXDDIMScheduler"])
    Checkpoint(checkpoint)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component_is_refused_by_name(checkpoint: Path, component: str) -> None:
    shutil.rmtree(checkpoint / component)
    source = Checkpoint(checkpoint)
    refusal(lambda: source.folder(component), str(checkpoint), f"lacks the folder {component!r}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b"{", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"a": NaN}', "not valid JSON"),
    ],
)
def test_a_broken_config_is_refused(checkpoint: Path, content: bytes | None, words: str) -> None:
    path = checkpoint / "vae" / "config.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    source = Checkpoint(checkpoint)
    refusal(lambda: source.config("vae", VaeConfig), str(path), words)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_layers", None), ("num_layers", "three"), ("num_layers", 0), ("patch_size", -2), ("in_channels", 32.5)],
)
def test_a_field_that_does_not_fit_is_refused_by_name(checkpoint: Path, field: str, value: Any) -> None:
    edit_json(checkpoint / "transformer" / "config.json", **{field: value})
    source = Checkpoint(checkpoint)
    refusal(lambda: source.config("transformer", TransformerConfig), "transformer/config.json", f"$.{field}")


def test_a_missing_field_is_refused_and_an_unknown_one_ignored(checkpoint: Path) -> None:
    path = checkpoint / "transformer" / "config.json"
    edit_json(path, invented_later=True)
    assert Checkpoint(checkpoint).config("transformer", TransformerConfig).num_layers == 3
    values = json.loads(path.read_text())
    del values["num_layers"]
    path.write_text(json.dumps(values))
    refusal(lambda: Checkpoint(checkpoint).config("transformer", TransformerConfig), "`num_layers`")


# --- tensors


def tensors(folder: Path, stem: str = "model") -> ComponentTensors:
    return ComponentTensors(folder, stem)


@pytest.mark.parametrize("component", WEIGHTS)
def test_tensors_are_read_as_stored(component: str) -> None:
    expected = load_file(GOLDEN / component / WEIGHTS[component])
    found = Checkpoint(GOLDEN).tensors(component)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert name in found
        assert found.info(name).shape == tuple(tensor.shape)
        assert torch.equal(found.read(name), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_float_is_read_bit_by_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    made = {
        "odd": torch.randn((3, 5), generator=generator).to(dtype),
        "scalar": torch.tensor(1.1, dtype=dtype),
        "none": torch.empty((0, 4), dtype=dtype),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-42], dtype=dtype),
    }
    save_file(made, tmp_path / "model.safetensors")
    source = tensors(tmp_path)
    for name, tensor in made.items():
        found = source.read(name)
        assert found.dtype == dtype
        assert found.shape == tensor.shape
        assert found.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", ["int64", "int32", "int8", "uint8", "bool"])
def test_integer_tensors_are_refused_by_name(tmp_path: Path, dtype: str) -> None:
    save_numpy({"weight": np.zeros(4, dtype)}, tmp_path / "model.safetensors")
    refusal(lambda: tensors(tmp_path).read("weight"), "model.safetensors", "'weight' has dtype", "floating-point")


def test_a_missing_tensor_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    source = tensors(tmp_path)
    for call in (lambda: source.info("b"), lambda: source.read("b")):
        refusal(call, str(tmp_path), "lacks the tensor 'b'", "Is the download complete?")


def test_a_file_cut_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100), "b": torch.zeros(100)}, path)
    source = tensors(tmp_path)
    path.write_bytes(path.read_bytes()[:-300])
    refusal(lambda: source.read("b"), str(path), "ends inside tensor 'b'")
    path.unlink()
    refusal(lambda: source.read("a"), str(path), "does not exist")


# --- weight files


@pytest.mark.parametrize("component", WEIGHTS)
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_shards_give_the_same_tensors_as_one_file(checkpoint: Path, component: str, shards: int) -> None:
    split(checkpoint, component, shards)
    found, expected = Checkpoint(checkpoint).tensors(component), Checkpoint(GOLDEN).tensors(component)
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found.read(name), expected.read(name)) for name in expected)


def test_shards_may_be_links_elsewhere(checkpoint: Path, tmp_path: Path) -> None:
    """The layout of the hub's cache: names are links to blobs outside the folder."""
    split(checkpoint, "transformer")
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted((checkpoint / "transformer").glob("*.safetensors"))):
        path.rename(tmp_path / "blobs" / str(number))
        path.symlink_to(tmp_path / "blobs" / str(number))
    assert sorted(Checkpoint(checkpoint).tensors("transformer")) == sorted(Checkpoint(GOLDEN).tensors("transformer"))


def test_a_missing_weight_file_is_refused_by_name(checkpoint: Path) -> None:
    (checkpoint / "vae" / WEIGHTS["vae"]).unlink()
    text = refusal(lambda: Checkpoint(checkpoint).tensors("vae"), str(checkpoint / "vae"), WEIGHTS["vae"])
    assert "Is the download complete?" in text


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "weights.pkl"])
def test_a_pickle_is_refused_by_name(checkpoint: Path, name: str) -> None:
    folder = checkpoint / "text_encoder"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x04K\x01.")
    text = refusal(lambda: Checkpoint(checkpoint).tensors("text_encoder"), str(folder), repr(name), "a pickle")
    assert "safe_serialization=True" in text


def test_a_pickle_beside_safetensors_is_ignored(checkpoint: Path) -> None:
    (checkpoint / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"never read")
    Checkpoint(checkpoint).tensors("vae")


def test_a_missing_shard_is_refused_by_name(checkpoint: Path) -> None:
    split(checkpoint, "transformer")
    shard = checkpoint / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors"
    shard.unlink()
    refusal(lambda: Checkpoint(checkpoint).tensors("transformer"), f"The shard {str(shard)!r} is missing")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_a_shard_outside_the_folder_is_refused(checkpoint: Path, name: str) -> None:
    split(checkpoint, "transformer")
    (index,) = (checkpoint / "transformer").glob("*.index.json")
    where = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=where | {next(iter(where)): name})
    text = refusal(lambda: Checkpoint(checkpoint).tensors("transformer"), str(index), "lies outside its folder")
    assert repr(name) in text


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        "text",
        {"weight_map": {}},
        {"weight_map": []},
        {"weight_map": ["a.safetensors"]},
        {"weight_map": {"a": None}},
        {"weight_map": {"a": ["x"]}},
        {"weight_map": {"a": 3}},
        {"weight_map": "a.safetensors"},
    ],
)
def test_an_index_without_a_weight_map_is_refused(checkpoint: Path, content: Any) -> None:
    index = checkpoint / "vae" / f"{WEIGHTS['vae']}.index.json"
    index.write_text(json.dumps(content))
    refusal(lambda: Checkpoint(checkpoint).tensors("vae"), str(index), "no 'weight_map'")


def test_a_tensor_that_two_shards_hold_is_refused(checkpoint: Path) -> None:
    split(checkpoint, "vae")
    first, second = sorted((checkpoint / "vae").glob("*.safetensors"))
    one = load_file(first)
    name = next(iter(one))
    save_file(load_file(second) | {name: one[name]}, second)
    refusal(lambda: Checkpoint(checkpoint).tensors("vae"), repr(name), str(first), str(second))


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b'{"weights": 1}', b"\xff" * 100])
def test_a_file_that_is_no_safetensors_is_refused_by_name(checkpoint: Path, content: bytes) -> None:
    path = checkpoint / "vae" / WEIGHTS["vae"]
    path.write_bytes(content)
    refusal(lambda: Checkpoint(checkpoint).tensors("vae"), str(path), "safetensors")


def test_a_cut_download_is_refused_by_name(checkpoint: Path) -> None:
    path = checkpoint / "vae" / WEIGHTS["vae"]
    path.write_bytes(path.read_bytes()[:-1])
    refusal(lambda: Checkpoint(checkpoint).tensors("vae"), str(path), "damaged or cut short")
