"""Trains the pocket checkpoint from nothing: VAE, then transformer and text encoder on its latents.

    python -m pocket.training.train --out FOLDER [--from CHECKPOINT [--encoder]] [--threads 2]
                                    [--device cuda] [--bf16] [--batch 12] [--vae-hours 1] [--dit-hours 8] [--smoke]

`--from pocket/model` goes on from a finished checkpoint instead: then the VAE's encoder stays as it is, unless `--encoder` lets
it learn too and the transformer follow it. The transformer then learns from its own estimates (`settings.REFINE`): sampling
starts every step from one, which training on the truth never shows it.

Run it again with the same folder after a kill and it goes on where the last saved state ends. FOLDER then holds
`vae/` and `dit/` (state, `log.jsonl` with the losses, `quality.jsonl`, sample sheets), `tokenizer/`, `checkpoint/`
(rewritten at every sample sheet) and, at the end, `done.json`. How good it has become, `benchmarks/pocket_quality.py --model
FOLDER/checkpoint` tells.

Two threads wait for each other at every operator, so that a neighbour on one core costs several times its share: on a machine
that does other work as well, give the training precedence (`chrt --rr 1`) or one thread. glibc gives memory back to the
system between operators; keeping it may spare a good part of the time:

    export GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.arena_max=1

`--bf16` computes the transformer's products in bfloat16: worth it where a processor has instructions for them (`amx_bf16` in
`lscpu`), slower where it has none.

`--device cuda` trains on a GPU, with clips drawn beforehand by `--threads` processes; the same random numbers are drawn on the
processor. A folder may go on on another device. (No GPU has run it yet; a test follows every tensor's device in the losses.)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path

import torch

from .card import model_card
from .checkpoint import write_checkpoint
from .language import Language, write_tokenizer
from .latents import latent_spread
from .settings import FULL, REFINE, SMOKE, Settings
from .start import spent_on
from .train_dit import Networks, train_dit
from .train_vae import train_vae

__all__ = ["train"]


def train(
    folder: Path,
    settings: Settings,
    *,
    threads: int = 1,
    start: Path | None = None,
    encoder: bool = False,
    device: torch.device | str = "cpu",
    bf16: bool = False,
) -> Networks:
    """All phases, each to the end of its budget; see the module.

    `start`: the checkpoint to go on from. `encoder`: whether the VAE's encoder then learns too. `device`: where the networks
    are trained, "cpu" or "cuda"; `bf16`: whether the transformer's products are bfloat16. A run may change both.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = folder / "tokenizer"
    if not (tokenizer / "tokenizer_config.json").exists():
        if start is None:
            write_tokenizer(tokenizer, settings.shapes.vocabulary)
        else:
            shutil.copytree(start / "tokenizer", tokenizer)
    language = Language(tokenizer, settings.shapes.text_length)

    vae = train_vae(folder / "vae", settings, threads, start, encoder=start is None or encoder, device=device)
    if start is None:
        scaling = _scaling(folder, vae)
    else:
        scaling = float(json.loads((start / "vae" / "config.json").read_text())["scaling_factor"])

    def keep(networks: Networks) -> int:
        spent = spent_on(folder, start, settings.dit)
        card = model_card(settings, spent)
        return write_checkpoint(folder / "checkpoint", networks, tokenizer, spent=spent, card=card)

    networks = train_dit(folder / "dit", settings, vae, language, scaling, threads, keep, start, device, bf16=bf16)
    size = keep(networks)
    (folder / "done.json").write_text(json.dumps({"bytes": size, "when": time.strftime("%Y-%m-%dT%H:%M:%S")}) + "\n")
    return networks


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
    parser.add_argument("--from", dest="start", type=Path, metavar="CHECKPOINT", help="begin with its weights")
    parser.add_argument("--encoder", action="store_true", help="with --from: the VAE's encoder learns too")
    parser.add_argument("--threads", type=int, default=2, help="processor cores to use; they also draw the clips")
    parser.add_argument("--device", default="cpu", help="where to train: cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="the transformer's products in bfloat16")
    parser.add_argument("--batch", type=int, help=f"clips in a step of the transformer, {FULL.dit.batch} if not given")
    parser.add_argument("--vae-hours", type=float, default=FULL.vae.hours)
    parser.add_argument("--dit-hours", type=float, default=FULL.dit.hours)
    parser.add_argument("--smoke", action="store_true", help="tiny networks and a few steps: does everything run?")
    given = parser.parse_args()
    if given.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {given.device}: PyTorch {torch.__version__} finds no GPU here")
    settings = SMOKE if given.smoke else FULL if given.start is None else REFINE
    settings = dataclasses.replace(
        settings,
        vae=dataclasses.replace(settings.vae, hours=given.vae_hours),
        dit=dataclasses.replace(
            settings.dit,
            hours=given.dit_hours,
            batch=given.batch or settings.dit.batch,
        ),
    )
    if given.device != "cpu":
        torch.set_float32_matmul_precision("high")  # TF32
    train(
        given.out,
        settings,
        threads=given.threads,
        start=given.start,
        encoder=given.encoder,
        device=given.device,
        bf16=given.bf16,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
