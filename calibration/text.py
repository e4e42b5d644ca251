"""The text encoder's weights as int8 (weights alone): T5 is memory, not time. It stays as it is if embeddings suffer.

Layer by layer, the set's prompts go through the exact encoder and through the one with rounded weights, side by side, so
that what is compared at the end holds the errors of all layers, and memory holds one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from ..bundle.errors import BundleError
from ..bundle.precision import Precision, widen
from ..bundle.store import Bundle
from ..bundle.tensors import MappedTensors
from ..export.workspace import spec_of
from ..runtime.backends.onnxruntime import OnnxRuntimeBackend
from ..runtime.text import relative_position_bias
from ..runtime.tokenizer import PromptTokenizer
from .block_graph import TEXT_LINEARS, observed, quantized
from .blocks import stored_linear, widened, write_tensors
from .decide import Settings, decide_weights, snr
from .graphs import read_model
from .modulation import Narrowed
from .work import Work

__all__ = ["LEAST_SNR", "narrow_text"]

LEAST_SNR = 30.0  # decibels of the embeddings, over all prompts
MOST_ROWS = 2048
MOST_PROMPTS = 16


def narrow_text(
    bundle: Bundle,
    runs: Bundle,
    backend: OnnxRuntimeBackend,
    prompts: Sequence[str],
    settings: Settings,
    work: Work,
    tick: Callable[[], None] = lambda: None,
) -> Narrowed:
    """Decides about the whole encoder and stores its weights in `work`. `BundleError`: the bundle has no text encoder.

    `runs`: the bundle that is computed with (of `backend`), `bundle` itself or its checkpoint in float32.
    """
    config, precision = bundle.manifest.text, cast(Precision, bundle.manifest.precision)
    if config is None:
        raise BundleError(f"The bundle {str(bundle.root)!r} was exported without its text encoder.")
    length = bundle.manifest.transformer.max_text_seq_length
    tokenizer = PromptTokenizer.from_file(bundle.path("tokenizer.json"))
    shared = runs.tensors("text")
    chosen = list(dict.fromkeys(prompts))[:MOST_PROMPTS]
    ids = np.stack([tokenizer.encode(prompt, length)[0] for prompt in chosen])
    exact = np.ascontiguousarray(widen(shared["embedding"][ids]))  # [prompts, S, Dt]
    rough = exact.copy()
    bias = relative_position_bias(shared["relative_attention_bias"], length, config.relative_attention_max_distance)
    model = read_model(runs, "text_block")
    looking = observed(model, TEXT_LINEARS)
    graph = backend.load("text_block", spec_of(looking, ""), looking.SerializeToString())
    made = quantized(model, TEXT_LINEARS, "int8-weights")
    narrow = backend.load("text_block", spec_of(made, ""), made.SerializeToString())
    for layer in range(config.num_layers):
        name = f"text_block_{layer:02d}"
        weights = bundle.tensors(name)
        rows: dict[str, list[np.ndarray]] = {linear: [] for linear in TEXT_LINEARS}
        for i in range(len(exact)):
            seen = graph({"hidden": exact[i : i + 1], "position_bias": bias, **runs.tensors(name)})
            exact[i : i + 1] = seen["hidden_out"]
            for linear in TEXT_LINEARS:
                rows[linear].append(seen[f"{linear}_in"][0].astype(np.float32))
        matrices = {f"{linear}_weight" for linear in TEXT_LINEARS}
        tensors = [(key, info.dtype, weights[key]) for key, info in weights.infos.items() if key not in matrices]
        for linear in TEXT_LINEARS:
            seen_rows = np.concatenate(rows[linear])[:MOST_ROWS]
            _, found = decide_weights(seen_rows, widen(weights[f"{linear}_weight"]), settings, precision)
            tensors += stored_linear(linear, found, "int8-weights", precision, f"{linear} of text layer {layer}")
        write_tensors(work.text_block(layer), tensors)
        stored = MappedTensors(work.text_block(layer), error=BundleError)
        fed = stored if runs is bundle else widened(stored)
        for i in range(len(rough)):
            rough[i : i + 1] = narrow({"hidden": rough[i : i + 1], "position_bias": bias, **fed})["hidden_out"]
        weights.release()
        tick()
    quality = snr(*(_normed(hidden, widen(shared["final_norm_weight"])) for hidden in (exact, rough)))
    return Narrowed(narrow=quality >= LEAST_SNR, snr=round(quality, 2))


def _normed(hidden: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The encoder's final root-mean-square norm, but for its epsilon."""
    scaled: np.ndarray = hidden / np.sqrt(np.mean(hidden * hidden, axis=-1, keepdims=True)) * weight
    return scaled
