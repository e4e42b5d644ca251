"""From checkpoint to bundle: what a finished bundle is made of."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs the extra 'export'")

import msgspec
import onnx
import torch
from safetensors.torch import load_file

from dynamictrl_edge.bundle.errors import DeviceError
from dynamictrl_edge.bundle.manifest import Manifest, read_manifest
from dynamictrl_edge.bundle.precision import Precision, widen
from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.export import components
from dynamictrl_edge.export.exporter import export_checkpoint
from dynamictrl_edge.export.trace import Signature
from dynamictrl_edge.export.vae import GraphInfo
from dynamictrl_edge.runtime import Animator
from tests.checkpoint_samples import WEIGHTS, Tensors, copied, edit_tensors, split
from tests.conftest import Export, Share
from tests.export_samples import axes
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


# --- other sources of the same weights


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return copied(tmp_path)


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
