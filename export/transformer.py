"""The PoseAdaLN DiT, cut where the runtime cuts it, as torch modules made to be traced: every weight is an input.

What is computed is the published transformer (arXiv 2503.21246, section 3; CogVideoX, arXiv 2408.06072) with four exact
rearrangements that the weight store makes once:

* LayerNorm affines and AdaLN shift/scale pairs become one (scale, shift) pair per norm: LN0(x) * w * (1 + s) + b * (1 + s)
  + t = LN0(x) * scale + shift, so a modulated norm is one LayerNorm with run-time affine.
* Query, key and value projections are one matrix; all weights are stored [in, out].
* Channels of every query and key head are ordered (even, odd): rotating adjacent pairs becomes rotating two halves.
  The attention product does not change, since both sides are permuted alike.
* 1 / sqrt(head_dim) is part of the query norm's affine.

Axes: B guidance halves, T timesteps, L text tokens, N video tokens, S = L + N, D width, F/H/W latent frames/rows/columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bundle.config import TransformerConfig
from .trace import Port, Signature

__all__ = [
    "GRAPHS",
    "ROWS",
    "Block",
    "CpuBlock",
    "Formats",
    "Head",
    "block_inputs",
    "block_outputs",
    "graph_modules",
    "head_signature",
    "norm",
    "sample_sizes",
]

# Rows of a block's modulation table: (scale, shift, gate) of each norm.
ROWS = ("video_1", "text_1", "pose", "video_2", "text_2")


class Formats:
    """Number formats of one precision.

    `compute`: matrix products and stored weights. `residual`: video, text and pose streams between blocks; float32 for
    fp16, whose range CogVideoX's activations leave. Norms, softmax, gates and rotary products are float32 throughout
    (pointwise islands: free, they fuse); the query-key product never is, since that would break attention fusion.
    """

    def __init__(self, precision: str):
        self.compute = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.residual = torch.bfloat16 if precision == "bf16" else torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [..., in] times weight [in, out] plus bias, in the weight's format."""
    return x.to(weight.dtype) @ weight + bias


def norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis in float32 with the given float32 affine."""
    return F.layer_norm(x.float(), (x.shape[-1],), scale.float(), shift.float(), eps)


def patchify(latents: Tensor, config: TransformerConfig) -> Tensor:
    """[1, F, C, H, W] -> [1, N, C * t * p * p]; tokens run frames, rows, columns; elements (C, t, row, column)."""
    t, p, c = config.time_patch, config.patch_size, config.latent_channels
    _, f, _, h, w = latents.shape
    x = latents.reshape(1, f // t, t, c, h // p, p, w // p, p)
    return x.permute(0, 1, 4, 6, 3, 2, 5, 7).reshape(1, -1, config.patch_elements)


def unpatchify(tokens: Tensor, like: Tensor, config: TransformerConfig) -> Tensor:
    """[B, N, C * t * p * p] -> [B, F, C, H, W] with the sizes of `like`; elements ordered (C, t, row, column)."""
    t, p, c = config.time_patch, config.patch_size, config.latent_channels
    _, f, _, h, w = like.shape
    x = tokens.reshape(tokens.shape[0], f // t, h // p, w // p, c, t, p, p)
    return x.permute(0, 1, 5, 4, 2, 6, 3, 7).reshape(tokens.shape[0], f, c, h, w)


class TimeEmbedding(nn.Module):
    """SiLU(temb), temb the MLP of the timestep's sinusoid plus the one of `ofs` where the model has it (1.5 style)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config

    def activated(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Takes the sinusoids and the MLPs' weights off the front of `tensors`; returns SiLU(temb) [T, E] and the rest."""
        count = 1 if self.config.ofs_embed_dim is None else 2
        sinusoids, rest = tensors[:count], tensors[count:]
        temb = None
        for x in sinusoids:
            w1, b1, w2, b2 = rest[:4]
            rest = rest[4:]
            x = linear(F.silu(linear(x, w1, b1)), w2, b2)
            temb = x if temb is None else temb + x
        return F.silu(temb), rest

    def rows(self, x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        """Chunks (shift, scale[, gate]) of x [T, n * D] -> (scale, shift[, gate]) with the norm's affine, float32."""
        weight, bias = weight.float(), bias.float()
        chunks = x.float().split(self.config.width, dim=-1)
        group = 3 if len(chunks) % 3 == 0 else 2
        rows: list[Tensor] = []
        for i in range(0, len(chunks), group):
            shift, scale, *gate = chunks[i : i + group]
            rows += [weight * (1 + scale), bias * (1 + scale) + shift, *gate]
        return rows


class Modulation(TimeEmbedding):
    """All scales, shifts and gates of one block for all timesteps: [T, 15, D] float32, rows as in `ROWS`.

    norm1 and norm2 (CogVideoXLayerNormZero) give shift, scale, gate for video, then for text, with one affine for both;
    the pose norm gives shift, scale, gate, of which the row holds 1 + gate.
    """

    def forward(self, *tensors: Tensor) -> Tensor:
        e, rest = self.activated(tensors)
        norm1, norm2, (scale, shift, gate) = (
            self.rows(linear(e, weight, bias), norm_weight, norm_bias)
            for weight, bias, norm_weight, norm_bias in (rest[0:4], rest[4:8], rest[8:12])
        )
        return torch.stack([*norm1, scale, shift, 1 + gate, *norm2], dim=1)


class HeadModulation(TimeEmbedding):
    """Scale and shift of the head's AdaLN for all timesteps: [T, 2, D] float32."""

    def forward(self, *tensors: Tensor) -> Tensor:
        e, (weight, bias, norm_weight, norm_bias) = self.activated(tensors)
        return torch.stack(self.rows(linear(e, weight, bias), norm_weight, norm_bias), dim=1)


class Conditioning(nn.Module):
    """What a request adds once: projected text, the image half of the patch embedding, pose tokens."""

    def __init__(self, config: TransformerConfig, formats: Formats):
        super().__init__()
        self.config, self.formats = config, formats

    def forward(
        self,
        prompt_embeds: Tensor,  # [B, L, Dt] float32
        image_latents: Tensor,  # [1, F, C, H, W] float32, frames after the first are zero
        pose_latents: Tensor,  # [1, F, C, H, W] float32
        text_weight: Tensor,
        text_bias: Tensor,
        patch_image_weight: Tensor,  # [C * t * p * p, D]
        patch_pose_weight: Tensor,  # both halves of the patch embedding added: the pose fills both
        patch_bias: Tensor,
        position: Tensor | None = None,  # [1, L + N, D], stored positional table
    ) -> tuple[Tensor, Tensor, Tensor]:
        text = linear(prompt_embeds, text_weight, text_bias).float()
        image = linear(patchify(image_latents, self.config), patch_image_weight, patch_bias).float()
        pose = linear(patchify(pose_latents, self.config), patch_pose_weight, patch_bias).float()
        if position is not None:
            length = text.shape[1]
            text = text + position[:, :length].float()
            image = image + position[:, length:].float()
            pose = pose + position[:, length:].float()
        r = self.formats.residual
        return text.to(r), image.to(r), pose.to(r)


class Stem(nn.Module):
    """Noisy latents to video tokens [1, N, D]; the image half was computed by `Conditioning`."""

    def __init__(self, config: TransformerConfig, formats: Formats):
        super().__init__()
        self.config, self.formats = config, formats

    def forward(self, latents: Tensor, image_tokens: Tensor, patch_latent_weight: Tensor) -> Tensor:
        x = patchify(latents, self.config).to(self.formats.compute) @ patch_latent_weight
        return (x.float() + image_tokens.float()).to(self.formats.residual)


class Block(nn.Module):
    """One transformer block with pose-adaptive LayerNorm; the pose stream goes through at batch 1."""

    def __init__(self, config: TransformerConfig, formats: Formats):
        super().__init__()
        self.config, self.formats = config, formats

    def forward(
        self,
        video: Tensor,  # [B, N, D]
        text: Tensor,  # [B, L, D]
        pose: Tensor,  # [1, N, D]
        modulation: Tensor,  # [15, D] float32: this step's row of the block's table
        rope_cos: Tensor,  # [S, head_dim / 2] float32; text rows are 1
        rope_sin: Tensor,  # [S, head_dim / 2] float32; text rows are 0
        qkv_weight: Tensor,
        qkv_bias: Tensor,
        q_norm_weight: Tensor,
        q_norm_bias: Tensor,
        k_norm_weight: Tensor,
        k_norm_bias: Tensor,
        out_weight: Tensor,
        out_bias: Tensor,
        ff_in_weight: Tensor,
        ff_in_bias: Tensor,
        ff_out_weight: Tensor,
        ff_out_bias: Tensor,
        *cache: Tensor,  # of the forms that reuse keys and values (reuse.py)
    ) -> tuple[Tensor, ...]:
        eps, c, r = self.config.norm_eps, self.formats.compute, self.formats.residual
        rows = [modulation[i] for i in range(15)]
        length = text.shape[1]

        posed = norm(pose, rows[6], rows[7], eps)  # c' of PoseAdaLN
        video_in = norm(video, rows[0], rows[1], eps) + posed
        text_in = norm(text, rows[3], rows[4], eps)
        qkv = linear(torch.cat([text_in, video_in], dim=1).to(c), qkv_weight, qkv_bias)  # [B, S, 3D]
        q, k, v = qkv.split(self.config.width, dim=-1)
        q = norm(self._heads(q), q_norm_weight, q_norm_bias, 1e-6)  # per head, [B, S, heads, head_dim] float32
        k = norm(self._heads(k), k_norm_weight, k_norm_bias, 1e-6)
        attended, *kept = self._attention(q, k, v, rope_cos, rope_sin, *cache)
        attended = linear(attended, out_weight, out_bias)
        text = text.float() + rows[5] * attended[:, :length].float()
        video = video.float() + rows[2] * attended[:, length:].float()

        x = torch.cat([norm(text, rows[12], rows[13], eps), norm(video, rows[9], rows[10], eps)], dim=1).to(c)
        x = linear(F.gelu(linear(x, ff_in_weight, ff_in_bias), approximate="tanh"), ff_out_weight, ff_out_bias)
        text = text + rows[14] * x[:, :length].float()
        video = video + rows[11] * x[:, length:].float()
        # The next block sees the normed pose times its gate, without a residual.
        return video.to(r), text.to(r), (posed * rows[8]).to(r), *kept

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, heads, head_dim]"""
        return x.reshape(x.shape[0], x.shape[1], self.config.num_attention_heads, self.config.attention_head_dim)

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *cache: Tensor
    ) -> tuple[Tensor, ...]:
        """Rotary attention: q, k [B, S, heads, head_dim], v [B, S, D] -> [B, S, D] and what is kept of keys and values.

        Spelled out, so that compilers fuse it.
        """
        q, k = self._rotated(q, cos, sin), self._rotated(k, cos, sin)
        k, v, *kept = self._seen(k, self._heads(v), *cache)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        probabilities = torch.softmax((q @ k.transpose(2, 3)).float(), dim=-1).to(v.dtype)
        x = (probabilities @ v).transpose(1, 2)
        return x.reshape(x.shape[0], x.shape[1], self.config.width), *kept

    def _seen(self, k: Tensor, v: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        """The keys and values that are attended to, and what is kept of them; all [B, S, ...]."""
        return k, v

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding of two halves, [B, S, heads, head_dim] -> the same."""
        half = self.config.attention_head_dim // 2
        first, second = x[..., :half], x[..., half:]
        cos, sin = cos[:, None], sin[:, None]
        x = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return x.to(self.formats.compute)


class CpuBlock(Block):
    """The same block in ONNX Runtime's own operators, whose attention never holds a score matrix on a CPU.

    ONNX Runtime fuses attention only from these (domain com.microsoft, float32). No other runtime knows them, so the
    bundle holds this graph beside the portable one.
    """

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *cache: Tensor
    ) -> tuple[Tensor, ...]:
        position = torch.zeros(1, dtype=torch.int64)  # rows of the tables count from the first token
        q, k = (
            _runtime_operator("RotaryEmbedding", (x.reshape(v.shape), position, cos, sin), {}, like=v) for x in (q, k)
        )
        k, v, *kept = self._seen(k, v, *cache)
        attributes = {"num_heads": self.config.num_attention_heads, "scale": 1.0}
        return _runtime_operator("MultiHeadAttention", (q, k, v), attributes, like=q), *kept


