"""The VAE's graphs, run by ONNX Runtime: the golden numbers, diffusers at other sizes, and what is in the files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamictrl_edge.bundle.errors import BundleError, InputError
from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend
from dynamictrl_edge.runtime.tiling import Tiling
from dynamictrl_edge.runtime.vae import VAEDecoder, VAEEncoder, decoded_frames, sample_posterior
from tests.golden import ROOT, case, max_abs, model_dir, relative_rms

torch = pytest.importorskip("torch", reason="exporting needs the extra 'export'")
onnx = pytest.importorskip("onnx", reason="exporting needs the extra 'export'")
diffusers = pytest.importorskip("diffusers", reason="exporting needs the extra 'export'")
ort = pytest.importorskip("onnxruntime")

from safetensors.torch import load_file, save_file  # noqa: E402

from dynamictrl_edge.export.vae import GRAPHS, WeightFile, export_vae_graph, vae_tensors  # noqa: E402

LIMITS = {"max_abs": 5e-5, "relative_rms": 1e-5}
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class ExportedVae:
    """A VAE whose graphs are exported when they are first asked for."""

    def __init__(self, config: dict[str, Any], weights: Mapping[str, Any], precision: Any, folder: Path) -> None:
        self.config, self.precision, self.folder = config, precision, folder
        self.files = {}
        for kind in ("encoder", "decoder"):
            path = folder / f"vae_{kind}.safetensors"
            save_file(
                {t.target: weights[t.source].to(TYPES[precision]).clone() for t in vae_tensors(kind, config)}, path
            )
            self.files[kind] = WeightFile.read(path)
        self.info = cache(self._export)
        self.graph = cache(self._load)

    def _export(self, name: str) -> Any:
        return export_vae_graph(name, self.config, self.precision, self.folder, self.files[name.split("_")[1]])

    def _load(self, name: str) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
        info = self.info(name)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.folder))
        session = ort.InferenceSession(info.path.read_bytes(), options, providers=["CPUExecutionProvider"])
        names = [port.name for port in info.outputs]

        def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            assert set(feeds) == {port.name for port in info.inputs}
            return dict(zip(names, session.run(names, dict(feeds)), strict=True))

        return run

    def encoder(self, **settings: Any) -> VAEEncoder:
        return VAEEncoder(self.graph, temporal_compression=self.config["temporal_compression_ratio"], **settings)

    def decoder(self, **settings: Any) -> VAEDecoder:
        return VAEDecoder(self.graph, **settings)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class BundledVae:
    """The VAE of an exported golden bundle, on the backend that users have."""

    def __init__(self, root: Path) -> None:
        bundle = Bundle(root)
        self.config = {name: getattr(bundle.manifest.vae, name) for name in ("sample_height", "sample_width")}
        self.ratio = bundle.manifest.vae.temporal_compression_ratio
        self.graph = OnnxRuntimeBackend(bundle).graph

    def encoder(self, **settings: Any) -> VAEEncoder:
        return VAEEncoder(self.graph, temporal_compression=self.ratio, **settings)

    def decoder(self, **settings: Any) -> VAEDecoder:
        return VAEDecoder(self.graph, **settings)


@pytest.fixture(scope="module")
def golden(request: pytest.FixtureRequest) -> Callable[[str], BundledVae]:
    bundles = {"cogvideox10-tiny": "bundle10", "cogvideox15-tiny": "bundle15"}
    return cache(lambda model: BundledVae(request.getfixturevalue(bundles[model])))


def _small_vae(temporal_compression: int) -> Any:
    """Three levels: 4 x 4 pixels per latent. Random weights everywhere, norms included."""
    torch.manual_seed(5)
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(4, 4, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_height=48,
        sample_width=80,
        temporal_compression_ratio=temporal_compression,
    ).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return vae


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, ExportedVae]]:
    """(temporal compression, precision) -> the small VAE in diffusers and exported."""

    @cache
    def load(temporal_compression: int, precision: str) -> tuple[Any, ExportedVae]:
        vae = _small_vae(temporal_compression)
        folder = tmp_path_factory.mktemp("small")
        return vae, ExportedVae(dict(vae.config), vae.state_dict(), precision, folder)

    return lambda temporal_compression=4, precision="fp32": load(temporal_compression, precision)


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def _reference(vae: Any, method: str, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        result = getattr(vae, method)(torch.from_numpy(x))
    return (result if isinstance(result, torch.Tensor) else result.sample).numpy()


# The golden numbers.


def _cases(kind: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "cases").glob(f"vae*_{kind}*.json"))


def _golden_tiling(vae: BundledVae, settings: dict[str, Any]) -> Tiling | None:
    if not settings["settings"]["tiling"]:
        return None
    return Tiling.published(vae.config["sample_height"], vae.config["sample_width"], 8)


def _check(found: np.ndarray, wanted: np.ndarray) -> None:
    assert max_abs(found, wanted) <= LIMITS["max_abs"]
    assert relative_rms(found, wanted) <= LIMITS["relative_rms"]


@pytest.mark.parametrize("name", _cases("encode"))
def test_encoding_meets_the_golden_numbers(name: str, golden: Callable[[str], BundledVae]) -> None:
    tensors, settings = case(name)
    vae = golden(settings["model"])
    moments = vae.encoder(tiling=_golden_tiling(vae, settings)).encode(tensors["pixels"])
    _check(moments, tensors["moments"])
    _check(sample_posterior(moments, tensors["sample_noise"]), tensors["sample"])


@pytest.mark.parametrize("name", _cases("decode"))
def test_decoding_meets_the_golden_numbers(name: str, golden: Callable[[str], BundledVae]) -> None:
    tensors, settings = case(name)
    vae = golden(settings["model"])
    pixels = vae.decoder(tiling=_golden_tiling(vae, settings)).decode(tensors["latents"])
    _check(pixels, tensors["pixels"])


def test_frames_leave_the_decoder_chunk_by_chunk(golden: Callable[[str], BundledVae]) -> None:
    tensors, settings = case("vae10_decode5")
    chunks = list(golden(settings["model"]).decoder().decode_stream(tensors["latents"]))
    assert [chunk.shape[2] for chunk in chunks] == [9, 8]
    _check(np.concatenate(chunks, axis=2), tensors["pixels"])


# Against diffusers, at sizes that no graph was traced with.


@pytest.mark.parametrize(
    ("frames", "height", "width"), [(1, 16, 24), (5, 8, 8), (13, 20, 12), (17, 24, 40), (21, 16, 16), (9, 18, 27)]
)
def test_encoding_equals_diffusers_at_any_size(
    frames: int, height: int, width: int, small: Callable[..., tuple[Any, ExportedVae]]
) -> None:
    vae, exported = small()
    pixels = _normal(1, 3, frames, height, width)
    _check(exported.encoder().encode(pixels), _reference(vae, "_encode", pixels))


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 6, 7])
def test_decoding_equals_diffusers_at_any_length(frames: int, small: Callable[..., tuple[Any, ExportedVae]]) -> None:
    vae, exported = small()
    latents = _normal(1, 4, frames, 3 + frames, 9 - frames)
    pixels = exported.decoder().decode(latents)
    assert pixels.shape[2] == decoded_frames(frames, 4)
    _check(pixels, _reference(vae, "decode", latents))


def test_only_the_first_levels_compress_time(small: Callable[..., tuple[Any, ExportedVae]]) -> None:
    vae, exported = small(2)
    pixels, latents = _normal(1, 3, 11, 8, 12), _normal(1, 4, 3, 3, 4)
    _check(exported.encoder().encode(pixels), _reference(vae, "_encode", pixels))
    _check(exported.decoder().decode(latents), _reference(vae, "decode", latents))


@pytest.mark.parametrize("order", ["time", "tiles"])
def test_tiles_equal_diffusers_over_several_chunks(order: Any, small: Callable[..., tuple[Any, ExportedVae]]) -> None:
    vae, exported = small()
    tiling = Tiling.published(48, 80, 4)
    assert (tiling.rows, tiling.columns) == (6, 10)
    pixels, latents = _normal(1, 3, 17, 36, 60), _normal(1, 4, 4, 8, 11)
    vae.enable_tiling()
    try:
        wanted = _reference(vae, "_encode", pixels), _reference(vae, "decode", latents)
    finally:
        vae.disable_tiling()
    _check(exported.encoder(tiling=tiling, order=order).encode(pixels), wanted[0])
    _check(exported.decoder(tiling=tiling, order=order).decode(latents), wanted[1])


# Precisions.


def test_half_precision_graphs_run_and_stay_close(small: Callable[..., tuple[Any, ExportedVae]]) -> None:
    vae, exported = small(precision="fp16")
    pixels, latents = _normal(1, 3, 9, 16, 24), _normal(1, 4, 5, 4, 6)
    moments, frames = exported.encoder().encode(pixels), exported.decoder().decode(latents)
    assert moments.dtype == frames.dtype == np.float32
    assert 1e-6 < relative_rms(moments, _reference(vae, "_encode", pixels)) < 5e-3
    assert 1e-6 < relative_rms(frames, _reference(vae, "decode", latents)) < 5e-3


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_only_weights_and_state_have_the_precision_of_the_bundle(
    precision: str, small: Callable[..., tuple[Any, ExportedVae]]
) -> None:
    element = {"fp32": "float", "fp16": "float16", "bf16": "bfloat16"}[precision]
    for name in ("vae_encoder_first", "vae_decoder_next"):  # exported, so they are valid ONNX
        info = small(precision=precision)[1].info(name)
        for port in (*info.inputs, *info.outputs):
            assert port.dtype == (element if port.name.startswith("state_") else "float")
        model = onnx.load(info.path, load_external_data=False)
        assert {tensor.data_type for tensor in model.graph.initializer} == {getattr(onnx.TensorProto, element.upper())}
        # No operator accepts bfloat16 before the opset that gave it the type.
        assert model.opset_import[0].version == (22 if precision == "bf16" else 20)


# What is in the files.


@pytest.mark.parametrize("model", ["cogvideox10-tiny", "cogvideox15-tiny"])
def test_every_weight_of_the_checkpoint_is_used_once(model: str) -> None:
    folder = model_dir(model) / "vae"
    tensors = [
        t
        for kind in ("encoder", "decoder")
        for t in vae_tensors(kind, json.loads((folder / "config.json").read_text()))
    ]
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert {t.source: t.shape for t in tensors} == {name: tuple(tensor.shape) for name, tensor in stored.items()}
    assert len({t.target for t in tensors}) == len(tensors) == len(stored)


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_refer_to_every_weight_by_file_name(name: str, small: Callable[..., tuple[Any, ExportedVae]]) -> None:
    exported = small()[1]
    info = exported.info(name)
    file = exported.files[name.split("_")[1]]
    model = onnx.load(info.path, load_external_data=False)
    assert {tensor.name for tensor in model.graph.initializer} == set(file.tensors)
    for tensor in model.graph.initializer:
        assert {entry.key: entry.value for entry in tensor.external_data} == {
            "location": file.path.name,
            "offset": str(file.tensors[tensor.name].offset),
            "length": str(file.tensors[tensor.name].nbytes),
        }
    assert info.weights == file.path.name


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_states_pair_up(kind: str, small: Callable[..., tuple[Any, ExportedVae]]) -> None:
    exported = small()[1]
    infos = [exported.info(name) for name in GRAPHS if kind in name]
    taken = [port for port in infos[-1].inputs if port.name.startswith("state_in.")]
    assert len(taken) == {"encoder": 12, "decoder": 18}[kind]  # one per convolution that looks back
    for info in infos:
        given = [port for port in info.outputs if port.name.startswith("state_out.")]
        assert [p.name.replace("_in.", "_out.") for p in taken] == [p.name for p in given]
        assert [p.shape for p in taken] == [p.shape for p in given]
    assert all(len(info.inputs) == 1 for info in infos[:-1])  # a first chunk has no past
    assert taken[0].name == "state_in.conv_in"


def test_graphs_are_reproducible_and_do_not_tell_where_they_were_made(
    small: Callable[..., tuple[Any, ExportedVae]], tmp_path: Path
) -> None:
    exported = small()[1]
    name = "vae_encoder_first"
    data = exported.info(name).path.read_bytes()
    again = export_vae_graph(name, exported.config, "fp32", tmp_path, exported.files["encoder"])
    assert again.path.read_bytes() == data
    for trace in (b"site-packages", b".py", str(Path.cwd()).encode(), str(exported.folder).encode()):
        assert trace not in data


# Refusals.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "'AutoencoderKL'"),
        ({"temporal_compression_ratio": 3}, "must be 1, 2, 4 or 8"),
        ({"temporal_compression_ratio": 8}, "3 levels halve time 2 times"),
        ({"down_block_types": ["UnknownBlock"] * 3}, "vae/config.json"),
        ({"norm_num_groups": 3}, "vae/config.json"),
    ],
)
def test_unusable_configurations_are_refused(change: dict[str, Any], message: str) -> None:
    config = {
        "down_block_types": ["CogVideoXDownBlock3D"] * 3,
        "up_block_types": ["CogVideoXUpBlock3D"] * 3,
        "block_out_channels": [4, 4, 8],
        "norm_num_groups": 2,
        "layers_per_block": 1,
        "latent_channels": 4,
    }
    assert vae_tensors("encoder", config)
    with pytest.raises(InputError, match=message):
        vae_tensors("encoder", config | change)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("encoder.conv_out.conv.bias"), "lacks the tensor 'encoder.conv_out.conv.bias'"),
        (lambda t: t.update({"encoder.conv_out.conv.bias": torch.zeros(9)}), r"F32 \[9\]; the graph needs F32 \[8\]"),
        (lambda t: t.update({"encoder.conv_in.conv.bias": torch.zeros(4).half()}), r"F16 \[4\]; the graph needs F32"),
    ],
)
def test_unfit_weight_files_are_refused(
    damage: Callable[[dict[str, Any]], Any],
    message: str,
    small: Callable[..., tuple[Any, ExportedVae]],
    tmp_path: Path,
) -> None:
    exported = small()[1]
    tensors = load_file(exported.files["encoder"].path)
    damage(tensors)
    save_file(tensors, tmp_path / "vae_encoder.safetensors")
    file = WeightFile.read(tmp_path / "vae_encoder.safetensors")
    with pytest.raises(BundleError, match=message):
        export_vae_graph("vae_encoder_next", exported.config, "fp32", tmp_path, file)
    assert not (tmp_path / "vae_encoder_next.onnx").exists()
