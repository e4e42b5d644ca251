"""A tiny random checkpoint in the published layout (1.5 style), for the demo until a trained one exists."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np

from ..bundle.config import TextConfig, TransformerConfig
from ..bundle.tensors import TensorWriter
from .convert import source_shapes
from .recipe import Recipe
from .text_encoder import text_layer_recipe, text_shared_recipe
from .transformer_weights import block_recipes, modulation_recipes, shared_recipes
from .vae import vae_tensors

__all__ = ["write_demo_checkpoint"]

WORDS = (
    "a the person woman man in blue red green white black yellow shirt dress trousers jacket skirt waves walks dances "
    "turns squats jumps stands with long short hair background shows meadow beach street city room wall sky and of on"
)
TRANSFORMER = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=64,
    num_layers=2,
    in_channels=32,
    out_channels=16,
    patch_size=2,
    patch_size_t=2,
    text_embed_dim=32,
    time_embed_dim=64,
    ofs_embed_dim=64,
    max_text_seq_length=32,
    sample_height=20,
    sample_width=12,
    sample_frames=17,
)
TEXT = TextConfig(d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=2, vocab_size=512)
VAE = {
    "_class_name": "AutoencoderKLCogVideoX",
    "block_out_channels": [8, 8, 16, 16],
    "down_block_types": ["CogVideoXDownBlock3D"] * 4,
    "up_block_types": ["CogVideoXUpBlock3D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_height": 160,
    "sample_width": 96,
    "scaling_factor": 0.7,
    "invert_scale_latents": True,
    "temporal_compression_ratio": 4,
}
SCHEDULER = {
    "_class_name": "CogVideoXDPMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "snr_shift_scale": 1.0,
    "timestep_spacing": "trailing",
}
INDEX = {
    "_class_name": "DynamiCtrlAnimationPipeline",
    "scheduler": ["diffusers", "CogVideoXDPMScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["dynamictrl", "DynamiCtrlTransformerModel"],
    "vae": ["dynamictrl", "AutoencoderKLCogVideoX"],
}


def write_demo_checkpoint(folder: Path, *, seed: int = 0) -> None:
    """Writes a checkpoint folder of about 4 MB with seeded random float32 weights."""
    random = np.random.default_rng(seed)
    recipes = [*shared_recipes(TRANSFORMER)]
    for i in range(TRANSFORMER.num_layers):
        recipes += [*block_recipes(TRANSFORMER, i), *modulation_recipes(TRANSFORMER, i)]
    text = [*text_shared_recipe(TEXT)]
    for i in range(TEXT.num_layers):
        text += text_layer_recipe(TEXT, i)
    vae = [(t.source, t.shape) for kind in ("encoder", "decoder") for t in vae_tensors(kind, VAE)]
    folder.mkdir()
    _json(folder / "model_index.json", INDEX)
    for component, config, tensors in (
        ("transformer", msgspec.to_builtins(TRANSFORMER), _sources(recipes)),
        ("text_encoder", {**msgspec.to_builtins(TEXT), "model_type": "t5"}, _sources(text)),
        ("vae", VAE, vae),
    ):
        (folder / component).mkdir()
        _json(folder / component / "config.json", config)
        stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
        with TensorWriter(folder / component / f"{stem}.safetensors", [(n, "F32", s) for n, s in tensors]) as writer:
            for name, shape in tensors:
                writer.write(name, _values(random, name, shape))
            writer.close()
    (folder / "scheduler").mkdir()
    _json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    (folder / "tokenizer").mkdir()
    _tokenizer(folder / "tokenizer")


def _sources(recipes: Iterable[Recipe]) -> list[tuple[str, tuple[int, ...]]]:
    """Every checkpoint tensor that the recipes read, once, with its shape."""
    found: dict[str, tuple[int, ...]] = {}
    for recipe in recipes:
        found.update(zip(recipe.sources, source_shapes(recipe), strict=True))
    return list(found.items())


def _values(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Matrices keep the size of what goes through them; norms are near one; biases are small."""
    if len(shape) == 1:
        base = 1.0 if "norm" in name and name.endswith("weight") and "linear" not in name else 0.0
        return (base + 0.05 * random.standard_normal(shape)).astype(np.float32)
    scale = 1.0 if name == "shared.weight" else float(np.prod(shape[1:])) ** -0.5
    return (scale * random.standard_normal(shape)).astype(np.float32)


def _tokenizer(folder: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 50),
        model_prefix=str(folder / "spiece"),
        vocab_size=TEXT.vocab_size,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    _json(folder / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "legacy": True})


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
