"""Names of number formats, and how numpy sees them (bfloat16, which numpy lacks, is carried as uint16)."""

from __future__ import annotations

from typing import Literal

import numpy as np

__all__ = ["DTYPES", "PRECISIONS", "SAFETENSORS_NAME", "Precision", "widen"]

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")

# safetensors name -> numpy dtype of the raw bytes
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
SAFETENSORS_NAME: dict[Precision, str] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


def widen(array: np.ndarray) -> np.ndarray:
    """float32 values of a float32, float16 or raw bfloat16 (uint16) array; no copy for float32."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)
