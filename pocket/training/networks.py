"""The three networks, made from diffusers' and transformers' own parts, with the configurations that a checkpoint holds."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    AutoencoderKLCogVideoX,
    CogVideoXCausalConv3d,
    CogVideoXResnetBlock3D,
    CogVideoXSpatialNorm3D,
)
from torch import Tensor, nn
from torch.nn import functional
from transformers import T5Config, T5EncoderModel

from benchmarks.checkpoints import diffusers_config, scheduler_config, t5_config
from benchmarks.published_torch import LATENT_STRIDE, PublishedTransformer, TransformerConfig, rotary_tables

from ..clips import COLUMNS, FRAMES, ROWS
from .settings import Shapes

__all__ = [
    "SCHEDULER",
    "make_text_encoder",
    "make_transformer",
    "make_vae",
    "rotary",
    "text_config",
    "transformer_config",
    "vae_config",
]

SCHEDULER = scheduler_config(1.0)


def transformer_config(shapes: Shapes) -> TransformerConfig:
    _, rows, columns = shapes.latent_size
    return TransformerConfig(
        num_attention_heads=shapes.heads,
        attention_head_dim=shapes.head_dim,
        in_channels=2 * shapes.latent_channels,
        out_channels=shapes.latent_channels,
        time_embed_dim=shapes.time_dim,
        ofs_embed_dim=shapes.time_dim,
        text_embed_dim=shapes.text_dim,
        num_layers=shapes.blocks,
        sample_width=columns,
        sample_height=rows,
        sample_frames=FRAMES,
        max_text_seq_length=shapes.text_length,
        patch_size=2,
        patch_size_t=2,
    )


def vae_config(shapes: Shapes, scaling_factor: float = 1.0) -> dict[str, Any]:
    levels = len(shapes.channels)
    return {
        **diffusers_config("AutoencoderKLCogVideoX"),
        "act_fn": "silu",
        "block_out_channels": list(shapes.channels),
        "down_block_types": ["CogVideoXDownBlock3D"] * levels,
        "force_upcast": True,
        "in_channels": 3,
        "invert_scale_latents": True,
        "latent_channels": shapes.latent_channels,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": shapes.vae_layers,
        "norm_eps": 1e-06,
        "norm_num_groups": shapes.norm_groups,
        "out_channels": 3,
        "sample_height": ROWS,
        "sample_width": COLUMNS,
        "scaling_factor": scaling_factor,
        "shift_factor": None,
        "temporal_compression_ratio": 4,
        "up_block_types": ["CogVideoXUpBlock3D"] * levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def text_config(shapes: Shapes) -> dict[str, Any]:
    width, heads = shapes.text_dim, shapes.text_heads
    return t5_config(width, width // heads, shapes.text_ff, heads, shapes.text_layers, shapes.vocabulary)


def make_vae(shapes: Shapes) -> AutoencoderKLCogVideoX:
    config = {key: value for key, value in vae_config(shapes).items() if not key.startswith("_")}
    vae = AutoencoderKLCogVideoX.from_config(config)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, CogVideoXResnetBlock3D):
                module.conv2.conv.weight.mul_(0.2)  # begins close to a chain of convolutions, which learns faster
            elif isinstance(module, CogVideoXCausalConv3d):
                # What stills teach is the sum over the kernel's moments; moving pictures begin as differences that cancel out
                # in it. (Without them, coding of motion never begins: encoder and decoder wait for each other.)
                past = module.conv.weight[:, :, :-1]
                past.mul_(0.5)
                module.conv.weight[:, :, -1].sub_(past.sum(2))
                module.forward = MethodType(_causal_convolution, module)
            elif isinstance(module, CogVideoXSpatialNorm3D):
                module.forward = MethodType(_spatial_norm, module)
    return vae


def _causal_convolution(module: Any, inputs: Tensor, conv_cache: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """What the module computes. A first chunk of a single frame is repeated into the past, so that the kernel's moments
    add up: one convolution in the plane, at a third of the work. A still teaches the present only: moving pictures, which
    it says nothing about, then begin as good as stills are."""
    if inputs.shape[2] > 1 or conv_cache is not None or module.time_kernel_size != 3:
        return CogVideoXCausalConv3d.forward(module, inputs, conv_cache)
    conv = module.conv
    padding = (module.height_pad, module.width_pad)
    weight = conv.weight[:, :, :-1].detach().sum(2) + conv.weight[:, :, -1]
    result = functional.conv2d(inputs[:, :, 0], weight, conv.bias, conv.stride[1:], padding)
    return result[:, :, None], inputs.expand(-1, -1, 2, -1, -1)


def _spatial_norm(
    module: Any, f: Tensor, zq: Tensor, conv_cache: dict[str, Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the module computes, with its pointwise convolutions before the enlargement instead of after it."""
    scale, shift = module.conv_y.conv, module.conv_b.conv
    both = functional.conv3d(zq, torch.cat([scale.weight, shift.weight]), torch.cat([scale.bias, shift.bias]))
    frames, *size = f.shape[2:]
    if frames > 1 and frames % 2 == 1:
        first = functional.interpolate(both[:, :, :1], size=(1, *size))
        both = torch.cat([first, functional.interpolate(both[:, :, 1:], size=(frames - 1, *size))], dim=2)
    else:
        both = functional.interpolate(both, size=(frames, *size))
    factor, addend = both.chunk(2, dim=1)
    return torch.addcmul(addend, module.norm_layer(f), factor), {}


def make_transformer(shapes: Shapes) -> PublishedTransformer:
    """Begins like published DiTs: every block adds nothing, the head predicts nothing, the pose has no gate."""
    model = PublishedTransformer(transformer_config(shapes))
    for block in model.transformer_blocks:
        for linear in (block.norm1.linear, block.control_norm1.linear, block.norm2.linear):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        # A gate of zero would hide the block's own weights from the first gradients for long; begin with a small one.
        with torch.no_grad():
            width = model.config.width
            for norm in (block.norm1, block.norm2):
                norm.linear.bias[2 * width : 3 * width] = 0.2
                norm.linear.bias[5 * width : 6 * width] = 0.2
    nn.init.zeros_(model.norm_out.linear.weight)
    nn.init.zeros_(model.norm_out.linear.bias)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    return model


def make_text_encoder(shapes: Shapes) -> T5EncoderModel:
    return T5EncoderModel(T5Config(**text_config(shapes)))


def rotary(shapes: Shapes) -> tuple[Tensor, Tensor]:
    """Cos and sin, [N, head dim] each, for the latents of a whole clip."""
    frames, rows, columns = shapes.latent_size
    # `rotary_tables` counts pixels of a VAE of eight; a 1.5-style table depends on the token grid only.
    return rotary_tables(transformer_config(shapes), rows * LATENT_STRIDE, columns * LATENT_STRIDE, frames)
