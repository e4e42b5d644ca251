"""The buffers that reuse needs: what is allocated, and how many bytes that is, from the same list."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ...bundle.config import Geometry, TransformerConfig
from ..backends.base import Buffers
from ..backends.host import HOST
from .policy import ReusePolicy
from .tokens import active_count

__all__ = ["Buffer", "Widths", "allocate", "cache_bytes", "cache_layout"]

Kind = Literal["stream", "compute", "float", "index", "int8"]


@dataclass(frozen=True)
class Widths:
    """Bytes of a number in the streams between blocks, and in matrix products (so also of keys and values)."""

    stream: int
    compute: int

    @classmethod
    def of(cls, precision: str) -> Widths:
        """fp32, fp16 or bf16, as `export.transformer.Formats` has them."""
        return cls(stream=2 if precision == "bf16" else 4, compute=4 if precision == "fp32" else 2)


@dataclass(frozen=True)
class Buffer:
    """An array to allocate.

    apart: over so many of the first axes, at most two, every place is an array of its own: engines of a GPU take no view that
    begins just anywhere. host: only the processor reads it.
    """

    shape: tuple[int, ...]
    kind: Kind
    apart: int = 0
    host: bool = False

    def bytes(self, widths: Widths) -> int:
        width = {"stream": widths.stream, "compute": widths.compute, "float": 4, "index": 8, "int8": 1}[self.kind]
        return width * math.prod(self.shape)


def cache_layout(policy: ReusePolicy, config: TransformerConfig, size: Geometry, *, guided: bool) -> dict[str, Buffer]:
    """Every buffer that a loop with this policy needs beside those of the loop without reuse.

    guided: both guidance halves are computed.
    """
    halves = 2 if guided else 1
    n, d, layers = size.video_tokens, config.width, config.num_layers
    buffers: dict[str, Buffer] = {}
    if policy.reuses_guidance and guided:
        shape = (size.latent_frames, config.latent_channels, size.latent_height, size.latent_width)
        buffers["conditional"] = Buffer((1, *shape), "float")
    if policy.follows_changes:
        shape = (size.latent_frames, config.latent_channels, size.latent_height, size.latent_width)
        buffers["whole"] = Buffer(shape, "float", host=True)
    if policy.reuses_trunk:
        buffers["residuals"] = Buffer((halves, 1 + policy.trunk_order, 1, n, d), "stream", apart=2)
    if policy.adaptive:
        buffers["modulated"] = Buffer((2, 1, n, d), "stream", apart=1)
    if policy.reuses_trunk or policy.reuses_tokens:
        buffers["composed"] = Buffer((halves, n, d), "stream")
    if policy.reuses_tokens:
        active = active_count(policy, n)
        # Without its half, the unconditional prediction needs no keys.
        caching = 1 if policy.reuses_guidance else halves
        narrow = policy.token_cache == "int8"
        for name in ("keys", "values"):
            buffers[name] = Buffer((caching, layers, 1, n - active, d), "int8" if narrow else "compute", apart=2)
            if narrow:  # one block's at a time, as its graph gives and takes them
                buffers[f"wide_{name}"] = Buffer((caching, 1, n - active, d), "compute", apart=1)
        if narrow:
            buffers["scales"] = Buffer((caching, layers, 2, config.num_attention_heads), "float", apart=2)
        rows = active + config.max_text_seq_length
        buffers["active_pose"] = Buffer((1, active, d), "stream")
        buffers["active_stem"] = Buffer((1, active, d), "stream")
        buffers["active_video"] = Buffer((caching, 2, 1, active, d), "stream", apart=2)
        buffers["active_poses"] = Buffer((caching, 2, 1, active, d), "stream", apart=2)
        buffers["active_rope"] = Buffer((2, rows, config.attention_head_dim // 2), "float", apart=1)
        buffers["active"] = Buffer((active,), "index")
        buffers["kept"] = Buffer((n - active,), "index")
    return buffers


def cache_bytes(
    policy: ReusePolicy,
    config: TransformerConfig,
    size: Geometry,
    *,
    guided: bool,
    precision: str,
    device: bool = False,
) -> int:
    """Bytes of all buffers of `cache_layout`. `precision`: fp32, fp16 or bf16. `device`: only of those that lie on a GPU."""
    widths = Widths.of(precision)
    layout = cache_layout(policy, config, size, guided=guided)
    return sum(buffer.bytes(widths) for buffer in layout.values() if not (device and buffer.host))


def allocate(layout: Mapping[str, Buffer], buffers: Buffers, stream: np.dtype, compute: np.dtype) -> dict[str, Any]:
    """Every buffer by name; lists of them, nested, where a `Buffer` is `apart`. Of whatever content: what was never
    written is never used (the first probe reads some, but nobody looks at its number)."""
    known = {"float": np.float32, "index": np.int64, "int8": np.int8}
    kinds = {"stream": stream, "compute": compute, **{kind: np.dtype(known[kind]) for kind in known}}

    def made(buffer: Buffer) -> Any:
        place, kind = HOST if buffer.host else buffers, kinds[buffer.kind]
        outer, shape = buffer.shape[: buffer.apart], buffer.shape[buffer.apart :]
        if not outer:
            return place.empty(shape, kind)
        if len(outer) == 1:
            return [place.empty(shape, kind) for _ in range(outer[0])]
        return [[place.empty(shape, kind) for _ in range(outer[1])] for _ in range(outer[0])]

    return {name: made(buffer) for name, buffer in layout.items()}
