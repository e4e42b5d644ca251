"""The modulation's weights as int8: they are a sixth of the denoiser, and work once per schedule.

Their inputs are all alike: one curve, the embedding of the timestep. On it, rounding errors can be made to cancel almost
entirely, which `compensate` does. They stay as they are if the tables do not come out as exact as `LEAST_SNR` says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import msgspec
import numpy as np

from ..bundle.errors import BundleError
from ..bundle.precision import Precision, widen
from ..bundle.store import Bundle
from ..bundle.tensors import MappedTensors
from ..export.workspace import spec_of
from ..runtime.backends.onnxruntime import OnnxRuntimeBackend
from ..runtime.denoiser import OFS
from ..runtime.embeddings import timestep_sinusoid
from .block_graph import MODULATION_LINEARS, observed, quantized
from .blocks import stored_linear, widened, write_tensors
from .decide import Settings, decide_weights, snr
from .graphs import read_model
from .work import Work

__all__ = ["LEAST_SNR", "Narrowed", "narrow_modulation"]

LEAST_SNR = 45.0  # decibels of every row of the table, at every block
DAMPING = 1e-6
MOST_TIMESTEPS = 250


class Narrowed(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a part's weights become int8, and the decibels of its output: the worst that was found."""

    narrow: bool
    snr: float


def narrow_modulation(
    bundle: Bundle,
    runs: Bundle,
    backend: OnnxRuntimeBackend,
    timesteps: int,
    settings: Settings,
    work: Work,
    tick: Callable[[], None] = lambda: None,
) -> Narrowed:
    """Decides about the modulation of all blocks together, since one graph serves them; stores the weights in `work`.

    `runs`: the bundle that is computed with (of `backend`), `bundle` itself or its checkpoint in float32. `timesteps`: how
    many the model was trained with.
    """
    manifest = bundle.manifest
    precision, config = cast(Precision, manifest.precision), manifest.transformer
    places = np.unique(np.linspace(0, timesteps - 1, min(timesteps, MOST_TIMESTEPS)).astype(np.int64))
    feeds: dict[str, np.ndarray] = {"time_sinusoid": timestep_sinusoid(places, config.width)}
    if config.ofs_embed_dim is not None:
        feeds["ofs_sinusoid"] = timestep_sinusoid([OFS], config.ofs_embed_dim)
    feeds.update(runs.tensors("denoiser"))
    # Quick here, and nothing else makes the tables exact enough.
    settings = msgspec.structs.replace(settings, compensate=True)
    model = read_model(runs, "modulation")
    looking = observed(model, MODULATION_LINEARS, ("T",))
    exact = backend.load("modulation", spec_of(looking, ""), looking.SerializeToString())
    made = quantized(model, MODULATION_LINEARS, "int8-weights")
    narrow = backend.load("modulation", spec_of(made, ""), made.SerializeToString())
    worst = float("inf")
    for block in range(config.num_layers):
        name = f"modulation_{block:02d}"
        weights = bundle.tensors(name)
        seen = exact({**feeds, **runs.tensors(name)})
        tensors = [(key, info.dtype, weights[key]) for key, info in weights.infos.items() if key not in _matrices()]
        for linear in MODULATION_LINEARS:
            rows = seen[f"{linear}_in"].astype(np.float32)
            _, found = decide_weights(rows, widen(weights[f"{linear}_weight"]), settings, precision, DAMPING)
            tensors += stored_linear(linear, found, "int8-weights", precision, f"{linear} of block {block}")
        write_tensors(work.modulation(block), tensors)
        stored = MappedTensors(work.modulation(block), error=BundleError)
        table = narrow({**feeds, **(stored if runs is bundle else widened(stored))})["table"]
        worst = min(worst, *(snr(seen["table"][:, row], table[:, row]) for row in range(table.shape[1])))
        weights.release()
        tick()
    return Narrowed(narrow=worst >= LEAST_SNR, snr=round(worst, 2))


def _matrices() -> set[str]:
    return {f"{name}_weight" for name in MODULATION_LINEARS}
