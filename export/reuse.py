"""Graphs of the reuse between steps, beside those of the exact loop in transformer.py; see runtime/reuse for how they run.

Axes: A active video tokens, Q = L + A, K = N - A kept rows; the others as in transformer.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..bundle.config import TransformerConfig
from .trace import Signature
from .transformer import Block, CpuBlock, Formats, Head, block_inputs, block_outputs, head_signature, norm, sample_sizes

__all__ = ["REUSE_GRAPHS", "reuse_modules"]

REUSE_GRAPHS = (
    *("head_reuse", "trunk_keep", "trunk_reuse", "trunk_probe"),
    *("tokens_keep", "tokens_reuse", "tokens_take", "tokens_put"),
    *("cache_narrow", "cache_widen"),
)
_STEPS = 127  # of int8 to each side of 0


class _Keeps(Block):
    """A block that also gives the keys (normed and rotated) and values of some of its rows, for `_Reuses`."""

    def _seen(self, k: Tensor, v: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        (rows,) = cache  # [K] int64, rows of [text; video]
        shape = (k.shape[0], rows.shape[0], self.config.width)
        return k, v, k.index_select(1, rows).reshape(shape), v.index_select(1, rows).reshape(shape)


class _Reuses(Block):
    """A block for the active video tokens only: the others take part with the keys and values that `_Keeps` gave.

    The inputs are the block's with A active tokens in the place of N. Attention does not ask for the order of keys, so
    that cached and fresh ones are joined, and nothing is scattered.
    """

    def _seen(self, k: Tensor, v: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        keys, values = (x.reshape(x.shape[0], x.shape[1], *k.shape[2:]) for x in cache)  # [B, K, D]
        return torch.cat([keys, k], dim=1), torch.cat([values, v], dim=1)


class TokensKeep(_Keeps, Block):
    """`tokens_keep`"""


class CpuTokensKeep(_Keeps, CpuBlock):
    """`tokens_keep_cpu`"""


class TokensReuse(_Reuses, Block):
    """`tokens_reuse`"""


class CpuTokensReuse(_Reuses, CpuBlock):
    """`tokens_reuse_cpu`"""


class TokensTake(nn.Module):
    """Rows of the active tokens: [1, N, D], [A] -> [1, A, D]."""

    def forward(self, video: Tensor, active: Tensor) -> Tensor:
        return video.index_select(1, active)


class TokensPut(nn.Module):
    """Rows of the active tokens put back in their places among the others."""

    def forward(self, video: Tensor, rows: Tensor, active: Tensor) -> Tensor:
        # One batch row at a time comes here; rows along the first axis are scattered with the least memory.
        return torch.index_put(video[0], (active,), rows[0])[None]


class CacheNarrow(nn.Module):
    """Keys and values [1, K, D] as int8, and the scale of each head [2, heads] float32: its largest magnitude over all rows
    is 127 steps."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads = config.num_attention_heads

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        made, scales = zip(*map(self._narrowed, (keys, values)), strict=True)
        return *made, torch.cat(scales)

    def _narrowed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        heads = x.reshape(x.shape[0], x.shape[1], self.heads, -1).float()
        scale = heads.abs().amax(dim=(1, 3)).clamp_min(1e-30) / _STEPS  # [1, heads]; of a head of zeros, any will do
        # TensorRT takes scales of quantizers as constants only, so the head's own is divided by before.
        steps = (heads / scale[:, None, :, None]).reshape(x.shape)
        return _quantizer("QuantizeLinear", steps, torch.int8), scale


class CacheWiden(nn.Module):
    """What `CacheNarrow` made, as keys and values again."""

    def __init__(self, config: TransformerConfig, formats: Formats):
        super().__init__()
        self.heads, self.formats = config.num_attention_heads, formats

    def forward(self, keys_narrow: Tensor, values_narrow: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._widened(x, scales[i]) for i, x in enumerate((keys_narrow, values_narrow)))

    def _widened(self, x: Tensor, scale: Tensor) -> Tensor:
        steps = _quantizer("DequantizeLinear", x, torch.float32)
        heads = steps.reshape(x.shape[0], x.shape[1], self.heads, -1) * scale[:, None]
        return heads.reshape(x.shape).to(self.formats.compute)


