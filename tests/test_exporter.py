"""From checkpoint to bundle: what is refused, how early, and what a finished bundle is made of."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs the extra 'export'")

import msgspec
import onnx
import torch
from safetensors.torch import load_file

from dynamictrl_edge.bundle.errors import DeviceError, EdgeError, InputError, UsageError
from dynamictrl_edge.bundle.manifest import Manifest, read_manifest
from dynamictrl_edge.bundle.precision import Precision, widen
from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.export import components
from dynamictrl_edge.export.convert import Converter
from dynamictrl_edge.export.exporter import export_checkpoint
from dynamictrl_edge.export.trace import Signature
from dynamictrl_edge.export.vae import GraphInfo
from dynamictrl_edge.runtime import Animator
from tests.checkpoint_samples import WEIGHTS, Tensors, copied, edit_json, edit_tensors, split
from tests.cli_samples import listing
from tests.conftest import Export, Share
from tests.golden import case, model_dir, relative_rms

MODEL = model_dir("cogvideox10-tiny")
REUSE = (
    *("head_reuse", "trunk_keep", "trunk_reuse", "trunk_probe"),
    *("tokens_keep", "tokens_reuse", "tokens_take", "tokens_put"),
    *("cache_narrow", "cache_widen"),
)
DENOISER = ("modulation", "head_modulation", "conditioning", "stem", "block", "head", *REUSE)
VAE = ("vae_encoder_first", "vae_encoder_next", "vae_decoder_first", "vae_decoder_first_even", "vae_decoder_next")
GRAPHS = (*DENOISER, "text_block", *VAE)
CPU_GRAPHS = (
    "block_cpu",
    "tokens_keep_cpu",
    "tokens_reuse_cpu",
)  # of float32 bundles; in operators that only ONNX Runtime has
# Inputs that are data; every other input of the denoiser's graphs and of `text_block` is a weight.
DATA = {
    "modulation": {"time_sinusoid", "ofs_sinusoid"},
    "head_modulation": {"time_sinusoid", "ofs_sinusoid"},
    "conditioning": {"prompt_embeds", "image_latents", "pose_latents"},
    "stem": {"latents", "image_tokens"},
    "block": {"video", "text", "pose", "modulation", "rope_cos", "rope_sin"},
    "head": {"video", "modulation", "latents", "x0_old", "noise", "coefficients"},
    "text_block": {"hidden", "position_bias"},
    "head_reuse": {"video", "modulation", "latents", "x0_old", "noise", "coefficients", "kept"},
    "trunk_keep": {"stem", "video"},
    "trunk_reuse": {"stem", "newest", "before", "weights"},
    "trunk_probe": {"video", "modulation", "before"},
    "tokens_keep": {"video", "text", "pose", "modulation", "rope_cos", "rope_sin", "rows"},
    "tokens_reuse": {"video", "text", "pose", "modulation", "rope_cos", "rope_sin", "keys", "values"},
    "tokens_take": {"video", "active"},
    "tokens_put": {"video", "rows", "active"},
    "cache_narrow": {"keys", "values"},
    "cache_widen": {"keys_narrow", "values_narrow", "scales"},
}
ONNX_NAME = {"F32": "float", "F16": "float16", "BF16": "bfloat16"}
STORED = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


# --- bundles

EXPORT = """
import sys
from dynamictrl_edge.export.exporter import export_checkpoint
export_checkpoint(sys.argv[1], sys.argv[2], reuse=False)
"""


@pytest.fixture(scope="session")
def bundle10_again(share: Share) -> Path:
    """Made from the same checkpoint as `bundle10` by another process with another seed of Python's hashes, without reuse."""

    def make(folder: Path) -> None:
        environment = {**os.environ, "PYTHONHASHSEED": "4"}
        command = [sys.executable, "-c", EXPORT, str(MODEL), str(folder / "bundle")]
        subprocess.run(command, env=environment, check=True, capture_output=True)

    return share("again", make) / "bundle"


@pytest.fixture(scope="session")
def bundle15_fp16(exported: Export) -> Path:
    return exported("cogvideox15-tiny", "fp16")