def _runtime_operator(name: str, inputs: tuple[Tensor, ...], attributes: dict[str, Any], *, like: Tensor) -> Tensor:
    """A node of an operator that only ONNX Runtime has; the result has the type and shape of `like`."""
    return torch.onnx.ops.symbolic(
        f"com.microsoft::{name}", inputs, attributes, dtype=like.dtype, shape=like.shape, version=1
    )


class Head(nn.Module):
    """Final norms, projection and unpatchify, then guidance and the DPM-solver++ SDE update in float32.

    `coefficients` [7] float32 = guidance, alpha, sigma, sample, x0, x0_old, noise (runtime/scheduler.py): with
    v = v_neg + guidance * (v_pos - v_neg), x0 = alpha * x - sigma * v and
    x' = sample * x + x0_coefficient * x0 + x0_old_coefficient * x0_old + noise_coefficient * noise.
    With one half (B = 1) v is the prediction itself.
    """

    def __init__(self, config: TransformerConfig, formats: Formats):
        super().__init__()
        self.config, self.formats = config, formats

    def forward(
        self,
        video: Tensor,  # [B, N, D]
        modulation: Tensor,  # [2, D] float32
        latents: Tensor,  # [1, F, C, H, W] float32, as the next two
        x0_old: Tensor,
        noise: Tensor,
        coefficients: Tensor,
        norm_final_weight: Tensor,
        norm_final_bias: Tensor,
        proj_weight: Tensor,
        proj_bias: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = (norm_final_weight, norm_final_bias, proj_weight, proj_bias)
        prediction = self._prediction(video, modulation, latents, *weights)
        negative, positive = prediction[:1], prediction[-1:]
        v = negative + coefficients[0] * (positive - negative)
        return *self._stepped(v, latents, x0_old, noise, coefficients), prediction

    def _prediction(
        self,
        video: Tensor,
        modulation: Tensor,
        latents: Tensor,
        norm_final_weight: Tensor,
        norm_final_bias: Tensor,
        proj_weight: Tensor,
        proj_bias: Tensor,
    ) -> Tensor:
        """[B, F, C, H, W] float32"""
        eps = self.config.norm_eps
        x = norm(video, norm_final_weight, norm_final_bias, eps)
        x = norm(x, modulation[0], modulation[1], eps)
        return unpatchify(linear(x, proj_weight, proj_bias).float(), latents, self.config)

    def _stepped(
        self, v: Tensor, latents: Tensor, x0_old: Tensor, noise: Tensor, coefficients: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(latents after the step, x0)"""
        alpha, sigma, sample, c_x0, c_old, c_noise = (coefficients[i] for i in range(1, 7))
        x0 = alpha * latents - sigma * v
        return sample * latents + c_x0 * x0 + c_old * x0_old + c_noise * noise, x0


GRAPHS = ("modulation", "head_modulation", "conditioning", "stem", "block", "head")


def sample_sizes(config: TransformerConfig) -> dict[str, int]:
    """Sizes of the dynamic axes while graphs are traced, no two alike where graphs tell them apart."""
    video_tokens = 2 * 3 * 5
    sizes = {"T": 3, "L": 7, "N": video_tokens, "S": 7 + video_tokens, "B": 2}
    return sizes | {"F": 2 * config.time_patch, "H": 3 * config.patch_size, "W": 5 * config.patch_size}


def block_inputs(config: TransformerConfig, formats: Formats, tokens: str, rows: str) -> tuple[Port, ...]:
    """A block's inputs; the names of the axes of video tokens and of all tokens."""
    c, r, f32 = formats.compute, formats.residual, torch.float32
    d, head = config.width, config.attention_head_dim
    return (
        ("video", r, ("B", tokens, d)),
        ("text", r, ("B", "L", d)),
        ("pose", r, (1, tokens, d)),
        ("modulation", f32, (15, d)),
        ("rope_cos", f32, (rows, head // 2)),
        ("rope_sin", f32, (rows, head // 2)),
        ("qkv_weight", c, (d, 3 * d)),
        ("qkv_bias", c, (3 * d,)),
        *((f"{x}_norm_{y}", c, (head,)) for x in "qk" for y in ("weight", "bias")),
        ("out_weight", c, (d, d)),
        ("out_bias", c, (d,)),
        ("ff_in_weight", c, (d, 4 * d)),
        ("ff_in_bias", c, (4 * d,)),
        ("ff_out_weight", c, (4 * d, d)),
        ("ff_out_bias", c, (d,)),
    )


def block_outputs(config: TransformerConfig, formats: Formats, tokens: str) -> tuple[Port, ...]:
    """A block's outputs; the name of the axis of video tokens."""
    r, d = formats.residual, config.width
    return ("video_out", r, ("B", tokens, d)), ("text_out", r, ("B", "L", d)), ("pose_out", r, (1, tokens, d))


def head_signature(config: TransformerConfig, formats: Formats, halves: int | str, *kept: Port) -> Signature:
    """Of the head over so many guidance halves; `kept`: more data, between the step's and the weights."""
    c, f32 = formats.compute, torch.float32
    d, k, latents = config.width, config.patch_elements, (1, *_latents(config))
    return Signature(
        (
            ("video", formats.residual, (halves, "N", d)),
            ("modulation", f32, (2, d)),
            ("latents", f32, latents),
            ("x0_old", f32, latents),
            ("noise", f32, latents),
            ("coefficients", f32, (7,)),
            *kept,
            ("norm_final_weight", c, (d,)),
            ("norm_final_bias", c, (d,)),
            ("proj_weight", c, (d, k)),
            ("proj_bias", c, (k,)),
        ),
        (("latents_out", f32, latents), ("x0", f32, latents), ("prediction", f32, (halves, *_latents(config)))),
        sample_sizes(config),
    )


def _latents(config: TransformerConfig) -> tuple[int | str, ...]:
    return "F", config.latent_channels, "H", "W"


def graph_modules(config: TransformerConfig, precision: str) -> dict[str, tuple[nn.Module, Signature]]:
    """Module and signature of every graph of the exact loop, and of the float32 block for ONNX Runtime on a CPU."""
    formats = Formats(precision)
    c, r, f32 = formats.compute, formats.residual, torch.float32
    d, e, dt, k = config.width, config.time_embed_dim, config.text_embed_dim, config.patch_elements
    latents = (1, *_latents(config))
    sizes = sample_sizes(config)
    if config.use_learned_positional_embeddings:
        sizes["P"] = sizes["S"]

    def weight(name: str, *shape: int | str) -> Port:
        return name, c, shape

    time: list[Port] = [("time_sinusoid", f32, ("T", d))]
    time_weights = [weight("time_1_weight", d, e), weight("time_1_bias", e)]
    time_weights += [weight("time_2_weight", e, e), weight("time_2_bias", e)]
    if config.ofs_embed_dim is not None:
        o = config.ofs_embed_dim
        time.append(("ofs_sinusoid", f32, (1, o)))
        time_weights += [weight("ofs_1_weight", o, o), weight("ofs_1_bias", o)]
        time_weights += [weight("ofs_2_weight", o, o), weight("ofs_2_bias", o)]
    norm_weights = []
    for name, rows in (("norm1", 6), ("norm2", 6), ("pose_norm", 3)):
        norm_weights += [weight(f"{name}_linear_weight", e, rows * d), weight(f"{name}_linear_bias", rows * d)]
        norm_weights += [weight(f"{name}_weight", d), weight(f"{name}_bias", d)]
    position = [weight("position", 1, "P", d)] if config.use_learned_positional_embeddings else []
    block = Signature(block_inputs(config, formats, "N", "S"), block_outputs(config, formats, "N"), sizes)
    made: dict[str, tuple[nn.Module, Signature]] = {
        "modulation": (
            Modulation(config),
            Signature((*time, *time_weights, *norm_weights), (("table", f32, ("T", 15, d)),), sizes),
        ),
        "head_modulation": (
            HeadModulation(config),
            Signature(
                (
                    *time,
                    *time_weights,
                    weight("norm_out_linear_weight", e, 2 * d),
                    weight("norm_out_linear_bias", 2 * d),
                    weight("norm_out_weight", d),
                    weight("norm_out_bias", d),
                ),
                (("table", f32, ("T", 2, d)),),
                sizes,
            ),
        ),
        "conditioning": (
            Conditioning(config, formats),
            Signature(
                (
                    ("prompt_embeds", f32, ("B", "L", dt)),
                    ("image_latents", f32, latents),
                    ("pose_latents", f32, latents),
                    weight("text_weight", dt, d),
                    weight("text_bias", d),
                    weight("patch_image_weight", k, d),
                    weight("patch_pose_weight", k, d),
                    weight("patch_bias", d),
                    *position,
                ),
                (("text", r, ("B", "L", d)), ("image_tokens", r, (1, "N", d)), ("pose", r, (1, "N", d))),
                sizes,
            ),
        ),
        "stem": (
            Stem(config, formats),
            Signature(
                (("latents", f32, latents), ("image_tokens", r, (1, "N", d)), weight("patch_latent_weight", k, d)),
                (("video", r, (1, "N", d)),),
                sizes,
            ),
        ),
        "block": (Block(config, formats), block),
        "head": (Head(config, formats), head_signature(config, formats, "B")),
    }
    if precision == "fp32":
        made["block_cpu"] = CpuBlock(config, formats), block
    return made
