"""The calibration set: photo, pose clip and prompt, as `--data FOLDER` describes them in its `samples.json`.

    {"samples": [{"image": "anna.png", "pose": "walk.mp4", "prompt": "a woman walks in a park"}, ...],
     "height": 576, "width": 1024, "frames": 37}

A sample may also have `negative_prompt` and `seed`; the sizes are optional (the bundle's default clip). Whatever yields
`Sample`s can be calibrated with; `pocket_samples` draws the people that the pocket model was trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from ..bundle.errors import BundleError, InputError, UsageError, from_os_error
from ..bundle.manifest import Manifest, inside

__all__ = ["POCKET", "SAMPLES_NAME", "Sample", "fingerprint", "pocket_samples", "read_samples"]

SAMPLES_NAME = "samples.json"
POCKET = "pocket"  # in the place of a folder: the built-in set


@dataclass(frozen=True)
class Sample:
    """One clip to observe. `image` and `pose` are whatever `animate` takes; sizes in pixels and frames, None: the bundle's."""

    image: Any
    pose: Any
    prompt: str
    negative_prompt: str = ""
    seed: int = 42
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    fit: str = "cover"

    def request(self, steps: int, guidance: float) -> dict[str, Any]:
        """The arguments of the runtime's `Request`."""
        return {
            "image": self.image,
            "pose": self.pose,
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "seed": self.seed,
            "height": self.height,
            "width": self.width,
            "num_frames": self.frames,
            "fit": self.fit,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
        }


class _Entry(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    image: str
    pose: str
    prompt: str
    negative_prompt: str = ""
    seed: Annotated[int, msgspec.Meta(ge=0)] = 42


class _File(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    samples: list[_Entry]
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    fit: str = "cover"


def read_samples(folder: Path) -> list[Sample]:
    """The samples of a folder, in the order of its `samples.json`.

    Raises:
        InputError: the folder or its list is missing, unreadable, damaged or empty; a sample names a file that is not
            there or lies outside; a prompt is empty.
    """
    path = folder / SAMPLES_NAME
    hint = f"A calibration set is a folder with photos, pose clips and a {SAMPLES_NAME} (see docs/calibration.md)."
    if not folder.is_dir():
        why = "it is a file" if folder.exists() else "it does not exist"
        raise InputError(f"There is no calibration set at {str(folder)!r}: {why}. {hint}")
    try:
        listed = msgspec.json.decode(path.read_bytes(), type=_File)
    except FileNotFoundError:
        raise InputError(f"{str(folder)!r} is not a calibration set: it has no {SAMPLES_NAME}. {hint}") from None
    except OSError as error:
        raise from_os_error(error, "read", path) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{str(path)!r} cannot be used: {error}. {hint}") from error
    if not listed.samples:
        raise InputError(f"{str(path)!r} lists no samples: there is nothing to calibrate with.")
    sizes = Sample("", "", "", height=listed.height, width=listed.width, frames=listed.frames, fit=listed.fit)
    return [_sample(folder, path, number, entry, sizes) for number, entry in enumerate(listed.samples)]


def pocket_samples(manifest: Manifest, root: str, count: int = 8) -> list[Sample]:
    """The first `count` of the clips that the pocket model was trained on, every other one with a masked photograph.

    Raises `UsageError` for the bundle of another model, to which drawn people would say nothing.
    """
    from ..pocket import MODEL
    from ..pocket.clips import COLUMNS, FRAMES, ROWS, make_clip

    config = "transformer/config.json"
    own = hashlib.sha256((MODEL / config).read_bytes()).hexdigest()
    if manifest.provenance.get(f"sha256 {config}") != own:
        raise UsageError(
            f"The built-in calibration set is for the pocket model, and {root!r} holds another one. Give --data a folder with "
            f"photos, pose clips and a {SAMPLES_NAME} (see docs/calibration.md)."
        )
    clips = [make_clip("train", i, masking=("none", "background", "none", "clothes")[i % 4]) for i in range(count)]
    return [
        Sample(clip.reference, clip.pose, clip.caption, seed=i, height=ROWS, width=COLUMNS, frames=FRAMES)
        for i, clip in enumerate(clips)
    ]


def _sample(folder: Path, path: Path, number: int, entry: _Entry, sizes: Sample) -> Sample:
    if not entry.prompt.strip():
        raise InputError(f"{str(path)!r}: the prompt of sample {number} is empty.")
    return replace(
        sizes,
        image=_file(folder, path, number, "image", entry.image),
        pose=_file(folder, path, number, "pose", entry.pose),
        prompt=entry.prompt,
        negative_prompt=entry.negative_prompt,
        seed=entry.seed,
    )


def _file(folder: Path, path: Path, number: int, what: str, name: str) -> Path:
    try:
        found = inside(folder, name)
    except BundleError:
        raise InputError(
            f"{str(path)!r}: the {what} of sample {number} is {name!r}, which lies outside the folder."
        ) from None
    if not found.exists():
        raise InputError(f"{str(path)!r}: sample {number} names the {what} {name!r}, which does not exist.")
    return found


def fingerprint(samples: Sequence[Sample]) -> str:
    """A hash over everything that the samples are made of: files by name, size and time, arrays by their bytes."""
    digest = hashlib.sha256()
    for sample in samples:
        for source in (sample.image, sample.pose):
            for part in _parts(source):
                digest.update(part)
        rest = (
            sample.prompt,
            sample.negative_prompt,
            sample.seed,
            sample.height,
            sample.width,
            sample.frames,
            sample.fit,
        )
        digest.update(repr(rest).encode())
    return digest.hexdigest()


def _parts(source: Any) -> list[bytes]:
    if isinstance(source, (str, Path)):
        root = Path(source)
        files = sorted(root.iterdir()) if root.is_dir() else [root]
        stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return [repr(stamps).encode()]
    array = np.ascontiguousarray(source)
    return [repr((array.dtype.str, array.shape)).encode(), array.tobytes()]
