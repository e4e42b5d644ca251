"""The published denoising loop in eager PyTorch, float32 unless asked otherwise: the peer that our runtime is compared with.

`PublishedTransformer` is put together from diffusers' own CogVideoX pieces the way the published DynamiCtrl transformer
is (arXiv 2503.21246), and `denoise` does per step what the published pipeline does, with the same amount of work: both
guidance halves go through everything, the pose and the text are embedded again at every step, every modulation vector
is computed again in every block. Nothing is hoisted out of the loop, fused or cached: this is a measure, not a product.

Layouts: B batch, F latent frames, C channels, H/W latent rows/columns, L text tokens, N video tokens, D width.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0
from diffusers.models.embeddings import CogVideoXPatchEmbed, TimestepEmbedding, Timesteps, get_1d_rotary_pos_embed
from diffusers.models.normalization import AdaLayerNorm, CogVideoXLayerNormZero
from diffusers.schedulers.scheduling_dpm_cogvideox import CogVideoXDPMScheduler
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = [
    "PublishedTransformer",
    "TransformerConfig",
    "denoise",
    "load_scheduler",
    "load_transformer",
    "rotary_tables",
]

Rotary = tuple[Tensor, Tensor]
StepCallback = Callable[[int, Tensor, Tensor], None]

OFS_VALUE = 2.0  # what the published pipeline always passes to a checkpoint that has an `ofs` embedding
LATENT_STRIDE = 8  # pixels per latent row or column


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """`transformer/config.json` of a checkpoint, under diffusers' names."""

    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    time_embed_dim: int
    text_embed_dim: int
    num_layers: int
    sample_width: int
    sample_height: int
    sample_frames: int
    max_text_seq_length: int
    patch_size: int = 2
    patch_size_t: int | None = None
    ofs_embed_dim: int | None = None
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    dropout: float = 0.0
    attention_bias: bool = True
    temporal_compression_ratio: int = 4
    activation_fn: str = "gelu-approximate"
    timestep_activation_fn: str = "silu"
    norm_elementwise_affine: bool = True
    norm_eps: float = 1e-5
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    use_rotary_positional_embeddings: bool = True
    use_learned_positional_embeddings: bool = False
    patch_bias: bool = True

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_json(cls, path: Path) -> TransformerConfig:
        """Reads the file; raises `TypeError` for a key that is missing or unknown."""
        values = json.loads(path.read_text())
        return cls(**{key: value for key, value in values.items() if not key.startswith("_")})


