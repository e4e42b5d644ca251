"""What a calibration keeps on disk while it is under way: the folder `.<name of the output>.calibration` beside the output.

It belongs to one bundle, one calibration set and one choice of settings (its key); with another key it begins anew. Every
file is written whole or not at all, so that an interrupted calibration goes on where it was.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from ..bundle.atomic import atomic_file
from ..bundle.errors import from_os_error
from ..bundle.manifest import Manifest
from ..runtime.denoiser import Latents

__all__ = ["Trajectory", "Work", "bundle_digest"]

_KEY = "key"


def bundle_digest(manifest: Manifest) -> str:
    """Identity of a bundle: a hash over the hashes of all its files."""
    return hashlib.sha256(msgspec.json.encode(manifest.files, order="sorted")).hexdigest()


@dataclass(frozen=True)
class Work:
    """Paths of the folder's files."""

    root: Path

    @classmethod
    def open(cls, output: Path, key: str) -> Work:
        """The folder that belongs to `output`, emptied if it was made for another key. `InputError`: not writable."""
        root = output.with_name(f".{output.name}.calibration")
        try:
            if not (root / _KEY).is_file() or (root / _KEY).read_text() != key:
                shutil.rmtree(root, ignore_errors=True)
                root.mkdir()
                (root / _KEY).write_text(key)
        except OSError as error:
            raise from_os_error(error, "write to", root) from error
        return cls(root)

    @property
    def statistics(self) -> Path:
        return self.root / "statistics.npz"

    def trajectory(self, sample: int) -> Path:
        return self.root / f"sample_{sample:04d}.npz"

    def weights(self, block: int) -> Path:
        """Quantized weights and vectors of a block."""
        return self.root / f"block_{block:02d}.safetensors"

    def decisions(self, block: int) -> Path:
        """Written after `weights`: says that they are whole."""
        return self.root / f"block_{block:02d}.json"

    def modulation(self, block: int) -> Path:
        """A block's modulation with int8 weights."""
        return self.root / f"modulation_{block:02d}.safetensors"

    @property
    def shared(self) -> Path:
        """The denoiser's shared weights, those of the conditioning as int8."""
        return self.root / "denoiser.safetensors"

    def text_block(self, layer: int) -> Path:
        """A layer of the text encoder with int8 weights."""
        return self.root / f"text_block_{layer:02d}.safetensors"

    def remove(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


@dataclass(frozen=True)
class Trajectory:
    """One sample's way through the loop in the bundle's own precision.

    conditions: what the loop was given. starts: [T, 1, F, C, H, W] latents that each step began with. predictions:
    [T, B, F, C, H, W] what the transformer said to them.
    """

    conditions: Latents
    grid: tuple[int, int, int]
    starts: np.ndarray
    predictions: np.ndarray

    def save(self, path: Path) -> None:
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                prompt_embeds=self.conditions.prompt_embeds,
                image=self.conditions.image,
                pose=self.conditions.pose,
                grid=np.asarray(self.grid),
                starts=self.starts,
                predictions=self.predictions,
            )

    @classmethod
    def load(cls, path: Path) -> Trajectory:
        """Raises `InputError` if the file cannot be read: the calibration must begin anew."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                given = dict(stored)
        except OSError as error:
            raise from_os_error(error, "read", path) from error
        frames, rows, columns = (int(n) for n in given["grid"])
        conditions = Latents(given["prompt_embeds"], given["image"], given["pose"])
        return cls(conditions, (frames, rows, columns), given["starts"], given["predictions"])
