"""The transformer on a part of a clip's tokens, which is what most training steps are spent on.

More than half of a clip's tokens are background that stands still and is soon learned. A step on the tokens that show the person
and a few others costs less than one on all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.published_torch import PublishedTransformer

__all__ = ["PartialAttention", "choose_tokens", "mask_of", "patch_of", "velocity"]

Rotary = tuple[Tensor, Tensor]
SHOWN = 0.03  # share of a latent's pixels, in the token's fullest latent, from which a token shows the person


class PartialAttention:
    """diffusers' attention processor for CogVideoX, but that every sample may have its own rotary tables.

    `image_rotary_emb`: cos and sin, [N, head dim] or [B, N, head dim] each.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [B, N, D], encoder_hidden_states [B, L, D] -> both after attention."""
        length = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (
            linear(joint).unflatten(2, (attn.heads, -1)).transpose(1, 2) for linear in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            cos, sin = (table[..., ::2] for table in image_rotary_emb)  # pairs share an angle
            turns = functional.pad(torch.complex(cos, sin), (0, 0, length, 0), value=1.0).unsqueeze(-3)  # text: none
            query, key = _turned(query, turns), _turned(key, turns)
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        out = attn.to_out[0](out.transpose(1, 2).flatten(2))
        return out[:, length:], out[:, :length]


def _turned(values: Tensor, turns: Tensor) -> Tensor:
    """values [B, heads, N, d], turns [1 or B, 1, N, d / 2] complex -> values, pair by pair turned."""
    pairs = torch.view_as_complex(values.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2)


def patch_of(model: PublishedTransformer) -> tuple[int, int]:
    """Latent frames of a token, and its rows and columns."""
    return model.config.patch_size_t or 1, model.config.patch_size


def choose_tokens(person: Tensor, share: float, patch: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Numbers of the tokens to keep, [B, K]: those that show the person, filled up with others by lot.

    person: [B, f, 1, h, w], the share of a latent's pixels that show the person. `share`: K of all tokens. `patch`:
    that of `patch_of`.
    """
    time, size = patch
    fullest = functional.max_pool3d(person[:, None, :, 0], (time, size, size)).flatten(1)
    urgency = torch.rand(fullest.shape, generator=generator).to(person.device) + (fullest > SHOWN)
    return urgency.topk(round(share * urgency.shape[1]), dim=1).indices


def velocity(
    model: PublishedTransformer,
    latents: Tensor,
    prompt_embeds: Tensor,
    timestep: Tensor,
    pose_latents: Tensor,
    rotary: Rotary,
    ofs: Tensor | None,
    keep: Tensor,
) -> Tensor:
    """The model's velocity of the tokens `keep` [B, K], as if there were no others; zero elsewhere.

    Shapes as in `PublishedTransformer.forward`; its blocks need `PartialAttention`.
    """
    temb, text, video, pose = model.embed(latents, prompt_embeds, timestep, pose_latents, ofs)

    def kept(tokens: Tensor) -> Tensor:
        return tokens.gather(1, keep[:, :, None].expand(-1, -1, tokens.shape[2]))

    cos, sin = (table[keep] for table in rotary)
    patches = model.predict(kept(video), text, kept(pose), temb, (cos, sin))
    everywhere = patches.new_zeros(len(patches), video.shape[1], patches.shape[2])
    everywhere = everywhere.scatter(1, keep[:, :, None].expand_as(patches), patches)
    return model.unpatchify(everywhere, latents.shape)


def mask_of(keep: Tensor, shape: torch.Size, patch: tuple[int, int]) -> Tensor:
    """Where the kept tokens lie: [B, f, 1, h, w], 1 there and 0 elsewhere. shape: that of latents [B, f, C, h, w]."""
    time, size = patch
    batch, frames, _, rows, columns = shape
    grid = torch.zeros(batch, (frames // time) * (rows // size) * (columns // size), device=keep.device)
    grid = grid.scatter(1, keep, 1.0).reshape(batch, 1, frames // time, rows // size, columns // size)
    return functional.interpolate(grid, scale_factor=(time, size, size))[:, 0, :, None]
