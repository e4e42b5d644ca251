"""From checkpoint tensors to the weight store: exact values, exact names, and nothing that is not finite."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="weights are converted by the extra 'export'")

import torch
from safetensors.torch import save_file

from dynamictrl_edge.bundle.config import TransformerConfig
from dynamictrl_edge.bundle.errors import InputError
from dynamictrl_edge.bundle.precision import Precision, widen
from dynamictrl_edge.bundle.tensors import MappedTensors
from dynamictrl_edge.export.checkpoint import Checkpoint, ComponentTensors
from dynamictrl_edge.export.convert import Converter, source_shapes
from dynamictrl_edge.export.recipe import Recipe
from dynamictrl_edge.export.reuse import reuse_modules
from dynamictrl_edge.export.transformer import graph_modules
from dynamictrl_edge.export.transformer_weights import (
    block_recipes,
    even_odd,
    modulation_recipes,
    shared_recipes,
)
from tests.golden import model_dir

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
FAMILIES = ("cogvideox10-tiny", "cogvideox15-tiny", "cogvideox10-learnedpos-tiny")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def converter(folder: Path, tensors: dict[str, torch.Tensor], precision: Precision = "fp32") -> Converter:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return Converter(ComponentTensors(folder, "model"), precision)


def written(made: Converter, path: Path, recipes: list[Recipe]) -> dict[str, torch.Tensor]:
    """The values that end up in the file, float32."""
    made.write(path, recipes)
    return {name: torch.from_numpy(widen(array).copy()) for name, array in MappedTensors(path).items()}


# --- values


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_values_are_rounded_once(tmp_path: Path, precision: Precision, source: torch.dtype) -> None:
    tensor = random(6, 4, dtype=source)
    made = converter(tmp_path, {"a.weight": tensor}, precision)
    found = written(made, tmp_path / "out", [Recipe("a", ("a.weight",), (6, 4))])
    assert torch.equal(found["a"], tensor.to(DTYPES[precision]).float())


def test_a_matrix_is_transposed_and_sources_are_joined_along_the_outputs(tmp_path: Path) -> None:
    q, k = random(6, 4, seed=1), random(6, 4, seed=2)
    made = converter(tmp_path, {"q": q, "k": k})
    recipes = [
        Recipe("turned", ("q",), (4, 6), transpose=True),
        Recipe("joined", ("q", "k"), (12, 4)),
        Recipe("both", ("q", "k"), (4, 12), transpose=True),
        Recipe("made", ("q", "k"), (6,), source_shapes=((6, 4), (6, 4)), make=lambda t: (t[0] - t[1]).sum(1)),
    ]
    found = written(made, tmp_path / "out", recipes)
    assert list(found) == [recipe.target for recipe in recipes]
    assert torch.equal(found["turned"], q.t())
    assert torch.equal(found["joined"], torch.cat([q, k]))
    assert torch.equal(found["both"], torch.cat([q, k]).t())
    assert torch.equal(found["made"], (q - k).sum(1))


def test_a_recipe_may_pin_its_precision(tmp_path: Path) -> None:
    made = converter(tmp_path, {"a": random(8)}, "fp16")
    made.write(tmp_path / "out", [Recipe("wide", ("a",), (8,), dtype="fp32"), Recipe("narrow", ("a",), (8,))])
    assert {name: info.dtype for name, info in MappedTensors(tmp_path / "out").infos.items()} == {
        "wide": "F32",
        "narrow": "F16",
    }


def test_a_file_is_described_by_its_hash_and_size_and_its_bytes_are_counted(tmp_path: Path) -> None:
    told: list[int] = []
    made = converter(tmp_path, {"a": random(8, 8), "b": random(3)}, "bf16")
    made.tick = told.append
    recipes = [Recipe("a", ("a",), (8, 8)), Recipe("b", ("b",), (3,), dtype="fp32")]
    entry = made.write(tmp_path / "out", recipes)
    data = (tmp_path / "out").read_bytes()
    assert entry.sha256 == hashlib.sha256(data).hexdigest()
    assert entry.bytes == len(data)
    assert told == [made.nbytes(recipe) for recipe in recipes] == [128, 12]


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    made = converter(tmp_path, {str(i): random(1000, seed=i) for i in range(5)})
    real, most = ComponentTensors.read, []
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def read(source: ComponentTensors, name: str) -> torch.Tensor:
        gc.collect()
        most.append(len(alive))
        tensor = real(source, name)
        alive.add(tensor)
        return tensor

    monkeypatch.setattr(ComponentTensors, "read", read)
    made.write(tmp_path / "out", [Recipe(str(i), (str(i),), (1000,)) for i in range(5)])
    assert max(most) <= 1


# --- what is refused


def refusal(made: Converter, path: Path, recipe: Recipe, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        made.write(path, [recipe])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_value_that_is_not_finite_is_refused_by_the_tensors_name(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    tensor = random(7, 9, dtype=dtype)
    tensor[3, 4] = value
    made = converter(tmp_path, {"a.weight": tensor})
    refusal(made, tmp_path / "out", Recipe("a", ("a.weight",), (7, 9)), "'a.weight'", "NaN or infinite")


def test_infinities_that_cancel_are_found(tmp_path: Path) -> None:
    tensor = torch.tensor([1.0, float("inf"), -float("inf")])
    refusal(converter(tmp_path, {"a": tensor}), tmp_path / "out", Recipe("a", ("a",), (3,)), "NaN or infinite")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_finite_values_of_any_size_are_kept(
    tmp_path_factory: pytest.TempPathFactory, values: list[float]
) -> None:  # their sum may be infinite
    folder = tmp_path_factory.mktemp("finite")
    tensor = torch.tensor([*values, 3.4e38, 3.4e38])
    found = written(converter(folder, {"a": tensor}), folder / "out", [Recipe("a", ("a",), tuple(tensor.shape))])
    assert torch.equal(found["a"], tensor)


@pytest.mark.parametrize(
    ("value", "dtype", "precision", "words"),
    [
        (65520.0, torch.float32, "fp16", "does not fit into fp16. Export with --precision bf16 or fp32."),
        (-1e5, torch.bfloat16, "fp16", "does not fit into fp16"),
        (3.4e38, torch.float32, "bf16", "does not fit into bf16. Its values are out of range."),
        (1e39, torch.float64, "fp32", "does not fit into fp32"),
    ],
)
def test_a_value_beyond_the_precision_is_refused(
    tmp_path: Path, value: float, dtype: torch.dtype, precision: Precision, words: str
) -> None:
    made = converter(tmp_path, {"a.weight": torch.tensor([1.0, value], dtype=dtype)}, precision)
    refusal(made, tmp_path / "out", Recipe("a", ("a.weight",), (2,)), "'a.weight'", words, str(tmp_path))


@pytest.mark.parametrize(("value", "precision"), [(65504.0, "fp16"), (3.38e38, "bf16")])
def test_the_largest_values_of_a_precision_are_kept(tmp_path: Path, value: float, precision: Precision) -> None:
    made = converter(tmp_path, {"a": torch.tensor([value])}, precision)
    assert written(made, tmp_path / "out", [Recipe("a", ("a",), (1,))])["a"].isfinite().all()


def test_a_recipe_that_makes_another_shape_is_refused(tmp_path: Path) -> None:
    made = converter(tmp_path, {"a": random(4, 4)})
    recipe = Recipe("a", ("a",), (4,), source_shapes=((4, 4),), make=lambda tensors: tensors[0])
    refusal(made, tmp_path / "out", recipe, "shape [4, 4], not (4,)")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe("b", ("b",), (2,)), "lacks the tensor 'b'"),
        (Recipe("a", ("a",), (4, 6)), "'a' with shape [6, 4]; its config asks for [4, 6]"),
        (Recipe("a", ("a",), (6, 4), transpose=True), "its config asks for [4, 6]"),
        (Recipe("a", ("a", "b"), (6, 4)), "its config asks for [3, 4]"),
    ],
)
def test_headers_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path: Path, recipe: Recipe, words: str
) -> None:
    made = converter(tmp_path, {"a": random(6, 4)})
    for call in (lambda: made.check([recipe]), lambda: made.write(tmp_path / "out", [recipe])):
        with pytest.raises(InputError, match=words.replace("[", r"\[")):
            call()
    assert not (tmp_path / "out").exists()


def test_integers_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    made = converter(tmp_path, {"a": torch.zeros(3, dtype=torch.int64)})
    with pytest.raises(InputError, match="'a' as I64; floating-point weights are needed"):
        made.check([Recipe("a", ("a",), (3,))])


def test_a_tensor_that_nothing_uses_is_refused_unless_it_may_stay_behind(tmp_path: Path) -> None:
    made = converter(tmp_path, {"a": random(2), "b": random(2), "c": random(2)})
    recipes = [Recipe("a", ("a",), (2,))]
    with pytest.raises(InputError, match="holds 2 tensors that its config does not explain, the first is 'b'"):
        made.check(recipes)
    with pytest.raises(InputError, match=r"holds 1 tensors .* the first is 'c'"):
        made.check(recipes, unused=("b", "d"))
    made.check(recipes, unused=("b", "c"))


# --- the denoiser's recipes


def config_of(model: str) -> TransformerConfig:
    return msgspec.json.decode((model_dir(model) / "transformer" / "config.json").read_bytes(), type=TransformerConfig)


def all_recipes(config: TransformerConfig) -> list[Recipe]:
    recipes = shared_recipes(config)
    for i in range(config.num_layers):
        recipes += block_recipes(config, i) + modulation_recipes(config, i)
    return recipes


@pytest.mark.parametrize("model", FAMILIES)
def test_recipes_use_every_tensor_with_its_shape(model: str) -> None:
    source = ComponentTensors(model_dir(model) / "transformer", "diffusion_pytorch_model")
    recipes = all_recipes(config_of(model))
    Converter(source, "fp32").check(recipes)
    uses = [name for recipe in recipes for name in recipe.sources]
    patch = [name for name in uses if name == "patch_embed.proj.weight"]
    assert len(patch) == 3  # the noisy half, the image half, and both added for the pose
    assert sorted(set(uses)) == sorted(source)
    assert len(uses) == len(set(uses)) + 2
    for recipe in recipes:
        assert len(source_shapes(recipe)) == len(recipe.sources)


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_weight_input_of_a_graph_is_made_by_a_recipe(model: str, precision: Precision) -> None:
    config = config_of(model)
    shared = {recipe.target: recipe for recipe in shared_recipes(config)}
    block = {recipe.target: recipe for recipe in block_recipes(config, 0)}
    modulation = {recipe.target: recipe for recipe in modulation_recipes(config, 0)}
    assert not block.keys() & shared.keys()
    assert not modulation.keys() & shared.keys()
    used: set[str] = set()
    for name, (_, signature) in {**graph_modules(config, precision), **reuse_modules(config, precision)}.items():
        store = shared | (
            modulation if name == "modulation" else block if name.startswith(("block", "tokens_")) else {}
        )
        for port, dtype, shape in signature.inputs:
            if port not in store:
                continue  # data
            assert all(wanted in (size, "P") for wanted, size in zip(shape, store[port].shape, strict=True)), port
            assert dtype == DTYPES[store[port].dtype or precision]
            used.add(port)
    assert used == {*shared, *block, *modulation}


@given(st.integers(1, 4), st.integers(1, 8).map(lambda n: 2 * n))
def test_even_channels_of_each_head_come_before_the_odd_ones(heads: int, head_dim: int) -> None:
    order = even_odd(heads * head_dim, head_dim)
    assert sorted(order) == list(range(heads * head_dim))
    for head in range(heads):
        part = order[head * head_dim : (head + 1) * head_dim]
        assert [i - head * head_dim for i in part] == [*range(0, head_dim, 2), *range(1, head_dim, 2)]


def test_attention_scores_do_not_change_by_the_order_of_channels(tmp_path: Path) -> None:
    """Query and key of the merged matrix, normed and scaled as stored, give the published scores (before rotation)."""
    model = "cogvideox10-tiny"
    config = config_of(model)
    source = Checkpoint(model_dir(model)).tensors("transformer")
    found = written(Converter(source, "fp32"), tmp_path / "out", block_recipes(config, 1))
    heads, size, d = config.num_attention_heads, config.attention_head_dim, config.width
    x = random(5, d)

    def normed(vector: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(vector.reshape(5, heads, size), (size,), weight, bias, 1e-6)

    a = "transformer_blocks.1.attn1."
    parts = [x @ source.read(f"{a}to_{n}.weight").t() + source.read(f"{a}to_{n}.bias") for n in "qkv"]
    q, k = (
        normed(parts[i], source.read(f"{a}norm_{n}.weight"), source.read(f"{a}norm_{n}.bias"))
        for i, n in enumerate("qk")
    )
    ours = (x @ found["qkv_weight"] + found["qkv_bias"]).split(d, -1)
    q2, k2 = (normed(ours[i], found[f"{n}_norm_weight"], found[f"{n}_norm_bias"]) for i, n in enumerate("qk"))
    scores = torch.einsum("ihd,jhd->hij", q, k) * size**-0.5
    assert torch.allclose(torch.einsum("ihd,jhd->hij", q2, k2), scores, atol=1e-5)
    assert torch.allclose(ours[2], parts[2], atol=1e-6)


@pytest.mark.parametrize("model", FAMILIES)
def test_the_patch_embedding_is_split_into_its_halves(tmp_path: Path, model: str) -> None:
    config = config_of(model)
    source = ComponentTensors(model_dir(model) / "transformer", "diffusion_pytorch_model")
    recipes = [recipe for recipe in shared_recipes(config) if recipe.target.startswith("patch")]
    found = written(Converter(source, "fp32"), tmp_path / "out", recipes)
    weight = source.read("patch_embed.proj.weight")
    # A pixel of channel c in a patch: the published embedding sees [noisy, image] or [pose, pose] on its channels.
    latent, image, pose = (random(config.patch_elements, seed=i) for i in range(3))
    flat = weight.reshape(config.width, -1)
    published = flat @ torch.cat([latent, image])
    assert torch.allclose(
        latent @ found["patch_latent_weight"] + image @ found["patch_image_weight"], published, atol=1e-5
    )
    assert torch.allclose(pose @ found["patch_pose_weight"], flat @ torch.cat([pose, pose]), atol=1e-5)


def test_the_scale_of_the_scores_is_exact_for_64_channels(tmp_path: Path) -> None:
    source = Checkpoint(model_dir("cogvideox10-tiny")).tensors("transformer")
    recipes = [r for r in block_recipes(config_of("cogvideox10-tiny"), 0) if r.target == "q_norm_weight"]
    found = written(Converter(source, "fp32"), tmp_path / "out", recipes)["q_norm_weight"]
    original = source.read("transformer_blocks.0.attn1.norm_q.weight")
    assert torch.equal(found * 8, original[list(even_odd(64, 64))])
