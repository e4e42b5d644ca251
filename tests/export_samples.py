"""What tests of exported graphs share."""

from __future__ import annotations

from typing import Any

__all__ = ["axes"]


def axes(shape: Any) -> tuple[int | str, ...]:
    """Names of dynamic axes and lengths of the others, of an ONNX shape."""
    return tuple(dim.dim_param or dim.dim_value for dim in shape.dim)
