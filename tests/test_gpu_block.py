"""The script for machines with a GPU, as far as it goes without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine_samples import needs_rtx
from tests.trt_snapshot import ALL
from tests.trt_usage import problems

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_block.py"


@needs_rtx
def test_the_dry_run_builds_every_form_of_the_block() -> None:
    options = ["--dry-run", "--flavour", "rtx", "--spec", "tiny15", "--size", "64x64x13"]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for kind in ("fp16", "int8"):
        for place in ("inputs", "constants"):
            row = next(line for line in done.stderr.splitlines() if f"'{kind}'" in line and f"'{place}'" in line)
            assert "'fused_attention': 1" in row
            product = "half" if kind == "fp16" else "int8"
            assert row.count(f"['{product}', '{product}']") == 4


@pytest.mark.parametrize("version", [name for name in ALL if "lean" not in name])
def test_its_calls_exist_in_every_builder(version: str) -> None:
    assert problems({"gpu_block": SCRIPT.read_text()}, version) == []
