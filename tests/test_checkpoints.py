"""Random checkpoints are what the published code would load, whatever their size; and receipts say what they must."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch

from benchmarks import receipt
from benchmarks.checkpoints import SPECS, NormalStrip, tensor_shapes, write_checkpoint
from benchmarks.published_pipeline import published_pipeline, raised_frames
from benchmarks.published_torch import load_transformer, rotary_tables
from dynamictrl_edge.bundle.errors import InputError, UsageError
from tests.golden import model_dir

GOLDEN_SPECS = {"tiny10": "cogvideox10-tiny", "tiny15": "cogvideox15-tiny"}
COMPONENTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The two tiny checkpoints, written once."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in GOLDEN_SPECS:
        write_checkpoint(folder / name, name)
    return {name: folder / name for name in GOLDEN_SPECS}


def weights(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a component, from however many files."""
    return {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in load_file(file).items()}


# Like the real thing


@pytest.mark.parametrize("name", GOLDEN_SPECS)
def test_every_config_is_the_golden_one(name: str, written: dict[str, Path]) -> None:
    golden = model_dir(GOLDEN_SPECS[name])
    files = [path.relative_to(golden) for path in golden.rglob("*.json")]
    assert len(files) >= 6
    for file in files:
        assert json.loads((written[name] / file).read_text()) == json.loads((golden / file).read_text()), file


@pytest.mark.parametrize("name", GOLDEN_SPECS)
@pytest.mark.parametrize("component", COMPONENTS)
def test_tensors_have_the_golden_names_shapes_and_spread(name: str, component: str, written: dict[str, Path]) -> None:
    golden = load_file(model_dir(GOLDEN_SPECS[name]) / component / COMPONENTS[component])
    ours = load_file(written[name] / component / COMPONENTS[component])
    assert {key: array.shape for key, array in ours.items()} == {key: array.shape for key, array in golden.items()}
    for key, array in golden.items():
        assert np.isfinite(ours[key]).all()
        assert np.abs(ours[key]).max() > 0
        if array.size >= 512:
            assert ours[key].std() == pytest.approx(array.std(), rel=0.25), key
            assert abs(ours[key].mean() - array.mean()) < 0.25 * array.std() + 0.02, key
        assert abs(ours[key].mean() - array.mean()) < 0.5, key


def test_learned_positions_have_the_golden_names_and_shapes() -> None:
    golden = model_dir("cogvideox10-learnedpos-tiny") / "transformer" / COMPONENTS["transformer"]
    expected = {key: array.shape for key, array in load_file(golden).items()}
    assert tensor_shapes(SPECS["tiny10-learnedpos"], "transformer") == expected


@pytest.mark.parametrize("name", GOLDEN_SPECS)
def test_the_published_pipeline_runs_on_them_and_nothing_saturates(name: str, written: dict[str, Path]) -> None:
    height, width, frames = 32, 48, 5
    generator = np.random.default_rng(1)
    clip = raised_frames(frames, SPECS[name].transformer.patch_size_t)[1]
    image = generator.integers(0, 256, (40, 40, 3), np.uint8)
    control = generator.integers(0, 256, (clip, height, width, 3), np.uint8)
    video = published_pipeline(
        written[name], image, control, "a person walks", "", height, width, frames, 3, 2.0, 7, False
    )
    assert np.isfinite(video["final_latents"]).all()
    assert 0.3 < video["final_latents"].std() < 5
    assert video["frames"].std() > 0.02
    assert 0.05 < video["frames"].mean() < 0.95


@pytest.mark.parametrize("name", ["bench-27m", "bench-27m-10", "bench-small"])
def test_bench_models_load_strictly_and_stay_sane(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    write_checkpoint(tmp_path / name, name, without=("vae", "text"))
    model = load_transformer(tmp_path / name / "transformer")
    config = model.config
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        output = model(
            torch.randn((1, 2, 32, 8, 8), generator=generator),
            torch.randn((1, config.max_text_seq_length, config.text_embed_dim), generator=generator),
            torch.tensor([500]),
            torch.randn((1, 2, 16, 8, 8), generator=generator),
            rotary_tables(config, 64, 64, 2),
            torch.tensor([2.0]) if spec.is_15 else None,
        )
    assert 0.5 < output.std().item() < 3


def test_text_encoder_and_vae_load_without_a_missing_or_extra_name(tmp_path: Path) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
    from transformers import T5EncoderModel, T5Tokenizer

    write_checkpoint(tmp_path / "c", "bench-small", dtype="bf16", without=("transformer",))
    _, text = T5EncoderModel.from_pretrained(tmp_path / "c" / "text_encoder", output_loading_info=True)
    _, vae = AutoencoderKLCogVideoX.from_pretrained(tmp_path / "c" / "vae", output_loading_info=True)
    for info in (text, vae):
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]
    tokenizer = T5Tokenizer.from_pretrained(tmp_path / "c" / "tokenizer")
    assert len(tokenizer) <= SPECS["bench-small"].text.vocabulary


