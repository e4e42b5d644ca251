"""What an export refuses, how early, and that nothing remains where it does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs the extra 'export'")

import torch

from dynamictrl_edge.bundle.errors import EdgeError, InputError, UsageError
from dynamictrl_edge.bundle.manifest import read_manifest
from dynamictrl_edge.export import components
from dynamictrl_edge.export.convert import Converter
from dynamictrl_edge.export.exporter import export_checkpoint
from tests.checkpoint_samples import WEIGHTS, Tensors, copied, edit_json, edit_tensors, split
from tests.cli_samples import listing
from tests.golden import model_dir

MODEL = model_dir("cogvideox10-tiny")


# --- refusals


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return copied(tmp_path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder for bundles with something else in it."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "other.txt").write_bytes(b"other")
    return folder


@pytest.fixture
def no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing is slow: what is wrong must be found before."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a graph was traced")

    for name in ("trace", "export_vae_graph"):
        monkeypatch.setattr(components, name, never)


@pytest.fixture
def no_weights(no_graphs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is reading all weights."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights were converted")

    monkeypatch.setattr(Converter, "write", never)


def refused(checkpoint: Path, out: Path, *words: str, error: type[EdgeError] = InputError, **options: Any) -> str:
    """The message of an export that must fail and leave everything as it was."""
    before = listing(out)
    with pytest.raises(error) as caught:
        export_checkpoint(checkpoint, out / "bundle", **options)
    assert type(caught.value) is error
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text
    assert listing(out) == before
    return text


def config(component: str, **changes: Any) -> Callable[[Path], None]:
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    return lambda checkpoint: edit_json(checkpoint / component / name, **changes)


def index(**changes: Any) -> Callable[[Path], None]:
    return lambda checkpoint: edit_json(checkpoint / "model_index.json", **changes)


def removed(*parts: str) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        path = checkpoint.joinpath(*parts)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def replaced(path: str, content: bytes) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        (checkpoint / path).write_bytes(content)

    return change


def tensors(component: str, change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    return lambda checkpoint: edit_tensors(checkpoint, component, change)


def without(name: str) -> Callable[[Tensors], object]:
    return lambda found: found.pop(name)


def made(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda found: found.update({name: change(found[name])})


def pickled(component: str) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        (checkpoint / component / WEIGHTS[component]).unlink()
        (checkpoint / component / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")

    return change


def sharded(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def changed(checkpoint: Path) -> None:
        split(checkpoint, "transformer")
        change(checkpoint / "transformer")

    return changed


INDEX_FILE = f"{WEIGHTS['transformer']}.index.json"
SHARD = "diffusion_pytorch_model-00002-of-00002.safetensors"
LAST = {  # a tensor of each component's last weight file
    "transformer": "transformer_blocks.2.control_norm1.linear.weight",
    "text_encoder": "encoder.block.1.layer.1.DenseReluDense.wo.weight",
    "vae": "decoder.conv_out.conv.weight",
}

EARLY: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no-model-index": (removed("model_index.json"), ("no model_index.json",)),
    "model-index-json": (replaced("model_index.json", b"{"), ("model_index.json", "not valid JSON")),
    "class": (index(transformer=["diffusers", "CogVideoXTransformer3DModel"]), ("transformer is", "'DynamiCtrlTransf")),
    "vae-class": (index(vae=["diffusers", "AutoencoderKLWan"]), ("vae is 'AutoencoderKLWan'",)),
    **{
        f"no-{component}": (removed(component), (f"lacks the folder {component!r}", "Is the download complete?"))
        for component in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    },
    **{
        f"no-{component}-config": (removed(component, name), (f"{component}/{name}", "does not exist"))
        for component, name in (
            ("transformer", "config.json"),
            ("vae", "config.json"),
            ("text_encoder", "config.json"),
            ("scheduler", "scheduler_config.json"),
        )
    },
    **{
        f"{component}-json": (replaced(f"{component}/config.json", b'{"a": 1,}'), (component, "not valid JSON"))
        for component in WEIGHTS
    },
    **{
        f"no-{component}-weights": (removed(component, name), (component, name, "Is the download complete?"))
        for component, name in WEIGHTS.items()
    },
    **{f"{component}-pickle": (pickled(component), ("pytorch_model.bin", "a pickle")) for component in WEIGHTS},
    "no-shard": (sharded(lambda folder: (folder / SHARD).unlink()), (SHARD, "is missing")),
    "shard-outside": (
        sharded(lambda folder: edit_json(folder / INDEX_FILE, weight_map={"a": "../../x.safetensors"})),
        (INDEX_FILE, "'../../x.safetensors'", "lies outside its folder"),
    ),
    "no-weight-map": (
        sharded(lambda folder: edit_json(folder / INDEX_FILE, weight_map=None)),
        (INDEX_FILE, "no 'weight_map'"),
    ),
    "cut-weights": (
        lambda c: (c / "vae" / WEIGHTS["vae"]).write_bytes((c / "vae" / WEIGHTS["vae"]).read_bytes()[:-9]),
        (f"vae/{WEIGHTS['vae']}", "cut short"),
    ),
    **{
        f"{component}-missing-tensor": (
            tensors(component, without(name)),
            ("lacks the tensor", name),
        )
        for component, name in LAST.items()
    },
    **{
        f"{component}-shape": (
            tensors(component, made(name, lambda tensor: tensor[:-1])),
            (repr(name), "its config asks for", "do not belong to this config"),
        )
        for component, name in LAST.items()
    },
    **{
        f"{component}-extra": (
            tensors(component, lambda t: t.update({"adapter.weight": torch.zeros(2)})),
            ("'adapter.weight'", "does not explain"),
        )
        for component in WEIGHTS
    },
    **{
        f"{component}-integers": (
            tensors(component, made(name, lambda tensor: tensor.to(torch.int8))),
            (repr(name), "I8", "floating-point"),
        )
        for component, name in LAST.items()
    },
    "more-layers": (config("transformer", num_layers=4), ("lacks the tensor 'transformer_blocks.3.",)),
    "fewer-layers": (config("transformer", num_layers=2), ("'transformer_blocks.2.", "does not explain")),
    "more-text-layers": (config("text_encoder", num_layers=3), ("lacks the tensor 'encoder.block.2.",)),
    "other-width": (config("transformer", num_attention_heads=4), ("its config asks for",)),
    "other-ff": (config("text_encoder", d_ff=128), ("its config asks for",)),
    "other-vae-width": (config("vae", block_out_channels=[8, 8, 16, 32]), ("its config asks for",)),
    "latent-channels": (config("vae", latent_channels=8), ("in_channels / 2 is 16", "vae latent_channels is 8")),
    "text-width": (config("transformer", text_embed_dim=64), ("text_embed_dim is 64", "d_model is 32")),
    "time-ratio": (config("vae", temporal_compression_ratio=8), ("temporal_compression_ratio is 4", "is 8")),
    "gray-vae": (config("vae", in_channels=1), ("vae in_channels is 1",)),
    "activation": (config("transformer", activation_fn="geglu"), ("activation_fn is 'geglu'", "'gelu-approximate'")),
    "no-rope": (config("transformer", use_rotary_positional_embeddings=False), ("use_rotary_positional_embeddings",)),
    "head-dim": (config("transformer", attention_head_dim=60), ("attention_head_dim 60",)),
    "heads-text": (
        config("transformer", num_attention_heads="two"),
        ("transformer/config.json", "num_attention_heads"),
    ),
    "vae-kind": (config("vae", _class_name="AutoencoderKLWan"), ("AutoencoderKLWan",)),
    "vae-ratio": (
        lambda c: [config(part, temporal_compression_ratio=3)(c) for part in ("vae", "transformer")],
        ("temporal_compression_ratio is 3",),
    ),
    "vae-blocks": (config("vae", down_block_types=["NoSuchBlock3D"] * 4), ("vae/config.json",)),
    "vae-groups": (config("vae", norm_num_groups=7), ("vae/config.json",)),
    "first-t5": (config("text_encoder", feed_forward_proj="relu"), ("feed_forward_proj is 'relu'", "T5 v1.1")),
    "umt5": (config("text_encoder", model_type="umt5"), ("text_encoder/config.json", "model_type is 'umt5'")),
    "no-text-layers": (config("text_encoder", num_layers=0), ("text_encoder/config.json", "num_layers")),
    "scheduler-kind": (config("scheduler", prediction_type="epsilon"), ("scheduler_config.json", "prediction_type")),
    "no-vocabulary": (
        lambda c: [removed("tokenizer", name)(c) for name in ("spiece.model", "tokenizer.json")],
        ("spiece.model",),
    ),
}


@pytest.mark.parametrize("kind", EARLY)
@pytest.mark.usefixtures("no_weights")
def test_a_checkpoint_that_does_not_fit_is_refused_before_any_work(kind: str, checkpoint: Path, out: Path) -> None:
    spoil, words = EARLY[kind]
    spoil(checkpoint)
    text = refused(checkpoint, out, *words)
    assert str(checkpoint) in text or "transformer/config.json" in text or kind.startswith("vae-")


def value(name: str, number: float) -> Callable[[Tensors], object]:
    return lambda found: found[name].reshape(-1)[-1:].fill_(number)


@pytest.mark.parametrize("component", LAST)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.usefixtures("no_graphs")
def test_weights_that_are_not_finite_are_refused_before_a_graph_is_traced(
    component: str, number: float, checkpoint: Path, out: Path
) -> None:
    edit_tensors(checkpoint, component, value(LAST[component], number))
    refused(checkpoint, out, repr(LAST[component]), str(checkpoint / component), "NaN or infinite")


@pytest.mark.parametrize("component", LAST)
@pytest.mark.usefixtures("no_graphs")
def test_weights_beyond_fp16_are_refused_with_the_precisions_that_hold_them(
    component: str, checkpoint: Path, out: Path
) -> None:
    edit_tensors(checkpoint, component, value(LAST[component], 1e5))
    words = (repr(LAST[component]), "does not fit into fp16", "--precision bf16 or fp32")
    refused(checkpoint, out, *words, precision="fp16")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"height": 90}, ("--height 90", "80 and 96")),
        ({"height": 0}, ("--height 0", "16")),
        ({"width": 100}, ("--width 100", "96 and 112")),
        ({"frames": 8}, ("--frames 8", "5 and 9")),
        ({"frames": 0}, ("--frames 0", "is 1")),
        ({"fps": 0}, ("0 frames per second",)),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_default_sizes_that_are_not_possible_are_refused(
    options: dict[str, int], words: tuple[str, ...], out: Path
) -> None:
    refused(MODEL, out, *words, error=UsageError, **options)


@pytest.mark.usefixtures("no_weights")
def test_a_stored_table_has_one_default_size(learned_checkpoint: Path, out: Path) -> None:
    words = ("one size only", "--width 64 --height 48 --frames 9")
    refused(learned_checkpoint, out, *words, error=UsageError, height=64)


# --- the output place


@pytest.fixture
def empty_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports without graphs: weights, tokenizer and manifest."""
    monkeypatch.setattr(components, "VAE_GRAPHS", ())
    monkeypatch.setattr(components, "trace", lambda *_, **__: None)
    monkeypatch.setattr(components.Workspace, "add_graph", lambda *_, **__: None)


