"""Training on a GPU, as far as it can be followed without one: where every tensor of the losses lies.

The networks are on PyTorch's "meta" device, which computes shapes only; data and random numbers begin on the processor, as they
do with a GPU.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pocket.clips import COLUMNS, POSE_FRAMES, ROWS, make_clip
from pocket.training import train_dit as dit_phase
from pocket.training import train_vae as vae_phase
from pocket.training.drawn import FEW, DrawnClips, training_clips
from pocket.training.latents import Batch
from pocket.training.networks import make_text_encoder, make_transformer, make_vae
from pocket.training.settings import REFINE, SMOKE
from pocket.training.train import train
from pocket.training.trainer import Trainer

AWAY = "meta"
# They take values, or positions to look at, from elsewhere.
CARRIERS = ("aten._to_copy", "aten.copy_", "aten.index.", "aten.index_put", "aten._index_put")


class OneDevice(TorchDispatchMode):
    """Refuses operators whose tensors are on several devices, as CUDA does; numbers may come from the processor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not str(func).startswith(CARRIERS):
            given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
            devices = {tensor.device.type for tensor in given if tensor.ndim or tensor.device.type != "cpu"}
            assert len(devices) < 2, f"{func} has tensors on {sorted(devices)}"
        return func(*args, **(kwargs or {}))


def test_operators_across_devices_are_noticed() -> None:
    away, here = torch.zeros(2, 2, device=AWAY), torch.zeros(2, 2)
    with OneDevice():
        assert (away * torch.tensor(2.0) + here.to(AWAY)).device.type == AWAY
        with pytest.raises(AssertionError, match="tensors on"):
            away @ here


def gradients_lie_with(parameters: list[nn.Parameter], loss: Tensor) -> None:
    assert loss.device.type == AWAY
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert {gradient.device.type for gradient in found if gradient is not None} == {AWAY}


def test_the_transformers_loss_follows_its_weights() -> None:
    shapes = SMOKE.shapes
    f, h, w = shapes.latent_size
    video = torch.zeros(4, f, shapes.latent_channels, h, w)
    batch = Batch(
        video, video, video[:, 0], torch.zeros(4, f, 1, h, w), torch.zeros(4, shapes.text_length, dtype=torch.long)
    )
    transformer, text_encoder = make_transformer(shapes).to(AWAY), make_text_encoder(shapes).to(AWAY)
    settings = dataclasses.replace(SMOKE, dit=dataclasses.replace(REFINE.dit, pixel_share=0.5))
    networks = dit_phase.Networks(settings, None, transformer, text_encoder, None, 1.0)  # type: ignore[arg-type]
    kernel = torch.zeros(2, shapes.latent_channels, 2, 3, 3)
    tables = dit_phase.Tables.of(settings, kernel, AWAY)
    with OneDevice():
        (part,) = dit_phase._losses(
            networks, batch, tables, np.random.default_rng(0), torch.Generator().manual_seed(0), 1
        )
        gradients_lie_with([*transformer.parameters(), *text_encoder.parameters()], part()["loss"])


@pytest.mark.parametrize(("still_share", "long_share"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_the_vaes_loss_follows_its_weights(still_share: float, long_share: float, tmp_path: Path) -> None:
    settings = dataclasses.replace(
        SMOKE, vae=dataclasses.replace(SMOKE.vae, still_share=still_share, long_share=long_share)
    )
    vae = make_vae(settings.shapes).to(AWAY)
    trainer = Trainer.of(tmp_path, {"vae": vae}, settings.vae, settings, 1, lambda name: False)
    clips = np.zeros((2, 2, POSE_FRAMES, ROWS, COLUMNS, 3), np.uint8)
    with OneDevice():
        for _ in range(3):
            gradients_lie_with(
                list(vae.parameters()), vae_phase._loss(vae, clips, trainer, settings, stills=False)["loss"]
            )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU here")
def test_a_smoke_training_on_a_gpu_ends_in_a_checkpoint(tmp_path: Path) -> None:
    train(tmp_path / "run", SMOKE, device="cuda")
    again = dataclasses.replace(SMOKE, vae=dataclasses.replace(SMOKE.vae, steps=6))
    train(tmp_path / "more", again, start=tmp_path / "run" / "checkpoint", device="cuda")
    assert (tmp_path / "more" / "done.json").exists()


# Clips drawn beforehand


def test_clips_that_several_processes_draw_come_in_order(tmp_path: Path) -> None:
    seen = list(training_clips(3, FEW + 5, workers=2))
    assert [number for number, _ in seen] == list(range(3, FEW + 5))
    for number, clip in seen[::17]:
        alone = make_clip("train", number)
        assert np.array_equal(clip.frames, alone.frames) and clip.caption == alone.caption
    drawn = DrawnClips(tmp_path, 60, workers=2)
    drawn.ensure(55)
    assert drawn.count == 55 and np.array_equal(drawn.pixels[54, 1], make_clip("train", 54).pose)