# Sizes


@pytest.mark.parametrize(
    ("name", "component", "millions", "tokens"),
    [
        ("full", "transformer", (5770, 5771), 20400),
        ("full", "text_encoder", (4760, 4765), 20400),
        ("full", "vae", (215, 216), 20400),
        ("bench-27m", "transformer", (26.5, 27.5), 1280),
        ("bench-27m-10", "transformer", (26.5, 27.5), 1280),
        ("bench-small", "transformer", (10, 11), 240),
    ],
)
def test_specs_have_the_promised_size(name: str, component: str, millions: tuple[float, float], tokens: int) -> None:
    shapes = tensor_shapes(SPECS[name], component)
    count = sum(math.prod(shape) for shape in shapes.values()) / 1e6
    assert millions[0] <= count <= millions[1]
    # 37 frames are 10 latent frames, 5 patches of 48 x 85 tokens.
    assert SPECS[name].video_tokens == tokens


def test_the_model_is_never_held_in_memory(tmp_path: Path) -> None:
    tensor_shapes(SPECS["bench-27m"], "transformer")  # imports do not count
    tracemalloc.start()
    written = write_checkpoint(tmp_path / "c", "bench-27m", without=("vae", "text"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert written.bytes > 100e6
    assert peak < 40e6


# Values


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(limit=st.integers(min_value=1, max_value=3_000_000))
def test_sharding_changes_the_files_but_not_the_tensors(
    limit: int, tmp_path_factory: pytest.TempPathFactory, written: dict[str, Path]
) -> None:
    folder = tmp_path_factory.mktemp("shards") / "c"
    write_checkpoint(folder, "tiny10", without=("vae", "text"), shard_bytes=limit)
    index = json.loads((folder / "transformer" / f"{COMPONENTS['transformer']}.index.json").read_text())
    whole = weights(written["tiny10"] / "transformer")
    files = sorted(path.name for path in (folder / "transformer").glob("*.safetensors"))
    count = len(files)
    assert files == [f"diffusion_pytorch_model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    for file in files:
        shard = load_file(folder / "transformer" / file)
        assert len(shard) == 1 or sum(array.nbytes for array in shard.values()) <= limit
        for key, array in shard.items():
            assert index["weight_map"][key] == file
            assert np.array_equal(array, whole[key])


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_narrow_types_are_the_rounded_float32_values(
    dtype: str, expected: torch.dtype, tmp_path: Path, written: dict[str, Path]
) -> None:
    from safetensors.torch import load_file as load_torch

    write_checkpoint(tmp_path / "c", "tiny10", dtype=dtype, without=("vae", "text"))  # type: ignore[arg-type]
    narrow = load_torch(tmp_path / "c" / "transformer" / COMPONENTS["transformer"])
    for key, value in load_torch(written["tiny10"] / "transformer" / COMPONENTS["transformer"]).items():
        assert narrow[key].dtype == expected
        assert torch.equal(narrow[key], value.to(expected)), key


def test_the_seed_decides_the_values(tmp_path: Path, written: dict[str, Path]) -> None:
    for seed in (0, 1):
        write_checkpoint(tmp_path / str(seed), "tiny10", seed=seed, without=("vae", "text"))
    file = Path("transformer") / COMPONENTS["transformer"]
    assert (tmp_path / "0" / file).read_bytes() == (written["tiny10"] / file).read_bytes()
    first, other = load_file(tmp_path / "0" / file), load_file(tmp_path / "1" / file)
    assert all(not np.array_equal(first[key], other[key]) for key in first)


def test_a_tensor_longer_than_the_strip_goes_round_it() -> None:
    strip = NormalStrip(seed=3)
    length = NormalStrip.LENGTH
    pieces = list(strip.stretches("some.weight", 2 * length + 5, 0.5, 2.0, "fp32"))
    values = np.concatenate(pieces)
    assert values.size == 2 * length + 5
    assert np.array_equal(values[:length], values[length : 2 * length])
    assert abs(values[:length].mean() - 0.5) < 0.01
    assert abs(values[:length].std() - 2) < 0.01
    assert all(length % width for width in (3072, 4096, 12288))  # so no weight matrix of these widths repeats its rows


# What is refused, what is left out


def test_parts_left_out_are_neither_written_nor_named(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path / "c", "tiny15", t5_layers=3, without=("vae", "transformer"))
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "model_index.json",
        "scheduler",
        "text_encoder",
        "tokenizer",
    ]
    index = json.loads((tmp_path / "c" / "model_index.json").read_text())
    assert {key for key in index if not key.startswith("_")} == {"scheduler", "text_encoder", "tokenizer"}
    assert written.parameters.keys() == {"text_encoder"}
    assert "encoder.block.2.layer.1.DenseReluDense.wo.weight" in weights(tmp_path / "c" / "text_encoder")


def test_wrong_requests_are_refused_by_name_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'huge'; choose one of tiny10"):
        write_checkpoint(tmp_path / "c", "huge")
    with pytest.raises(UsageError, match="Cannot leave out scheduler"):
        write_checkpoint(tmp_path / "c", "tiny10", without=("scheduler",))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="not empty"):
        write_checkpoint(tmp_path / "full", "tiny10")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


# Receipts


def test_a_receipt_says_when_where_and_with_what(tmp_path: Path) -> None:
    pair = receipt.paired(lambda: 3.0, lambda: 1.5, rounds=3)
    path = receipt.write_receipt(
        "speed", {"steps": 10, "model": Path("/some/where/tiny15")}, {"latency": pair, "rms": np.float32(0.5)},
        seeds=[1, 2], folder=tmp_path / "results",
    )  # fmt: skip
    assert path == tmp_path / "results" / "speed.json"
    found = json.loads(path.read_text())
    assert found.keys() == {"name", "date", "commit", "machine", "versions", "settings", "seeds", "figures"}
    assert found["name"] == "speed"
    assert found["seeds"] == [1, 2]
    assert found["date"].endswith("+00:00")
    assert found["commit"].keys() == {"hash", "dirty"}
    assert found["machine"].keys() == {"cpu", "cores", "memory_bytes", "system", "python", "gpus"}
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["memory_bytes"] > 2**28
    assert found["versions"]["numpy"] == np.__version__
    assert found["settings"] == {"steps": 10, "model": "tiny15"}
    assert found["figures"] == {"latency": {**dataclasses.asdict(pair), "a": [3.0] * 3, "b": [1.5] * 3,
                                            "ratios": [2.0] * 3}, "rms": 0.5}  # fmt: skip


def test_a_receipt_refuses_what_json_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot hold object"):
        receipt.write_receipt("speed", {}, {"what": object()}, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pairs_alternate_and_are_compared_within_each_pair() -> None:
    order: list[str] = []
    figures = iter([2.0, 1.0, 2.0, 8.0, 9.0, 3.0])  # a b, b a, a b

    def run(name: str) -> float:
        order.append(name)
        return next(figures)

    result = receipt.paired(lambda: run("a"), lambda: run("b"), rounds=3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert result.a == (2.0, 8.0, 9.0)
    assert result.b == (1.0, 2.0, 3.0)
    assert result.ratios == (2.0, 4.0, 3.0)
    assert (result.a_median, result.b_median) == (8.0, 2.0)
    assert (result.ratio_median, result.ratio_min, result.ratio_max) == (3.0, 2.0, 4.0)


def test_peak_memory_of_a_child_is_its_own() -> None:
    ballast = np.ones(100_000_000, np.uint8)
    program = "import json, benchmarks.receipt as r; print('noise'); print(json.dumps({'peak': r.peak_rss()}))"
    peak = receipt.run_json([sys.executable, "-c", program])["peak"]
    assert 5e6 < peak < 150e6 < receipt.peak_rss()
    assert ballast[-1] == 1


def test_the_ceiling_is_the_best_figure_of_the_installed_libraries() -> None:
    ceiling = receipt.gemm_ceiling(seconds=0.01, sizes=(32, 64))
    assert {"numpy", "torch"} <= ceiling.by_library.keys()
    assert all(by_size.keys() == {"32", "64"} for by_size in ceiling.by_library.values())
    assert ceiling.gflops == max(max(by_size.values()) for by_size in ceiling.by_library.values())
    assert min(min(by_size.values()) for by_size in ceiling.by_library.values()) > 0
