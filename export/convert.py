"""Checkpoint tensors into the bundle's weight store: strictly by name, one tensor in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..bundle.errors import InputError
from ..bundle.manifest import FileEntry
from ..bundle.precision import SAFETENSORS_NAME, Precision
from ..bundle.tensors import TensorWriter
from .checkpoint import ComponentTensors
from .recipe import Recipe

if TYPE_CHECKING:
    from .workspace import Workspace

__all__ = ["Converter", "source_shapes"]

TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Converter:
    """Writes the weight files of one component."""

    source: ComponentTensors
    precision: Precision
    tick: Callable[[int], None] = lambda nbytes: None  # progress: bytes written

    def check(self, recipes: Sequence[Recipe]) -> None:
        """Refuses missing and mis-shaped tensors before a byte is written."""
        for recipe in recipes:
            for name, shape in zip(recipe.sources, source_shapes(recipe), strict=True):
                found = self.source.info(name).shape
                if found != shape:
                    raise InputError(
                        f"The checkpoint {str(self.source.folder)!r} has the tensor {name!r} with shape {list(found)}; "
                        f"its config asks for {list(shape)}. The weights do not belong to this config."
                    )

    def write(self, path: Path, recipes: Sequence[Recipe]) -> FileEntry:
        """Converts `recipes` into the safetensors file `path`; `InputError` names a tensor that is not finite."""
        self.check(recipes)
        precisions = [recipe.dtype or self.precision for recipe in recipes]
        table = [(r.target, SAFETENSORS_NAME[p], r.shape) for r, p in zip(recipes, precisions, strict=True)]  # type: ignore[index]
        with TensorWriter(path, table) as writer:
            for recipe, precision in zip(recipes, precisions, strict=True):
                writer.write(recipe.target, self._made(recipe, precision))
                self.tick(math.prod(recipe.shape) * TORCH[precision].itemsize)
            return FileEntry(writer.close(), writer.nbytes)

    def _made(self, recipe: Recipe, precision: str) -> np.ndarray:
        sources = [self._finite(name) for name in recipe.sources]
        if recipe.make is not None:
            tensor = recipe.make(sources)
        else:
            if recipe.permute_rows is not None:
                sources = [tensor[list(recipe.permute_rows)] for tensor in sources]
            tensor = torch.cat(sources) if len(sources) > 1 else sources[0]
            if recipe.transpose:
                tensor = tensor.t()
        if tuple(tensor.shape) != recipe.shape:
            raise InputError(
                f"{', '.join(recipe.sources)} make a tensor of shape {list(tensor.shape)}, not {recipe.shape}."
            )
        converted = tensor.to(TORCH[precision])
        if precision == "fp16" and not _is_finite(converted):
            raise InputError(
                f"The tensor {recipe.sources[0]!r} does not fit into fp16. Export with --precision bf16 or fp32."
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

    def write_all(
        self,
        plan: Sequence[tuple[str, Sequence[Recipe]]],
        workspace: Workspace,
        stage: Callable[[str], None],
        ignore: Collection[str] = (),
    ) -> None:
        """Writes every file of `plan` (name under weights/, recipes). All of them together must use every tensor."""
        for _, recipes in plan:  # what is missing in the last file is found before the first is written
            self.check(recipes)
        self._refuse_extra({name for _, recipes in plan for recipe in recipes for name in recipe.sources}.union(ignore))
        for name, recipes in plan:
            stage(f"weights {name}")
            workspace.add_weights(name, self.write(workspace.weights_path(name), recipes))

    def _refuse_extra(self, used: Collection[str]) -> None:
        extra = sorted(name for name in self.source if name not in used)
        if extra:
            raise InputError(
                f"The checkpoint {str(self.source.folder)!r} holds {len(extra)} tensors that its config does not explain, "
                f"the first is {extra[0]!r}. The weights do not belong to this config."
            )


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
