"""The text encoder: exported graph, host arithmetic and weights together against the published numbers."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers.models.t5.modeling_t5 import T5Attention

from dynamictrl_edge.bundle.config import TextConfig
from dynamictrl_edge.bundle.errors import BundleError, InputError, Interrupted
from dynamictrl_edge.bundle.precision import Precision
from dynamictrl_edge.bundle.tensors import MappedTensors
from dynamictrl_edge.export import components
from dynamictrl_edge.export.checkpoint import Checkpoint
from dynamictrl_edge.export.convert import Converter
from dynamictrl_edge.export.recipe import Recipe
from dynamictrl_edge.export.text_encoder import (
    TORCH_DTYPES,
    TextBlock,
    check_text_config,
    text_block_signature,
    text_layer_recipe,
    text_shared_recipe,
)
from dynamictrl_edge.export.tokenizer import convert_tokenizer
from dynamictrl_edge.export.trace import trace
from dynamictrl_edge.export.workspace import Workspace
from dynamictrl_edge.runtime.text import TextEncoder, TextStage, relative_position_bias
from dynamictrl_edge.runtime.tokenizer import PromptTokenizer
from tests.golden import case, max_abs, model_dir, relative_rms

MAX_ABS, RELATIVE_RMS = 5e-5, 1e-5  # the golden README's limits for text
CASES = ["text10", "text15"]
JSON = json.loads((model_dir("cogvideox10-tiny") / "text_encoder" / "config.json").read_text())
TINY = check_text_config(JSON)
REAL = TextConfig(d_model=4096, d_kv=64, d_ff=10240, num_heads=64, num_layers=24, vocab_size=32128)

Graph = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


FOLDER = tempfile.TemporaryDirectory()


@functools.lru_cache
def exported() -> Workspace:
    """The text part of cogvideox10-tiny as the exporter writes it, float32."""
    source = Checkpoint(model_dir("cogvideox10-tiny"))
    workspace = Workspace(Path(FOLDER.name))
    part = components.text_encoder(TINY, Converter(source.tensors("text_encoder"), "fp32"))
    part.check()
    part.write_weights(workspace, lambda stage: None)
    part.graphs["text_block"](workspace)
    workspace.add_bytes("tokenizer.json", convert_tokenizer(source.folder("tokenizer")).encode())
    return workspace


@functools.lru_cache
def block(precision: Precision) -> onnx.ModelProto:
    """The tiny models' graph; both have the same configuration."""
    if precision == "fp32":
        return onnx.load(exported().root / "graphs" / "text_block.onnx")
    return trace(TextBlock(TINY, precision), text_block_signature(TINY, precision), name="text_block")


