"""Checkpoint tensors into the bundle's weight store: strictly by name, one tensor in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..bundle.errors import InputError
from ..bundle.manifest import FileEntry
from ..bundle.precision import SAFETENSORS_NAME, Precision
from ..bundle.tensors import TensorWriter
from .checkpoint import TORCH_DTYPES, ComponentTensors
from .recipe import Recipe

__all__ = ["Converter", "source_shapes"]

TORCH: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Converter:
    """Writes the weight files of one component."""

    source: ComponentTensors
    precision: Precision
    tick: Callable[[int], None] = lambda nbytes: None  # progress: bytes written

    def check(self, recipes: Sequence[Recipe], unused: Collection[str] = ()) -> None:
        """Refuses missing, mis-shaped and integer tensors, and such as neither `recipes` nor `unused` name.

        Only the headers of the files are read for it.
        """
        for recipe in recipes:
            self._check_sources(recipe)
        used = {name for recipe in recipes for name in recipe.sources}.union(unused)
        extra = sorted(name for name in self.source if name not in used)
        if extra:
            raise InputError(
                f"The checkpoint {str(self.source.folder)!r} holds {len(extra)} tensors that its config does not explain, "
                f"the first is {extra[0]!r}. The weights do not belong to this config."
            )

    def _check_sources(self, recipe: Recipe) -> None:
        for name, shape in zip(recipe.sources, source_shapes(recipe), strict=True):
            found = self.source.info(name)
            if found.dtype not in TORCH_DTYPES:
                raise InputError(
                    f"The checkpoint {str(self.source.folder)!r} has the tensor {name!r} as {found.dtype}; "
                    f"floating-point weights are needed ({', '.join(TORCH_DTYPES)})."
                )
            if found.shape != shape:
                raise InputError(
                    f"The checkpoint {str(self.source.folder)!r} has the tensor {name!r} with shape {list(found.shape)}; "
                    f"its config asks for {list(shape)}. The weights do not belong to this config."
                )

    def nbytes(self, recipe: Recipe) -> int:
        """Bytes of the tensor that `recipe` makes."""
        return math.prod(recipe.shape) * TORCH[self._precision(recipe)].itemsize

    def _precision(self, recipe: Recipe) -> Precision:
        return recipe.dtype or self.precision

    def write(self, path: Path, recipes: Sequence[Recipe]) -> FileEntry:
        """Converts `recipes` into the safetensors file `path`; `InputError` names a tensor that is not finite."""
        for recipe in recipes:
            self._check_sources(recipe)
        table = [(r.target, SAFETENSORS_NAME[self._precision(r)], r.shape) for r in recipes]
        with TensorWriter(path, table) as writer:
            for recipe in recipes:
                writer.write(recipe.target, self._made(recipe))
                self.tick(self.nbytes(recipe))
            return FileEntry(writer.close(), writer.nbytes)

    def _made(self, recipe: Recipe) -> np.ndarray:
        sources = [self._finite(name) for name in recipe.sources]
        if recipe.make is not None:
            tensor = recipe.make(sources)
        else:
            tensor = torch.cat(sources) if len(sources) > 1 else sources[0]
            if recipe.transpose:
                tensor = tensor.t()
        if tuple(tensor.shape) != recipe.shape:
            raise InputError(
                f"{', '.join(recipe.sources)} make a tensor of shape {list(tensor.shape)}, not {recipe.shape}."
            )
        precision = self._precision(recipe)
        converted = tensor.to(TORCH[precision])
        if converted.dtype != tensor.dtype and not _is_finite(converted):
            remedy = "Export with --precision bf16 or fp32." if precision == "fp16" else "Its values are out of range."
            raise InputError(
                f"The checkpoint tensor {recipe.sources[0]!r} in {str(self.source.folder)!r} does not fit into "
                f"{precision}. {remedy}"
            )
        converted = converted.contiguous()
        return converted.view(torch.int16).numpy() if precision == "bf16" else converted.numpy()

    def _finite(self, name: str) -> torch.Tensor:
        tensor = self.source.read(name)
        if not _is_finite(tensor):
            raise InputError(
                f"The checkpoint tensor {name!r} in {str(self.source.folder)!r} holds NaN or infinite values. "
                "The file is damaged or the training diverged."
            )
        return tensor


def source_shapes(recipe: Recipe) -> tuple[tuple[int, ...], ...]:
    """The shapes that a recipe's checkpoint tensors must have."""
    if recipe.source_shapes is not None:
        return recipe.source_shapes
    shape = recipe.shape[::-1] if recipe.transpose else recipe.shape
    if len(recipe.sources) == 1:
        return (shape,)
    return ((shape[0] // len(recipe.sources), *shape[1:]),) * len(recipe.sources)


def _is_finite(tensor: torch.Tensor) -> bool:
    # One pass that keeps nothing: a sum is finite unless an element is not (or the sum itself overflows).
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())
