"""Bytes of activations that the compiler will plan for an engine, estimated before there is one.

TensorRT-RTX lays an engine's intermediate tensors out in one arena whose size follows from the largest shapes of the profile
alone: not from the weights' values, the other shapes, or the capability within SM80 and later. So a short formula per graph
says it: how many tensors of which size are alive at once. The counts were read off the compiler's own reports
(`activation_memory.json` and `activation_memory_reuse.json` in `benchmarks/results`; `docs/memory.md` says how far off the
formulas are). Other TensorRT versions
were not measured. An engine's report always takes precedence over this file.
"""

from __future__ import annotations

from collections.abc import Mapping

from .model_facts import FLOAT, ModelFacts
from .targets import Capability

__all__ = ["DECODER_CHUNK", "ENCODER_CHUNK", "estimate_activation"]

# What a matrix product that is split among more processors than it has tiles uses for its parts.
SCRATCH = 8_192_000
_NARROW = 100_000_000  # for convolutions of toy models, of less than _WIDE channels: up to that much, or nothing
_WIDE = 64
_TURING: Capability = (7, 5)
ENCODER_CHUNK = 8  # frames of the VAE's later time chunks, as in the published implementation
DECODER_CHUNK = 2  # latent frames
_VAE = ("vae_encoder_first", "vae_encoder_next", "vae_decoder_first", "vae_decoder_first_even", "vae_decoder_next")


def estimate_activation(
    graph: str, facts: ModelFacts, axes: Mapping[str, int], *, capability: Capability | None = None
) -> int:
    """Bytes of activations of the engine of `graph`, inputs, outputs and weights not counted.

    `axes`: the largest length of each of the graph's named axes ("B", "N", ..., as in the manifest's ports). `capability`: the
    oldest GPU that the engine is for; None: SM80 or later.

    Raises:
        ValueError: no such graph.
        KeyError: an axis of the graph is missing.
    """
    if graph in _VAE:
        return _vae(graph, facts, axes, capability)
    counts = {
        "block": _block,
        "stem": _stem,
        "head": _head,
        "conditioning": _conditioning,
        "modulation": _modulation,
        "head_modulation": _head_modulation,
        "text_block": _text_block,
        "tokens_keep": _tokens_keep,
        "tokens_reuse": _tokens_reuse,
        "tokens_put": _tokens_put,
        "cache_narrow": _cache,
        "cache_widen": _cache,
        "trunk_probe": _trunk_probe,
        "head_reuse": lambda facts, axes, capability: _head(facts, {**axes, "B": 1}, capability),
        **dict.fromkeys(("trunk_keep", "trunk_reuse", "tokens_take"), _nothing),
    }
    if graph not in counts:
        raise ValueError(f"there is no graph {graph!r}; there are {', '.join((*counts, *_VAE))}")
    return counts[graph](facts, axes, capability)


def _block(facts: ModelFacts, axes: Mapping[str, int], capability: Capability | None) -> int:
    """B * S tokens of D channels. In bytes per channel: the feed-forward's inner map has 8 (4 D channels of 2 bytes), its
    float32 input and both residual streams 12, and so on; two float32 sums per query and key head come on top."""
    config = facts.transformer
    b, s, d = axes["B"], axes["N"] + axes["L"], config.width
    elements = b * s * d
    sums = 8 * b * s * config.num_attention_heads
    if facts.base == "fp32":
        # Not fused: scores and their softmax. From some size on the compiler takes these from the device while it runs, and its
        # report leaves them out.
        scores = 2 * FLOAT * b * config.num_attention_heads * s * s
        return (36 if b == 1 else 48) * elements + sums + scores
    per_channel = _bytes_per_channel(facts, b, capability)
    large = per_channel * elements
    small = (per_channel - 4) * elements + SCRATCH
    if facts.precision == "int8-weights":
        # Widened before use: 9 of a block's 12 D x D are alive at the peak of a large clip, all of them at that of a small one.
        matrix = facts.element * d * d
        large, small = large + 9 * matrix, (per_channel - 6) * elements + 12 * matrix
    return max(large, small) + sums


def _bytes_per_channel(facts: ModelFacts, batch: int, capability: Capability | None) -> int:
    turing = capability is not None and capability <= _TURING
    integers = facts.precision in ("int8", "fp8")
    if batch == 1:
        return 30 if turing and not integers else 26
    return 26 + (4 if facts.base == "bf16" else 0) - (4 if integers else 0)


def _stem(facts: ModelFacts, axes: Mapping[str, int], capability: Capability | None) -> int:
    """The patches and their products."""
    config = facts.transformer
    return facts.element * axes["N"] * (config.width + config.patch_elements) + SCRATCH


def _head(facts: ModelFacts, axes: Mapping[str, int], capability: Capability | None) -> int:
    config = facts.transformer
    tokens = axes["B"] * axes["N"]
    return facts.element * tokens * (config.width + config.patch_elements) + SCRATCH * 5 // 4


def _conditioning(facts: ModelFacts, axes: Mapping[str, int], capability: Capability | None) -> int:
    """Patches of photo and pose, and the prompts; three products with their scratch."""
    config = facts.transformer
    patches = 2 * axes["N"] * config.patch_elements
    prompts = axes["B"] * axes["L"] * config.text_embed_dim
    return facts.element * (patches + prompts) + 3 * SCRATCH * 5 // 4