@functools.lru_cache
def graph(precision: Precision) -> Graph:
    session = ort.InferenceSession(block(precision).SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda feeds: {"hidden_out": session.run(["hidden_out"], dict(feeds))[0]}


def made(recipes: list[Recipe], tensors: dict[str, torch.Tensor], precision: Precision = "fp32") -> dict[str, Any]:
    """The recipes carried out in the plainest way."""
    result = {}
    for recipe in recipes:
        tensor = torch.cat([tensors[name] for name in recipe.sources])
        tensor = tensor.t() if recipe.transpose else tensor
        assert tuple(tensor.shape) == recipe.shape
        result[recipe.target] = tensor.to(
            TORCH_DTYPES[precision] if recipe.dtype is None else torch.float32
        ).contiguous()
    return result


def encoder(
    name: str, precision: Precision = "fp32", *, length: int = 16, layers: int = TINY.num_layers
) -> TextEncoder:
    folder = model_dir(name)
    tensors = load_file(folder / "text_encoder" / "model.safetensors")
    shared = {k: t.numpy() for k, t in made(text_shared_recipe(TINY), tensors, precision).items()}
    return TextEncoder(
        PromptTokenizer.from_str(convert_tokenizer(folder / "tokenizer")),
        shared["embedding"],
        shared["relative_attention_bias"],
        shared["final_norm_weight"],
        [
            {k: t.numpy() for k, t in made(text_layer_recipe(TINY, i), tensors, precision).items()}
            for i in range(layers)
        ],
        graph(precision),
        length=length,
    )


@pytest.mark.parametrize("name", CASES)
def test_prompt_embeddings_equal_the_published_ones(name: str) -> None:
    tensors, info = case(name)
    embeds = encoder(info["model"]).encode(info["settings"]["prompts"])
    assert embeds.dtype == np.float32
    assert max_abs(embeds, tensors["prompt_embeds"]) < MAX_ABS
    assert relative_rms(embeds, tensors["prompt_embeds"]) < RELATIVE_RMS


@pytest.mark.parametrize("name", CASES)
def test_every_stage_equals_the_published_one(name: str) -> None:
    golden, info = case(name)
    tensors = load_file(model_dir(info["model"]) / "text_encoder" / "model.safetensors")
    shared = made(text_shared_recipe(TINY), tensors)
    hidden = shared["embedding"].numpy()[golden["token_ids"]]
    assert np.array_equal(hidden, golden["token_embeddings"])
    bias = relative_position_bias(shared["relative_attention_bias"].numpy(), 16)
    assert np.array_equal(bias, golden["position_bias"])
    weights = {k: t.numpy() for k, t in made(text_layer_recipe(TINY, 0), tensors).items()}
    first = graph("fp32")({"hidden": hidden, "position_bias": bias, **weights})["hidden_out"]
    assert max_abs(first, golden["layer_0_hidden"]) < MAX_ABS
    assert relative_rms(first, golden["layer_0_hidden"]) < RELATIVE_RMS


def test_any_number_of_prompts_and_any_length() -> None:
    prompts = ["a woman", "", "a man dances on a beach", "x", "a woman"]
    together = encoder("cogvideox10-tiny", length=7).encode(prompts)
    assert together.shape == (5, 7, 32)
    for prompt, embeds in zip(prompts, together, strict=True):
        assert max_abs(embeds[None], encoder("cogvideox10-tiny", length=7).encode([prompt])) < 1e-6


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.sampled_from([8, 16, 32, 64]), st.integers(20, 300))
def test_position_buckets_equal_transformers(length: int, buckets: int, max_distance: int) -> None:
    heads = np.arange(buckets, dtype=np.float32)[:, None] * np.array([1, -1], np.float32)
    places = torch.arange(length)
    expected = T5Attention._relative_position_bucket(
        places[None, :] - places[:, None], True, num_buckets=buckets, max_distance=max_distance
    ).numpy()
    bias = relative_position_bias(heads, length, max_distance)
    assert bias.shape == (1, 2, length, length)
    assert np.array_equal(bias[0, 0], expected)
    assert np.array_equal(bias[0, 1], -expected)


def test_fp16_stays_close_to_fp32() -> None:
    prompts = case("text10")[1]["settings"]["prompts"]
    exact, half = (encoder("cogvideox10-tiny", precision).encode(prompts) for precision in ("fp32", "fp16"))  # type: ignore[arg-type]
    assert 0 < relative_rms(half, exact) < 1.5e-3


def random_feeds(precision: Precision, *, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn([{"B": 2, "S": 16}.get(n, n) for n in shape], generator=generator).to(dtype)  # type: ignore[call-overload]
        * (1.0 if name in ("hidden", "position_bias") else 0.2)
        for name, dtype, shape in text_block_signature(TINY, precision).inputs
    }


def test_fp16_survives_feed_forward_sums_beyond_its_range() -> None:
    # By torch, whose products are really float16: ONNX Runtime computes them in float32 on a CPU and never overflows.
    feeds = random_feeds("fp16")
    feeds["wo_weight"] *= 150
    feeds["norm2_weight"] *= 80
    exact = TextBlock(TINY, "fp32")(**{name: tensor.float() for name, tensor in feeds.items()})
    assert exact.abs().max() > 2 * 65504
    block16 = TextBlock(TINY, "fp16")
    assert relative_rms(block16(**feeds).numpy(), exact.numpy()) < 3e-3
    block16.gate_scale = 1.0
    assert not block16(**feeds).isfinite().all()  # what the scale is there for


def test_fp16_graph_computes_what_its_module_does() -> None:
    feeds = random_feeds("fp16")
    result = graph("fp16")({name: tensor.numpy() for name, tensor in feeds.items()})["hidden_out"]
    assert result.dtype == np.float32
    assert relative_rms(result, TextBlock(TINY, "fp16")(**feeds).numpy()) < 1.5e-3


def test_bf16_graph_is_valid_and_its_module_close_to_fp32() -> None:
    # ONNX Runtime has no bfloat16 kernels on a CPU, so the graph is checked as a graph and its module is run by torch.
    onnx.checker.check_model(block("bf16"), full_check=True)
    feeds = random_feeds("bf16")
    exact = TextBlock(TINY, "fp32")(**{name: tensor.float() for name, tensor in feeds.items()})
    half = TextBlock(TINY, "bf16")(**feeds)
    assert half.dtype == torch.float32
    assert 0 < relative_rms(half.numpy(), exact.numpy()) < 2e-2


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_matrix_product_runs_in_the_graphs_precision(precision: Precision) -> None:
    inferred = onnx.shape_inference.infer_shapes(block(precision), strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.input)}
    products = [node for node in inferred.node if node.op_type in ("MatMul", "Gemm")]
    wanted = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
    assert len(products) == 6  # q/k/v, scores, mix, out, wi, wo
    assert {types[name] for node in products for name in node.input} == {wanted[precision]}


