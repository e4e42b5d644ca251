"""Writes checkpoints of random weights in the diffusers layout, of any size, in the memory of one tensor.

    python benchmarks/checkpoints.py SPEC FOLDER [--dtype bf16] [--t5-layers 4] [--without vae,text] [--shard-gb 5]

`full` has the shape of DynamiCtrl-5B (11.5 GB in bf16, plus the text encoder); the other specs are small enough to run.
Names and shapes come from models made on the meta device, which holds no numbers. Values are stretches of one strip of
normals that is drawn once, each tensor from its own place, so that a large checkpoint is written as fast as the disk
takes it. The same seed gives the same values whatever the sharding.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dynamictrl_edge.bundle.atomic import atomic_folder
from dynamictrl_edge.bundle.errors import EdgeError, UsageError

sys.path.append(str(Path(__file__).resolve().parents[1]))  # so that this file also runs as a script

from benchmarks.published_torch import PublishedTransformer, TransformerConfig
from benchmarks.receipt import ROOT, peak_rss

__all__ = [
    "SPECS",
    "Spec",
    "TextShape",
    "VaeShape",
    "Written",
    "tensor_shapes",
    "text_config",
    "transformer_config",
    "vae_config",
    "write_checkpoint",
]

Dtype = Literal["fp32", "bf16", "fp16"]
Shape = tuple[int, ...]

# What only a tokenizer can say; the tiny one of the golden models serves every vocabulary of 512 and more.
TOKENIZER = ROOT / "tests" / "golden" / "models" / "cogvideox10-tiny" / "tokenizer"

VERSIONS = {"diffusers": "0.39.0", "transformers": "4.57.1"}  # as the configs of the golden models say
FORMATS: dict[Dtype, tuple[str, str, int]] = {  # name in safetensors, in configs, bytes
    "fp32": ("F32", "float32", 4),
    "bf16": ("BF16", "bfloat16", 2),
    "fp16": ("F16", "float16", 2),
}


@dataclasses.dataclass(frozen=True)
class VaeShape:
    channels: tuple[int, int, int, int]
    layers_per_block: int = 1
    norm_groups: int = 8
    sample_height: int = 96
    sample_width: int = 160


@dataclasses.dataclass(frozen=True)
class TextShape:
    """The T5 encoder; its width is the transformer's `text_embed_dim`."""

    layers: int = 2
    heads: int = 4
    key_width: int = 8
    feed_forward: int = 64
    vocabulary: int = 512


