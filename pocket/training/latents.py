"""Training clips as latents, computed once per VAE and kept on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..clips import POSE_FRAMES, Masking, masked_reference
from ..figure import PARTS
from .drawn import training_clips
from .language import Language
from .settings import Shapes
from .train_vae import to_pixels
from .trainer import device_of

__all__ = ["MASKINGS", "Batch", "LatentStore", "latent_spread", "moments"]

MASKINGS: tuple[Masking, ...] = ("none", "background", "clothes")


@dataclass(frozen=True)
class Batch:
    """Posteriors sampled; unscaled. video, pose: [B, f, C, h, w]; image: [B, C, h, w]; person: [B, f, 1, h, w], the share
    of a latent's pixels that show the person; tokens: [B, L]."""

    video: Tensor
    pose: Tensor
    image: Tensor
    person: Tensor
    tokens: Tensor


@torch.no_grad()
def moments(vae: Any, clips: NDArray[np.uint8]) -> Tensor:
    """[B, F, H, W, 3] uint8 -> mean and standard deviation, [B, 2, f, C, h, w] float32, on the processor."""
    pixels = to_pixels(clips).to(device_of(vae))
    mean, log_variance = vae.encode(pixels).latent_dist.parameters.cpu().chunk(2, dim=1)
    return torch.stack([mean, torch.exp(0.5 * log_variance.clamp(-30, 20))], dim=1).transpose(2, 3)


def latent_spread(vae: Any, clips: int) -> float:
    """Root mean square of the video latents of training clips, sampled, which the scaling factor makes one."""
    squares = [moments(vae, clip.frames[None])[0].square().sum(0).mean() for _, clip in training_clips(0, clips)]
    return float(torch.stack(squares).mean().sqrt())


class LatentStore:
    """The first `count` training clips, made by `vae` in order, as far as they are missing; see `DrawnClips`."""

    def __init__(
        self, folder: Path, vae: Any, language: Language, shapes: Shapes, count: int, workers: int = 1
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        f, h, w = shapes.latent_size
        c = shapes.latent_channels
        self.vae, self.language, self._workers = vae, language, workers
        self._done = folder / "latents.json"
        self.clips = _file(folder / "clips.f16", np.float16, (count, 2, 2, f, c, h, w))  # video, pose; mean, std
        self.images = _file(folder / "images.f16", np.float16, (count, len(MASKINGS), 2, c, h, w))
        self.people = _file(folder / "people.u8", np.uint8, (count, f, h, w))
        self.tokens = _file(folder / "tokens.i16", np.int16, (count, language.length))
        self.count = min(json.loads(self._done.read_text())["count"], count) if self._done.exists() else 0

    def ensure(self, count: int) -> None:
        """Encodes until there are `count` clips."""
        for i, clip in training_clips(self.count, min(count, len(self.tokens)), self._workers):
            self.clips[i] = moments(self.vae, np.stack([clip.frames, clip.pose])).numpy()
            references = [masked_reference(clip.frames[0], clip.parts[0], masking) for masking in MASKINGS]
            self.images[i] = moments(self.vae, np.stack(references)[:, None])[:, :, 0].numpy()
            self.people[i] = _person(clip.parts, self.people.shape[1:])
            self.tokens[i] = self.language.ids(clip.caption)
            self.count = i + 1
            if self.count % 50 == 0 or self.count == count:
                self._done.write_text(json.dumps({"count": self.count}))

    def batch(
        self,
        random: np.random.Generator,
        noise: torch.Generator,
        ready: int,
        size: int,
        masked: tuple[float, float],
        dropout: float,
    ) -> Batch:
        """`size` random ones of the first `ready` clips; shares `masked` with a reference that lacks background or clothes, a
        share `dropout` with no caption."""
        rows = random.integers(ready, size=size)
        which = random.choice(len(MASKINGS), size=size, p=[1 - sum(masked), *masked])
        tokens = self.tokens[rows].astype(np.int64)
        tokens[random.random(size) < dropout] = self.language.ids("")

        def drawn(stored: NDArray[np.float16]) -> Tensor:
            mean, std = torch.from_numpy(stored.astype(np.float32)).unbind(1)
            return mean + std * torch.randn(mean.shape, generator=noise)

        return Batch(
            video=drawn(self.clips[rows, 0]),
            pose=drawn(self.clips[rows, 1]),
            image=drawn(self.images[rows, which]),
            person=torch.from_numpy(self.people[rows].astype(np.float32) / 255)[:, :, None],
            tokens=torch.from_numpy(tokens),
        )


def _person(parts: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """[F, H, W] parts -> [f, h, w] 0..255: the largest share over the frames of a latent."""
    frames, rows, columns = shape
    shown = (parts != PARTS.index("background")).astype(np.float32)
    size = shown.shape[1] // rows
    shares = shown.reshape(POSE_FRAMES, rows, size, columns, size).mean(axis=(2, 4))
    groups = [shares[:1], *np.split(shares[1:], frames - 1)]
    return np.stack([np.round(255 * group.max(0)).astype(np.uint8) for group in groups])


def _file(path: Path, kind: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    with path.open("ab") as file:
        file.truncate(int(np.prod(shape)) * np.dtype(kind).itemsize)
    return np.memmap(path, kind, "r+", shape=shape)
