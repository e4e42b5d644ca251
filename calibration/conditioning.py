"""The weights of the conditioning as int8: text projection and the image's and pose's halves of the patch embedding.

They work once per request, so they are memory and no time; in a small model they are a good part of what is left once the
blocks are int8. A linear whose output suffers stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import msgspec
import numpy as np
from onnx import ModelProto

from ..bundle.precision import Precision, widen
from ..bundle.store import Bundle
from ..export.workspace import spec_of
from ..runtime.backends.onnxruntime import OnnxRuntimeBackend
from ..runtime.denoiser import Latents
from .block_graph import CONDITIONING_LINEARS, observed, quantized
from .blocks import stored_linear, write_tensors
from .decide import Settings, decide_weights
from .graphs import read_model
from .work import Work

__all__ = ["LEAST_SNR", "NarrowedLinears", "narrow_conditioning", "narrowed_graph"]

LEAST_SNR = 40.0  # decibels of a linear's product, on rows that were kept apart
MOST_ROWS = 4096


class NarrowedLinears(msgspec.Struct, frozen=True, kw_only=True):
    """The linears whose weights become int8, and the decibels of every linear's product."""

    linears: tuple[str, ...]
    snr: dict[str, float]


def narrow_conditioning(
    bundle: Bundle,
    runs: Bundle,
    backend: OnnxRuntimeBackend,
    requests: Sequence[Latents],
    settings: Settings,
    work: Work,
) -> NarrowedLinears:
    """Decides about each linear and stores the shared weights of the denoiser, with the narrow ones, in `work`.

    `runs`: the bundle that is computed with (of `backend`), `bundle` itself or its checkpoint in float32. `requests`: what
    the loops of the calibration set were given.
    """
    precision = cast(Precision, bundle.manifest.precision)
    model = read_model(runs, "conditioning")
    looking = observed(model, CONDITIONING_LINEARS, ("rows", "columns"))
    graph = backend.load("conditioning", spec_of(looking, ""), looking.SerializeToString())
    shared = runs.tensors("denoiser")
    rows: dict[str, list[np.ndarray]] = {linear: [] for linear in CONDITIONING_LINEARS}
    for request in requests:
        feeds = {"prompt_embeds": request.prompt_embeds, "image_latents": request.image, "pose_latents": request.pose}
        seen = graph({**feeds, **shared})
        for linear, kept in rows.items():
            found = seen[f"{linear}_in"].astype(np.float32)
            kept.append(found.reshape(-1, found.shape[-1]))
    weights = bundle.tensors("denoiser")
    tensors = {key: (key, info.dtype, weights[key]) for key, info in weights.infos.items()}
    quality: dict[str, float] = {}
    for linear, parts in rows.items():
        found = np.concatenate(parts)
        found = found[np.abs(found).max(axis=1) > 0]  # frames after the first hold no image
        found = found[:: max(1, len(found) // MOST_ROWS)]
        decision, made = decide_weights(found, widen(weights[f"{linear}_weight"]), settings, precision)
        quality[linear] = round(decision.snr, 2)
        if decision.snr >= LEAST_SNR:
            for tensor in stored_linear(linear, made, "int8-weights", precision, linear):
                tensors[tensor[0]] = tensor
    write_tensors(work.shared, list(tensors.values()))
    return NarrowedLinears(linears=tuple(name for name in quality if f"{name}_out_scale" in tensors), snr=quality)


def narrowed_graph(source: Bundle, linears: Sequence[str]) -> ModelProto:
    """Graph `conditioning` for int8 weights of these linears."""
    return quantized(read_model(source, "conditioning"), linears, "int8-weights")
