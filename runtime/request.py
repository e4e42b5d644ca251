"""What a caller asks for, checked before any work: every value that can never work is refused here by name."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from ..bundle.errors import UsageError
from .media.fit import FITS, Fit
from .reuse.policy import OFF, ReusePolicy, parse_policy

__all__ = ["ALIASES", "Request", "Source", "Tiling"]

Source = Any  # a path, a Pillow image or an array; the media readers say which
Tiling = Literal["auto", "on", "off"]
MAX_SEED = 2**64 - 1

# Short names, as on the command line.
ALIASES = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "frames": "num_frames",
    "control_video": "pose",
}


@dataclass(frozen=True)
class Request:
    """One clip. Names follow diffusers' pipelines; `ALIASES` gives the short forms that are accepted as well.

    image: photo as a path, Pillow image or uint8 array [H, W, 3].
    pose: video file, folder of frames, or uint8 array [F, H, W, 3].
    prompt, negative_prompt: text; an empty negative prompt is the published default.
    num_inference_steps: 1 to 1000. guidance_scale: guidance is on above 1.
    seed: 0 to 2**64 - 1; the same seed gives the published implementation's clip (float32).
    height, width: pixels, multiples of 16; num_frames: 4 n + 1; fps: frames per second. None: the bundle's default.
    fit: how photo and pose frames are brought to the size: cover, contain, stretch (as published).
    skip_frames: pose frames left out at the start. drop_prefix: made frames left out at the start of the result.
    tiling: VAE in tiles of the published geometry: on, off, or auto (only when the memory plan needs it).
    re_init_noise: start from noise whose low frequencies come from the photo (FreeInit, arXiv 2312.07537).
    reuse: what denoising steps use again of earlier ones: off, a policy's name with changes, or a `ReusePolicy`.
    check_steps: a step whose latents are not finite ends the clip and is named. None: where that costs nothing, on the processor;
        on a GPU the loop waits for one small read per step.
    """

    image: Source
    pose: Source
    prompt: str
    negative_prompt: str = ""
    num_inference_steps: int = 25
    guidance_scale: float = 3.0
    seed: int = 42
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: float | Fraction | None = None
    fit: Fit = "cover"
    skip_frames: int = 0
    drop_prefix: int = 0
    tiling: Tiling = "auto"
    re_init_noise: bool = False
    reuse: str | ReusePolicy = OFF
    check_steps: bool | None = None

    @classmethod
    def of(cls, **arguments: Any) -> Request:
        """A request from keyword arguments, aliases resolved; `UsageError` names an unknown or doubled one."""
        names = {field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in arguments.items():
            full = ALIASES.get(name, name)
            if full not in names:
                raise UsageError(f"There is no argument {name!r}. Known are {', '.join(sorted(names | set(ALIASES)))}.")
            if full in values:
                raise UsageError(f"{full!r} was given twice, once as {name!r}.")
            values[full] = value
        for name in ("image", "pose", "prompt"):
            if values.get(name) is None:
                raise UsageError(f"The argument {name!r} is missing.")
        return cls(**values)

    def __post_init__(self) -> None:
        self._whole("num_inference_steps", "--steps", 1, 1000)
        self._whole("seed", "--seed", 0, MAX_SEED)
        self._whole("skip_frames", "--skip-frames", 0, 10**9)
        self._whole("drop_prefix", "--drop-prefix", 0, 10**9)
        for name in ("height", "width", "num_frames"):
            if getattr(self, name) is not None:
                self._whole(name, f"--{name.replace('num_', '')}", 1, 10**6)
        if not _finite(self.guidance_scale) or self.guidance_scale < 0:
            raise UsageError(
                f"--guidance {self.guidance_scale} is not possible: give a number of 0 or more; 1 turns it off."
            )
        if self.fps is not None and (not _finite(self.fps) or not 0 < self.fps <= 1000):
            raise UsageError(f"--fps {self.fps} is not possible: give a number above 0, up to 1000.")
        if self.fit not in FITS:
            raise UsageError(f"--fit {self.fit!r} is not known; use one of {', '.join(FITS)}.")
        if self.tiling not in ("auto", "on", "off"):
            raise UsageError(f"--tiling {self.tiling!r} is not known; use auto, on or off.")
        for name in ("prompt", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise UsageError(f"{name!r} must be text, not {type(getattr(self, name)).__name__}.")
        for name in ("image", "pose"):
            source = getattr(self, name)
            if not isinstance(source, (str, os.PathLike, np.ndarray)) and not hasattr(source, "convert"):
                raise UsageError(f"{name!r} must be a path, a picture or an array, not {type(source).__name__}.")

        if self.check_steps is not None and not isinstance(self.check_steps, bool):
            raise UsageError(f"'check_steps' must be True, False or None, not {self.check_steps!r}.")
        if not isinstance(self.reuse, (str, ReusePolicy)):
            raise UsageError(f"'reuse' must be text or a ReusePolicy, not {type(self.reuse).__name__}.")
        _ = self.policy  # refuses what is not known

    def _whole(self, name: str, flag: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= most:
            raise UsageError(f"{flag} {value!r} is not possible: give a whole number from {least} to {most}.")

    @property
    def guided(self) -> bool:
        """Whether both guidance halves are computed."""
        return self.guidance_scale > 1.0

    @property
    def policy(self) -> ReusePolicy | None:
        """What is reused between steps; None: nothing."""
        return self.reuse if isinstance(self.reuse, ReusePolicy) else parse_policy(self.reuse)


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False
