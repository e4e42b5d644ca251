"""A clip on the GPU backend held against ONNX Runtime's on the processor, stage by stage: whether engines are right.

Every stage has the processor's input, so that an engine's error shows where it arises: text encoder, VAE encoder (photo and pose
clip), the first denoising step (conditioning, modulation, stem, blocks, head) and the VAE decoder. Then whole clips: the first one,
which may compile kernels, a second, one whose weights stream, and one whose steps are CUDA graphs; they must be the same numbers.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loop import attempt, relative_rms
from dynamictrl_edge.runtime import Animator
from dynamictrl_edge.runtime.animator import Clip, Prepared

__all__ = ["compare"]

Arrays = dict[str, np.ndarray]


def compare(bundle: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Figures for the request `wanted` (arguments of `Request`) on a bundle that has engines for this GPU.

    Raises `DeviceError` or `BundleError` where the engines do not run; a later clip that fails leaves its reason instead.
    """
    processor = Animator.from_bundle(bundle, backend="onnxruntime", cache=False)
    exact = processor(**wanted)
    given = processor.prepare(**wanted)
    found: dict[str, Any] = {"onnxruntime_seconds": exact.seconds}
    with contextlib.closing(Animator.from_bundle(bundle, backend="tensorrt", cache=False)) as animator:
        theirs, ours = (stages(who, given, wanted, exact.latents) for who in (processor, animator))
        found["stages"] = {name: relative_rms(ours[name], array) for name, array in theirs.items()}
        first = animator(**wanted)
        found["first"] = facts(animator, first, exact)
        second = animator(**wanted)
        found["second"] = facts(animator, second, exact) | {"same_numbers": same(second, first)}
        free = animator.backend.plan(given.run.geometry, given.run.request, None)  # type: ignore[attr-defined]
    found["least_memory"] = attempt(
        lambda: another(bundle, wanted, first, exact, memory=(free.smallest_budget + 1) / 1e9)
    )
    found["cuda_graphs"] = attempt(lambda: another(bundle, wanted, first, exact, cuda_graphs=True))
    return found


def stages(animator: Animator, given: Prepared, wanted: dict[str, Any], final: np.ndarray) -> Arrays:
    """What the stages give: the denoising step for `given`, the decoder for the latents `final` [F, C, H, W]."""
    prepared = animator.prepare(**wanted)
    made = {
        "text": prepared.latents.prompt_embeds,
        "photo": prepared.latents.image,
        "pose": prepared.latents.pose,
    }
    run = prepared.run
    steps = animator._steps(run, given.latents, given.initial, prepared.noise, lambda *_: None)
    with contextlib.closing(steps):  # type: ignore[type-var]
        made["step"] = next(steps).prediction.copy()
    made["frames"] = np.concatenate(list(animator._decoded(run, final, lambda *_: None))).astype(np.float32)
    return made


def another(bundle: Path, wanted: dict[str, Any], first: Clip, exact: Clip, **options: Any) -> dict[str, Any]:
    """A second clip of an animator with these options."""
    with contextlib.closing(Animator.from_bundle(bundle, backend="tensorrt", cache=False, **options)) as animator:
        animator(**wanted)
        made = animator(**wanted)
        return {**options, **facts(animator, made, exact), "same_numbers": same(made, first), "notices": made.notices}


def facts(animator: Animator, made: Clip, exact: Clip) -> dict[str, Any]:
    return {
        "seconds": made.seconds,
        "device_peak_bytes": animator.device_peak,
        "latents_relative_rms": relative_rms(made.latents, exact.latents),
        "frames_mean_difference": float(np.abs(made.frames.astype(np.float32) - exact.frames).mean()),
    }


def same(one: Clip, other: Clip) -> bool:
    return np.array_equal(one.latents, other.latents) and np.array_equal(one.frames, other.frames)