@dataclasses.dataclass(frozen=True)
class Spec:
    """A checkpoint to write, and a size in pixels and frames to run it at."""

    transformer: TransformerConfig
    vae: VaeShape
    text: TextShape
    height: int
    width: int
    frames: int
    dtype: Dtype = "fp32"

    @property
    def is_15(self) -> bool:
        """1.5-style: patches span two frames, latents of the photo stay unscaled, another noise schedule."""
        return self.transformer.patch_size_t is not None

    @property
    def video_tokens(self) -> int:
        """Video tokens at the spec's own size."""
        latent_frames = (self.frames - 1) // 4 + 1
        return -(-latent_frames // (self.transformer.patch_size_t or 1)) * (self.height // 16) * (self.width // 16)


def _transformer(
    style: Literal["1.0", "1.5"], heads: int, layers: int, time: int, text: int, text_length: int, sample: Shape
) -> TransformerConfig:
    frames, height, width = sample
    return TransformerConfig(
        num_attention_heads=heads,
        attention_head_dim=64,
        in_channels=32,
        out_channels=16,
        time_embed_dim=time,
        text_embed_dim=text,
        num_layers=layers,
        sample_frames=frames,
        sample_height=height,
        sample_width=width,
        max_text_seq_length=text_length,
        patch_size_t=2 if style == "1.5" else None,
        ofs_embed_dim=time if style == "1.5" else None,
    )


_LEARNED = dataclasses.replace(_transformer("1.0", 1, 1, 32, 32, 16, (9, 6, 8)), use_learned_positional_embeddings=True)
_BENCH_VAE = VaeShape((8, 8, 16, 16))
_BENCH_TEXT = TextShape(heads=8, key_width=64, feed_forward=1024)

SPECS: Mapping[str, Spec] = {
    "tiny10": Spec(
        _transformer("1.0", 2, 3, 64, 32, 16, (9, 12, 20)), VaeShape((8, 16, 16, 16)), TextShape(), 64, 64, 9
    ),
    "tiny10-learnedpos": Spec(_LEARNED, VaeShape((8, 16, 16, 16)), TextShape(), 48, 64, 9),
    "tiny15": Spec(
        _transformer("1.5", 2, 3, 64, 32, 16, (9, 40, 40)), VaeShape((8, 8, 16, 16)), TextShape(), 64, 64, 13
    ),
    # 27 million parameters and 1 280 video tokens + 32: bound by arithmetic on a CPU.
    "bench-27m": Spec(_transformer("1.5", 6, 8, 256, 512, 32, (13, 40, 64)), _BENCH_VAE, _BENCH_TEXT, 320, 512, 13),
    "bench-27m-10": Spec(_transformer("1.0", 6, 8, 256, 512, 32, (13, 32, 40)), _BENCH_VAE, _BENCH_TEXT, 256, 320, 13),
    # 11 million parameters and 240 video tokens + 16: bound by everything else.
    "bench-small": Spec(_transformer("1.5", 4, 8, 128, 512, 16, (13, 20, 24)), _BENCH_VAE, _BENCH_TEXT, 160, 192, 13),
    # DynamiCtrl-5B.
    "full": Spec(
        _transformer("1.5", 48, 42, 512, 4096, 226, (81, 300, 300)),
        VaeShape((128, 256, 256, 512), layers_per_block=3, norm_groups=32, sample_height=480, sample_width=720),
        TextShape(layers=24, heads=64, key_width=64, feed_forward=10240, vocabulary=32128),
        768,
        1360,
        37,
        "bf16",
    ),
}


@dataclasses.dataclass(frozen=True)
class Written:
    """What was written: parameters per component, bytes of all weight files, seconds."""

    parameters: Mapping[str, int]
    bytes: int
    seconds: float


def write_checkpoint(
    folder: Path,
    spec: Spec | str,
    *,
    seed: int = 0,
    dtype: Dtype | None = None,
    t5_layers: int | None = None,
    without: Sequence[str] = (),
    shard_bytes: int = 5 * 10**9,
) -> Written:
    """Writes `folder` (it appears whole or not at all).

    spec: a `Spec` or a name from `SPECS`. dtype: of all weights; default the spec's. t5_layers: other than the spec's.
    without: components left out of the folder and of `model_index.json`, of "transformer", "vae", "text" (the text
    encoder and its tokenizer). A component larger than `shard_bytes` is split into files of at most that size.

    Raises `UsageError` for an unknown name, `InputError` when the folder is not empty or cannot be written.
    """
    started = time.perf_counter()
    if isinstance(spec, str):
        if spec not in SPECS:
            raise UsageError(f"There is no checkpoint spec {spec!r}; choose one of {', '.join(SPECS)}.")
        spec = SPECS[spec]
    if unknown := set(without) - {"transformer", "vae", "text"}:
        raise UsageError(f"Cannot leave out {', '.join(sorted(unknown))}; choose from transformer, vae, text.")
    if t5_layers is not None:
        spec = dataclasses.replace(spec, text=dataclasses.replace(spec.text, layers=t5_layers))
    spec = dataclasses.replace(spec, dtype=dtype or spec.dtype)

    strip = NormalStrip(seed)
    parameters: dict[str, int] = {}
    total_bytes = 0
    with atomic_folder(folder) as target:
        _write_json(target / "model_index.json", _model_index(without))
        _write_json(target / "scheduler" / "scheduler_config.json", scheduler_config(1.0 if spec.is_15 else 3.0))
        if "text" not in without:
            shutil.copytree(TOKENIZER, target / "tokenizer")
        for component, stem, config in (
            ("transformer", "diffusion_pytorch_model", transformer_config(spec)),
            ("vae", "diffusion_pytorch_model", vae_config(spec)),
            ("text_encoder", "model", text_config(spec)),
        ):
            if component.removesuffix("_encoder") in without:
                continue
            shapes = tensor_shapes(spec, component)
            _write_json(target / component / "config.json", config)
            total_bytes += _write_weights(target / component, stem, spec, component, shapes, strip, shard_bytes)
            parameters[component] = sum(math.prod(shape) for shape in shapes.values())
    return Written(parameters, total_bytes, time.perf_counter() - started)


def tensor_shapes(spec: Spec, component: str) -> dict[str, Shape]:
    """Name -> shape of every tensor of "transformer", "vae" or "text_encoder", in the model's own order."""
    with torch.device("meta"):
        if component == "transformer":
            model: torch.nn.Module = PublishedTransformer(spec.transformer)
        elif component == "vae":
            from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX

            model = AutoencoderKLCogVideoX.from_config(vae_config(spec))
        else:
            from transformers import T5Config, T5EncoderModel

            config: Any = T5Config  # untyped
            model = T5EncoderModel(config(**text_config(spec)))
    tied = "encoder.embed_tokens.weight"  # T5's embedding under its second name; checkpoints hold it once
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name != tied}


