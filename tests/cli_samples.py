"""What the tests of the command line share: small inputs on disk, and the command line run in process or beside it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dynamictrl_edge.cli.main import run
from tests.media_samples import noise

Frames = NDArray[np.uint8]

PROMPT = "a woman in a red dress"
PROGRAM = (sys.executable, "-c", "from dynamictrl_edge.cli.main import main; main()")


@dataclass(frozen=True)
class Inputs:
    """A photo and a pose clip on disk."""

    image: Path
    pose: Path


def write_inputs(folder: Path, photo: Frames, pose: Frames) -> Inputs:
    """`photo.png` and a folder `pose` of PNG frames."""
    Image.fromarray(photo).save(folder / "photo.png")
    (folder / "pose").mkdir()
    for number, frame in enumerate(pose):
        Image.fromarray(frame).save(folder / "pose" / f"{number:03d}.png")
    return Inputs(folder / "photo.png", folder / "pose")


def small_inputs(folder: Path, frames: int = 5, height: int = 32, width: int = 48) -> Inputs:
    return write_inputs(folder, noise(height, width, 3, seed=1), noise(frames, height, width, 3, seed=2))


def animate(bundle: Path, inputs: Inputs, out: Path | str, **options: Any) -> list[str]:
    """An `animate` command line of the quickest clip; `options` replace or add (True: a flag, None: left out)."""
    values: dict[str, Any] = {
        "image": inputs.image,
        "pose": inputs.pose,
        "prompt": PROMPT,
        "out": out,
        "steps": 2,
        "guidance": 1,
        "height": 32,
        "width": 48,
        "frames": 5,
        "fit": "stretch",
        "tiling": "off",
        **options,
    }
    return ["animate", str(bundle), *flags(values)]


def flags(values: dict[str, Any]) -> list[str]:
    arguments = []
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            arguments.append(flag)
        elif value is not None:
            arguments.append(f"{flag}={value}")  # one word: values may begin with a dash
    return arguments


def beside(*arguments: str, **keywords: Any) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, timeout=120, check=False, **keywords)


def one_thread() -> dict[str, str]:
    """The environment for processes that run beside a test."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def without_graphs(monkeypatch: pytest.MonkeyPatch, *parts: str) -> None:
    """Makes an export quick: it writes weights, but no graphs of these parts (none given: of all)."""
    from dynamictrl_edge.export import components

    for name in parts or ("denoiser", "text_encoder", "vae"):
        real = getattr(components, name)
        monkeypatch.setattr(components, name, lambda *parts, real=real: dataclasses.replace(real(*parts), graphs={}))


def listing(folder: Path) -> dict[str, bytes | str | None]:
    """Everything below a folder, hidden files too: names with contents (of a link its target, None for folders)."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(folder.rglob("*")):
        content = os.readlink(path) if path.is_symlink() else None if path.is_dir() else path.read_bytes()
        found[str(path.relative_to(folder))] = content
    return found


def refused(capsys: pytest.CaptureFixture[str], folder: Path, arguments: list[str], code: int, *words: str) -> str:
    """Runs a command line that must fail: with this exit code, one readable paragraph that holds `words`, nothing on
    stdout, and `folder` as it was. Returns the message."""
    before = listing(folder)
    capsys.readouterr()
    found = run(arguments)
    out, err = capsys.readouterr()
    assert found == code, err
    assert out == ""
    for word in words:
        assert word in err
    assert "Traceback" not in err and "Internal error" not in err
    if "Usage:" not in err:  # our own message, not one of the option parser
        assert err.startswith("dynamictrl: ") and err.count("\n") == 1, err
    assert listing(folder) == before
    return err


def pngs(folder: Path) -> Frames:
    """The frames of a folder, [F, H, W, 3]."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])


def made(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> Any:
    """Runs a command line that must work; returns what it printed as JSON."""
    capsys.readouterr()
    code = run([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def assert_video(path: Path, count: int, rate: Fraction | int, width: int, height: int) -> Frames:
    """Plays an MP4 from its beginning to its end."""
    with av.open(str(path)) as container:
        (stream,) = container.streams.video
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        decoded = list(container.decode(stream))
        assert stream.average_rate == rate
    assert [frame.time for frame in decoded] == pytest.approx([i / float(rate) for i in range(count)])
    assert {(frame.width, frame.height) for frame in decoded} == {(width, height)}
    return np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])
