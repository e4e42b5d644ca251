"""The command for machines with a GPU, as far as it goes without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the first part measures with PyTorch")

from benchmarks.gpu import tokens

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"


def test_the_dry_run_goes_through_every_measurement() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--dry-run"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    toy = found["toy"]
    assert toy["tokens"] == 24 and toy["block_seconds"] > 0
    assert set(toy["active_tokens"]) == {"0.2", "0.4", "0.6"}
    for share, row in toy["active_tokens"].items():
        assert float(share) < row["by_flop"] < 1
    assert toy["streaming"]["block_bytes"] == 4 * 12 * 64**2
    for name in ("both_halves_together", "guidance_reuse", "trunk_reuse"):
        assert toy[name] > 0


def test_a_machine_without_the_package_or_a_gpu_says_what_was_skipped(tmp_path: Path) -> None:
    """Only Python, PyTorch and numpy: everything else cannot be imported."""
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("msgspec", "av", "onnxruntime", "click"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, {str(SCRIPT.parents[1])!r})
from benchmarks import gpu
import benchmarks.receipt
from pathlib import Path
benchmarks.receipt.write_receipt.__kwdefaults__["folder"] = Path({str(tmp_path)!r})
sys.argv = ["gpu.py"]
gpu.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    figures = json.loads((tmp_path / "gpu.json").read_text())["figures"]
    assert "no GPU" in figures["torch"]["skipped"]
    assert figures["engines"]["skipped"]


def test_tokens_of_a_clip() -> None:
    assert (tokens("1360x768x37"), tokens("1024x576x37"), tokens("512x288x17")) == (20400, 11520, 1728)