def _quantizer(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A quantizer of int8 with steps of 1."""
    inputs = (x, torch.ones((), device=x.device), torch.zeros((), dtype=torch.int8, device=x.device))
    made = torch.onnx.ops.symbolic(name, inputs, {}, dtype=dtype, shape=x.shape)
    return made.to(x.device)  # it is made on the processor, whatever device is traced


class TrunkKeep(nn.Module):
    """What all blocks together add to the stem's tokens."""

    def __init__(self, formats: Formats):
        super().__init__()
        self.formats = formats

    def forward(self, stem: Tensor, video: Tensor) -> Tensor:
        return (video.float() - stem.float()).to(self.formats.residual)


class TrunkReuse(nn.Module):
    """The stem's tokens plus a weighted sum of two kept residuals; `weights` [2] float32: of the newest, of the one before."""

    def __init__(self, formats: Formats):
        super().__init__()
        self.formats = formats

    def forward(self, stem: Tensor, newest: Tensor, before: Tensor, weights: Tensor) -> Tensor:
        residual = weights[0] * newest.float() + weights[1] * before.float()
        return (stem.float() + residual).to(self.formats.residual)


class TrunkProbe(nn.Module):
    """How far the first block's modulated input has moved: mean |now - before| over mean |before|, as in TeaCache
    (arXiv 2411.19108). `modulated` is `before` of the next step."""

    def __init__(self, config: TransformerConfig, formats: Formats):
        super().__init__()
        self.config, self.formats = config, formats

    def forward(self, video: Tensor, modulation: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        now = norm(video, modulation[0], modulation[1], self.config.norm_eps)
        old = before.float()
        change = (now - old).abs().mean() / old.abs().mean().clamp_min(1e-12)
        return now.to(self.formats.residual), change.reshape(1)


class HeadReuse(Head):
    """The head where only the conditional half ran: the difference of the halves is that of an earlier prediction.

    With d = kept_pos - kept_neg, v = v_neg + guidance * d and v_neg = v_pos - d give v = v_pos + (guidance - 1) * d;
    `coefficients[0]` is the factor of d.
    """

    def forward(  # type: ignore[override]  # one input more, after the data
        self,
        video: Tensor,  # [1, N, D]
        modulation: Tensor,
        latents: Tensor,
        x0_old: Tensor,
        noise: Tensor,
        coefficients: Tensor,
        kept: Tensor,  # [2, F, C, H, W] float32: an earlier prediction of both halves
        norm_final_weight: Tensor,
        norm_final_bias: Tensor,
        proj_weight: Tensor,
        proj_bias: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = (norm_final_weight, norm_final_bias, proj_weight, proj_bias)
        prediction = self._prediction(video, modulation, latents, *weights)
        v = prediction + coefficients[0] * (kept[1:] - kept[:1])
        return *self._stepped(v, latents, x0_old, noise, coefficients), prediction


def reuse_modules(config: TransformerConfig, precision: str) -> dict[str, tuple[nn.Module, Signature]]:
    """Module and signature of every graph of reuse, and of the float32 ones for ONNX Runtime on a CPU."""
    formats = Formats(precision)
    c, r, f32 = formats.compute, formats.residual, torch.float32
    d, heads = config.width, config.num_attention_heads
    sizes = sample_sizes(config)
    active_tokens = 11
    sizes |= {"A": active_tokens, "Q": sizes["L"] + active_tokens, "K": sizes["N"] - active_tokens}
    video, active = (1, "N", d), ("active", torch.int64, ("A",))
    kept = ("kept", f32, (2, "F", config.latent_channels, "H", "W"))
    keys_values = tuple((name, c, ("B", "K", d)) for name in ("keys", "values"))
    keep = Signature(
        (*block_inputs(config, formats, "N", "S"), ("rows", torch.int64, ("K",))),
        (*block_outputs(config, formats, "N"), *keys_values),
        sizes,
    )
    reuse = Signature(
        (*block_inputs(config, formats, "A", "Q"), *keys_values), block_outputs(config, formats, "A"), sizes
    )
    made: dict[str, tuple[nn.Module, Signature]] = {
        "head_reuse": (HeadReuse(config, formats), head_signature(config, formats, 1, kept)),
        "trunk_keep": (
            TrunkKeep(formats),
            Signature((("stem", r, video), ("video", r, video)), (("residual", r, video),), sizes),
        ),
        "trunk_reuse": (
            TrunkReuse(formats),
            Signature(
                (("stem", r, video), ("newest", r, video), ("before", r, video), ("weights", f32, (2,))),
                (("video_out", r, video),),
                sizes,
            ),
        ),
        "trunk_probe": (
            TrunkProbe(config, formats),
            Signature(
                (("video", r, video), ("modulation", f32, (15, d)), ("before", r, video)),
                (("modulated", r, video), ("change", f32, (1,))),
                sizes,
            ),
        ),
        "tokens_keep": (TokensKeep(config, formats), keep),
        "tokens_reuse": (TokensReuse(config, formats), reuse),
        "tokens_take": (
            TokensTake(),
            Signature((("video", r, video), active), (("video_out", r, (1, "A", d)),), sizes),
        ),
        "tokens_put": (
            TokensPut(),
            Signature((("video", r, video), ("rows", r, (1, "A", d)), active), (("video_out", r, video),), sizes),
        ),
    }
    narrow = (
        *((f"{name}_narrow", torch.int8, (1, "K", d)) for name in ("keys", "values")),
        ("scales", f32, (2, heads)),
    )
    wide = tuple((name, c, (1, "K", d)) for name in ("keys", "values"))
    made["cache_narrow"] = CacheNarrow(config), Signature(wide, narrow, sizes)
    made["cache_widen"] = CacheWiden(config, formats), Signature(narrow, wide, sizes)
    if precision == "fp32":
        made["tokens_keep_cpu"] = CpuTokensKeep(config, formats), keep
        made["tokens_reuse_cpu"] = CpuTokensReuse(config, formats), reuse
    return made
