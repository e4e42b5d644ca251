"""What an error of latents shows in pixels, learned from a decoder whose answer is known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from pocket.training.pixels import fit_pixel_metric, kept_pixel_metric, pixel_error

CHANNELS, SCALE = 3, 2


class LinearDecoder(nn.Module):
    """Four frames of SCALE x SCALE pixels from a latent and the one before it, one frame from the first. Channel 2 is not
    heard, channel 0 twice as loudly as channel 1."""

    def __init__(self) -> None:
        super().__init__()
        weights = torch.randn(3 * 4 * SCALE * SCALE, 2 * CHANNELS, generator=torch.Generator().manual_seed(1))
        weights[:, 2::CHANNELS] = 0
        weights[:, 0::CHANNELS] *= 2
        self.weights = nn.Parameter(weights)

    def decode(self, latents: Tensor) -> SimpleNamespace:
        now = latents[0].transpose(0, 1)
        before = torch.cat([torch.zeros_like(now[:1]), now[:-1]])
        values = torch.einsum("oc,fchw->fohw", self.weights, torch.cat([before, now], dim=1))
        frames, _, rows, columns = values.shape
        pixels = values.reshape(frames, 3, 4, SCALE, SCALE, rows, columns).permute(1, 0, 2, 5, 3, 6, 4)
        pixels = pixels.reshape(3, 4 * frames, rows * SCALE, columns * SCALE)
        return SimpleNamespace(sample=pixels[None, :, 3:])


@pytest.fixture(scope="module")
def decoder() -> LinearDecoder:
    return LinearDecoder().requires_grad_(False)


def clips(seed: int) -> Tensor:
    return torch.randn(6, 4, CHANNELS, 5, 4, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def kernel(decoder: LinearDecoder) -> Tensor:
    return fit_pixel_metric(decoder, clips(0))


def test_of_a_linear_decoder_it_is_the_error_of_the_pixels(decoder: LinearDecoder, kernel: Tensor) -> None:
    error = clips(7)
    shown = pixel_error(kernel, error)
    assert shown.shape == (6, 3, 1, 5, 4)
    pixels = torch.stack([decoder.decode(clip[None, 1:].transpose(1, 2)).sample[0] for clip in error])
    square = pixels[:, :, 1:].reshape(6, 3, 2, 4, 5, SCALE, 4, SCALE).square().mean((1, 3, 5, 7))
    ratio = shown[:, 1:, 0] / square
    assert ratio.std() / ratio.mean() < 0.01


def test_of_errors_like_the_learned_ones_its_mean_is_the_mean_square(kernel: Tensor) -> None:
    error = clips(8)
    shown = pixel_error(kernel, error)[:, 1:].mean() / error[:, 2:].square().mean()
    assert shown.item() == pytest.approx(1, rel=0.15)


def test_what_the_decoder_does_not_hear_costs_nothing(kernel: Tensor) -> None:
    errors = torch.zeros(3, 4, CHANNELS, 5, 4)
    for channel in range(CHANNELS):
        errors[channel, :, channel] = clips(9)[0, :, 0]
    loud, soft, none = pixel_error(kernel, errors).flatten(1).mean(1).tolist()
    assert none < 1e-4 * soft and 2 < loud / soft < 8


def test_the_frame_that_the_pipeline_drops_costs_nothing(kernel: Tensor) -> None:
    error = torch.zeros(1, 4, CHANNELS, 5, 4)
    error[:, 0] = 9.0
    assert not pixel_error(kernel, error).any()


def test_it_is_fitted_once(decoder: LinearDecoder, kernel: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "pixels.safetensors"
    assert torch.equal(kept_pixel_metric(path, decoder, clips(0)), kernel)
    assert torch.equal(kept_pixel_metric(path, None, clips(5)), kernel)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