# Values


def distribution(spec: Spec, component: str, name: str, shape: Shape) -> tuple[float, float]:
    """(mean, standard deviation) of a tensor.

    As in the golden models: activations stay near 1, norms near the identity, and gates, shifts and biases are far
    enough from zero that leaving one out shows.
    """
    leaf = name.rsplit(".", 1)[-1]
    fan_in = math.prod(shape[1:])
    unit = 1 / math.sqrt(max(fan_in, 1))
    if component == "transformer":
        if name == "patch_embed.pos_embedding":
            return 0.4, 0.5
        modulation = "norm" in name and ".linear." in name
        if len(shape) == 1 and "norm" in name and not modulation:
            return (1.0 if leaf == "weight" else 0.0), 0.15
        if leaf == "bias":
            return 0.0, 0.25 if modulation else 0.1
        embeds_time = name.startswith(("time_embedding", "ofs_embedding"))
        return 0.0, unit * (0.6 if modulation else 1.5 if embeds_time else 1.0)
    if component == "text_encoder":
        if len(shape) == 1:
            return 1.0, 0.15
        if name.endswith("relative_attention_bias.weight"):
            return 0.0, 0.6
        if name == "shared.weight":
            return 0.0, 1.0
        # T5 does not divide its scores by the root of the head width; the query weights do.
        return 0.0, unit * (spec.text.key_width**-0.5 if name.endswith(".q.weight") else 1.0)
    if leaf == "bias":
        if name == "encoder.conv_out.conv.bias":
            return -1.0, 1.0  # half of these are the posterior's log variance
        return (1.0 if "conv_y" in name else 0.0), 0.1
    if len(shape) == 1:
        return 1.0, 0.15
    if "conv_y" in name or "conv_b" in name:
        return 0.0, 0.25 * unit
    if name == "decoder.conv_out.conv.weight":
        return 0.0, 0.5 * unit
    return 0.0, unit * (1.3 if ".conv.weight" in name and "sampler" not in name else 1.0)


class NormalStrip:
    """A strip of standard normals, drawn once. A tensor takes a stretch from a place given by its name."""

    # Prime, so that no weight matrix has rows that repeat.
    LENGTH = 4_194_301

    def __init__(self, seed: int) -> None:
        self._normals = np.random.default_rng(seed).standard_normal(self.LENGTH, dtype=np.float32)
        self._whole = lru_cache(maxsize=4)(self._converted)  # the few kinds of large matrices

    def stretches(self, name: str, count: int, mean: float, std: float, dtype: Dtype) -> Iterator[NDArray[Any]]:
        """`count` values in pieces, in the bits of `dtype` (bf16 as uint16)."""
        start = zlib.crc32(name.encode()) % self.LENGTH
        while count > 0:
            stop = min(start + count, self.LENGTH)
            if count >= self.LENGTH:
                yield self._whole(mean, std, dtype)[start:stop]
            else:
                yield self._converted(mean, std, dtype, start, stop)
            count, start = count - (stop - start), 0

    def _converted(
        self, mean: float, std: float, dtype: Dtype, start: int = 0, stop: int | None = None
    ) -> NDArray[Any]:
        values = self._normals[start:stop] * np.float32(std) + np.float32(mean)
        if dtype == "fp32":
            return values
        if dtype == "fp16":
            return values.astype(np.float16)
        bits = values.view(np.uint32)  # to bfloat16, rounding half to even
        return ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


# Files


def _write_weights(
    folder: Path, stem: str, spec: Spec, component: str, shapes: dict[str, Shape], strip: NormalStrip, limit: int
) -> int:
    """Writes `<stem>.safetensors`, or shards and their index; returns the bytes of all tensors."""
    width = FORMATS[spec.dtype][2]
    sizes = {name: math.prod(shape) * width for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size

    count = len(shards)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors"
        _write_safetensors(folder / file, spec, component, {name: shapes[name] for name in names}, strip)
        weight_map.update(dict.fromkeys(names, file))
    if count > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / f"{stem}.safetensors.index.json", index)
    return sum(sizes.values())


