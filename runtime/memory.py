"""What a clip needs in memory on the CPU, stage by stage, and what to do with a budget.

The stages take turns, so the peak is the largest of them. The counts are of buffers that the runtime or ONNX Runtime
really allocates (a test holds a clip's measured peak against the plan); the planner for GPUs counts device memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..bundle.config import Geometry, TransformerConfig, VaeConfig
from ..bundle.errors import DeviceError
from ..bundle.manifest import Manifest
from .measure import physical_memory

__all__ = ["GB", "MemoryPlan", "physical_memory", "plan_memory"]

GB = 1e9
PROCESS = 140_000_000  # Python, numpy, PyAV and ONNX Runtime, measured after a first small clip
FLOAT = 4  # ONNX Runtime computes fp16 graphs in float32 on the CPU
# Full-resolution feature maps that live at once in the decoder's last level under ONNX Runtime, which fuses little: 16 to
# 22 of as many channels as enter that level were measured (channels 8 to 64, 128 to 512 pixels, 3 to 17 latent frames).
VAE_MAPS = 24
SHARE = 0.8  # of the machine's memory may be used without being asked


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per stage and the decisions that follow from the budget (None: no limit)."""

    budget: int | None
    stages: dict[str, int]
    resident_blocks: int
    tiled: bool

    @property
    def peak(self) -> int:
        return max(self.stages.values())

    @property
    def batch(self) -> int:
        """Guidance halves that go through a block as one batch: a processor gains more from halves side by side."""
        return 1


def plan_memory(
    manifest: Manifest,
    size: Geometry,
    *,
    halves: int,
    tiling: str,
    budget: float | None,
    block: int,
    physical: int | None = None,
    caches: int = 0,
) -> MemoryPlan:
    """Decides how many blocks stay resident and whether the VAE works in tiles.

    Args:
        halves: 2 under guidance, else 1. budget: GB (1e9 bytes) for the process. None: no limit, as long as the clip needs
            at most `SHARE` of `physical`, the machine's memory in bytes (None: unknown); else that share is the budget.
        block: bytes of one block's weights. caches: bytes that the loop keeps for reuse between steps.

    Raises:
        DeviceError: the clip does not fit; the text gives the smallest budget that works and what else to change.
    """
    layers = manifest.transformer.num_layers
    fused = "block_cpu" in manifest.graphs
    limit = None if budget is None else int(budget * GB)
    if limit is None and physical is not None:
        free = _unlimited(manifest, size, halves, tiling == "on", block, fused, caches)
        limit = None if free.peak <= SHARE * physical else int(SHARE * physical)
    if limit is None:
        return _unlimited(manifest, size, halves, tiling == "on", block, fused, caches)
    place = f"--memory {budget:g}" if budget is not None else f"the {limit / GB:.1f} GB that this machine can spare"
    whole = vae_bytes(manifest.vae, size, size.height, size.width)
    tile = vae_bytes(manifest.vae, size, *_tile(manifest.vae, size))
    tiled = tiling == "on" or (tiling == "auto" and PROCESS + whole > limit)
    decode = tile if tiled else whole
    loop = loop_bytes(manifest, size, halves, block) + block_activations(manifest.transformer, size, fused) + caches
    stages = {"text": PROCESS + text_bytes(manifest), "vae": PROCESS + decode, "denoise": PROCESS + loop + 2 * block}
    if (least := max(stages.values())) > limit:
        stage = max(stages, key=lambda name: stages[name])
        advice = {
            "text": "the text encoder alone needs that",
            "vae": "make a smaller clip" + ("" if decode == tile else ", or let the VAE work in tiles: --tiling on"),
            "denoise": "make a smaller or shorter clip",
        }[stage]
        raise DeviceError(
            f"{size.width}x{size.height} with {size.frames} frames does not fit into {place}: the {stage} "
            f"stage needs {least / GB:.2f} GB. Give at least --memory {least / GB + 0.005:.2f}, or {advice}."
        )
    resident = min(layers, 2 + (limit - stages["denoise"]) // block)
    if resident < layers:
        # Streamed blocks pass through room for two; what else is resident counts on top.
        resident = max(0, resident - 2)
    stages["denoise"] = PROCESS + loop + min(layers, resident + 2) * block
    return MemoryPlan(limit, stages, resident, tiled)


def _unlimited(
    manifest: Manifest, size: Geometry, halves: int, tiled: bool, block: int, fused: bool, caches: int
) -> MemoryPlan:
    """Everything stays, and the guidance halves run side by side."""
    area = _tile(manifest.vae, size) if tiled else (size.height, size.width)
    layers = manifest.transformer.num_layers
    loop = loop_bytes(manifest, size, halves, block) + caches
    loop += halves * block_activations(manifest.transformer, size, fused)
    stages = {
        "text": PROCESS + text_bytes(manifest),
        "vae": PROCESS + vae_bytes(manifest.vae, size, *area),
        "denoise": PROCESS + loop + layers * block,
    }
    return MemoryPlan(None, stages, layers, tiled)


def loop_bytes(manifest: Manifest, size: Geometry, halves: int, block: int) -> int:
    """Buffers of the denoising loop, without weights and the block's activations."""
    config = manifest.transformer
    # Per half: video twice and pose twice; once: stem, photo tokens, pose.
    streams = (4 * halves + 3) * size.video_tokens * config.width
    latents = 6 * size.latent_frames * config.latent_channels * size.latent_height * size.latent_width
    widened = 2 * block if manifest.precision == "fp16" else 0  # a float32 copy of the block at hand
    if manifest.label in ("fp8", "int8-weights"):  # and of its quantized weights
        widened = max(widened, FLOAT * 12 * config.width**2)
    return FLOAT * (streams + latents) + widened


def block_activations(config: TransformerConfig, size: Geometry, fused: bool) -> int:
    """Bytes that one call of the block needs beside its inputs, outputs and weights; `fused`: no score matrix."""
    s, d = size.video_tokens + config.max_text_seq_length, config.width
    scores = 0 if fused else 2 * config.num_attention_heads * s * s  # query-key products and their softmax
    return FLOAT * max(scores + 6 * s * d, 10 * s * d)  # attention, or feed-forward with its two inner maps


def vae_bytes(vae: VaeConfig, size: Geometry, height: int, width: int) -> int:
    """One time chunk of the decoder (the encoder needs less) at [height, width], and the frames that wait beside it."""
    frames = min(size.pose_frames, 2 * vae.temporal_compression_ratio + 1)
    chunk = VAE_MAPS * max(vae.block_out_channels[:2]) * frames * height * width
    pixels = 3 * size.pose_frames * size.height * size.width
    return FLOAT * (chunk + pixels)


def text_bytes(manifest: Manifest) -> int:
    """One text block's weights and activations."""
    text = manifest.text
    if text is None:
        return 0
    s = manifest.transformer.max_text_seq_length
    weights = 4 * text.d_model * text.inner + 3 * text.d_model * text.d_ff
    activations = 2 * (text.num_heads * s * s + 4 * s * text.d_ff)
    return FLOAT * (weights + 2 * activations)


def _tile(vae: VaeConfig, size: Geometry) -> tuple[int, int]:
    return min(size.height, vae.sample_height // 2), min(size.width, vae.sample_width // 2)
