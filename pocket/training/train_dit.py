"""Training of transformer and text encoder together: v-prediction on stored latents, as CogVideoX image-to-video models.

What enters is what the pipeline gives a 1.5-style checkpoint: noisy latents and, on further channels, the photograph's
latents, unscaled, in the first frame and zero in the others; the pose's latents, scaled; the caption, padding included.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_dpm_cogvideox import CogVideoXDPMScheduler
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.published_torch import OFS_VALUE, PublishedTransformer, denoise

from ..clips import Clip, make_clip
from .language import Language
from .latents import Batch, LatentStore, moments
from .networks import SCHEDULER, make_text_encoder, make_transformer, rotary
from .pixels import CLIPS, kept_pixel_metric, pixel_error
from .settings import Settings
from .start import load_weights
from .trainer import Part, Trainer, device_of

__all__ = ["Networks", "sample", "train_dit"]

FIRST = 600  # clips encoded before the first step
EARLIER = (50, 300)  # timesteps by which an estimate is older than the noise that is added to it
HIDDEN = re.compile(r"\.(attn1\.to_|ff\.net|SelfAttention\.[qkvo]\.|DenseReluDense)")  # matrices that Muon trains


@dataclass(frozen=True)
class Networks:
    """Everything that animates, in PyTorch."""

    settings: Settings
    vae: Any
    transformer: PublishedTransformer
    text_encoder: Any
    language: Language
    scaling_factor: float


@dataclass(frozen=True)
class Tables:
    """What every step needs and none changes, on the device: cumulative alphas [1000]; cos and sin of the rotary embedding,
    [N, head dim] each; if errors count in pixels, the kernel for `pixel_error`. `bf16`: products of matrices in bfloat16."""

    alphas: Tensor
    rotary: tuple[Tensor, Tensor]
    kernel: Tensor | None
    bf16: bool = False

    @classmethod
    def of(cls, settings: Settings, kernel: Tensor | None, device: torch.device | str, *, bf16: bool = False) -> Tables:
        alphas = CogVideoXDPMScheduler.from_config(SCHEDULER).alphas_cumprod.float().to(device)
        return cls(alphas, _rotary(settings, device), None if kernel is None else kernel.to(device), bf16)


def train_dit(
    folder: Path,
    settings: Settings,
    vae: Any,
    language: Language,
    scaling: float,
    threads: int,
    keep: Callable[[Networks], object],
    start: Path | None = None,
    device: torch.device | str = "cpu",
    *,
    bf16: bool = False,
) -> Networks:
    """Trains, or goes on training, to the end of the budget; `keep` is given the averaged networks now and then.

    `start`: a checkpoint whose transformer and text encoder are the beginning. `bf16`: their products in bfloat16; weights,
    sums over a batch and what the optimizers do stay float32.
    """
    run = settings.dit
    torch.manual_seed(settings.seed)
    transformer, text_encoder = make_transformer(settings.shapes), make_text_encoder(settings.shapes)
    if start is not None:
        load_weights(transformer, start / "transformer")
        load_weights(text_encoder, start / "text_encoder")
    networks = Networks(settings, vae.to(device), transformer.to(device), text_encoder.to(device), language, scaling)
    models = {"transformer": transformer, "text_encoder": text_encoder}
    trainer = Trainer.of(folder, models, run, settings, threads, lambda name: HIDDEN.search(name) is not None)
    if not trainer.done:
        on_processor = device_of(transformer).type == "cpu"
        store = LatentStore(folder, vae, language, settings.shapes, run.clips, threads)
        kernel = None
        if run.pixel_share > 0:
            store.ensure(min(run.clips, CLIPS))
            means = torch.from_numpy(store.clips[: min(run.clips, CLIPS), 0, 0].astype(np.float32))
            kernel = kept_pixel_metric(folder / "pixels.safetensors", vae, means)
        tables = Tables.of(settings, kernel, device, bf16=bf16)

        def parts() -> list[Part]:
            # A GPU would wait for clips that are encoded as training goes.
            ready = min(run.clips, FIRST + trainer.progress.step // 2) if on_processor else run.clips
            store.ensure(ready)
            masked = run.without_background, run.without_clothes
            batch = store.batch(trainer.random, trainer.noise, ready, run.batch, masked, run.caption_dropout)
            count = threads if on_processor and run.batch % threads == 0 else 1
            return _losses(networks, batch, tables, trainer.random, trainer.noise, count)

        def look() -> None:
            _sheet(folder, networks, trainer, settings.sheet_clips)
            keep(networks)

        trainer.run(parts, {settings.sheet_every: look})
    with torch.no_grad():
        for name, parameter in trainer.parameters.items():
            parameter.copy_(trainer.averaged[name])
    for model in trainer.models.values():
        model.eval().requires_grad_(False)
    return networks


def _losses(
    networks: Networks,
    batch: Batch,
    tables: Tables,
    random: np.random.Generator,
    generator: torch.Generator,
    count: int,
) -> list[Part]:
    """The loss of a batch, in `count` equal shares of it.

    Of a share `own_share` of the samples the noise is added to the model's estimate at an earlier, noisier timestep instead
    of the truth, which stays the target: sampling knows no other latents, and errors of one step are mended in the next
    only by a model that has seen them. With a kernel, a share `pixel_share` of the loss is what shows of the error in pixels.
    """
    run, scaling, alphas, device = networks.settings.dit, networks.scaling_factor, tables.alphas, tables.alphas.device
    batch = Batch(*(tensor.to(device) for tensor in (batch.video, batch.pose, batch.image, batch.person, batch.tokens)))
    clean = batch.video * scaling
    size, last = len(clean), len(alphas) - 1
    # One timestep from each of `size` equal spans: the loss of a batch then says less about its luck.
    spans = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    timesteps = (spans * len(alphas)).long().clamp(max=last)
    noise = torch.randn(clean.shape, generator=generator).to(device)
    own = random.random(size) < run.own_share
    # Half of the estimates are made from nothing but noise, as the first step's; half one step of 20 to 3 before.
    before = timesteps + torch.randint(*EARLIER, (size,), generator=generator)
    before = torch.where(torch.rand(size, generator=generator) < 0.5, last, before.clamp(max=last)).to(device)
    noise_before = torch.randn(clean.shape, generator=generator).to(device)
    timesteps = timesteps.to(device)
    image = torch.cat([batch.image[:, None], torch.zeros_like(clean[:, 1:])], dim=1)
    pose = batch.pose * scaling
    # The error of v is that of the estimate over 1 - alpha, which tells little from nothing where the estimate was the
    # model's own and hardly any noise hides it.
    remains = (1 - alphas[timesteps]).where(torch.from_numpy(own).to(device), torch.ones((), device=device))
    weight = (1 + run.person_weight * batch.person) * remains[:, None, None, None, None]
    weight = weight / weight.mean()

    def velocity_of(noisy: Tensor, rows: Any, times: Tensor) -> Tensor:
        # No cache of rounded weights: it is one for all threads, and a share has a thread of its own.
        rounding = torch.autocast(device.type, torch.bfloat16, cache_enabled=False) if tables.bf16 else nullcontext()
        with rounding:
            given = (
                torch.cat([noisy, image[rows]], dim=2),
                networks.text_encoder(batch.tokens[rows])[0],
                times,
                pose[rows],
                tables.rotary,
                torch.full((1,), OFS_VALUE, device=device),
            )
            velocity: Tensor = networks.transformer(*given)
        return velocity.float()

    def share(index: int) -> dict[str, Tensor]:
        rows = np.arange(index, size, count)  # every share has all spans of time
        base = clean[rows]
        where = np.flatnonzero(own[rows])
        if len(where):
            mine = rows[where]
            with torch.no_grad():
                signal, rest = _roots(alphas[before[mine]])
                noisy = signal * clean[mine] + rest * noise_before[mine]
                base[where] = signal * noisy - rest * velocity_of(noisy, mine, before[mine])
        signal, rest = _roots(alphas[timesteps[rows]])
        noisy = signal * base + rest * noise[rows]
        # The v from which the scheduler's estimate, signal x - rest v, is the truth.
        velocity = (signal * noisy - clean[rows]) / rest
        error = velocity_of(noisy, rows, timesteps[rows]) - velocity
        loss = (weight[rows] * error.square()).mean()
        if tables.kernel is not None:
            shown = (weight[rows, 1:] * pixel_error(tables.kernel, error)).mean()
            loss = torch.lerp(loss, shown, run.pixel_share)
        square = error.detach().square()
        middle = len(square) // 2
        return {
            "loss": loss,
            "mse": square.mean(),
            "mse_noisy": square[middle:].mean(),
            "mse_clean": square[:middle].mean(),
        }

    return [partial(share, index) for index in range(count)]


def _rotary(settings: Settings, device: torch.device | str) -> tuple[Tensor, Tensor]:
    cos, sin = rotary(settings.shapes)
    return cos.to(device), sin.to(device)


def _roots(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of signal and noise, [B, 1, 1, 1, 1] each."""
    alpha = alpha[:, None, None, None, None]
    return alpha.sqrt(), (1 - alpha).sqrt()