@pytest.fixture(scope="session")
def bundle15_bf16(exported: Export) -> Path:
    return exported("cogvideox15-tiny", "bf16")


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


# --- other sources of the same weights


@pytest.fixture
def quick(bundle10: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the graphs of `bundle10`, which depend on the configuration only."""

    def traced(module: object, signature: Signature, *, name: str, device: str) -> onnx.ModelProto:
        return onnx.load(bundle10 / "graphs" / f"{name}.onnx")

    def copied(name: str, config: object, precision: object, out: Path, *_: object) -> GraphInfo:
        shutil.copy(bundle10 / "graphs" / f"{name}.onnx", out)
        return GraphInfo(name, out / f"{name}.onnx", (), (), "")

    monkeypatch.setattr(components, "trace", traced)
    monkeypatch.setattr(components, "export_vae_graph", copied)


def hashes(manifest: Manifest) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in manifest.files.items()}


@pytest.mark.usefixtures("quick")
def test_shards_export_to_the_same_bundle(bundle10: Path, checkpoint: Path, tmp_path: Path) -> None:
    for component in WEIGHTS:
        split(checkpoint, component)
    made = export_checkpoint(checkpoint, tmp_path / "bundle")
    assert hashes(made) == hashes(read_manifest(bundle10))
    Bundle(tmp_path / "bundle").verify()


def to_bf16(found: Tensors) -> None:
    found.update({name: tensor.to(torch.bfloat16) for name, tensor in found.items()})


def rounded_to_bf16(found: Tensors) -> None:
    found.update({name: tensor.to(torch.bfloat16).float() for name, tensor in found.items()})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.usefixtures("quick")
def test_a_bf16_checkpoint_exports_its_exact_values(checkpoint: Path, tmp_path: Path, precision: Precision) -> None:
    narrow = shutil.copytree(checkpoint, tmp_path / "narrow")
    for component in WEIGHTS:
        edit_tensors(narrow, component, to_bf16)
        edit_tensors(checkpoint, component, rounded_to_bf16)
        split(narrow, component)
    made = export_checkpoint(narrow, tmp_path / "from-bf16", precision=precision)
    wide = export_checkpoint(checkpoint, tmp_path / "from-fp32", precision=precision)
    assert hashes(made) == hashes(wide)


@pytest.mark.usefixtures("quick")
def test_the_defaults_and_the_progress_of_an_export(tmp_path: Path) -> None:
    class Told:
        def __init__(self) -> None:
            self.stages: list[tuple[str, float | None]] = []
            self.names: list[str] = []
            self.amounts: list[float] = []

        def stage(self, name: str, total: float | None = None) -> None:
            self.stages.append((name, total))
            self.amounts.append(0)

        def rename(self, name: str) -> None:
            self.names.append(name)

        def advance(self, amount: float = 1) -> None:
            self.amounts[-1] += amount

    told = Told()
    made = export_checkpoint(MODEL, tmp_path / "a", height=64, width=80, frames=13, fps=5, progress=told)
    assert msgspec.to_builtins(made.defaults) == {"height": 64, "width": 80, "frames": 13, "fps": 5}
    assert told.stages == [("weights", told.amounts[0]), ("graphs", told.amounts[1])]
    assert told.amounts[1] == len(GRAPHS + CPU_GRAPHS) == len(made.graphs)
    stored = sum(Bundle(tmp_path / "a").tensors(Path(n).stem).nbytes for n in made.files if n.startswith("weights/"))
    assert told.amounts[0] == stored
    assert [name for name in told.names if name.startswith("weights")][::10] == [
        "weights denoiser",
        "weights vae_encoder",
    ]
    own = export_checkpoint(MODEL, tmp_path / "b").defaults
    assert msgspec.to_builtins(own) == {"height": 96, "width": 160, "frames": 9, "fps": 8}


# --- what a bundle is made of


def test_two_exports_are_the_same_byte_for_byte(bundle10: Path, bundle10_again: Path) -> None:
    one, two = (read_manifest(folder) for folder in (bundle10, bundle10_again))
    again = hashes(two)
    assert again.keys() >= {f"graphs/{name}.onnx" for name in GRAPHS if name not in REUSE} | {
        "weights/denoiser.safetensors"
    }
    assert {name: value for name, value in hashes(one).items() if name in again} == again
    graphs = {name: spec for name, spec in one.graphs.items() if name in two.graphs}
    files = {name: entry for name, entry in one.files.items() if name in two.files}
    assert msgspec.structs.replace(one, graphs=graphs, files=files) == two
    Bundle(bundle10_again).verify()


def test_a_bundle_holds_what_its_manifest_lists_and_nothing_else(bundle10: Path) -> None:
    manifest = read_manifest(bundle10)
    found = {str(path.relative_to(bundle10)) for path in bundle10.rglob("*") if path.is_file()}
    assert found == {*manifest.files, "bundle.json"}
    assert sorted(manifest.graphs) == sorted(GRAPHS + CPU_GRAPHS)
    assert manifest.total_bytes == sum((bundle10 / name).stat().st_size for name in manifest.files)
    assert manifest.provenance.keys() >= {"dynamictrl-edge", "torch", "onnx", "sha256 model_index.json"}


def test_no_file_names_the_machine_that_made_it(bundle10: Path, bundle15_fp16: Path) -> None:
    here = Path(__file__).resolve().parents[1]
    secrets = {str(here), str(Path.home()), sys.prefix, os.getcwd(), str(bundle10.parent), "site-packages", ".py"}
    secrets -= {"/"}
    for bundle in (bundle10, bundle15_fp16):
        for path in (*(bundle / "graphs").iterdir(), bundle / "bundle.json"):
            data = path.read_bytes()
            assert [secret for secret in secrets if secret.encode() in data] == [], path.name


def axes(shape: Any) -> tuple[int | str, ...]:
    return tuple(dim.dim_param or dim.dim_value for dim in shape.dim)


def test_only_float32_bundles_hold_the_cpus_own_graph(bundle10: Path, bundle15_fp16: Path, bundle15_bf16: Path) -> None:
    graphs = read_manifest(bundle10).graphs
    for name in CPU_GRAPHS:
        assert graphs[name].inputs == graphs[name.removesuffix("_cpu")].inputs
        assert graphs[name].outputs == graphs[name.removesuffix("_cpu")].outputs
    for bundle in (bundle15_fp16, bundle15_bf16):
        assert sorted(read_manifest(bundle).graphs) == sorted(GRAPHS)


def test_without_reuse_the_exact_loop_is_left(bundle10_again: Path) -> None:
    left = {name for name in GRAPHS + CPU_GRAPHS if name.removesuffix("_cpu") not in REUSE}
    assert set(read_manifest(bundle10_again).graphs) == left


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_has_the_versions_and_names_that_the_manifest_says(
    name: str, bundle10: Path, bundle15_fp16: Path, bundle15_bf16: Path
) -> None:
    for bundle in (bundle10, bundle15_fp16, bundle15_bf16):
        spec, data = Bundle(bundle).graph(name)
        model = onnx.load_from_string(data)
        opsets = {entry.domain: entry.version for entry in model.opset_import}
        assert opsets[""] >= 20
        assert set(opsets) == {""}
        assert not model.functions
        assert model.ir_version <= 10
        assert model.graph.name == name
        for ports, values in ((spec.inputs, model.graph.input), (spec.outputs, model.graph.output)):
            for port, found in zip(ports, values, strict=True):
                kind = found.type.tensor_type
                assert port.name == found.name
                assert port.dtype == onnx.TensorProto.DataType.Name(kind.elem_type).lower()
                assert port.shape == axes(kind.shape)
        symbols = {str(n) for port in (*spec.inputs, *spec.outputs) for n in port.shape if isinstance(n, str)}
        if name in VAE:
            assert all(
                re.fullmatch(r"frames|latent_frames|(\d+\*)?latent_(height|width)", symbol) for symbol in symbols
            )
            assert {"latent_height", "latent_width"} <= symbols
        else:
            expected = {
                "modulation": {"T"},
                "head_modulation": {"T"},
                "conditioning": {"B", "L", "N", "F", "H", "W"},
                "stem": {"N", "F", "H", "W"},
                "block": {"B", "N", "L", "S"},
                "head": {"B", "N", "F", "H", "W"},
                "text_block": {"B", "S"},
                "head_reuse": {"N", "F", "H", "W"},
                **{key: {"N"} for key in ("trunk_keep", "trunk_reuse", "trunk_probe")},
                "tokens_keep": {"B", "N", "L", "S", "K"},
                "tokens_reuse": {"B", "A", "L", "Q", "K"},
                **{key: {"N", "A"} for key in ("tokens_take", "tokens_put")},
                **{key: {"K"} for key in ("cache_narrow", "cache_widen")},
            }
            assert symbols == expected[name]


def test_every_weight_input_is_in_the_store_and_nothing_else_is(
    bundle10: Path, bundle15_fp16: Path, bundle15_bf16: Path
) -> None:
    for root in (bundle10, bundle15_fp16, bundle15_bf16):
        bundle = Bundle(root)
        shared = bundle.tensors("denoiser").infos
        used = set()
        for i in range(bundle.manifest.transformer.num_layers):
            own = dict.fromkeys(("block", "tokens_keep", "tokens_reuse"), f"block_{i:02d}")
            own["modulation"] = f"modulation_{i:02d}"
            for name in DENOISER:
                infos = bundle.tensors(own[name]).infos if name in own else {}
                store = {**shared, **infos}
                inputs = [port for port in bundle.manifest.graphs[name].inputs if port.name not in DATA[name]]
                assert {port.name for port in inputs} >= set(infos)
                for port in inputs:
                    assert store[port.name].shape == port.shape
                    assert ONNX_NAME[store[port.name].dtype] == port.dtype
                    used.add(port.name)
                if name == "block":
                    assert {info.offset % 64 for info in infos.values()} == {0}
        assert used >= set(shared)
        for i in range(bundle.manifest.text.num_layers if bundle.manifest.text else 0):
            infos = bundle.tensors(f"text_block_{i:02d}").infos
            inputs = [
                port for port in bundle.manifest.graphs["text_block"].inputs if port.name not in DATA["text_block"]
            ]
            assert [(port.name, port.shape, port.dtype) for port in inputs] == [
                (name, info.shape, ONNX_NAME[info.dtype]) for name, info in infos.items()
            ]


def test_the_vaes_initializers_lie_in_its_weight_files(
    bundle10: Path, bundle15_fp16: Path, bundle15_bf16: Path
) -> None:
    for root in (bundle10, bundle15_fp16, bundle15_bf16):
        bundle = Bundle(root)
        for name in VAE:
            spec, data = bundle.graph(name)
            file = "_".join(name.split("_")[:2])
            assert spec.weights == f"weights/{file}.safetensors"
            infos = bundle.tensors(file).infos
            outside = [t for t in onnx.load_from_string(data).graph.initializer if t.external_data]
            assert {tensor.name for tensor in outside} == set(infos)
            for tensor in outside:
                where = {entry.key: entry.value for entry in tensor.external_data}
                info = infos[tensor.name]
                assert where["location"] == f"{file}.safetensors"
                assert (int(where["offset"]), int(where["length"])) == (info.offset, info.nbytes)
                assert onnx.TensorProto.DataType.Name(tensor.data_type).lower() == ONNX_NAME[info.dtype]


def test_the_weights_of_a_bundle_are_those_of_the_checkpoint(bundle10: Path) -> None:
    """Spot checks that use none of the recipes."""
    transformer = load_file(MODEL / "transformer" / WEIGHTS["transformer"])
    bundle = Bundle(bundle10)
    block, shared = bundle.tensors("block_02"), bundle.tensors("denoiser")
    assert np.array_equal(block["ff_in_weight"], transformer["transformer_blocks.2.ff.net.0.proj.weight"].t())
    assert np.array_equal(block["qkv_weight"][:, 256:], transformer["transformer_blocks.2.attn1.to_v.weight"].t())
    assert np.array_equal(shared["proj_bias"], transformer["proj_out.bias"])
    text = load_file(MODEL / "text_encoder" / WEIGHTS["text_encoder"])
    assert np.array_equal(bundle.tensors("text")["embedding"], text["shared.weight"])
    vae = load_file(MODEL / "vae" / WEIGHTS["vae"])
    stored = {**bundle.tensors("vae_encoder"), **bundle.tensors("vae_decoder")}
    assert stored.keys() == vae.keys()
    assert all(np.array_equal(stored[name], tensor) for name, tensor in vae.items())


# --- other precisions


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_precision_is_that_of_all_weights_and_graphs(
    precision: Precision, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle = Bundle(request.getfixturevalue(f"bundle15_{precision}"))
    assert bundle.manifest.precision == precision
    bundle.verify()
    wide = {"norm1_weight", "norm2_weight", "relative_attention_bias", "final_norm_weight"}  # of the text encoder
    for name in bundle.manifest.files:
        if name.startswith("weights/"):
            part = Path(name).stem
            for tensor, info in bundle.tensors(part).infos.items():
                pinned = part.startswith("text") and tensor in wide
                assert info.dtype == ("F32" if pinned else STORED[precision]), (part, tensor)
    transformer = load_file(model_dir("cogvideox15-tiny") / "transformer" / WEIGHTS["transformer"])
    rounded = transformer["proj_out.weight"].to({"fp16": torch.float16, "bf16": torch.bfloat16}[precision]).float()
    assert np.array_equal(widen(bundle.tensors("denoiser")["proj_weight"]), rounded.t())
    for name in (*DENOISER, "text_block"):
        model = onnx.load_from_string(bundle.graph(name)[1])
        onnx.checker.check_model(model, full_check=True)
        kinds = {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
        if precision == "bf16" or not name.startswith(
            ("trunk_", "tokens_take", "tokens_put")
        ):  # no weights, float32 streams
            assert onnx.TensorProto.DataType.Value({"fp16": "FLOAT16", "bf16": "BFLOAT16"}[precision]) in kinds
    for name in VAE:  # the checker looks for external initializers beside the graph
        spec = bundle.manifest.graphs[name]
        shutil.copy(bundle.path(spec.file), tmp_path)
        shutil.copy(bundle.path(str(spec.weights)), tmp_path)
        onnx.checker.check_model(tmp_path / f"{name}.onnx", full_check=True)


@pytest.mark.parametrize("name", ["pipeline15_nocfg_f9", "pipeline15_cfg3_f13"])
def test_an_fp16_bundle_animates_near_the_published_float32(name: str, bundle15_fp16: Path) -> None:
    golden, facts = case(name)
    settings = facts["settings"]
    keys = (
        "prompt",
        "negative_prompt",
        "num_inference_steps",
        "guidance_scale",
        "seed",
        "height",
        "width",
        "num_frames",
    )
    clip = Animator.from_bundle(bundle15_fp16, cache=False, threads=1)(
        image=golden["image_u8"],
        pose=golden["control_u8"],
        fit="stretch",
        tiling="on" if settings["vae_tiling_and_slicing"] else "off",
        **{key: settings[key] for key in keys},
    )
    wanted = golden["decoder_input"][0].transpose(1, 0, 2, 3) * np.float32(0.7)
    error = relative_rms(clip.latents, wanted)
    assert 1e-5 < error < 3e-3  # 7e-4 without guidance, 1e-3 with it
    frames = golden["frames_u8"][: settings["num_frames"]].astype(int)
    assert np.abs(clip.frames.astype(int) - frames).max() <= 2


def test_a_bf16_bundle_says_what_to_do_on_a_cpu(bundle15_bf16: Path) -> None:
    with pytest.raises(DeviceError, match=r"bf16.*Export it with --precision fp32") as caught:
        Animator.from_bundle(bundle15_bf16)
    assert caught.value.exit_code == 5
    assert str(bundle15_bf16) in str(caught.value)