def _modulation(facts: ModelFacts, axes: Mapping[str, int], capability: Capability | None) -> int:
    config = facts.transformer
    rows = axes["T"] * (15 * FLOAT * config.width + 2 * config.time_embed_dim)
    return rows + (2 if axes["T"] > 1 else 4) * SCRATCH


def _head_modulation(facts: ModelFacts, axes: Mapping[str, int], capability: Capability | None) -> int:
    config = facts.transformer
    rows = axes["T"] * (2 * FLOAT * config.width + 4 * config.time_embed_dim)
    return rows + (1 if axes["T"] > 1 else 2) * SCRATCH


def _tokens_keep(facts: ModelFacts, axes: Mapping[str, int], capability: Capability | None) -> int:
    """The block's; what is kept is written as it is made."""
    if facts.precision != "int8-weights":
        return _block(facts, axes, capability)
    return _widening(facts, axes["B"], axes["N"] + axes["L"], capability)


def _tokens_reuse(facts: ModelFacts, axes: Mapping[str, int], capability: Capability | None) -> int:
    """B * Q tokens, whose attention has K more keys and values. The peak is the block's, or lies where they are joined."""
    config, b, q, d = facts.transformer, axes["B"], axes["A"] + axes["L"], facts.transformer.width
    sums = 8 * b * q * config.num_attention_heads
    kept = 2 * facts.element * b * axes["K"] * d
    if facts.base == "fp32":
        scores = 2 * FLOAT * b * config.num_attention_heads * q * (q + axes["K"])
        return (36 if b == 1 else 48) * b * q * d + sums + scores + kept
    per_channel = _bytes_per_channel(facts, b, capability)
    joining = (per_channel - 5) * b * q * d + kept + sums
    if facts.precision == "int8-weights":
        return max(_widening(facts, b, q, capability), joining + 3 * facts.element * d * d)
    whole = per_channel * b * q * d + sums
    if b == 1 and not facts.quantized and per_channel == 26:
        whole += kept  # where a lone half's feed-forward needs little, they are still there
    return max(whole, joining)


def _widening(facts: ModelFacts, b: int, s: int, capability: Capability | None) -> int:
    """The forms of a block that widen its int8 weights: 5 of their 12 D x D are alive at the peak."""
    config, d = facts.transformer, facts.transformer.width
    per_channel = max(30, _bytes_per_channel(facts, b, capability))
    return per_channel * b * s * d + 8 * b * s * config.num_attention_heads + 5 * facts.element * d * d


def _tokens_put(facts: ModelFacts, axes: Mapping[str, int], capability: Capability | None) -> int:
    """The map into which the rows are put, and their places."""
    return axes["N"] * (facts.stream * facts.transformer.width + 8)


def _cache(facts: ModelFacts, axes: Mapping[str, int], capability: Capability | None) -> int:
    """Keys and values in float32."""
    return 2 * FLOAT * axes["K"] * facts.transformer.width + SCRATCH // 8


def _trunk_probe(facts: ModelFacts, axes: Mapping[str, int], capability: Capability | None) -> int:
    """The normed tokens now and before, in float32; a stream of another type is widened first."""
    maps = 2 if facts.stream == FLOAT else 3
    return maps * FLOAT * axes["N"] * facts.transformer.width + SCRATCH // 8


def _nothing(facts: ModelFacts, axes: Mapping[str, int], capability: Capability | None) -> int:
    """From inputs to outputs with nothing in between."""
    return 0


def _text_block(facts: ModelFacts, axes: Mapping[str, int], capability: Capability | None) -> int:
    config = facts.text
    if config is None:
        return 0
    tokens = axes["B"] * axes["S"]
    scores = 0
    if facts.base == "fp32":
        scores = 2 * FLOAT * axes["B"] * config.num_heads * axes["S"] ** 2
    return facts.element * tokens * (3 * config.d_ff + 4 * config.d_model) + scores + SCRATCH


def _vae(graph: str, facts: ModelFacts, axes: Mapping[str, int], capability: Capability | None) -> int:
    """At full resolution a handful of maps is alive: a residual block's input, its normed and its padded form (two frames
    more), and results. The decoder's last level takes in the second width, and looks at the latents, enlarged."""
    vae = facts.vae
    ratio = vae.temporal_compression_ratio
    pixels = axes["latent_height"] * axes["latent_width"] * vae.spatial_compression**2
    # Of a level `halvings` further down, whose maps are that much smaller.
    widths = [width / 4**halvings for halvings, width in enumerate(vae.block_out_channels)]
    if graph.startswith("vae_encoder"):
        frames = axes["frames"] if graph == "vae_encoder_first" else ENCODER_CHUNK
        maps = (6 * frames + 3) if facts.base == "bf16" else (5 * frames + 2)
        channels = maps * max(widths)
    else:
        latents = axes["latent_frames"] if graph == "vae_decoder_first" else DECODER_CHUNK
        frames = ratio * latents - (ratio - 1 if graph == "vae_decoder_first" else 0)
        turing = capability is not None and capability <= _TURING
        entering = [4 * width for width in widths[1:]] or widths
        guide = vae.latent_channels * (1 if max(entering) >= vae.latent_channels else 2)
        channels = ((5 if turing else 4) * frames + 2) * max(entering) + (frames + 2) * guide
    narrow = max(vae.block_out_channels) < _WIDE
    return int(facts.element * channels * pixels) + (_NARROW if narrow else 0)
