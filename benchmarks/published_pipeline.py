"""The whole published pipeline on the CPU in float32: photo, pose clip and prompt in, video out.

The peer for black-box comparisons at any seed, size, step count and prompt. The text encoder is transformers', the VAE
is diffusers', the denoising loop is `published_torch`; the random tensors are drawn in the published order from one
generator, so that a seed means the same video.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import T5EncoderModel, T5Tokenizer

from benchmarks.published_torch import denoise, load_scheduler, load_transformer, rotary_tables

__all__ = ["PublishedVideo", "published_pipeline"]


class PublishedVideo(TypedDict):
    """What one run gives."""

    prompt_embeds: NDArray[np.float32]  # [2 or 1, L, D], negative first
    initial_latents: NDArray[np.float32]  # [1, F, C, H, W]
    image_latents: NDArray[np.float32]  # [1, F, C, H, W]
    pose_latents: NDArray[np.float32]  # [1, F, C, H, W]
    final_latents: NDArray[np.float32]  # [1, F, C, H, W], with the padding frame where there is one
    saved_latents: NDArray[np.float32]  # [F', C, H, W], as `--save-latents` writes them: without the padding frame
    frames: NDArray[np.float32]  # [N, height, width, 3], 0..1; N may be more than was asked for
    frames_u8: NDArray[np.uint8]  # [N, height, width, 3]


@torch.no_grad()
def published_pipeline(
    checkpoint_dir: Path,
    image_u8: NDArray[np.uint8],
    control_u8: NDArray[np.uint8],
    prompt: str,
    negative_prompt: str,
    height: int,
    width: int,
    num_frames: int,
    steps: int,
    guidance: float,
    seed: int,
    tiling: bool,
) -> PublishedVideo:
    """Runs a diffusers-layout checkpoint folder as the published code does.

    image_u8: [rows, columns, 3] of any size, stretched to height x width with Lanczos. control_u8: the drawn pose,
    [frames, height, width, 3]; for 1.5-style checkpoints it has the raised length (see `raised_frames`).
    Raises `ValueError` when the pose clip has another shape.
    """
    transformer = load_transformer(checkpoint_dir / "transformer")
    scheduler = load_scheduler(checkpoint_dir / "scheduler")
    vae = AutoencoderKLCogVideoX.from_pretrained(
        checkpoint_dir / "vae", torch_dtype=torch.float32, low_cpu_mem_usage=False
    )
    if tiling:
        vae.enable_tiling()
        vae.enable_slicing()

    padding_frames, raised = raised_frames(num_frames, transformer.config.patch_size_t)
    if control_u8.shape != (raised, height, width, 3):
        raise ValueError(f"the pose clip is {control_u8.shape}; the model needs {(raised, height, width, 3)}")
    latent_frames = (raised - 1) // 4 + 1

    guided = guidance > 1.0
    prompts = [negative_prompt, prompt] if guided else [prompt]
    prompt_embeds = _encode_text(checkpoint_dir, prompts, transformer.config.max_text_seq_length)

    # The order of the draws is part of the contract: image posterior, pose posterior, first noise, steps.
    generator = torch.Generator().manual_seed(seed)
    scaling = vae.config.scaling_factor
    image_latent = _sampled_latents(vae, _photo(image_u8, height, width), generator)
    if not vae.config.invert_scale_latents:
        image_latent = image_latent * scaling  # with `invert_scale_latents` they stay as they are
    pose_latents = _sampled_latents(vae, _pose(control_u8), generator) * scaling
    image_latents = torch.cat([image_latent, torch.zeros_like(pose_latents[:, 1:])], dim=1)
    shape = (1, latent_frames, transformer.config.out_channels, height // 8, width // 8)
    initial = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma

    final = denoise(
        transformer,
        scheduler,
        prompt_embeds=prompt_embeds,
        latents=initial,
        image_latents=image_latents,
        pose_latents=pose_latents,
        rotary=rotary_tables(transformer.config, height, width, latent_frames),
        steps=steps,
        guidance=guidance,
        generator=generator,
    )
    kept = final[:, padding_frames:]
    decoded = vae.decode(1 / scaling * kept.permute(0, 2, 1, 3, 4)).sample  # [1, 3, N, height, width]
    frames = (decoded[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1).numpy()
    return PublishedVideo(
        prompt_embeds=prompt_embeds.numpy(),
        initial_latents=initial.numpy(),
        image_latents=image_latents.numpy(),
        pose_latents=pose_latents.numpy(),
        final_latents=final.numpy(),
        saved_latents=kept[0].numpy(),
        frames=frames,
        frames_u8=(frames * 255).round().astype(np.uint8),
    )


def raised_frames(num_frames: int, patch_size_t: int | None) -> tuple[int, int]:
    """(latent frames added, frames that the pose clip must have) when `num_frames` are asked for."""
    latent_frames = (num_frames - 1) // 4 + 1
    added = -latent_frames % patch_size_t if patch_size_t else 0
    return added, num_frames + 4 * added


def _encode_text(checkpoint_dir: Path, prompts: list[str], length: int) -> Tensor:
    """Padded to `length` and encoded without an attention mask: pad tokens take part. Returns [B,L,D]."""
    tokenizer = T5Tokenizer.from_pretrained(checkpoint_dir / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(checkpoint_dir / "text_encoder", dtype=torch.float32).eval()
    rows = []
    for prompt in prompts:
        tokens: Any = tokenizer([prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        rows.append(encoder(tokens.input_ids)[0])
    return torch.cat(rows)


def _photo(image_u8: NDArray[np.uint8], height: int, width: int) -> Tensor:
    """[rows, columns, 3] -> [1,3,1,height,width], -1..1."""
    picture = Image.fromarray(image_u8).resize((width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255.0)
    return (2.0 * pixels - 1.0).permute(2, 0, 1)[None, :, None]


def _pose(control_u8: NDArray[np.uint8]) -> Tensor:
    """[F,height,width,3] -> [1,3,F,height,width], -1..1."""
    pixels = torch.from_numpy(control_u8.astype(np.float32) / 255.0)
    return ((pixels - 0.5) / 0.5).permute(3, 0, 1, 2)[None]


def _sampled_latents(vae: AutoencoderKLCogVideoX, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """[1,3,F,height,width] -> a sample of the posterior, unscaled, [1,F,C,H,W]."""
    sample: Tensor = vae.encode(pixels).latent_dist.sample(generator)
    return sample.permute(0, 2, 1, 3, 4)