@pytest.mark.usefixtures("empty_graphs")
def test_an_existing_folder_is_refused_unless_it_is_empty_or_to_be_replaced(out: Path) -> None:
    bundle = out / "bundle"
    bundle.mkdir()
    first = export_checkpoint(MODEL, bundle)
    assert read_manifest(bundle) == first
    refused(MODEL, out, "is not empty. Remove it, or give another name")
    (bundle / "stale").write_bytes(b"of the old bundle")
    second = export_checkpoint(MODEL, bundle, replace=True, precision="fp16")
    assert read_manifest(bundle) == second != first
    assert not (bundle / "stale").exists()
    assert sorted(path.name for path in out.iterdir()) == ["bundle", "other.txt"]


@pytest.mark.usefixtures("no_graphs")
def test_a_failed_replacement_keeps_the_old_bundle(checkpoint: Path, out: Path) -> None:
    (out / "bundle").mkdir()
    (out / "bundle" / "bundle.json").write_text("the old one")
    edit_tensors(checkpoint, "vae", value(LAST["vae"], float("nan")))
    refused(checkpoint, out, "NaN", replace=True)


@pytest.mark.usefixtures("no_weights")
def test_only_a_bundle_is_replaced_and_never_the_checkpoint(checkpoint: Path, out: Path) -> None:
    (out / "bundle").mkdir()
    (out / "bundle" / "photo.jpg").write_bytes(b"of a holiday")
    refused(checkpoint, out, "holds something that is not a bundle", replace=True)
    shutil.copytree(checkpoint, out / "bundle" / "inside")
    (out / "bundle" / "bundle.json").write_text("{}")
    refused(out / "bundle" / "inside", out, "holds the checkpoint", replace=True)
    (out / "link").symlink_to(out / "bundle")
    refused(out / "link" / "inside", out, "holds the checkpoint", replace=True)


