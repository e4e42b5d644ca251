"""What is trained, and how long: the shapes of the three networks and the budget of every phase."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from ..clips import COLUMNS, POSE_FRAMES, ROWS

__all__ = ["FULL", "REFINE", "SMOKE", "DitRun", "Settings", "Shapes", "VaeRun"]


@dataclass(frozen=True)
class Shapes:
    """Sizes of the networks. The VAE has as many levels as `channels` and compresses 2x per level but the last."""

    channels: tuple[int, ...] = (16, 32, 80)
    latent_channels: int = 16
    vae_layers: int = 1
    norm_groups: int = 8
    heads: int = 3
    head_dim: int = 64
    blocks: int = 6
    time_dim: int = 48
    text_dim: int = 128
    text_length: int = 32
    text_layers: int = 2
    text_heads: int = 4
    text_ff: int = 256
    vocabulary: int = 96

    @property
    def scale(self) -> int:
        """Pixels per latent row or column."""
        return int(2 ** (len(self.channels) - 1))

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """Frames, rows, columns of the latents of a whole clip."""
        return (POSE_FRAMES - 1) // 4 + 1, ROWS // self.scale, COLUMNS // self.scale


@dataclass(frozen=True)
class VaeRun:
    """Training of the VAE. Steps are of three kinds: single frames, which cost little and teach most of what there is to
    learn in space; windows of one time chunk; and whole clips in several chunks."""

    steps: int = 30000
    clips: int = 3000  # drawn once, used again and again
    learning_rate: float = 1.5e-3
    hidden_rate: float = 6e-3  # of Muon, which trains all but the first and last layers
    warm_up: int = 50
    average: float = 0.995  # of the weights that are kept (EMA)
    kl: float = 1e-4
    square: float = 2.0  # weight of the squared error, which PSNR is made of, beside the absolute one
    gradient: float = 0.5  # weight of the error of differences of neighbouring pixels
    still_first: float = 0.25  # of the budget, which begins with single frames only
    still_share: float = 0.35  # steps on single frames after that
    still_batch: int = 8
    window_batch: int = 2
    window_pace: float = 0.5  # of the learning rates, after stills: batches are smaller then
    long_share: float = 0.15  # steps on a whole clip
    hours: float = 1.0  # the budget ends with this or with `steps`, and the learning rate comes down to it


@dataclass(frozen=True)
class DitRun:
    """Training of transformer and text encoder, on latents that were computed once."""

    steps: int = 40000
    clips: int = 4000
    batch: int = 12
    learning_rate: float = 1.5e-3
    hidden_rate: float = 4e-3  # of Muon, which trains the matrices of attention and feed-forward
    warm_up: int = 100
    average: float = 0.998
    caption_dropout: float = 0.1
    without_background: float = 0.25  # samples whose photograph lacks what the caption has to say
    without_clothes: float = 0.25
    pixel_share: float = 0.0  # of the loss, for what shows of an error in pixels instead of the error of the latents
    person_weight: float = 1.0  # extra weight of the person's region
    own_share: float = 0.0  # samples whose noise is added to the model's own estimate, as while sampling
    hours: float = 8.0


@dataclass(frozen=True)
class Settings:
    shapes: Shapes = field(default_factory=Shapes)
    vae: VaeRun = field(default_factory=VaeRun)
    dit: DitRun = field(default_factory=DitRun)
    seed: int = 1
    keep_every: float = 180.0  # seconds between saved states
    sheet_every: int = 500  # steps between sample sheets
    sheet_clips: int = 6


FULL = Settings()
# From a finished checkpoint: the decoder on moving pictures; the transformer on its own estimates and what shows of its errors,
# and more often with a caption that has to say what the photograph lacks.
REFINE = dataclasses.replace(
    FULL,
    vae=dataclasses.replace(FULL.vae, still_share=0.1, window_pace=0.1, average=0.98, square=20.0),
    dit=dataclasses.replace(
        FULL.dit,
        learning_rate=0.6e-3,
        hidden_rate=1.6e-3,
        average=0.99,
        without_background=0.22,
        without_clothes=0.43,
        pixel_share=0.75,
        person_weight=4.0,
        own_share=0.9,
    ),
)
SMOKE = Settings(
    shapes=Shapes(
        channels=(8, 8, 16),
        heads=1,
        head_dim=32,
        blocks=1,
        time_dim=16,
        text_dim=16,
        text_layers=1,
        text_heads=2,
        text_ff=32,
    ),
    vae=dataclasses.replace(FULL.vae, steps=4, clips=3, warm_up=1),
    dit=dataclasses.replace(FULL.dit, steps=4, clips=3, batch=2, warm_up=1, pixel_share=0.5, own_share=0.5),
    keep_every=0.0,
    sheet_every=4,
    sheet_clips=3,
)
