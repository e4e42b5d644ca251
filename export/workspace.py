"""The bundle under construction: a temporary folder whose files are hashed as they are written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from ..bundle.manifest import FileEntry, GraphSpec, Port

__all__ = ["Workspace", "spec_of"]


@dataclass
class Workspace:
    """Collects what the manifest lists."""

    root: Path
    files: dict[str, FileEntry] = field(default_factory=dict)
    graphs: dict[str, GraphSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for folder in ("graphs", "weights"):
            (self.root / folder).mkdir()

    def add_graph(self, name: str, model: onnx.ModelProto, *, weights: str | None = None) -> None:
        """Writes `graphs/<name>.onnx`. `weights` names the file of its external initializers, added before.

        A graph without those is checked by `onnx.checker` here (the checker would look for the file beside the graph).
        """
        if weights is None:
            onnx.checker.check_model(model, full_check=True)
        file = f"graphs/{name}.onnx"
        self.add_bytes(file, model.SerializeToString(deterministic=True))
        self.graphs[name] = spec_of(model, file, None if weights is None else f"weights/{weights}.safetensors")

    def add_bytes(self, name: str, data: bytes) -> None:
        (self.root / name).write_bytes(data)
        self.files[name] = FileEntry(hashlib.sha256(data).hexdigest(), len(data))

    def weights_path(self, name: str) -> Path:
        return self.root / f"weights/{name}.safetensors"

    def add_weights(self, name: str, entry: FileEntry) -> None:
        """Lists `weights/<name>.safetensors`, which a converter has written."""
        self.files[f"weights/{name}.safetensors"] = entry


def spec_of(model: onnx.ModelProto, file: str, weights: str | None = None) -> GraphSpec:
    """How the manifest describes a model in `file`; `weights`: the file of its external initializers."""
    return GraphSpec(file=file, inputs=_ports(model.graph.input), outputs=_ports(model.graph.output), weights=weights)


def _ports(values: Iterable[onnx.ValueInfoProto]) -> tuple[Port, ...]:
    """Names, types and symbolic shapes of a graph's inputs or outputs."""
    return tuple(
        Port(
            value.name,
            onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower(),
            tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
        )
        for value in values
    )
