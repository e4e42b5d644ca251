"""The CPU's memory plan: what it promises and what it asks for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.plan_tables import TEXT, TRANSFORMER, VAE
from dynamictrl_edge.bundle.config import SizeDefaults, geometry
from dynamictrl_edge.bundle.errors import DeviceError
from dynamictrl_edge.bundle.manifest import FORMAT_NAME, FORMAT_VERSION, Manifest
from dynamictrl_edge.runtime.memory import plan_memory

FULL = Manifest(
    format=FORMAT_NAME,
    version=FORMAT_VERSION,
    precision="fp32",
    transformer=TRANSFORMER,
    vae=VAE,
    text=TEXT,
    scheduler={},
    defaults=SizeDefaults(height=768, width=1360, frames=37),
    graphs={},
    files={},
    provenance={},
)
BLOCK = 453_000_000


def plan(height: int, width: int, frames: int, budget: float | None, tiling: str = "auto"):  # type: ignore[no-untyped-def]
    size = geometry(FULL.transformer, FULL.vae, height, width, frames)
    return plan_memory(FULL, size, halves=2, tiling=tiling, budget=budget, block=BLOCK)


def test_without_a_budget_all_blocks_stay_and_nothing_is_tiled() -> None:
    made = plan(288, 512, 17, None)
    assert made.resident_blocks == 42
    assert not made.tiled
    assert made.stages["denoise"] > 42 * BLOCK


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 9), st.floats(0.1, 60))
def test_a_plan_keeps_its_budget_or_names_one_that_works(rows: int, columns: int, chunks: int, budget: float) -> None:
    size = rows * 16, columns * 16, 4 * chunks + 1
    try:
        made = plan(*size, budget)
    except DeviceError as refusal:
        least = float(re.findall(r"at least --memory ([0-9.]+)", str(refusal))[0])
        assert least > budget
        made = plan(*size, least)
        assert made.peak <= least * 1e9
        return
    assert made.peak <= budget * 1e9
    assert 0 <= made.resident_blocks <= 42


def test_more_memory_never_keeps_fewer_blocks() -> None:
    kept = [plan(64, 64, 17, budget).resident_blocks for budget in (4, 6, 8, 12, 16, 24, 40)]
    assert kept == sorted(kept)
    assert kept[-1] == 42


def test_tiles_are_used_only_when_the_budget_needs_them() -> None:
    assert not plan(512, 512, 9, 1000).tiled
    assert plan(512, 512, 9, 30).tiled
    assert plan(512, 512, 9, None, tiling="on").tiled
    with pytest.raises(DeviceError, match="--tiling on"):
        plan(512, 512, 9, 30, tiling="off")


def test_the_machines_memory_is_the_budget_of_a_clip_that_needs_more() -> None:
    size = geometry(FULL.transformer, FULL.vae, 512, 512, 9)
    roomy = plan_memory(FULL, size, halves=2, tiling="auto", budget=None, block=BLOCK, physical=10**12)
    assert roomy.budget is None
    small = plan_memory(FULL, size, halves=2, tiling="auto", budget=None, block=BLOCK, physical=40 * 10**9)
    assert small.tiled
    assert small.peak <= 32e9
    with pytest.raises(DeviceError, match=r"this machine can spare.*--memory"):
        plan_memory(FULL, size, halves=2, tiling="auto", budget=None, block=BLOCK, physical=4 * 10**9)


def test_measured_peak_of_a_small_clip_stays_under_the_plan(bundle10: Path) -> None:
    """One process, its own high-water mark: the plan's promise for a real run."""
    import subprocess
    import sys

    code = """
import sys
import numpy as np
from dynamictrl_edge.runtime import Animator
random = np.random.default_rng(0)
animator = Animator.from_bundle(sys.argv[1], cache=False)
run, chunks = animator.start(
    image=random.integers(0, 255, (256, 256, 3), dtype=np.uint8),
    pose=random.integers(0, 255, (9, 256, 256, 3), dtype=np.uint8),
    prompt="a person", steps=1, height=256, width=256, frames=9,
)
list(chunks)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024, run.plan.peak)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc/self/status")
    answer = subprocess.run([sys.executable, "-c", code, str(bundle10)], check=True, capture_output=True, text=True)
    peak, planned = map(int, answer.stdout.split())
    assert 0.3 * planned < peak < 1.1 * planned
