"""ONNX models made here, as the runtime and the manifest know them."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from ..bundle.errors import BundleError
from ..bundle.manifest import GraphSpec, Port
from ..bundle.store import Bundle

__all__ = ["read_model", "spec_of"]


def read_model(bundle: Bundle, name: str) -> onnx.ModelProto:
    """A graph of the bundle; `BundleError` if it is no ONNX model."""
    _, data = bundle.graph(name)
    try:
        return onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's own types
        raise BundleError(
            f"The graph {name!r} of {str(bundle.root)!r} cannot be read ({error}). Export the checkpoint again."
        ) from error


def spec_of(model: onnx.ModelProto, file: str) -> GraphSpec:
    """The description of a model without external weights."""
    return GraphSpec(file=file, inputs=_ports(model.graph.input), outputs=_ports(model.graph.output))


def _ports(values: Iterable[onnx.ValueInfoProto]) -> tuple[Port, ...]:
    return tuple(
        Port(
            value.name,
            onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower(),
            tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
        )
        for value in values
    )
