"""How much an error of the latents shows in pixels: the decoder's answer to it, as one convolution.

To a decoder the directions of an error are not alike: in the pocket VAE they differ by 40 times in how much they change the
picture (mixtures of its 16 channels, in power). A transformer trained on the squared error of latents spends itself on all of
them. The convolution is fitted to what the decoder does with errors; the square of its output stands beside that of the
latents in the loss, at a small part of what the decoder itself and its gradients would cost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from dynamictrl_edge.bundle.atomic import atomic_file

from .trainer import device_of

__all__ = ["fit_pixel_metric", "kept_pixel_metric", "pixel_error"]

WINDOW = 3  # rows and columns of latents that a pixel is taken to depend on; in time its own and the one before
FRAMES = 4  # of a latent, but for the first
RANK = 32  # directions of an error that are looked at; they hold 99 % of what shows
SHARE = 0.35  # of the difference to another clip, as an error to learn from
CLIPS = 24


def pixel_error(kernel: Tensor, error: Tensor) -> Tensor:
    """What shows of an error of latents.

    kernel: [R, C, 2, 3, 3]; error: [B, f, C, h, w]. Returns [B, f - 1, 1, h, w], the mean square over the kernel's R
    outputs. The first latent frame is the one that the pipeline drops.
    """
    padded = functional.pad(error[:, 1:].transpose(1, 2), (1, 1, 1, 1, 1, 0))
    return functional.conv3d(padded, kernel).square().mean(1)[:, :, None]


@torch.no_grad()
def fit_pixel_metric(vae: Any, latents: Tensor, rank: int = RANK) -> Tensor:
    """The kernel for `pixel_error`, by least squares.

    latents: [N, f, C, h, w] of N > 1 clips, unscaled. The errors to learn from are parts of the differences between clips.
    Normalised so that of these errors the mean `pixel_error` is the mean square.
    """
    latents = latents.to(device_of(vae))
    channels = latents.shape[2]
    size = 2 * channels * WINDOW**2
    squares = torch.zeros(size, size, dtype=torch.float64)
    products, power, count = torch.zeros(()), 0.0, 0
    for clean, other in zip(latents[:, 1:], latents.roll(1, 0)[:, 1:], strict=True):
        error = SHARE * (other - clean)
        shown = _decode(vae, clean + error) - _decode(vae, clean)
        rows = _windows(error).cpu().double()
        squares += rows.T @ rows
        products = products + rows.T @ _patches(shown, *clean.shape[2:]).cpu().double()
        power += float(error[1:].square().sum())
        count += error[1:].numel()
    ridge = 1e-3 * squares.diag().mean() * torch.eye(size, dtype=torch.float64)
    left, values, _ = torch.linalg.svd(torch.linalg.solve(squares + ridge, products), full_matrices=False)
    kernel = (left * values)[:, :rank].T
    shows = float(((kernel @ squares) * kernel).sum()) * channels / (count * len(kernel))
    kernel = kernel * (power / count / shows) ** 0.5
    return kernel.reshape(-1, 2, channels, WINDOW, WINDOW).transpose(1, 2).float().contiguous()


def kept_pixel_metric(path: Path, vae: Any, latents: Tensor) -> Tensor:
    """The kernel in `path` (safetensors), fitted to `latents` and written there if there is none."""
    if not path.exists():
        kernel = fit_pixel_metric(vae, latents)
        with atomic_file(path) as target:
            save_file({"kernel": kernel}, target)
    return load_file(path)["kernel"]


def _decode(vae: Any, latents: Tensor) -> Tensor:
    """[f, C, h, w] -> [3, F, H, W]."""
    pixels: Tensor = vae.decode(latents[None].transpose(1, 2)).sample[0]
    return pixels


def _windows(error: Tensor) -> Tensor:
    """[f, C, h, w] -> [(f - 1) h w, 2 C 9]: of every latent but the first frame's, those that its pixels depend on."""
    around = functional.unfold(error, WINDOW, padding=WINDOW // 2)
    return torch.cat([around[:-1], around[1:]], dim=1).transpose(1, 2).flatten(0, 1)


def _patches(pixels: Tensor, rows: int, columns: int) -> Tensor:
    """[3, F, H, W] -> [(f - 1) h w, values]: the pixels of every latent but the first frame's."""
    moving = pixels[:, 1:]
    colours, frames, height, width = moving.shape
    cut = moving.reshape(colours, frames // FRAMES, FRAMES, rows, height // rows, columns, width // columns)
    return cut.permute(1, 3, 5, 0, 2, 4, 6).reshape(frames // FRAMES * rows * columns, -1)
