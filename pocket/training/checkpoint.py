"""Writes what was trained as a checkpoint folder in the diffusers layout, which `dynamictrl export` reads like any other."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.checkpoints import diffusers_config
from dynamictrl_edge.bundle.atomic import atomic_folder

from .networks import SCHEDULER, text_config, transformer_config, vae_config
from .start import RECORD, Spent
from .train_dit import Networks

__all__ = ["LIMIT", "write_checkpoint"]

LIMIT = 20_000_000  # bytes that the repository has for it

INDEX = {
    **diffusers_config("DynamiCtrlAnimationPipeline"),
    "scheduler": ["diffusers", "CogVideoXDPMScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["dynamictrl", "DynamiCtrlTransformerModel"],
    "vae": ["dynamictrl", "AutoencoderKLCogVideoX"],
}


def write_checkpoint(
    folder: Path,
    networks: Networks,
    tokenizer: Path,
    *,
    spent: Mapping[str, Spent],
    card: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Writes `folder` whole or not at all, replacing an older one; returns the bytes of all its files.

    `tokenizer`: the folder of `write_tokenizer`. `spent`: kept in the checkpoint, for runs that go on from it. `card`: the
    model card's text, if there is one yet.
    """
    shapes = networks.settings.shapes
    older = folder.with_name(folder.name + ".old")
    shutil.rmtree(older, ignore_errors=True)
    if folder.exists():
        folder.rename(older)
    with atomic_folder(folder) as target:
        _json(target / "model_index.json", INDEX)
        _json(target / RECORD, spent)
        _json(target / "scheduler" / "scheduler_config.json", SCHEDULER)
        transformer = diffusers_config("DynamiCtrlTransformerModel") | dataclasses.asdict(transformer_config(shapes))
        text_state = dict(networks.text_encoder.state_dict())
        text_state.pop("encoder.embed_tokens.weight", None)  # the embedding under its second name
        name = str(dtype).removeprefix("torch.")
        for component, stem, config, state in (
            ("transformer", "diffusion_pytorch_model", transformer, networks.transformer.state_dict()),
            ("vae", "diffusion_pytorch_model", vae_config(shapes, networks.scaling_factor), networks.vae.state_dict()),
            ("text_encoder", "model", {**text_config(shapes), "dtype": name}, text_state),
        ):
            _json(target / component / "config.json", config)
            _weights(target / component / f"{stem}.safetensors", state, dtype)
        shutil.copytree(tokenizer, target / "tokenizer")
        if card is not None:
            (target / "README.md").write_text(card)
    shutil.rmtree(older, ignore_errors=True)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _weights(path: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    save_file({name: value.detach().to(dtype).contiguous() for name, value in state.items()}, path, {"format": "pt"})


def _json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
