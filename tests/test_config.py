"""Sizes that a model can make, the nearest ones to those that it cannot, and configurations that are refused."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamictrl_edge.bundle.config import (
    SizeDefaults,
    TextConfig,
    TransformerConfig,
    VaeConfig,
    geometry,
)
from dynamictrl_edge.bundle.errors import InputError, UsageError
from tests.golden import model_dir


def config_of(model: str, component: str, kind: type) -> Any:
    return msgspec.convert(json.loads((model_dir(model) / component / "config.json").read_text()), kind)


VAES = {name: config_of(name, "vae", VaeConfig) for name in ("cogvideox10-tiny", "cogvideox15-tiny")}
TRANSFORMERS = {name: config_of(name, "transformer", TransformerConfig) for name in VAES}
LEARNED = config_of("cogvideox10-learnedpos-tiny", "transformer", TransformerConfig)
FULL = msgspec.structs.replace(
    TRANSFORMERS["cogvideox15-tiny"],
    num_attention_heads=48,
    num_layers=42,
    text_embed_dim=4096,
    time_embed_dim=512,
    ofs_embed_dim=512,
    max_text_seq_length=226,
)

families = pytest.mark.parametrize("name", TRANSFORMERS)
steps = st.integers(1, 200)


# --- sizes that are possible


@families
@given(steps, steps, st.integers(0, 60))
def test_a_possible_size_is_counted_in_every_unit(name: str, rows: int, columns: int, n: int) -> None:
    transformer, vae = TRANSFORMERS[name], VAES[name]
    size = geometry(transformer, vae, 16 * rows, 16 * columns, 4 * n + 1)
    assert (size.height, size.width, size.frames) == (16 * rows, 16 * columns, 4 * n + 1)
    assert (size.latent_height, size.latent_width) == (2 * rows, 2 * columns)
    odd = (n + 1) % 2 and name == "cogvideox15-tiny"
    assert size.padding_frames == (1 if odd else 0)
    assert size.latent_frames == n + 1 + size.padding_frames
    assert size.pose_frames == 4 * (size.latent_frames - 1) + 1
    assert size.pose_frames - size.frames == 4 * size.padding_frames
    per_token = 2 if name == "cogvideox15-tiny" else 1
    assert size.grid == (size.latent_frames / per_token, rows, columns)
    assert size.video_tokens == size.grid[0] * rows * columns


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.sampled_from([1, 2, 4, 8]), steps, steps, steps)
def test_compression_and_patches_are_those_of_the_configs(
    levels: int, patch: int, time_patch: int, ratio: int, rows: int, columns: int, n: int
) -> None:
    vae = msgspec.structs.replace(
        VAES["cogvideox10-tiny"], block_out_channels=(8,) * levels, temporal_compression_ratio=ratio
    )
    transformer = msgspec.structs.replace(
        TRANSFORMERS["cogvideox15-tiny"], patch_size=patch, patch_size_t=time_patch, temporal_compression_ratio=ratio
    )
    step = 2 ** (levels - 1) * patch
    size = geometry(transformer, vae, step * rows, step * columns, ratio * n + 1)
    assert size.grid[1:] == (rows, columns)
    assert size.latent_height * 2 ** (levels - 1) == size.height
    assert size.latent_frames % time_patch == 0
    assert 0 <= size.padding_frames < time_patch
    assert size.latent_frames - size.padding_frames == n + 1
    assert size.grid[0] * time_patch == size.latent_frames


def test_full_size_has_the_known_number_of_tokens() -> None:
    size = geometry(FULL, VAES["cogvideox15-tiny"], 768, 1360, 37)
    assert (size.latent_frames, size.padding_frames, size.pose_frames) == (10, 0, 37)
    assert size.video_tokens == 20_400
    assert FULL.width == 3072
    assert FULL.patch_elements == 128


def test_golden_configs_are_accepted() -> None:
    for transformer in (*TRANSFORMERS.values(), LEARNED, FULL):
        transformer.check()
    text = config_of("cogvideox10-tiny", "text_encoder", TextConfig)
    assert text.inner == 32
    assert VAES["cogvideox10-tiny"].spatial_compression == 8


# --- sizes that are not


def possible(name: str, height: int, width: int, frames: int) -> bool:
    try:
        geometry(TRANSFORMERS[name], VAES[name], height, width, frames)
    except UsageError:
        return False
    return True


@families
@given(st.data())
def test_the_offered_sizes_are_possible_and_the_nearest(name: str, data: st.DataObject) -> None:
    field = data.draw(st.sampled_from(["height", "width", "frames"]))
    value = data.draw(st.integers(-40, 700))
    good = {"height": 32, "width": 48, "frames": 9}

    def works(value: int) -> bool:
        return possible(name, **(good | {field: value}))

    if works(value):
        return
    with pytest.raises(UsageError, match=re.escape(f"--{field} {value} is not possible")) as caught:
        geometry(TRANSFORMERS[name], VAES[name], **(good | {field: value}))
    assert caught.value.exit_code == 2
    sentence = str(caught.value).split("the nearest ")[1]
    offered = [int(number) for number in re.findall(r"\d+", sentence)]
    assert sentence.startswith("is " if len(offered) == 1 else "are ")
    assert all(works(number) for number in offered)
    above = next(number for number in itertools.count(value) if works(number))
    below = next((number for number in range(value, 0, -1) if works(number)), None)
    assert offered == [number for number in (below, above) if number is not None]


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((90, 160, 9), "--height 90 is not possible: it must be a multiple of 16, the nearest are 80 and 96."),
        ((96, 161, 9), "--width 161 is not possible: it must be a multiple of 16, the nearest are 160 and 176."),
        ((0, 160, 9), "--height 0 is not possible: it must be a multiple of 16, the nearest is 16."),
        ((96, -16, 9), "--width -16 is not possible: it must be a multiple of 16, the nearest is 16."),
        ((96, 160, 8), "--frames 8 is not possible: the model makes 4 * n + 1 frames, the nearest are 5 and 9."),
        ((96, 160, 0), "--frames 0 is not possible: the model makes 4 * n + 1 frames, the nearest is 1."),
        ((96, 160, -3), "--frames -3 is not possible: the model makes 4 * n + 1 frames, the nearest is 1."),
        ((96, 160, 2), "--frames 2 is not possible: the model makes 4 * n + 1 frames, the nearest are 1 and 5."),
    ],
)
def test_impossible_sizes_are_refused_in_these_words(size: tuple[int, int, int], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        geometry(TRANSFORMERS["cogvideox10-tiny"], VAES["cogvideox10-tiny"], *size)
    assert str(caught.value) == words


# --- stored positional tables


@given(st.integers(1, 80), st.integers(1, 60), st.integers(1, 60))
def test_a_stored_table_is_for_one_size_and_the_offered_one_is_possible(frames: int, rows: int, columns: int) -> None:
    vae = VAES["cogvideox10-tiny"]
    transformer = msgspec.structs.replace(
        LEARNED, sample_frames=frames, sample_height=2 * rows, sample_width=2 * columns
    )
    with pytest.raises(UsageError, match="one size only") as caught:
        geometry(transformer, vae, 16 * rows, 16 * columns + 16, 9)
    width, height, offered = (int(n) for n in re.findall(r"--\w+ (\d+)", str(caught.value)))
    size = geometry(transformer, vae, height, width, offered)
    assert (size.height, size.width) == (16 * rows, 16 * columns)
    assert size.grid == ((frames - 1) // 4 + 1, rows, columns)


@pytest.mark.parametrize("size", [(48, 64, 5), (48, 64, 13), (64, 64, 9), (48, 48, 9)])
def test_a_stored_table_at_another_size_is_refused(size: tuple[int, int, int]) -> None:
    assert geometry(LEARNED, VAES["cogvideox10-tiny"], 48, 64, 9).video_tokens == 36
    with pytest.raises(UsageError, match="--width 64 --height 48 --frames 9"):
        geometry(LEARNED, VAES["cogvideox10-tiny"], *size)


# --- configurations


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_rotary_positional_embeddings": False}, "use_rotary_positional_embeddings is False"),
        ({"activation_fn": "gelu"}, "activation_fn is 'gelu'.*'gelu-approximate'"),
        ({"timestep_activation_fn": "gelu"}, "timestep_activation_fn is 'gelu'"),
        ({"norm_elementwise_affine": False}, "norm_elementwise_affine is False"),
        ({"attention_bias": False}, "attention_bias is False"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos is False"),
        ({"freq_shift": 1}, "freq_shift is 1"),
        ({"out_channels": 32}, "out_channels is 32.*16"),
        ({"attention_head_dim": 60}, "attention_head_dim 60 is no multiple of 8"),
        ({"ofs_embed_dim": 32}, "ofs_embed_dim 32 and time_embed_dim 64 differ"),
        ({"patch_bias": False}, "patch_bias is False"),
        ({"use_learned_positional_embeddings": True, "patch_size_t": 2}, "use_learned_positional_embeddings with"),
    ],
)
def test_transformers_that_are_not_computed_are_refused_by_the_field(changes: dict[str, Any], words: str) -> None:
    config = msgspec.structs.replace(TRANSFORMERS["cogvideox10-tiny"], **changes)
    with pytest.raises(InputError, match=words) as caught:
        config.check()
    assert caught.value.exit_code == 3
    assert "transformer/config.json" in str(caught.value)


def test_a_linear_patch_embedding_has_its_bias_whatever_patch_bias_says() -> None:
    """diffusers hands `patch_bias` to the convolution only; published 1.5-style models say False."""
    msgspec.structs.replace(TRANSFORMERS["cogvideox15-tiny"], patch_bias=False).check()


@pytest.mark.parametrize("component", [TransformerConfig, VaeConfig, TextConfig, SizeDefaults])
def test_counts_below_one_are_refused_by_the_field(component: type[msgspec.Struct]) -> None:
    sources: dict[type, msgspec.Struct] = {
        TransformerConfig: TRANSFORMERS["cogvideox15-tiny"],
        VaeConfig: VAES["cogvideox10-tiny"],
        TextConfig: config_of("cogvideox10-tiny", "text_encoder", TextConfig),
        SizeDefaults: SizeDefaults(height=16, width=16, frames=1),
    }
    values = msgspec.to_builtins(sources[component])
    assert msgspec.convert(values, component) == sources[component]
    fields = [
        name
        for name, value in values.items()
        if type(value) is int and name not in ("freq_shift", "pad_token_id", "eos_token_id")
    ]
    assert len(fields) >= 4
    for name, wrong in itertools.product(fields, (0, -1, None, "many")):
        if wrong is None and name in ("patch_size_t", "ofs_embed_dim"):
            continue
        with pytest.raises(msgspec.ValidationError, match=name):
            msgspec.convert(values | {name: wrong}, component)