@torch.no_grad()
def sample(
    networks: Networks,
    reference: NDArray[np.uint8],
    pose: NDArray[np.uint8],
    caption: str,
    *,
    steps: int = 10,
    guidance: float = 1.0,
    seed: int = 0,
) -> NDArray[np.uint8]:
    """reference [H, W, 3], pose [F, H, W, 3] -> [F - 4, H, W, 3], as the pipeline does it, but for the stream of noise."""
    generator, device = torch.Generator().manual_seed(seed), device_of(networks.transformer)

    def drawn(frames: NDArray[np.uint8]) -> Tensor:
        mean, std = moments(networks.vae, frames[None])[0]
        return (mean + std * torch.randn(mean.shape, generator=generator))[None].to(device)

    image = drawn(reference[None])
    pose_latents = drawn(pose) * networks.scaling_factor
    captions = ["", caption] if guidance > 1 else [caption]
    tokens = torch.from_numpy(np.stack([networks.language.ids(text) for text in captions])).to(device)
    final = denoise(
        networks.transformer,
        CogVideoXDPMScheduler.from_config(SCHEDULER),
        prompt_embeds=networks.text_encoder(tokens)[0],
        latents=torch.randn(pose_latents.shape, generator=generator).to(device),
        image_latents=torch.cat([image, torch.zeros_like(pose_latents[:, 1:])], dim=1),
        pose_latents=pose_latents,
        rotary=_rotary(networks.settings, device),
        steps=steps,
        guidance=guidance,
        generator=generator,
    )
    latents = (final[:, 1:] / networks.scaling_factor).transpose(1, 2)
    pixels = networks.vae.decode(latents).sample[0].cpu()
    frames: NDArray[np.uint8] = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    return frames


