"""Going on from a finished checkpoint: its weights, and what was spent on it before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict

from safetensors.torch import load_file
from torch import nn

from .settings import DitRun

__all__ = ["RECORD", "Spent", "load_weights", "spent_on"]

PHASES = ("vae", "dit")
# Kinds of the transformer's steps, which "dit" counts as well, and the setting that makes them.
KINDS = {"own": "own_share", "pixels": "pixel_share"}
RECORD = "training.json"  # in a checkpoint


class Spent(TypedDict):
    """Training of one phase over all runs: optimizer steps, and hours of the machines' time."""

    steps: int
    hours: float


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copies a component's safetensors into `model`. Raises `RuntimeError` if a tensor is missing, or of another shape."""
    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("embed_tokens.weight")]  # the embedding's second name
    if missing or unexpected:
        raise RuntimeError(f"{str(folder)!r} is of another shape: {', '.join([*missing, *unexpected][:4])}")


def spent_on(run: Path, start: Path | None, dit: DitRun) -> dict[str, Spent]:
    """What a training folder's logs say, and what the checkpoint `start` that it began with had cost, by phase.

    Of the transformer's steps those on its own estimates ("own") and with the error in pixels ("pixels") are counted apart;
    `dit` says whether this run's are.
    """
    record = start / RECORD if start is not None else None
    before = json.loads(record.read_text()) if record is not None and record.exists() else {}
    result: dict[str, Spent] = {}
    for phase in (*PHASES, *KINDS):
        log = run / ("dit" if phase in KINDS else phase) / "log.jsonl"
        here = log.exists() and (phase not in KINDS or getattr(dit, KINDS[phase]) > 0)
        last = json.loads(log.read_text().splitlines()[-1]) if here else {}
        old = before.get(phase, {})
        result[phase] = {
            "steps": last.get("step", 0) + old.get("steps", 0),
            "hours": round(last.get("hours", 0.0) + old.get("hours", 0.0), 3),
        }
    return result
