"""Training of the VAE on windows of drawn clips and pose drawings, cut as the runtime cuts time.

The norms of this VAE measure a whole time chunk, so it is trained on the chunks it will see: the first chunk of a clip of
21 frames has 13 (3 latents of 5 are decoded first); a single photograph; and, less often, whole clips in several chunks.
The runtime drops the first latent frame of a 1.5-style model and decodes the rest, so that the first latent that the decoder
sees stands for four frames, of which it makes the last. Half of the windows are decoded that way.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..clips import POSE_FRAMES, make_clip
from .drawn import DrawnClips
from .networks import make_vae
from .settings import Settings
from .start import load_weights
from .trainer import Part, Trainer, device_of

__all__ = ["photo_psnr", "train_vae"]

LATENTS = 3  # of a first time chunk in the decoder
FIRST = 200  # clips drawn before the first step
ENDS = re.compile("conv_in|conv_out")  # layers that AdamW trains; Muon has the others


def train_vae(
    folder: Path,
    settings: Settings,
    threads: int,
    start: Path | None = None,
    *,
    encoder: bool = True,
    device: torch.device | str = "cpu",
) -> Any:
    """Trains, or goes on training, to the end of the budget; returns the VAE with its averaged weights.

    `start`: a checkpoint whose VAE is the beginning. `encoder` False: only the decoder learns, so that latents stay what they
    are.
    """
    run = settings.vae
    torch.manual_seed(settings.seed)
    vae = make_vae(settings.shapes)
    if start is not None:
        load_weights(vae, start / "vae")
    vae.to(device).encoder.requires_grad_(encoder)
    trainer = Trainer.of(folder, {"vae": vae}, run, settings, threads, lambda name: ENDS.search(name) is None)
    if not trainer.done:
        on_processor = device_of(vae).type == "cpu"
        drawn = DrawnClips(folder, run.clips, threads)

        def parts() -> list[Part]:
            # A GPU would wait for clips that are drawn as training goes.
            ready = min(run.clips, FIRST + trainer.progress.step) if on_processor else run.clips
            drawn.ensure(ready)
            return [lambda: _loss(vae, drawn.pixels[:ready], trainer, settings, stills=start is None)]

        trainer.run(parts, {settings.sheet_every: lambda: _sheet(folder, vae, trainer, settings.sheet_clips)}, log=25)
    with torch.no_grad():
        for name, parameter in trainer.parameters.items():
            parameter.copy_(trainer.averaged[name])
    return vae.eval().requires_grad_(False)


def to_pixels(frames: np.ndarray) -> Tensor:
    """[B, F, H, W, 3] uint8 -> [B, 3, F, H, W] in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def _loss(vae: Any, clips: NDArray[np.uint8], trainer: Trainer, settings: Settings, stills: bool) -> dict[str, Tensor]:
    """`stills`: whether training begins with single frames only."""
    run, random = settings.vae, trainer.random
    draw = float(random.random())
    begins = stills and trainer.share < run.still_first
    trainer.pace = 1.0 if begins else run.window_pace
    drop = int(random.integers(2))  # whether the decoder's first latent stands for four frames, as in the runtime
    if begins or draw < run.still_share:
        kinds, length = [int(random.random() < 0.3) for _ in range(run.still_batch)], 1
    elif draw < run.still_share + run.long_share:
        kinds, length = [int(random.random() < 0.4)], POSE_FRAMES
    else:
        # Photographs, and as often as not poses.
        kinds = [int(random.random() < 0.3) for _ in range(run.window_batch)]
        length = 4 * (LATENTS + drop) - 3
    windows = []
    for kind in kinds:
        start = int(random.integers(POSE_FRAMES - length + 1))
        windows.append(clips[random.integers(len(clips)), kind, start : start + length])
    device = device_of(vae)
    pixels = to_pixels(np.stack(windows)).to(device)
    is_pose = torch.tensor(kinds, dtype=torch.float32)[:, None, None, None, None].to(device)

    mean, log_variance = vae.encode(pixels).latent_dist.parameters.chunk(2, dim=1)
    log_variance = log_variance.clamp(-30, 20)
    noise = torch.randn(mean.shape, generator=trainer.noise).to(device)
    latents = mean + torch.exp(0.5 * log_variance) * noise
    if length > 1:
        keep = latents.shape[2] - drop
        keep -= 1 - keep % 2  # an odd number of latents makes whole clips
        latents = latents[:, :, drop : drop + keep]
        first = 4 * drop
        pixels = pixels[:, :, first : first + 4 * keep - 3]
    decoded = vae.decode(latents).sample

    # Sticks are thin and dark seen by the whole: what is drawn counts more than the black around it.
    lit = (pixels.amax(1, keepdim=True) > -0.9).float()
    weight = 1 + 3 * is_pose * lit
    error = decoded - pixels
    absolute = (weight * error.abs()).mean()
    square = (weight * error.square()).mean()
    edges = sum((error.diff(dim=axis)).abs().mean() for axis in (3, 4))
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    loss = absolute + run.square * square + run.gradient * edges + run.kl * kl
    return {"loss": loss, "l1": absolute.detach(), "mse": square.detach(), "kl": kl.detach()}


@torch.no_grad()
def photo_psnr(vae: Any, clips: int, kind: str = "frames") -> tuple[float, np.ndarray]:
    """Mean PSNR (dB) of held-out clips of 17 frames, encoded and decoded in float32, and the last pair of clips."""
    results = []
    truth = rebuilt = np.zeros(0, np.uint8)
    for i in range(clips):
        clip = make_clip("held-out", i)
        truth = clip.frames[:17] if kind == "frames" else clip.pose[:17]
        pixels = vae.decode(vae.encode(to_pixels(truth[None]).to(device_of(vae))).latent_dist.mean).sample.cpu()
        rebuilt = ((pixels[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
        error = np.mean((rebuilt.astype(np.float64) - truth) ** 2, axis=(1, 2, 3))
        results.append(float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-9)))))
    return float(np.mean(results)), np.concatenate([truth[::3], rebuilt[::3]], axis=1)


def _sheet(folder: Path, vae: Any, trainer: Trainer, clips: int) -> None:
    frames, picture = photo_psnr(vae, clips)
    pose, pose_picture = photo_psnr(vae, clips, "pose")
    rows = np.concatenate([np.concatenate(list(p), axis=1) for p in (picture, pose_picture)], axis=0)
    Image.fromarray(rows).resize((rows.shape[1] * 2, rows.shape[0] * 2), 0).save(
        folder / f"sheet-{trainer.progress.step:06d}.png"
    )
    with (folder / "quality.jsonl").open("a") as file:
        line = {
            "step": trainer.progress.step,
            "hours": trainer.progress.seconds / 3600,
            "psnr": frames,
            "pose_psnr": pose,
        }
        file.write(json.dumps(line) + "\n")
