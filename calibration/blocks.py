"""The blocks as they may become: float and quantized weights side by side, any of the linears taken from either."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec
import numpy as np

from ..bundle.atomic import atomic_file
from ..bundle.errors import BundleError, InputError
from ..bundle.manifest import Scheme
from ..bundle.precision import SAFETENSORS_NAME, Precision, widen
from ..bundle.store import Bundle
from ..bundle.tensors import MappedTensors, TensorWriter
from .block_graph import LINEARS, SCALED
from .decide import Decision, Quantized, Settings, decide, decide_weights
from .grids import as_stored, grid_of
from .observe import Observations
from .work import Work

__all__ = [
    "BlockCandidate",
    "Decisions",
    "candidates",
    "decide_blocks",
    "row_scale",
    "stored_linear",
    "widened",
    "write_tensors",
]

Decisions = dict[str, Decision]  # by linear
Tensor = tuple[str, str, np.ndarray]  # name, safetensors dtype, values

# Rows of the modulation table (scale, shift, gate per norm) that lead to a linear; the pose's gate undoes what was done.
_ROWS = {"qkv": (0, 1, 3, 4, 6, 7), "ff_in": (9, 10, 12, 13)}
_POSE_GATE = 8
_TABLE = 15


def row_scale(in_scales: Mapping[str, np.ndarray]) -> np.ndarray:
    """[15, D] float32: factors of the modulation table that make the norms' outputs arrive multiplied by `in_scales` [D].

    Exact: both addends of the input of qkv are multiplied, and the pose stream, which goes on from one of them, is divided
    again where its gate is applied.
    """
    width = len(next(iter(in_scales.values())))
    rows = np.ones((_TABLE, width), np.float32)
    for name, scale in in_scales.items():
        rows[list(_ROWS[name])] = scale
        if name == "qkv":
            rows[_POSE_GATE] = 1 / scale
    return rows


@dataclass(frozen=True)
class BlockCandidate:
    """One block in both forms: `exact` are its own weights, `narrow` those of `decide_blocks`.

    `wide`: `exact` are of a float32 export, to which the vectors of `narrow` are widened.
    """

    exact: MappedTensors
    narrow: MappedTensors
    wide: bool = False

    def weights(self, quantized: Iterable[str]) -> dict[str, np.ndarray]:
        """Weight inputs of the block graph in which the linears `quantized` are."""
        chosen = dict(self.exact)
        for name in quantized:
            chosen[f"{name}_weight"] = self.narrow[f"{name}_weight"]
            vectors = [f"{name}_out_scale", *([f"{name}_in_scale"] if name in SCALED else [])]
            chosen.update({vector: self.narrow[vector] for vector in vectors if vector in self.narrow})
        return widened(chosen) if self.wide else chosen

    def row_scale(self, quantized: Iterable[str]) -> np.ndarray | None:
        """Factors for the modulation table; None where nothing changes."""
        scales = {n: self.narrow[f"{n}_in_scale"] for n in quantized if n in _ROWS and f"{n}_in_scale" in self.narrow}
        return row_scale(scales) if scales else None

    def release(self) -> None:
        self.exact.release()
        self.narrow.release()


def decide_blocks(
    bundle: Bundle, seen: Observations, settings: Settings, work: Work, tick: Callable[[], None] = lambda: None
) -> list[Decisions]:
    """Decides all linears of all blocks and stores their quantized form; blocks that are stored already are left alone."""
    return [
        _stored(work, block) or _decide_block(bundle, seen, settings, work, block, tick)
        for block in range(bundle.manifest.transformer.num_layers)
    ]


def _stored(work: Work, block: int) -> Decisions | None:
    try:
        return msgspec.json.decode(work.decisions(block).read_bytes(), type=Decisions)
    except (OSError, msgspec.DecodeError):
        return None


def _decide_block(
    bundle: Bundle, seen: Observations, settings: Settings, work: Work, block: int, tick: Callable[[], None]
) -> Decisions:
    precision = cast(Precision, bundle.manifest.precision)
    weights = bundle.tensors(f"block_{block:02d}")
    decisions: Decisions = {}
    tensors: list[Tensor] = []
    for name in LINEARS:
        statistics, weight = seen.tensors[block, name], widen(weights[f"{name}_weight"])
        if settings.scheme == "int8-weights":
            decision, made = decide_weights(statistics.kept, weight, settings, precision)
        else:
            decision, made = decide(statistics, weight, settings, precision, stored=name in SCALED)
        decisions[name] = decision
        tensors += stored_linear(name, made, settings.scheme, precision, f"{name} of block {block}")
        tick()
    write_tensors(work.weights(block), tensors)
    with atomic_file(work.decisions(block)) as path:
        path.write_bytes(msgspec.json.encode(decisions))
    weights.release()
    return decisions


def write_tensors(path: Path, tensors: list[Tensor]) -> None:
    """Writes a safetensors file, whole or not at all."""
    table = [(name, dtype, array.shape) for name, dtype, array in tensors]
    with atomic_file(path) as temporary, TensorWriter(temporary, table) as writer:
        for name, _, array in tensors:
            writer.write(name, array)
        writer.close()


def stored_linear(name: str, made: Quantized, scheme: Scheme, precision: Precision, where: str) -> list[Tensor]:
    """What a file holds of a quantized linear; `InputError` if a scale does not fit into `precision`."""
    found = [(f"{name}_weight", grid_of(scheme).dtype, made.weight)]
    vectors = [(f"{name}_out_scale", made.out_scale, precision)]
    if made.in_scale is not None:
        vectors.append((f"{name}_in_scale", made.in_scale, precision if name in SCALED else "fp32"))
    for vector, values, kind in vectors:
        stored = as_stored(values, kind)
        if not np.isfinite(widen(stored)).all() or not widen(stored).all():
            raise InputError(
                f"The scales of {where} do not fit into {kind}: its activations or weights are too large or too small. "
                "Calibrate a bundle that was exported with --precision bf16 or fp32."
            )
        found.append((vector, SAFETENSORS_NAME[kind], stored))
    return found


def widened(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same with half precision as float32; what is quantized stays."""
    return {name: widen(array) if array.dtype.itemsize == 2 else array for name, array in arrays.items()}


def candidates(bundle: Bundle, work: Work, *, wide: bool = False) -> list[BlockCandidate]:
    """All blocks, mapped, with the float weights of `bundle`."""
    return [
        BlockCandidate(bundle.tensors(f"block_{i:02d}"), MappedTensors(work.weights(i), error=BundleError), wide)
        for i in range(bundle.manifest.transformer.num_layers)
    ]
