"""What the runtime must know of a model, validated once at the edge. Field names are those of the checkpoint's JSON."""

from __future__ import annotations

from typing import Annotated

import msgspec

from .errors import InputError, UsageError

__all__ = ["SizeDefaults", "TextConfig", "TransformerConfig", "VaeConfig"]


Count = Annotated[int, msgspec.Meta(ge=1)]


class TransformerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The PoseAdaLN CogVideoX transformer (`transformer/config.json`); unknown fields are ignored, like diffusers does."""

    num_attention_heads: Count
    attention_head_dim: Count
    num_layers: Count
    in_channels: Count
    out_channels: Count
    patch_size: Count
    patch_size_t: Count | None = None
    patch_bias: bool = True
    text_embed_dim: Count
    time_embed_dim: Count
    ofs_embed_dim: Count | None = None
    max_text_seq_length: Count
    sample_height: Count
    sample_width: Count
    sample_frames: Count
    temporal_compression_ratio: Count = 4
    norm_eps: float = 1e-5
    use_learned_positional_embeddings: bool = False
    use_rotary_positional_embeddings: bool = True
    activation_fn: str = "gelu-approximate"
    timestep_activation_fn: str = "silu"
    norm_elementwise_affine: bool = True
    attention_bias: bool = True
    flip_sin_to_cos: bool = True
    freq_shift: int = 0

    def check(self) -> None:
        """Refuses (`InputError`) what the graphs do not compute."""
        wanted = {
            "use_rotary_positional_embeddings": True,
            "activation_fn": "gelu-approximate",
            "timestep_activation_fn": "silu",
            "norm_elementwise_affine": True,
            "attention_bias": True,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "out_channels": self.in_channels // 2,
        }
        for field, value in wanted.items():
            if getattr(self, field) != value:
                raise InputError(
                    f"transformer/config.json: {field} is {getattr(self, field)!r}; this tool computes DynamiCtrl "
                    f"models, where it is {value!r}."
                )
        if self.attention_head_dim % 8:
            raise InputError(
                f"transformer/config.json: attention_head_dim {self.attention_head_dim} is no multiple of 8."
            )
        if self.ofs_embed_dim not in (None, self.time_embed_dim):
            raise InputError(
                f"transformer/config.json: ofs_embed_dim {self.ofs_embed_dim} and time_embed_dim {self.time_embed_dim} "
                "differ; the two embeddings are added."
            )
        # diffusers reads `patch_bias` for the convolution of 1.0-style models only.
        if self.patch_size_t is None and not self.patch_bias:
            raise InputError("transformer/config.json: patch_bias is False; a patch embedding with a bias is needed.")
        if self.use_learned_positional_embeddings and self.patch_size_t is not None:
            raise InputError(
                "transformer/config.json: use_learned_positional_embeddings with patch_size_t is not supported; "
                "stored positional tables are those of 1.0-style models."
            )

    @property
    def width(self) -> int:
        """Channels of a token, D."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        """Channels of the noisy latents, of the image latents and of the pose latents, each."""
        return self.in_channels // 2

    @property
    def time_patch(self) -> int:
        """Latent frames per token: 1 (CogVideoX 1.0 style) or `patch_size_t` (1.5 style)."""
        return self.patch_size_t or 1

    @property
    def patch_elements(self) -> int:
        """Numbers of one latent half in a token's patch, ordered (channel, frame, row, column)."""
        return self.latent_channels * self.time_patch * self.patch_size**2

    def token_grid(self, latent_frames: int, latent_height: int, latent_width: int) -> tuple[int, int, int]:
        """Tokens along time, rows and columns."""
        return latent_frames // self.time_patch, latent_height // self.patch_size, latent_width // self.patch_size


class TextConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The T5 v1.1 encoder (`text_encoder/config.json`)."""

    d_model: Count
    d_kv: Count
    d_ff: Count
    num_heads: Count
    num_layers: Count
    vocab_size: Count
    relative_attention_num_buckets: Count = 32
    relative_attention_max_distance: Count = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"
    pad_token_id: int = 0
    eos_token_id: int = 1

    @property
    def inner(self) -> int:
        """Channels of all attention heads together."""
        return self.num_heads * self.d_kv


class VaeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """AutoencoderKLCogVideoX (`vae/config.json`)."""

    block_out_channels: Annotated[tuple[Count, ...], msgspec.Meta(min_length=1)]
    latent_channels: Count
    layers_per_block: Count
    sample_height: Count
    sample_width: Count
    scaling_factor: Annotated[float, msgspec.Meta(gt=0)]  # latents are divided by it
    invert_scale_latents: bool = False
    temporal_compression_ratio: Count = 4
    norm_num_groups: Count = 32
    norm_eps: float = 1e-6
    in_channels: Count = 3
    out_channels: Count = 3

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent along rows and columns: every level but the last halves."""
        return 2 ** (len(self.block_out_channels) - 1)


class SizeDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """What `animate` makes when no size is given; pixels and frames."""

    height: Count
    width: Count
    frames: Count
    fps: Count = 8


class Geometry(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of one request, in every unit that some part of the pipeline counts in.

    `latent_frames` includes the frame that 1.5-style models pad with (dropped again before decoding), `pose_frames`
    is the pose clip's length that belongs to it: (latent_frames - 1) * temporal compression + 1.
    """

    height: int
    width: int
    frames: int
    latent_frames: int
    latent_height: int
    latent_width: int
    padding_frames: int
    pose_frames: int
    grid: tuple[int, int, int]

    @property
    def video_tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


def geometry(transformer: TransformerConfig, vae: VaeConfig, height: int, width: int, frames: int) -> Geometry:
    """Resolves a wanted size; `UsageError` with the nearest possible values if the model cannot make it."""
    step = vae.spatial_compression * transformer.patch_size
    for name, value in (("height", height), ("width", width)):
        if value < step or value % step:
            raise UsageError(
                f"--{name} {value} is not possible: it must be a multiple of {step}, the nearest {_around(value, step)}."
            )
    ratio = vae.temporal_compression_ratio
    if frames < 1 or (frames - 1) % ratio:
        raise UsageError(
            f"--frames {frames} is not possible: the model makes {ratio} * n + 1 frames, "
            f"the nearest {_around(frames - 1, ratio, least=0, plus=1)}."
        )
    latent_frames = (frames - 1) // ratio + 1
    padding = -latent_frames % transformer.time_patch
    latent_frames += padding
    latent_height, latent_width = height // vae.spatial_compression, width // vae.spatial_compression
    if transformer.use_learned_positional_embeddings:
        _check_native(transformer, vae, height, width, frames, latent_frames)
    return Geometry(
        height=height,
        width=width,
        frames=frames,
        latent_frames=latent_frames,
        latent_height=latent_height,
        latent_width=latent_width,
        padding_frames=padding,
        pose_frames=(latent_frames - 1) * ratio + 1,
        grid=transformer.token_grid(latent_frames, latent_height, latent_width),
    )


def _check_native(
    transformer: TransformerConfig, vae: VaeConfig, height: int, width: int, frames: int, latent_frames: int
) -> None:
    scale, ratio = vae.spatial_compression, vae.temporal_compression_ratio
    native = (
        transformer.sample_height * scale,
        transformer.sample_width * scale,
        (transformer.sample_frames - 1) // ratio + 1,
    )
    if (height, width, latent_frames) != native:
        raise UsageError(
            f"{width}x{height} with {frames} frames is not possible: this checkpoint stores its positional table for "
            f"one size only. Use --width {native[1]} --height {native[0]} --frames {(native[2] - 1) * ratio + 1}."
        )


def _around(value: int, step: int, least: int | None = None, plus: int = 0) -> str:
    lowest = step if least is None else least
    below = max(lowest, value // step * step)
    above = max(below + step, -(-value // step) * step) if value > lowest else below
    return f"is {below + plus}" if below == above else f"are {below + plus} and {above + plus}"