def _sheet(folder: Path, networks: Networks, trainer: Trainer, clips: int) -> None:
    """Held-out clips: reference, every fourth pose, truth, output; and how far output, copy and truth are apart."""
    rows, ours, copies = [], [], []
    for i in range(clips):
        clip = make_clip("held-out", i, masking="none" if i < clips - 2 else ("background", "clothes")[i % 2])
        made = sample(
            networks, clip.reference, clip.pose, clip.caption, guidance=1.0 if clip.masking == "none" else 2.0, seed=i
        )
        if clip.masking == "none":
            ours.append(_psnr(made, clip.truth))
            copies.append(_psnr(np.broadcast_to(clip.reference, clip.truth.shape), clip.truth))
        rows.append(_row(clip, made))
    picture = np.concatenate(rows)
    Image.fromarray(picture).resize((picture.shape[1] * 2, picture.shape[0] * 2), 0).save(
        folder / f"sheet-{trainer.progress.step:06d}.png"
    )
    line = {
        "step": trainer.progress.step,
        "hours": trainer.progress.seconds / 3600,
        "psnr": float(np.mean(ours)) if ours else None,  # a sheet of two has masked photographs only
        "copy": float(np.mean(copies)) if copies else None,
    }
    with (folder / "quality.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def _row(clip: Clip, made: NDArray[np.uint8]) -> NDArray[np.uint8]:
    shown = range(0, len(made), 4)
    lead = len(clip.pose) - len(made)
    strips = [
        [clip.reference],
        [clip.pose[lead + i] for i in shown],
        [clip.truth[i] for i in shown],
        [made[i] for i in shown],
    ]
    return np.concatenate([frame for strip in strips for frame in strip], axis=1)


def _psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    error = np.mean((a.astype(np.float64) - b) ** 2, axis=(1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-9))))
