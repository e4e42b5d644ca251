"""The T5 v1.1 encoder as one `text_block` graph whose weights are inputs, and where those weights come from.

The encoder (Raffel et al. 2020, the v1.1 layout with a gated GELU) is the same block with other numbers in every layer.
So the graph holds no weights: it is run once per layer with that layer's weights. Embedding rows, the relative position
bias and the final norm are plain arithmetic that the runtime does on the host. There is no attention mask, because the
published pipeline lets pad tokens take part.

Residual stream. `hidden` is float32 in and out whatever the precision: T5's residual grows beyond float16's 65504, and
bfloat16's eight bits would lose what small later layers add. Norms and softmax are float32 islands without a matrix
product in them; every product runs in the graph's precision (Turing has no float32 GEMM in TensorRT).

The `wo` product overflows float16 as well (transformers keeps that matrix in float32 for this reason). In fp16 the
gated activations are therefore scaled by 2^-6 before it and the result by 2^6 after it, in float32. Powers of two move
no mantissa bit: 4.2 million fits, and only activations under 0.004 (float16's subnormals, times 64) lose digits.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from ..bundle.config import TextConfig
from ..bundle.errors import InputError
from ..bundle.precision import Precision
from .recipe import Recipe
from .trace import Signature

__all__ = [
    "EMBEDDING_ALIASES",
    "TextBlock",
    "check_text_config",
    "text_block_signature",
    "text_layer_recipe",
    "text_shared_recipe",
]

TORCH_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP16_GATE_SCALE = 2.0**-6

# The embedding's names in checkpoints; the second is the first again when both are there.
EMBEDDING_ALIASES = ("shared.weight", "encoder.embed_tokens.weight")


def check_text_config(values: Mapping[str, Any], source: str = "text_encoder/config.json") -> TextConfig:
    """The encoder's configuration from the checkpoint's JSON; `InputError` names `source` and the unfit value.

    Only the T5 v1.1 encoder is computed. transformers takes a missing `feed_forward_proj` for "relu", the first T5's
    layout, and derives `dense_act_fn` and `is_gated_act` from it where they are not written down.
    """
    fields = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True}
    for field, wanted in fields.items():
        value = values.get(field, "relu" if field == "feed_forward_proj" else wanted)
        if value != wanted:
            raise InputError(
                f"{source!r}: {field} is {value!r}; the text encoder must have the T5 v1.1 layout, "
                f"where it is {wanted!r}."
            )
    try:
        config = msgspec.convert(dict(values), TextConfig)
    except msgspec.ValidationError as error:
        raise InputError(f"{source!r} is no T5 configuration: {error}.") from error
    return config


class TextBlock(nn.Module):
    """One T5 v1.1 encoder layer without weights of its own. B prompts, S tokens, Dt channels."""

    def __init__(self, config: TextConfig, precision: Precision = "fp32"):
        super().__init__()
        self.heads, self.head_width, self.inner = config.num_heads, config.d_kv, config.inner
        self.ff = config.d_ff
        self.eps = config.layer_norm_epsilon
        self.dtype = TORCH_DTYPES[precision]
        self.gate_scale = FP16_GATE_SCALE if precision == "fp16" else 1.0

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Root-mean-square norm in float32: no mean is taken off and there is no bias."""
        scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.eps)
        return (hidden * scale * weight).to(self.dtype)

    def _attention(self, x: Tensor, position_bias: Tensor, qkv_weight: Tensor, out_weight: Tensor) -> Tensor:
        qkv = x @ qkv_weight  # [B, S, 3 * inner]
        query, key, value = (
            part.reshape(*part.shape[:2], self.heads, self.head_width).transpose(1, 2)
            for part in qkv.split(self.inner, -1)
        )  # [B, heads, S, d]
        # T5 does not divide by sqrt(d); its initialization holds that factor.
        scores = (query @ key.transpose(2, 3)).float() + position_bias  # [B, heads, S, S]
        mixed = scores.softmax(-1).to(self.dtype) @ value
        return mixed.transpose(1, 2).reshape(*x.shape[:2], self.inner) @ out_weight

    def _feed_forward(self, x: Tensor, wi_weight: Tensor, wo_weight: Tensor) -> Tensor:
        gate, linear = (x @ wi_weight).split(self.ff, -1)
        if self.gate_scale == 1.0:
            return ((nn.functional.gelu(gate, approximate="tanh") * linear) @ wo_weight).float()
        gated = nn.functional.gelu(gate, approximate="tanh") * (linear * self.gate_scale)
        return (gated @ wo_weight).float() * (1 / self.gate_scale)

    def forward(
        self,
        hidden: Tensor,
        position_bias: Tensor,
        norm1_weight: Tensor,
        qkv_weight: Tensor,
        attn_out_weight: Tensor,
        norm2_weight: Tensor,
        wi_weight: Tensor,
        wo_weight: Tensor,
    ) -> Tensor:
        """The next residual stream.

        Args:
            hidden: float32 [B, S, Dt].
            position_bias: float32 [1, heads, S, S], added to the scores.
            norm1_weight, norm2_weight: float32 [Dt].
            qkv_weight: [Dt, 3 * inner], columns ordered q, k, v, each head after head.
            attn_out_weight: [inner, Dt].
            wi_weight: [Dt, 2 * d_ff], columns wi_0 (through GELU, tanh form) then wi_1.
            wo_weight: [d_ff, Dt]. The matrices are in the graph's precision.

        Returns:
            float32 [B, S, Dt].
        """
        attended = self._attention(self._norm(hidden, norm1_weight), position_bias, qkv_weight, attn_out_weight)
        hidden = hidden + attended.float()
        return hidden + self._feed_forward(self._norm(hidden, norm2_weight), wi_weight, wo_weight)