def test_real_size_is_traced_without_weights() -> None:
    signature = text_block_signature(REAL, "fp16")
    model = trace(TextBlock(REAL, "fp16"), signature, name="text_block")
    assert sum(np.prod(t.dims) for t in model.graph.initializer) < 64
    assert model.ByteSize() < 30_000
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "hidden": ["B", "S", 4096],
        "position_bias": [1, 64, "S", "S"],
        "norm1_weight": [4096],
        "qkv_weight": [4096, 12288],
        "attn_out_weight": [4096, 4096],
        "norm2_weight": [4096],
        "wi_weight": [4096, 20480],
        "wo_weight": [10240, 4096],
        "hidden_out": ["B", "S", 4096],
    }


def test_recipes_use_every_tensor_of_the_checkpoint_once() -> None:
    names = set(load_file(model_dir("cogvideox15-tiny") / "text_encoder" / "model.safetensors"))
    recipes = text_shared_recipe(TINY) + [r for i in range(TINY.num_layers) for r in text_layer_recipe(TINY, i)]
    sources = [source for recipe in recipes for source in recipe.sources]
    assert sorted(sources) == sorted(names)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("feed_forward_proj", "relu"),
        ("feed_forward_proj", "gated-silu"),
        ("feed_forward_proj", None),
        ("dense_act_fn", "relu"),
        ("is_gated_act", False),
        ("model_type", "umt5"),
        ("d_kv", 0),
        ("num_layers", "two"),
    ],
)
def test_other_encoders_are_refused_by_the_value(field: str, value: object) -> None:
    values = {**JSON, field: value}
    if value is None:
        del values[field]
    with pytest.raises(InputError, match=field):
        check_text_config(values)


def test_work_can_be_stopped_between_layers() -> None:
    calls = []

    def check() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        encoder("cogvideox10-tiny").encode(["a"], check=check)
    assert len(calls) == 2


def test_overflow_is_an_error_that_names_the_remedy() -> None:
    broken = encoder("cogvideox10-tiny")
    broken._graph = lambda feeds: {"hidden_out": np.full_like(feeds["hidden"], np.inf)}
    with pytest.raises(BundleError, match="--precision"):
        broken.encode(["a"])


def test_tokenizer_larger_than_the_embedding_is_refused() -> None:
    tokenizer = PromptTokenizer.from_str(convert_tokenizer(model_dir("cogvideox10-tiny") / "tokenizer"))
    small = np.zeros((100, 32), np.float32)
    with pytest.raises(BundleError, match="486 tokens, its text encoder 100"):
        TextEncoder(tokenizer, small, small, small[0], [], graph("fp32"), length=16)


class Exported:
    """Stands for a bundle: the files of the text part."""

    def __init__(self, workspace: Workspace):
        self.root = workspace.root
        self.opened: list[str] = []
        self.manifest = SimpleNamespace(
            text=TINY,
            transformer=SimpleNamespace(max_text_seq_length=16),
            files=workspace.files,
            graphs=workspace.graphs,
        )

    def path(self, name: str) -> Path:
        return self.root / name

    def tensors(self, name: str) -> MappedTensors:
        self.opened.append(name)
        return MappedTensors(self.root / "weights" / f"{name}.safetensors")

    def weights_digest(self, prefix: str) -> str:
        return "".join(entry.sha256 for name, entry in sorted(self.manifest.files.items()) if prefix in name)


def test_exported_text_part_encodes_once_and_then_reads_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNAMICTRL_CACHE", str(tmp_path))
    tensors, info = case("text10")
    backend: Any = SimpleNamespace(graph=lambda name: graph("fp32"))
    prompts = info["settings"]["prompts"][1:]  # the empty one as negative prompt, the one that is too long
    for opened in (["text", "text_block_00", "text_block_01"], []):
        bundle: Any = Exported(exported())
        embeds, notices = TextStage(bundle, backend).encode(prompts)
        assert max_abs(embeds, tensors["prompt_embeds"][1:]) < MAX_ABS
        assert len(notices) == 1
        assert "--prompt is too long" in notices[0]
        assert bundle.opened == opened
    bundle = Exported(exported())
    TextStage(bundle, backend, cache=False).encode(prompts)
    assert bundle.opened
    with pytest.raises(InputError, match="--prompt is empty"):
        TextStage(bundle, backend).encode(["a", ""])
