"""ONNX models of a bundle."""

from __future__ import annotations

import onnx

from ..bundle.errors import BundleError
from ..bundle.store import Bundle

__all__ = ["read_model"]


def read_model(bundle: Bundle, name: str) -> onnx.ModelProto:
    """A graph of the bundle; `BundleError` if it is no ONNX model."""
    _, data = bundle.graph(name)
    try:
        return onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's own types
        raise BundleError(
            f"The graph {name!r} of {str(bundle.root)!r} cannot be read ({error}). Export the checkpoint again."
        ) from error