def text_layer_recipe(config: TextConfig, layer: int) -> list[Recipe]:
    """Where the weight inputs of `text_block` for layer `layer` come from. Norms stay float32: they are small."""
    width, inner, ff = config.d_model, config.inner, config.d_ff
    attention = f"encoder.block.{layer}.layer.0"
    dense = f"encoder.block.{layer}.layer.1"
    qkv = tuple(f"{attention}.SelfAttention.{name}.weight" for name in "qkv")
    wi = tuple(f"{dense}.DenseReluDense.wi_{i}.weight" for i in (0, 1))
    return [
        Recipe("norm1_weight", (f"{attention}.layer_norm.weight",), (width,), dtype="fp32"),
        Recipe("qkv_weight", qkv, (width, 3 * inner), transpose=True),
        Recipe("attn_out_weight", (f"{attention}.SelfAttention.o.weight",), (inner, width), transpose=True),
        Recipe("norm2_weight", (f"{dense}.layer_norm.weight",), (width,), dtype="fp32"),
        Recipe("wi_weight", wi, (width, 2 * ff), transpose=True),
        Recipe("wo_weight", (f"{dense}.DenseReluDense.wo.weight",), (ff, width), transpose=True),
    ]


def text_shared_recipe(config: TextConfig, names: Container[str] = EMBEDDING_ALIASES) -> list[Recipe]:
    """The encoder's tensors outside the layers (`names`: the checkpoint's). All layers share layer 0's positions."""
    embedding = next((name for name in EMBEDDING_ALIASES if name in names), EMBEDDING_ALIASES[0])
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    shape = (config.relative_attention_num_buckets, config.num_heads)
    return [
        Recipe("embedding", (embedding,), (config.vocab_size, config.d_model)),
        Recipe("relative_attention_bias", (table,), shape, dtype="fp32"),
        Recipe("final_norm_weight", ("encoder.final_layer_norm.weight",), (config.d_model,), dtype="fp32"),
    ]


def text_block_signature(config: TextConfig, precision: Precision) -> Signature:
    """Inputs and output of graph `text_block`: `B` prompts of `S` tokens."""
    f32, compute = torch.float32, TORCH_DTYPES[precision]
    weights = tuple(
        (recipe.target, compute if recipe.dtype is None else f32, recipe.shape)
        for recipe in text_layer_recipe(config, 0)
    )
    hidden = ("B", "S", config.d_model)
    return Signature(
        inputs=(("hidden", f32, hidden), ("position_bias", f32, (1, config.num_heads, "S", "S")), *weights),
        outputs=(("hidden_out", f32, hidden),),
        sizes={"B": 2, "S": 16},
    )
