"""What the compiler did with a graph, as data: kernels, types, memory. Read from its log, so no GPU is needed."""

from __future__ import annotations

import msgspec

__all__ = ["Kernel", "LayerReport", "Operand"]


class Operand(msgspec.Struct, frozen=True):
    """A tensor that a kernel reads or writes: `dtype` as the compiler names it in lower case (half, bfloat16, float, int8,
    fp8, int64, ...), `shape` with -1 for dynamic axes."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Kernel(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the engine: `kind` is the compiler's layer type (gemm, kgen, runtime_fusion, ...); `onnx` names the graph
    nodes that it computes."""

    name: str
    kind: str
    tactic: str
    inputs: tuple[Operand, ...]
    constants: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    onnx: tuple[str, ...]


class LayerReport(msgspec.Struct, frozen=True, kw_only=True):
    """An engine as its compiler describes it; all sizes in bytes."""

    graph: str
    kernels: tuple[Kernel, ...]
    activation_bytes: int
    scratch_bytes: int
    weights_bytes: int
