"""What a TensorRT module offers: asked before it is used, since versions and flavours differ."""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["has", "lean_library"]


def has(trt: ModuleType, name: str) -> bool:
    """Whether this TensorRT has `name` ("IStreamWriter", "Builder.build_serialized_network_to_stream")."""
    found: Any = trt
    for part in name.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def lean_library() -> Path | None:
    """The shared library of TensorRT's lean runtime: from its package, else where the system keeps it (JetPack)."""
    spec = importlib.util.find_spec("tensorrt_lean_libs")
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec is not None else []
    places += [Path("/usr/lib") / f"{platform.machine()}-linux-gnu"]
    for place in places:
        if libraries := sorted([*place.glob("libnvinfer_lean.so*"), *place.glob("nvinfer_lean*.dll")]):
            return libraries[0]
    return None
