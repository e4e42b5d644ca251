"""Which checkpoint tensors make which tensors of the denoiser's weight store (names of the published checkpoint)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..bundle.config import TransformerConfig
from .recipe import Recipe

__all__ = ["block_recipes", "modulation_recipes", "shared_recipes"]


def even_odd(width: int, head_dim: int) -> tuple[int, ...]:
    """Row order that puts each head's even channels before its odd ones: adjacent rotary pairs become two halves."""
    one = [*range(0, head_dim, 2), *range(1, head_dim, 2)]
    return tuple(head * head_dim + i for head in range(width // head_dim) for i in one)


def block_recipes(config: TransformerConfig, index: int) -> list[Recipe]:
    """The weight inputs of graph `block` for block `index`, without its modulation."""
    d, head = config.width, config.attention_head_dim
    p = f"transformer_blocks.{index}."
    a = p + "attn1."
    order = torch.tensor(even_odd(d, head))
    small = torch.tensor(even_odd(head, head))
    scale = head**-0.5

    def merged(sources: Sequence[Tensor]) -> Tensor:
        q, k, v = sources
        rows = torch.cat([q[order], k[order], v])
        return rows.t() if rows.dim() == 2 else rows

    def scaled(sources: Sequence[Tensor]) -> Tensor:
        return sources[0].float()[small] * scale  # 1 / 8 for 64 channels: exact

    def reordered(sources: Sequence[Tensor]) -> Tensor:
        return sources[0][small]

    recipes = [
        Recipe(
            f"qkv_{kind}",
            tuple(f"{a}to_{x}.{kind}" for x in "qkv"),
            (d, 3 * d) if kind == "weight" else (3 * d,),
            source_shapes=((d, d) if kind == "weight" else (d,),) * 3,
            make=merged,
        )
        for kind in ("weight", "bias")
    ]
    for kind in ("weight", "bias"):
        recipes.append(Recipe(f"q_norm_{kind}", (f"{a}norm_q.{kind}",), (head,), make=scaled))
        recipes.append(Recipe(f"k_norm_{kind}", (f"{a}norm_k.{kind}",), (head,), make=reordered))
    for target, source, n_in, n_out in (
        ("out", f"{a}to_out.0", d, d),
        ("ff_in", f"{p}ff.net.0.proj", d, 4 * d),
        ("ff_out", f"{p}ff.net.2", 4 * d, d),
    ):
        recipes += _linear(target, source, n_in, n_out)
    return recipes


def modulation_recipes(config: TransformerConfig, index: int) -> list[Recipe]:
    """The weight inputs of graph `modulation` that belong to block `index`."""
    d, e = config.width, config.time_embed_dim
    p = f"transformer_blocks.{index}."
    recipes: list[Recipe] = []
    for target, source, rows in (("norm1", "norm1", 6), ("norm2", "norm2", 6), ("pose_norm", "control_norm1", 3)):
        recipes += _linear(f"{target}_linear", f"{p}{source}.linear", e, rows * d)
        recipes += [Recipe(f"{target}_{kind}", (f"{p}{source}.norm.{kind}",), (d,)) for kind in ("weight", "bias")]
    return recipes


def shared_recipes(config: TransformerConfig) -> list[Recipe]:
    """All other tensors: time embeddings, patch embedding, stored positions, head."""
    d, e, k = config.width, config.time_embed_dim, config.patch_elements
    c, t, p = config.latent_channels, config.time_patch, config.patch_size
    recipes = [*_linear("time_1", "time_embedding.linear_1", d, e), *_linear("time_2", "time_embedding.linear_2", e, e)]
    if config.ofs_embed_dim is not None:
        o = config.ofs_embed_dim
        recipes += [
            *_linear("ofs_1", "ofs_embedding.linear_1", o, o),
            *_linear("ofs_2", "ofs_embedding.linear_2", o, o),
        ]
    recipes += _linear("text", "patch_embed.text_proj", config.text_embed_dim, d)

    # 1.0: a [D, 2C, p, p] convolution; 1.5: a [D, 2C * t * p * p] linear map over (channel, frame, row, column).
    patch = "patch_embed.proj.weight"
    source_shape = (d, 2 * c, p, p) if config.patch_size_t is None else (d, 2 * c * t * p * p)

    def half(sources: Sequence[Tensor], which: str) -> Tensor:
        halves = sources[0].float().reshape(d, 2, k)
        part = {"latent": halves[:, 0], "image": halves[:, 1], "pose": halves[:, 0] + halves[:, 1]}[which]
        return part.t()

    for which in ("latent", "image", "pose"):
        recipes.append(
            Recipe(
                f"patch_{which}_weight",
                (patch,),
                (k, d),
                source_shapes=(source_shape,),
                make=lambda sources, which=which: half(sources, which),  # type: ignore[misc]
            )
        )
    recipes.append(Recipe("patch_bias", ("patch_embed.proj.bias",), (d,)))
    if config.use_learned_positional_embeddings:
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        grid = config.token_grid(frames, config.sample_height, config.sample_width)
        tokens = config.max_text_seq_length + grid[0] * grid[1] * grid[2]
        recipes.append(Recipe("position", ("patch_embed.pos_embedding",), (1, tokens, d)))
    recipes += _linear("norm_out_linear", "norm_out.linear", e, 2 * d)
    for target, source in (("norm_out", "norm_out.norm"), ("norm_final", "norm_final")):
        recipes += [Recipe(f"{target}_{kind}", (f"{source}.{kind}",), (d,)) for kind in ("weight", "bias")]

    recipes += _linear("proj", "proj_out", d, k)  # rows ordered (C, t, row, column)
    return recipes


def _linear(target: str, source: str, n_in: int, n_out: int) -> list[Recipe]:
    return [
        Recipe(f"{target}_weight", (f"{source}.weight",), (n_in, n_out), transpose=True),
        Recipe(f"{target}_bias", (f"{source}.bias",), (n_out,)),
    ]