@pytest.mark.usefixtures("no_weights")
def test_an_output_place_that_cannot_be_used_is_refused_before_any_work(out: Path) -> None:
    before = listing(out)
    for target, words in (
        (out / "no" / "bundle", "mkdir -p"),
        (out / "other.txt", "existing file"),
        (out / "other.txt" / "bundle", "is a file, not a folder"),
    ):
        with pytest.raises(InputError, match=words):
            export_checkpoint(MODEL, target)
    assert listing(out) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("an operator is unknown"), MemoryError()])
@pytest.mark.parametrize("where", ["add_bytes", "add_weights", "add_graph"])
def test_nothing_remains_whatever_ends_the_export(
    where: str, error: BaseException, out: Path, empty_graphs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise error

    before = listing(out)
    monkeypatch.setattr(components.Workspace, where, interrupted)
    with pytest.raises(type(error)):
        export_checkpoint(MODEL, out / "bundle")
    assert listing(out) == before


def test_a_full_disk_is_explained_and_nothing_remains(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dynamictrl_edge.bundle.tensors import TensorWriter

    real, written = TensorWriter.write, []

    def write(writer: TensorWriter, name: str, array: np.ndarray) -> None:
        written.append(name)
        if len(written) > 20:
            raise OSError(28, "No space left on device")
        real(writer, name, array)

    monkeypatch.setattr(TensorWriter, "write", write)
    refused(MODEL, out, "disk is full", str(out / "bundle"))
