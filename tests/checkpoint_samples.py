"""Checkpoints for tests: copies of the golden ones with small changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.golden import model_dir

WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
Tensors = dict[str, torch.Tensor]


def copied(folder: Path, model: str = "cogvideox10-tiny") -> Path:
    """A copy of a golden checkpoint as `folder/checkpoint`."""
    return shutil.copytree(model_dir(model), folder / "checkpoint")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(checkpoint: Path, component: str, change: Callable[[Tensors], object]) -> None:
    """Lets `change` work on all tensors of a component, by name, and stores them again."""
    path = checkpoint / component / WEIGHTS[component]
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def split(checkpoint: Path, component: str, shards: int = 2) -> None:
    """Stores a component's weights in shards with an index, as `save_pretrained` does with large ones."""
    path = checkpoint / component / WEIGHTS[component]
    tensors = load_file(path)
    path.unlink()
    where = {}
    for number in range(shards):
        part = dict(list(tensors.items())[number::shards])
        shard = path.with_name(f"{path.stem}-{number + 1:05d}-of-{shards:05d}.safetensors")
        save_file(part, shard)
        where.update(dict.fromkeys(part, shard.name))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    path.with_name(path.name + ".index.json").write_text(json.dumps(index))
