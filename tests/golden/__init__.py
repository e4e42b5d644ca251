"""Golden numbers of the published implementation on tiny models (float32, CPU): `cases/` and `models/`."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).parent
# Cases of the whole pipeline.
PIPELINES = (
    "pipeline10_cfg3",
    "pipeline10_nocfg",
    "pipeline10_tiled_resized",
    "pipeline15_cfg3_f13",
    "pipeline15_cfg3_f9",
    "pipeline15_nocfg_f9",
)


@cache
def case(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and settings of one case. The arrays are shared between tests: do not write into them."""
    tensors = load_file(ROOT / "cases" / f"{name}.safetensors")
    for array in tensors.values():
        array.flags.writeable = False
    return tensors, json.loads((ROOT / "cases" / f"{name}.json").read_text())


def model_dir(name: str) -> Path:
    return ROOT / "models" / name


def max_abs(a: np.ndarray, b: np.ndarray) -> float:
    """The largest absolute difference; raises ValueError when the shapes differ (no silent broadcasting)."""
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
    return float(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64)))) if a.size else 0.0


def relative_rms(a: np.ndarray, b: np.ndarray) -> float:
    """RMS of a - b over the RMS of b."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.sqrt(np.mean((a - b) ** 2)) / max(np.sqrt(np.mean(b**2)), 1e-30))
