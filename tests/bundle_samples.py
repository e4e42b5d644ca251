"""Bundles made by hand from a few bytes, for tests that need no model: quick to write, complete enough to be opened."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from dynamictrl_edge.bundle.config import SizeDefaults, TextConfig, TransformerConfig, VaeConfig
from dynamictrl_edge.bundle.manifest import (
    FORMAT_NAME,
    FORMAT_VERSION,
    FileEntry,
    GraphSpec,
    Manifest,
    Port,
    write_manifest,
)
from dynamictrl_edge.bundle.tensors import TensorWriter

TRANSFORMER = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=64,
    num_layers=1,
    in_channels=32,
    out_channels=16,
    patch_size=2,
    text_embed_dim=32,
    time_embed_dim=64,
    max_text_seq_length=16,
    sample_height=12,
    sample_width=20,
    sample_frames=9,
)
VAE = VaeConfig(
    block_out_channels=(8, 8, 16, 16),
    latent_channels=16,
    layers_per_block=1,
    sample_height=96,
    sample_width=160,
    scaling_factor=0.7,
)
TEXT = TextConfig(d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=2, vocab_size=512)
GRAPH, WEIGHTS, TOKENIZER = "graphs/block.onnx", "weights/block_00.safetensors", "tokenizer.json"
GRAPH_BYTES, TOKENIZER_BYTES = b"no graph, but nobody runs it", b'{"model": "of no kind"}\n'


def entry_of(data: bytes) -> FileEntry:
    return FileEntry(hashlib.sha256(data).hexdigest(), len(data))


def small_manifest(files: dict[str, FileEntry]) -> Manifest:
    """A manifest whose one graph uses `GRAPH` and `WEIGHTS`."""
    graph = GraphSpec(
        file=GRAPH,
        inputs=(Port("video", "float", ("B", "N", 128)),),
        outputs=(Port("video_out", "float", ("B", "N", 128)),),
        weights=WEIGHTS,
    )
    return Manifest(
        format=FORMAT_NAME,
        version=FORMAT_VERSION,
        precision="fp32",
        transformer=TRANSFORMER,
        text=TEXT,
        vae=VAE,
        scheduler={"beta_start": 0.00085, "timestep_spacing": "trailing"},
        defaults=SizeDefaults(height=96, width=160, frames=9),
        graphs={"block": graph},
        files=files,
        provenance={"dynamictrl-edge": "0.1"},
    )


def small_bundle(root: Path) -> Path:
    """Writes a bundle of one graph, one weight file and a tokenizer into the new folder `root`."""
    for folder in ("graphs", "weights"):
        (root / folder).mkdir(parents=True)
    (root / GRAPH).write_bytes(GRAPH_BYTES)
    (root / TOKENIZER).write_bytes(TOKENIZER_BYTES)
    with TensorWriter(root / WEIGHTS, [("out_bias", "F32", (3,)), ("empty", "F16", (0, 4))]) as writer:
        writer.write("out_bias", np.array([1, 2, 3], np.float32))
        writer.write("empty", np.zeros((0, 4), np.float16))
        writer.close()
    write_manifest(
        root, small_manifest({name: entry_of((root / name).read_bytes()) for name in (GRAPH, WEIGHTS, TOKENIZER)})
    )
    return root


def edit_manifest(root: Path, **changes: Any) -> None:
    """Replaces top-level fields of `bundle.json`; None removes one."""
    path = root / "bundle.json"
    values = json.loads(path.read_text()) | changes
    path.write_bytes(msgspec.json.encode({name: value for name, value in values.items() if value is not None}))
