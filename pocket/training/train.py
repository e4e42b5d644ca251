"""Trains the pocket checkpoint from nothing: VAE, then transformer and text encoder on its latents.

    python -m pocket.training.train --out FOLDER [--threads 2] [--vae-hours 3] [--dit-hours 8] [--smoke]

Run it again with the same folder after a kill and it goes on where the last saved state ends. FOLDER then holds
`vae/` and `dit/` (state, `log.jsonl` with the losses, `quality.jsonl`, sample sheets), `tokenizer/`, `checkpoint/`
(rewritten at every sample sheet) and, at the end, `bundle/`, `evaluation/` and `done.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

from ..clips import COLUMNS, FRAMES, ROWS
from ..evaluate import evaluate, of_bundle, write_report
from .card import model_card
from .checkpoint import write_checkpoint
from .language import Language, write_tokenizer
from .latents import latent_spread
from .settings import FULL, SMOKE, Settings
from .train_dit import Networks, train_dit
from .train_vae import train_vae

__all__ = ["train"]


def train(folder: Path, settings: Settings, *, threads: int = 1) -> Networks:
    """All phases, each to the end of its budget; see the module."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = folder / "tokenizer"
    if not (tokenizer / "tokenizer_config.json").exists():
        write_tokenizer(tokenizer, settings.shapes.vocabulary)
    language = Language(tokenizer, settings.shapes.text_length)

    vae = train_vae(folder / "vae", settings, threads)
    scaling = _scaling(folder, vae)

    def keep(networks: Networks) -> None:
        write_checkpoint(folder / "checkpoint", networks, tokenizer, card=model_card(folder, settings))

    networks = train_dit(folder / "dit", settings, vae, language, scaling, threads, keep)
    size = write_checkpoint(folder / "checkpoint", networks, tokenizer, card=model_card(folder, settings))
    if settings.held_out and not (folder / "evaluation" / "report.json").exists():
        _measure(folder, settings, threads)
        size = write_checkpoint(folder / "checkpoint", networks, tokenizer, card=model_card(folder, settings))
    (folder / "done.json").write_text(json.dumps({"bytes": size, "when": time.strftime("%Y-%m-%dT%H:%M:%S")}) + "\n")
    return networks


def _measure(folder: Path, settings: Settings, threads: int) -> None:
    """Exports the checkpoint to `bundle/` and writes what it makes of held-out clips to `evaluation/`."""
    from dynamictrl_edge.export.exporter import export_checkpoint

    export_checkpoint(
        folder / "checkpoint", folder / "bundle", height=ROWS, width=COLUMNS, frames=FRAMES, fps=8, replace=True
    )
    animate, codec = of_bundle(folder / "bundle", threads=threads)
    write_report(evaluate(animate, codec, clips=settings.held_out), folder / "evaluation")


def _scaling(folder: Path, vae: torch.nn.Module) -> float:
    """Makes the spread of the latents one; measured once, since the latents on disk go with it.

    Raises `SystemExit` if the VAE was trained further since then.
    """
    path = folder / "scaling.json"
    steps = json.loads((folder / "vae" / "log.jsonl").read_text().splitlines()[-1])["step"]
    if not path.exists():
        path.write_text(json.dumps({"scaling_factor": round(1 / latent_spread(vae, 60), 4), "vae_steps": steps}) + "\n")
    known = json.loads(path.read_text())
    if known["vae_steps"] != steps:
        raise SystemExit(
            f"{str(folder / 'dit')!r} was begun with a VAE of {known['vae_steps']} steps, which has {steps} now. "
            f"Remove that folder and {str(path)!r} to train the transformer anew."
        )
    return float(known["scaling_factor"])


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the pocket checkpoint; run again to go on.")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--threads", type=int, default=2, help="at most; fewer are used while fewer are faster")
    parser.add_argument("--vae-hours", type=float, default=FULL.vae.hours)
    parser.add_argument("--dit-hours", type=float, default=FULL.dit.hours)
    parser.add_argument("--smoke", action="store_true", help="tiny networks and a few steps: does everything run?")
    given = parser.parse_args()
    settings = SMOKE if given.smoke else FULL
    settings = dataclasses.replace(
        settings,
        vae=dataclasses.replace(settings.vae, hours=given.vae_hours),
        dit=dataclasses.replace(settings.dit, hours=given.dit_hours),
    )
    train(given.out, settings, threads=given.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
