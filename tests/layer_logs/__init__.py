"""Build logs of TensorRT-RTX, for tests of what reads them.

`recorded(name)`: messages of builds of exported bundles, kept from TensorRT-RTX 1.7.1 (those about layers and memory, and
the first few). `built(cases)`: messages of builds done now, of tiny graphs, without a GPU.
"""

from __future__ import annotations

import base64
import gzip
import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
RECORDED = sorted(path.name.removesuffix(".json.gz") for path in FOLDER.glob("*.json.gz"))
Shape = Sequence[int]


def recorded(name: str) -> list[str]:
    messages: list[str] = json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))
    return messages


@dataclass(frozen=True)
class Case:
    """A graph in ONNX's text form, without its first line; what to build it for; shapes [least, best, most] per profile."""

    graph: str
    capabilities: tuple[str, ...] = ("SM86", "SM89", "SM120")
    profiles: tuple[Mapping[str, Sequence[Shape]], ...] = field(default=({"x": ((1, 128), (64, 128), (256, 128))},))

    def model(self) -> bytes:
        parser = pytest.importorskip("onnx.parser", reason="making graphs needs the extra 'build'")
        data: bytes = parser.parse_model(f'<ir_version: 9, opset_import: ["": 20]> {self.graph}').SerializeToString()
        return data


def built(cases: Mapping[str, Case], folder: Path) -> dict[str, list[str]]:
    """Messages of each build. One child process does all: a process has one TensorRT logger for ever, other tests' perhaps."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed (extra 'rtx')")
    jobs = {
        name: {"model": base64.b64encode(case.model()).decode(), "for": case.capabilities, "profiles": case.profiles}
        for name, case in cases.items()
    }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run(
        [sys.executable, "-m", "tests.layer_logs", str(folder / "jobs.json"), str(folder / "logs.json")],
        check=True,
        cwd=FOLDER.parents[1],
        timeout=300,
    )
    logs: dict[str, list[str]] = json.loads((folder / "logs.json").read_text())
    return logs
