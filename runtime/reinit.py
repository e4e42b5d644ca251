"""Noise re-initialisation, the published `re_init_noise_latent`: low frequencies from the photo, high ones from noise.

After FreeInit (arXiv 2312.07537) with the published settings: a Gaussian low-pass of normalised stop frequency 0.25. The
published implementation filters over (channel, row, column), not over time; so does this.
"""

from __future__ import annotations

import numpy as np

from .noise import NoiseSource
from .scheduler import SchedulerConfig, alphas_cumprod

__all__ = ["gaussian_low_pass", "reinitialised"]

STOP = 0.25
AXES = (-3, -2, -1)


def gaussian_low_pass(shape: tuple[int, int, int], stop: float = STOP) -> np.ndarray:
    """[C, H, W] float64 weights for a centred spectrum: exp(-d / (2 stop^2)), d the squared normalised frequency."""
    axes = [(2 * np.arange(n) / n - 1) ** 2 for n in shape]
    distance = axes[0][:, None, None] + axes[1][None, :, None] + axes[2][None, None, :]
    return np.exp(-distance / (2 * stop**2))


def reinitialised(
    initial: np.ndarray, image_latents: np.ndarray, noise: NoiseSource, seed: int, config: SchedulerConfig
) -> np.ndarray:
    """The loop's first latents, [1, F, C, H, W] float32, from plain noise `initial` and the photo's latents.

    The photo's latents are diffused to a random timestep, which the published code draws from PyTorch's global
    generator; here it is what that generator gives right after torch.manual_seed(seed). One more noise is drawn.
    """
    timestep = first_word(seed) % config.num_train_timesteps
    alpha = float(alphas_cumprod(config)[timestep])
    diffused = np.sqrt(alpha) * image_latents + np.sqrt(1 - alpha) * initial
    fresh = noise.normal(initial.shape)
    low = gaussian_low_pass(initial.shape[-3:])
    spectrum = _spectrum(diffused) * low + _spectrum(fresh) * (1 - low)
    mixed = np.fft.ifftn(np.fft.ifftshift(spectrum, axes=AXES), axes=AXES).real
    return mixed.astype(np.float32)


def _spectrum(x: np.ndarray) -> np.ndarray:
    return np.fft.fftshift(np.fft.fftn(x, axes=AXES), axes=AXES)


def first_word(seed: int) -> int:
    """The first 32-bit output of MT19937 as PyTorch seeds it."""
    return int(np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 2**32, dtype=np.uint32))
