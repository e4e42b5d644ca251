"""The transformer on some of its tokens: what it computes there, which they are, and what the loss then depends on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_dpm_cogvideox import CogVideoXDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.published_torch import LATENT_STRIDE, OFS_VALUE, PublishedTransformer, rotary_tables
from pocket.training.latents import Batch
from pocket.training.networks import SCHEDULER, make_text_encoder, transformer_config
from pocket.training.partial import PartialAttention, choose_tokens, mask_of, patch_of, velocity
from pocket.training.settings import SMOKE
from pocket.training.train_dit import Networks, Tables, _losses

CONFIG = dataclasses.replace(transformer_config(SMOKE.shapes), num_attention_heads=2, num_layers=2)
FRAMES, ROWS, COLUMNS = 4, 6, 8  # of latents
PATCH = (2, 2)


@pytest.fixture(scope="module")
def model() -> PublishedTransformer:
    torch.manual_seed(1)
    result = PublishedTransformer(CONFIG)
    for parameter in result.parameters():
        nn.init.normal_(parameter, std=0.3)
    return result.requires_grad_(False)


def with_partial_attention(model: PublishedTransformer) -> PublishedTransformer:
    result = PublishedTransformer(CONFIG)
    result.load_state_dict(model.state_dict())
    for block in result.transformer_blocks:
        block.attn1.set_processor(PartialAttention())
    return result.requires_grad_(False)


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents and image, caption, timesteps, pose."""
    draw = torch.Generator().manual_seed(seed)
    size = (2, FRAMES, CONFIG.in_channels, ROWS, COLUMNS)
    return (
        torch.randn(size, generator=draw),
        torch.randn(2, 5, CONFIG.text_embed_dim, generator=draw),
        torch.tensor([999, 400]),
        torch.randn(2, FRAMES, CONFIG.out_channels, ROWS, COLUMNS, generator=draw),
    )


def tables(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return rotary_tables(CONFIG, rows * LATENT_STRIDE, columns * LATENT_STRIDE, FRAMES)


OFS = torch.full((1,), OFS_VALUE)


def test_the_attention_is_that_of_diffusers(model: PublishedTransformer) -> None:
    given_ = (*inputs(), tables(ROWS, COLUMNS), OFS)
    torch.testing.assert_close(with_partial_attention(model)(*given_), model(*given_), atol=2e-5, rtol=1e-4)


def test_on_the_tokens_of_a_corner_it_is_the_model_on_that_corner(model: PublishedTransformer) -> None:
    latents, text, timestep, pose = inputs()
    rows, columns = 4, 6
    numbers = torch.arange(FRAMES * ROWS * COLUMNS // 8).reshape(FRAMES // 2, ROWS // 2, COLUMNS // 2)
    corner = numbers[:, : rows // 2, : columns // 2].flatten()
    # In another order for each sample: positions go with their tokens.
    keep = torch.stack([corner, corner[torch.randperm(len(corner), generator=torch.Generator().manual_seed(3))]])
    made = velocity(with_partial_attention(model), latents, text, timestep, pose, tables(ROWS, COLUMNS), OFS, keep)
    cut = (..., slice(rows), slice(columns))
    expected = model(latents[cut], text, timestep, pose[cut], tables(rows, columns), OFS)
    torch.testing.assert_close(made[cut], expected, atol=2e-5, rtol=1e-4)
    there = mask_of(keep, latents.shape, patch_of(model))
    assert there[cut].all() and there.sum() == there[cut].numel()
    assert not (made * (1 - there)).any()


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 1.0), st.floats(0.0, 1.0))
def test_tokens_that_show_the_person_come_first(seed: int, share: float, covered: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    person = (torch.rand(3, FRAMES, 1, ROWS, COLUMNS, generator=draw) < 0.3 * covered).float()
    keep = choose_tokens(person, share, PATCH, draw)
    count = FRAMES * ROWS * COLUMNS // 8
    assert keep.shape == (3, round(share * count))
    there = mask_of(keep, person.shape, PATCH)
    assert there.sum() == keep.numel() * 8  # none twice
    for kept, seen in zip(there, person, strict=True):
        missed = (seen * (1 - kept)).sum() > 0
        other = mask_without(kept, seen).sum() > 0
        assert not (missed and other)


def mask_without(kept: Tensor, person: Tensor) -> Tensor:
    """Kept tokens that show nothing of the person; both [f, 1, h, w]."""
    fullest = nn.functional.max_pool3d(person[None, None, :, 0], (2, 2, 2))
    return kept[::2, 0, ::2, ::2] * (fullest[0, 0] == 0)


@pytest.mark.parametrize(("own_share", "pixel_share"), [(0.0, 0.0), (1.0, 0.5)])
def test_what_other_tokens_hold_does_not_matter(
    model: PublishedTransformer, own_share: float, pixel_share: float
) -> None:
    shapes = SMOKE.shapes
    draw = torch.Generator().manual_seed(5)
    video, pose = torch.randn(2, 3, FRAMES, CONFIG.out_channels, ROWS, COLUMNS, generator=draw)
    person = (torch.rand(3, FRAMES, 1, ROWS, COLUMNS, generator=draw) < 0.05).float()
    tokens = torch.zeros(3, shapes.text_length, dtype=torch.long)
    keep = choose_tokens(person, 0.5, PATCH, draw)
    there = mask_of(keep, video.shape, PATCH)
    settings = dataclasses.replace(
        SMOKE, dit=dataclasses.replace(SMOKE.dit, own_share=own_share, pixel_share=pixel_share)
    )
    networks = Networks(settings, None, with_partial_attention(model), make_text_encoder(shapes), None, 1.0)  # type: ignore[arg-type]
    alphas = CogVideoXDPMScheduler.from_config(SCHEDULER).alphas_cumprod.float()
    kernel = torch.ones(1, CONFIG.out_channels, 2, 3, 3) if pixel_share else None

    def loss(video: Tensor, pose: Tensor) -> dict[str, Tensor]:
        batch = Batch(video, pose, torch.zeros_like(video[:, 0]), person, tokens)
        draws = np.random.default_rng(2), torch.Generator().manual_seed(2)
        (part,) = _losses(networks, batch, Tables(alphas, tables(ROWS, COLUMNS), kernel), keep, *draws, 1)
        return part()

    def changed(values: Tensor, where: Tensor) -> Tensor:
        return values * (1 - 2 * where)

    before, elsewhere = loss(video, pose), 1 - there
    for name, value in loss(changed(video, elsewhere), changed(pose, elsewhere)).items():
        torch.testing.assert_close(value, before[name], atol=1e-5, rtol=1e-5)
    assert abs(loss(changed(video, there), pose)["loss"] - before["loss"]) > 1e-4
    assert abs(loss(video, changed(pose, there))["loss"] - before["loss"]) > 1e-4
