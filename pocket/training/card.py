"""The model card that goes with the checkpoint: how it was made, how good it is, what it can not do."""

from __future__ import annotations

from collections.abc import Mapping

from ..clips import COLUMNS, FRAMES, POSE_FRAMES, ROWS
from .settings import Settings
from .start import Spent

__all__ = ["model_card"]


def model_card(settings: Settings, spent: Mapping[str, Spent]) -> str:
    """The card's text; `benchmarks/tables.py` puts the measured figures between its two marks."""
    shapes = settings.shapes
    vae, dit, own, pixels = (spent[name] for name in ("vae", "dit", "own", "pixels"))
    refined = (
        f"\nThe last {own['steps']} of them learned from the transformer's own estimates, as sampling starts every step from one;\n"
        f"{settings.dit.without_background + settings.dit.without_clothes:.0%} of their references were blacked out."
        if own["steps"]
        else ""
    )
    if pixels["steps"]:
        refined += (
            f"\nIn the last {pixels['steps']} a part of the loss was what an error shows in pixels, by a linear stand-in for the"
            " decoder."
        )
    channels = ", ".join(map(str, shapes.channels))
    vae_sizes = f"{shapes.latent_channels} latent channels, {shapes.scale}x in space, 4x in time"
    dit_sizes = f"{shapes.blocks} blocks of width {shapes.heads * shapes.head_dim}, {shapes.heads} heads"
    text_sizes = f"{shapes.text_layers} layers of width {shapes.text_dim}, a vocabulary of the captions' words"
    return f"""---
license: apache-2.0
---

# Pocket DynamiCtrl

A DynamiCtrl (arXiv 2503.21246) small enough to train on two processor cores and to keep in a source repository. It animates
drawn people: {COLUMNS}x{ROWS} pixels, {FRAMES} frames, from a reference picture, a pose clip of {POSE_FRAMES} frames and a
caption. It exists so that quantization, reuse and new backends can be judged on weights that mean something.

## What it is

| | |
|---|---|
| VAE | `AutoencoderKLCogVideoX`, {len(shapes.channels)} levels of {channels} channels, {vae_sizes} |
| transformer | PoseAdaLN, 1.5 style (`patch_size_t` 2, `ofs`), {dit_sizes} |
| text encoder | T5, {text_sizes}, trained with the transformer |
| schedule | that of the 5B family: v-prediction, zero terminal SNR, `snr_shift_scale` 1.0 |

The first {POSE_FRAMES - FRAMES} frames of the pose clip lead in: like every 1.5-style model of an odd number of latent
frames it makes one latent frame more and drops the first, so that frame 0 of the result belongs to pose frame
{POSE_FRAMES - FRAMES}.

## How it was made

From nothing, by `python -m pocket.training.train --out FOLDER`, on clips drawn by `pocket.clips` (seeded; no photograph, no
video and no other model had a part in it): articulated people of varied build, clothes, skin and hair that walk, wave, dance, turn,
squat and raise their arms before hills, cities, beaches and walls. Half of the references had their background or their
clothes blacked out, and a tenth of the captions was left out. VAE: {vae["steps"]} steps in {vae["hours"]:.1f} hours.
Transformer and text encoder: {dit["steps"]} steps of {settings.dit.batch} clips in {dit["hours"]:.1f} hours.{refined}
Weights are exponential averages. Training clips and held-out clips share no seed.

## How good it is

<!-- pocket -->
Not measured yet; `python benchmarks/pocket_quality.py` does it.
<!-- end -->

## What it can not do

- Photographs, real videos, faces: it has seen nothing but the generator's drawings, and anything else falls apart.
- Other sizes and lengths than {COLUMNS}x{ROWS} and {FRAMES} frames.
- Words beyond the captions' own (six motions, ten colours of clothes, five of hair, six kinds of background), or a caption
  that contradicts what the reference shows.
- Pose drawings of another style than `pocket.figure.draw_pose`'s: OpenPose's 18 body points without hands and face, sticks
  about 3 pixels thick.
- It says nothing about the quality of DynamiCtrl-5B.
"""