def _write_safetensors(path: Path, spec: Spec, component: str, shapes: dict[str, Shape], strip: NormalStrip) -> None:
    """The format is a length, a JSON header, then the tensors; so it can be written as the values are made."""
    label, _, width = FORMATS[spec.dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * width
        header[name] = {"dtype": label, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the tensors aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            mean, std = distribution(spec, component, name, shape)
            for piece in strip.stretches(name, math.prod(shape), mean, std, spec.dtype):
                file.write(piece.data)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


# Configs


def _model_index(without: Sequence[str]) -> dict[str, Any]:
    parts = {
        "scheduler": ["diffusers", "CogVideoXDPMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["dynamictrl.models.model_dynamictrl", "DynamiCtrlTransformerModel"],
        "vae": ["dynamictrl.models.modules.model_cogvideox_autoencoderKL", "AutoencoderKLCogVideoX"],
    }
    left_out = set(without) | ({"text_encoder", "tokenizer"} if "text" in without else set())
    kept = {name: value for name, value in parts.items() if name not in left_out}
    return diffusers_config("DynamiCtrlAnimationPipeline") | kept


def diffusers_config(class_name: str) -> dict[str, Any]:
    return {"_class_name": class_name, "_diffusers_version": VERSIONS["diffusers"]}


def transformer_config(spec: Spec) -> dict[str, Any]:
    return diffusers_config("DynamiCtrlTransformerModel") | dataclasses.asdict(spec.transformer)


def vae_config(spec: Spec) -> dict[str, Any]:
    return diffusers_config("AutoencoderKLCogVideoX") | {
        "act_fn": "silu",
        "block_out_channels": list(spec.vae.channels),
        "down_block_types": ["CogVideoXDownBlock3D"] * 4,
        "force_upcast": True,
        "in_channels": 3,
        "invert_scale_latents": spec.is_15,
        "latent_channels": 16,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": spec.vae.layers_per_block,
        "norm_eps": 1e-06,
        "norm_num_groups": spec.vae.norm_groups,
        "out_channels": 3,
        "sample_height": spec.vae.sample_height,
        "sample_width": spec.vae.sample_width,
        "scaling_factor": 0.7,
        "shift_factor": None,
        "temporal_compression_ratio": 4,
        "up_block_types": ["CogVideoXUpBlock3D"] * 4,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def text_config(spec: Spec) -> dict[str, Any]:
    text = spec.text
    shape = t5_config(
        spec.transformer.text_embed_dim, text.key_width, text.feed_forward, text.heads, text.layers, text.vocabulary
    )
    return shape | {"classifier_dropout": 0.0, "dropout_rate": 0.1, "dtype": FORMATS[spec.dtype][1]}


def t5_config(
    width: int, key_width: int, feed_forward: int, heads: int, layers: int, vocabulary: int
) -> dict[str, Any]:
    """`text_encoder/config.json` of a T5 1.1 encoder without dropout; `key_width`: of one head."""
    return {
        "architectures": ["T5EncoderModel"],
        "d_ff": feed_forward,
        "d_kv": key_width,
        "d_model": width,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.0,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": False,
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "num_decoder_layers": layers,
        "num_heads": heads,
        "num_layers": layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "transformers_version": VERSIONS["transformers"],
        "use_cache": False,
        "vocab_size": vocabulary,
    }


def scheduler_config(snr_shift_scale: float) -> dict[str, Any]:
    """`scheduler/scheduler_config.json`; 1.5-style models shift nothing (1.0), 1.0-style ones by 3.0."""
    return diffusers_config("CogVideoXDPMScheduler") | {
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "sample_max_value": 1.0,
        "set_alpha_to_one": True,
        "snr_shift_scale": snr_shift_scale,
        "steps_offset": 0,
        "timestep_spacing": "trailing",
        "trained_betas": None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a checkpoint of random weights in the diffusers layout.")
    parser.add_argument("spec", choices=SPECS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=FORMATS, help="default: the spec's (fp32, for full bf16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--t5-layers", type=int, metavar="N", help="text encoder layers, default the spec's")
    parser.add_argument("--without", default="", metavar="PARTS", help="leave out, of: transformer,vae,text")
    parser.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="largest weight file, default 5")
    given = parser.parse_args()
    try:
        written = write_checkpoint(
            given.folder,
            given.spec,
            seed=given.seed,
            dtype=given.dtype,
            t5_layers=given.t5_layers,
            without=[part for part in given.without.split(",") if part],
            shard_bytes=int(given.shard_gb * 1e9),
        )
    except EdgeError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    for component, count in written.parameters.items():
        print(f"{component:14}{count / 1e6:10.2f} M parameters")
    rate = written.bytes / written.seconds / 1e9
    print(f"{written.bytes / 1e9:.2f} GB in {written.seconds:.1f} s, {rate:.2f} GB/s, peak {peak_rss() / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