class PoseAdaptiveLayerNorm(nn.Module):
    """PoseAdaLN: LayerNorm of the pose tokens, shifted and scaled by the timestep, and a gate for the next block."""

    def __init__(self, time_dim: int, dim: int, affine: bool, eps: float) -> None:
        super().__init__()
        self.linear = nn.Linear(time_dim, 3 * dim)
        self.norm = nn.LayerNorm(dim, eps=eps, elementwise_affine=affine)

    def forward(self, pose: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        """pose [B,N,D], temb [B,T] -> the modulated pose [B,N,D] and its gate [B,1,D]."""
        shift, scale, gate = self.linear(nn.functional.silu(temb)).chunk(3, dim=1)
        return self.norm(pose) * (1 + scale)[:, None] + shift[:, None], gate[:, None]


class PublishedBlock(nn.Module):
    """A CogVideoX block whose attention input has the modulated pose added to the video tokens."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim, time_dim = config.width, config.time_embed_dim
        affine, eps = config.norm_elementwise_affine, config.norm_eps
        attention_processor: Any = CogVideoXAttnProcessor2_0  # untyped
        self.norm1 = CogVideoXLayerNormZero(time_dim, dim, affine, eps, bias=True)
        self.control_norm1 = PoseAdaptiveLayerNorm(time_dim, dim, affine, eps)
        self.attn1 = Attention(
            query_dim=dim,
            dim_head=config.attention_head_dim,
            heads=config.num_attention_heads,
            qk_norm="layer_norm",
            eps=1e-6,
            bias=config.attention_bias,
            out_bias=True,
            processor=attention_processor(),
        )
        self.norm2 = CogVideoXLayerNormZero(time_dim, dim, affine, eps, bias=True)
        self.ff = FeedForward(dim, dropout=config.dropout, activation_fn=config.activation_fn, final_dropout=True)

    def forward(
        self, video: Tensor, text: Tensor, pose: Tensor, temb: Tensor, rotary: Rotary
    ) -> tuple[Tensor, Tensor, Tensor]:
        """video, pose [B,N,D], text [B,L,D], temb [B,T] -> the three streams for the next block."""
        text_length = text.shape[1]

        norm_video, norm_text, gate, text_gate = self.norm1(video, text, temb)
        norm_pose, pose_gate = self.control_norm1(pose, temb)
        attn_video, attn_text = self.attn1(
            hidden_states=norm_video + norm_pose, encoder_hidden_states=norm_text, image_rotary_emb=rotary
        )
        video = video + gate * attn_video
        text = text + text_gate * attn_text
        pose = norm_pose + pose_gate * norm_pose  # the normed value: the pose stream has no residual

        norm_video, norm_text, gate, text_gate = self.norm2(video, text, temb)
        joint = self.ff(torch.cat([norm_text, norm_video], dim=1))  # [B, L+N, D]
        video = video + gate * joint[:, text_length:]
        text = text + text_gate * joint[:, :text_length]
        return video, text, pose


class PublishedTransformer(nn.Module):
    """The published pose-driven DiT. Parameters have the checkpoint's own names, so it loads strictly."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        if not config.use_rotary_positional_embeddings:
            raise ValueError("there is no DynamiCtrl checkpoint without rotary positions")
        self.config = config
        self.patch_embed = CogVideoXPatchEmbed(
            patch_size=config.patch_size,
            patch_size_t=config.patch_size_t,
            in_channels=config.in_channels,
            embed_dim=config.width,
            text_embed_dim=config.text_embed_dim,
            bias=config.patch_bias,
            sample_width=config.sample_width,
            sample_height=config.sample_height,
            sample_frames=config.sample_frames,
            temporal_compression_ratio=config.temporal_compression_ratio,
            max_text_seq_length=config.max_text_seq_length,
            spatial_interpolation_scale=config.spatial_interpolation_scale,
            temporal_interpolation_scale=config.temporal_interpolation_scale,
            use_positional_embeddings=False,
            use_learned_positional_embeddings=config.use_learned_positional_embeddings,
        )
        act = config.timestep_activation_fn
        self.time_proj = Timesteps(config.width, config.flip_sin_to_cos, config.freq_shift)
        self.time_embedding = TimestepEmbedding(config.width, config.time_embed_dim, act)
        if config.ofs_embed_dim is not None:
            self.ofs_proj = Timesteps(config.ofs_embed_dim, config.flip_sin_to_cos, config.freq_shift)
            self.ofs_embedding = TimestepEmbedding(config.ofs_embed_dim, config.ofs_embed_dim, act)
        self.transformer_blocks = nn.ModuleList([PublishedBlock(config) for _ in range(config.num_layers)])
        self.norm_final = nn.LayerNorm(config.width, config.norm_eps, config.norm_elementwise_affine)
        self.norm_out = AdaLayerNorm(
            embedding_dim=config.time_embed_dim,
            output_dim=2 * config.width,
            norm_elementwise_affine=config.norm_elementwise_affine,
            norm_eps=config.norm_eps,
            chunk_dim=1,
        )
        patch_volume = config.patch_size**2 * (config.patch_size_t or 1)
        self.proj_out = nn.Linear(config.width, patch_volume * config.out_channels)

    def forward(
        self,
        latents: Tensor,
        prompt_embeds: Tensor,
        timestep: Tensor,
        pose_latents: Tensor,
        rotary: Rotary,
        ofs: Tensor | None = None,
    ) -> Tensor:
        """The velocity prediction.

        latents: [B,F,32,H,W], noisy and image on channels. prompt_embeds: [B,L,text width]. timestep: int64 [B].
        pose_latents: [B,F,16,H,W]. rotary: cos and sin, [N, head dim] each. ofs: [1] for 1.5-style checkpoints.
        Latents, embeddings and `ofs` are of the weights' type. Returns [B,F,16,H,W] of it.
        """
        text_length = prompt_embeds.shape[1]
        temb = self.time_embedding(self.time_proj(timestep).to(latents.dtype))  # [B, T]; sinusoids are float32
        if self.config.ofs_embed_dim is not None:
            temb = temb + self.ofs_embedding(self.ofs_proj(ofs).to(latents.dtype))

        joint = self.patch_embed(prompt_embeds, latents)  # [B, L+N, D]
        text, video = joint[:, :text_length], joint[:, text_length:]
        # The pose has half the channels of the input and takes the same weights twice. The patch embedding wants text
        # with it, so the published code projects the prompt a second time and drops it.
        pose = self.patch_embed(prompt_embeds, torch.cat([pose_latents, pose_latents], dim=2))[:, text_length:]

        for block in self.transformer_blocks:
            video, text, pose = block(video, text, pose, temb, rotary)

        video = self.norm_final(torch.cat([text, video], dim=1))[:, text_length:]
        return self._unpatchify(self.proj_out(self.norm_out(video, temb=temb)), latents.shape)

    def _unpatchify(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        """tokens [B,N,P] -> [B,F,C,H,W]; a token holds (C, time, row, column) in this order."""
        batch, frames, _, height, width = shape
        p, p_t = self.config.patch_size, self.config.patch_size_t or 1
        grid = tokens.reshape(batch, frames // p_t, height // p, width // p, -1, p_t, p, p)
        return grid.permute(0, 1, 5, 4, 2, 6, 3, 7).reshape(batch, frames, -1, height, width)


def load_transformer(folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PublishedTransformer:
    """Reads `transformer/` of a checkpoint (safetensors, sharded or not) strictly, ready to run in this type, there.

    The parameters take the place of empty ones, as in diffusers' own loading, so that float32 weights are held once.
    Raises `RuntimeError` when a tensor is missing, unexpected or has another shape.
    """
    with torch.device("meta"):
        model = PublishedTransformer(TransformerConfig.from_json(folder / "config.json"))
    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        state.update({name: tensor.to(device, dtype) for name, tensor in load_file(file).items()})
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def load_scheduler(folder: Path) -> CogVideoXDPMScheduler:
    """Reads `scheduler/` of a checkpoint. Its `step` draws its noise from the generator that it is given."""
    values = json.loads((folder / "scheduler_config.json").read_text())
    scheduler: CogVideoXDPMScheduler = CogVideoXDPMScheduler.from_config(values)
    return scheduler


def rotary_tables(config: TransformerConfig, height: int, width: int, latent_frames: int) -> Rotary:
    """Rotary cos and sin, [N, head dim] float32 each, for a picture of height x width pixels.

    1.0 style: the token grid is fitted into the checkpoint's sample grid and its rows and columns are spread over that
    box, its end excluded. 1.5 style: positions count 0, 1, 2, ...; time counts patches.
    (Not diffusers' `get_3d_rotary_pos_embed`: its recent versions space a box that does not start at 0 differently.)
    """
    patch = config.patch_size
    rows, columns = height // (LATENT_STRIDE * patch), width // (LATENT_STRIDE * patch)
    counts = -(-latent_frames // (config.patch_size_t or 1)), rows, columns
    box_start, box_end = (0, 0), (rows, columns)
    if config.patch_size_t is None:
        box_start, box_end = _fitted_box((rows, columns), (config.sample_height // patch, config.sample_width // patch))
    starts, ends = (0, *box_start), (counts[0], *box_end)
    parts: list[Rotary] = []
    for axis, eighths in enumerate((2, 3, 3)):  # time, rows, columns share the head as 2 : 3 : 3
        where = np.linspace(starts[axis], ends[axis], counts[axis], endpoint=False, dtype=np.float32)
        tables = get_1d_rotary_pos_embed(config.attention_head_dim // 8 * eighths, where, use_real=True)
        shape = [1, 1, 1, -1]
        shape[axis] = counts[axis]
        cos, sin = (table.reshape(shape).expand(*counts, -1) for table in tables)
        parts.append((cos, sin))
    cos, sin = (torch.cat(tables, dim=-1).flatten(0, 2).float() for tables in zip(*parts, strict=True))
    return cos, sin


def _fitted_box(grid: tuple[int, int], base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Top-left and bottom-right corner of `grid` scaled to fit inside `base` and centred; rounds half to even."""
    (rows, columns), (base_rows, base_columns) = grid, base
    if rows / columns > base_rows / base_columns:
        fitted = base_rows, round(base_rows / rows * columns)
    else:
        fitted = round(base_columns / columns * rows), base_columns
    top, left = round((base_rows - fitted[0]) / 2), round((base_columns - fitted[1]) / 2)
    return (top, left), (top + fitted[0], left + fitted[1])


@torch.no_grad()
def denoise(
    model: PublishedTransformer,
    scheduler: CogVideoXDPMScheduler,
    *,
    prompt_embeds: Tensor,
    latents: Tensor,
    image_latents: Tensor,
    pose_latents: Tensor,
    rotary: Rotary,
    steps: int,
    guidance: float,
    generator: torch.Generator,
    on_step: StepCallback | None = None,
) -> Tensor:
    """The published loop: duplicate, predict, guide, step.

    prompt_embeds: [2,L,D], negative first, when `guidance` is above 1; else [1,L,D]. latents: [1,F,16,H,W], the first
    noise. image_latents, pose_latents: [1,F,16,H,W], already scaled. `generator` gives each step's noise.
    `on_step(index, model_output, latents)` is called after every step. Returns the final latents [1,F,16,H,W].

    The model computes in the type of its weights; latents stay float32, in which the noise is drawn, so that it is the same
    noise whatever that type is. (The published pipeline rounds them to the weights' type after every step.)
    """
    guided = guidance > 1.0
    halves = 2 if guided else 1
    dtype = next(model.parameters()).dtype
    prompt_embeds, image_latents, pose_latents = (t.to(dtype) for t in (prompt_embeds, image_latents, pose_latents))
    ofs = None if model.config.ofs_embed_dim is None else image_latents.new_full((1,), OFS_VALUE)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    scheduler_step: Any = scheduler.step  # its annotations do not allow for None
    previous_x0 = None
    for index, timestep in enumerate(timesteps):
        noisy = scheduler.scale_model_input(torch.cat([latents] * halves), timestep)
        output = model(
            torch.cat([noisy.to(dtype), torch.cat([image_latents] * halves)], dim=2),  # [2, F, 32, H, W]
            prompt_embeds,
            timestep.expand(halves).to(latents.device),
            torch.cat([pose_latents] * halves),
            rotary,
            ofs,
        )
        velocity = output.float()
        if guided:
            negative, positive = velocity.chunk(2)
            velocity = negative + guidance * (positive - negative)
        earlier = timesteps[index - 1] if index > 0 else None
        latents, previous_x0 = scheduler_step(
            velocity, previous_x0, timestep, earlier, latents, generator=generator, return_dict=False
        )
        if on_step is not None:
            on_step(index, output, latents)
    return latents
