"""The torch peer reproduces the golden numbers of the published implementation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch

from benchmarks.published_pipeline import published_pipeline, raised_frames
from benchmarks.published_torch import (
    PublishedTransformer,
    denoise,
    load_scheduler,
    load_transformer,
    rotary_tables,
)
from tests.golden import PIPELINES, case, max_abs, model_dir, relative_rms

TRANSFORMER_CASES = [
    "transformer10_a",
    "transformer10_b",
    "transformer10_learnedpos",
    "transformer15_a",
    "transformer15_b",
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def transformer(model: str) -> PublishedTransformer:
    return load_transformer(model_dir(model) / "transformer")


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy())


def recorded(model: PublishedTransformer) -> tuple[dict[str, list[Any]], list[Any]]:
    """Hooks on every module: name -> the outputs of its calls, in order; and the handles to remove."""
    outputs: dict[str, list[Any]] = {}

    def hook_for(name: str) -> Any:
        return lambda module, inputs, output: outputs.setdefault(name, []).append(output)

    return outputs, [module.register_forward_hook(hook_for(name)) for name, module in model.named_modules() if name]


def run_with_intermediates(name: str) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """The forward pass of a golden case: intermediates under the golden names, and the output."""
    arrays, info = case(name)
    model = transformer(info["model"])
    length = arrays["encoder_hidden_states"].shape[1]
    outputs, handles = recorded(model)
    try:
        with torch.no_grad():
            result = model(
                tensor(arrays["hidden_states"]),
                tensor(arrays["encoder_hidden_states"]),
                tensor(arrays["timestep"]),
                tensor(arrays["control_hidden_states"]),
                (tensor(arrays["rope_cos"]), tensor(arrays["rope_sin"])),
                tensor(arrays["ofs"]) if "ofs" in arrays else None,
            )
    finally:
        for handle in handles:
            handle.remove()
    found = {
        "time_sinusoid": outputs["time_proj"][0],
        "temb": outputs["time_embedding"][0],
        "patch_text": outputs["patch_embed"][0][:, :length],
        "patch_hidden": outputs["patch_embed"][0][:, length:],
        "patch_control": outputs["patch_embed"][1][:, length:],
        "norm_final_hidden": outputs["norm_final"][0][:, length:],
        "norm_out": outputs["norm_out"][0],
        "proj_out": outputs["proj_out"][0],
    }
    if "ofs" in arrays:
        found["ofs_embedding"] = outputs["ofs_embedding"][0]
        found["temb"] = found["temb"] + found["ofs_embedding"]
    for i in range(model.config.num_layers):
        block = f"transformer_blocks.{i}"
        for key, value in zip(("hidden", "text", "control"), outputs[block][0], strict=True):
            found[f"block_{i}_{key}"] = value
        modulated, gate = outputs[f"{block}.control_norm1"][0]
        hidden, text = outputs[f"{block}.attn1"][0]
        found |= {f"block_{i}_control_modulated": modulated, f"block_{i}_control_gate": gate}
        found |= {f"block_{i}_attn_hidden": hidden, f"block_{i}_attn_text": text}
    return found, result.numpy()


@pytest.mark.parametrize("name", TRANSFORMER_CASES)
def test_transformer_meets_the_golden_output_and_every_intermediate(name: str) -> None:
    arrays, info = case(name)
    found, output = run_with_intermediates(name)
    golden = {key for key, entry in info["tensors"].items() if entry["role"] == "intermediate"}
    assert golden <= found.keys()
    for key in sorted(golden):
        value = found[key].numpy()
        assert max_abs(value, arrays[key]) <= 1e-3, key
        assert relative_rms(value, arrays[key]) <= 1e-4, key
    assert max_abs(output, arrays["output"]) <= 2e-4
    assert relative_rms(output, arrays["output"]) <= 5e-5


def test_the_pose_changes_the_prediction() -> None:
    arrays, info = case("transformer15_b")
    model = transformer(info["model"])
    rotary = tensor(arrays["rope_cos"]), tensor(arrays["rope_sin"])
    with torch.no_grad():
        other = model(
            tensor(arrays["hidden_states"]),
            tensor(arrays["encoder_hidden_states"]),
            tensor(arrays["timestep"]),
            torch.zeros_like(tensor(arrays["control_hidden_states"])),
            rotary,
            tensor(arrays["ofs"]),
        )
    assert relative_rms(other.numpy(), arrays["output"]) > 0.1


@pytest.mark.parametrize("name", ["rope10", "rope15"])
def test_rotary_tables_meet_the_golden_tables(name: str) -> None:
    arrays, info = case(name)
    config = transformer(info["model"]).config
    sizes = [key.removesuffix("_cos") for key in arrays if key.startswith("h") and key.endswith("_cos")]
    assert sizes
    for size in sizes:
        height, width, frames = (int(part[1:]) for part in size.split("_"))
        cos, sin = rotary_tables(config, height, width, raised_latents(frames, config.patch_size_t))
        assert max_abs(cos.numpy(), arrays[f"{size}_cos"]) <= 1e-5
        assert max_abs(sin.numpy(), arrays[f"{size}_sin"]) <= 1e-5


@pytest.mark.parametrize("name", ["rope10", "rope15"])
def test_rotary_tables_meet_the_production_sizes_axis_by_axis(name: str) -> None:
    arrays, info = case(name)
    for entry in info["production_tables"]:
        config = dataclasses.replace(
            transformer(info["model"]).config,
            sample_height=entry["sample_height"],
            sample_width=entry["sample_width"],
            patch_size_t=entry["patch_size_t"],
        )
        times, rows, columns = entry["grid"]
        tables = rotary_tables(config, entry["height"], entry["width"], entry["latent_frames_passed"])
        for kind, table in zip(("cos", "sin"), tables, strict=True):
            grid = table.reshape(times, rows, columns, 64).numpy()
            assert max_abs(grid[:, 0, 0, :16], arrays[f"{entry['key']}_t_{kind}"]) <= 1e-5
            assert max_abs(grid[0, :, 0, 16:40], arrays[f"{entry['key']}_h_{kind}"]) <= 1e-5
            assert max_abs(grid[0, 0, :, 40:], arrays[f"{entry['key']}_w_{kind}"]) <= 1e-5


def raised_latents(frames: int, patch_size_t: int | None) -> int:
    return (raised_frames(frames, patch_size_t)[1] - 1) // 4 + 1


@pytest.mark.parametrize("name", PIPELINES)
def test_denoising_loop_meets_every_golden_step(name: str) -> None:
    arrays, info = case(name)
    settings = info["settings"]
    model = transformer(info["model"])
    generator = torch.Generator().manual_seed(settings["seed"])
    for draw in info["random_draws"][:3]:  # both posteriors and the first noise come before the loop
        drawn = torch.randn(draw["shape"], generator=generator).numpy()
        assert max_abs(drawn, arrays[draw["tensor"]]) <= 1e-6
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    final = denoise(
        model,
        load_scheduler(model_dir(info["model"]) / "scheduler"),
        prompt_embeds=tensor(arrays["prompt_embeds"]),
        latents=tensor(arrays["initial_latents"]),
        image_latents=tensor(arrays["image_latents"]),
        pose_latents=tensor(arrays["control_video_latents"]),
        rotary=(tensor(arrays["rope_cos"]), tensor(arrays["rope_sin"])),
        steps=settings["num_inference_steps"],
        guidance=settings["guidance_scale"],
        generator=generator,
        on_step=lambda index, output, latents: seen.append((output.numpy(), latents.numpy())),
    )
    assert len(seen) == len(info["timesteps"])
    for index, (output, latents) in enumerate(seen):
        assert max_abs(output, arrays[f"step_{index:02d}_model_output"]) <= 2e-4
        assert max_abs(latents, arrays[f"step_{index:02d}_latents"]) <= 5e-4
    assert max_abs(final.numpy(), arrays["final_latents"]) <= 5e-4
    assert relative_rms(final.numpy(), arrays["final_latents"]) <= 1e-4


@pytest.mark.parametrize("name", PIPELINES)
def test_whole_pipeline_meets_the_golden_video(name: str) -> None:
    arrays, info = case(name)
    settings = info["settings"]
    video = published_pipeline(
        model_dir(info["model"]),
        arrays["image_u8"],
        arrays["control_u8"],
        settings["prompt"],
        settings["negative_prompt"],
        settings["height"],
        settings["width"],
        settings["num_frames"],
        settings["num_inference_steps"],
        settings["guidance_scale"],
        settings["seed"],
        settings["vae_tiling_and_slicing"],
    )
    assert max_abs(video["prompt_embeds"], arrays["prompt_embeds"]) <= 5e-5
    assert max_abs(video["initial_latents"], arrays["initial_latents"]) <= 1e-6
    assert max_abs(video["image_latents"], arrays["image_latents"]) <= 5e-5
    assert max_abs(video["pose_latents"], arrays["control_video_latents"]) <= 5e-5
    assert max_abs(video["final_latents"], arrays["final_latents"]) <= 5e-4
    assert relative_rms(video["final_latents"], arrays["final_latents"]) <= 1e-4
    assert video["saved_latents"].shape[0] == info["frame_counts"]["latent_frames_decoded"]
    assert max_abs(video["frames"], arrays["frames"]) <= 2e-4
    assert max_abs(video["frames_u8"], arrays["frames_u8"]) <= 1


def test_a_pose_clip_of_the_unraised_length_is_refused() -> None:
    arrays, info = case("pipeline15_nocfg_f9")
    with pytest.raises(ValueError, match=r"needs \(13, 32, 48, 3\)"):
        published_pipeline(
            model_dir(info["model"]), arrays["image_u8"], arrays["control_u8"][:9], "", "", 32, 48, 9, 2, 1.0, 0, False
        )


@pytest.mark.parametrize(
    ("frames", "patch_size_t", "expected"), [(9, None, (0, 9)), (13, 2, (0, 13)), (9, 2, (1, 13)), (37, 2, (0, 37))]
)
def test_raised_frames(frames: int, patch_size_t: int | None, expected: tuple[int, int]) -> None:
    assert raised_frames(frames, patch_size_t) == expected
