"""The GPUs that engines are built for, as data."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from ..bundle.errors import UsageError

__all__ = ["FLAVOURS", "TARGETS", "Capability", "Flavour", "Target", "capability_name", "find_target", "types_of"]

Flavour = Literal["rtx", "tensorrt"]
FLAVOURS: tuple[Flavour, ...] = ("rtx", "tensorrt")

Capability = tuple[int, int]  # (major, minor) compute capability: (8, 9) is SM89


@dataclass(frozen=True)
class Target:
    """A GPU, or a class of GPUs that take the same engines.

    `flavours` are those that can build for it, the usual one first: "rtx" builds anywhere, "tensorrt" on the GPU itself.
    `memory_gb` is what the card typically has (1e9 bytes); `unified`: shared with the processor, as on Jetson.
    """

    name: str
    capability: Capability
    flavours: tuple[Flavour, ...]
    memory_gb: float
    note: str
    unified: bool = False

    @property
    def types(self) -> frozenset[str]:
        """The number formats in which it multiplies matrices, by the names that `--precision` takes."""
        return types_of(self.capability)


def types_of(capability: Capability) -> frozenset[str]:
    """Number formats of a compute capability.

    SM75 lacks bfloat16, and TensorRT-RTX refuses float32 matrix products there ("FP32 GEMM is not supported"), so fp32 is
    not among its types; FP8 came with SM89.
    """
    types = {"fp16", "int8"}
    if capability >= (8, 0):
        types |= {"fp32", "bf16"}
    if capability >= (8, 9):
        types.add("fp8")
    return frozenset(types)


def capability_name(capability: Capability) -> str:
    """(8, 9) -> "SM89"."""
    return f"SM{capability[0]}{capability[1]}"


_BOTH: tuple[Flavour, ...] = ("rtx", "tensorrt")
_SDK: tuple[Flavour, ...] = ("tensorrt",)
_SERVER = "server; TensorRT's own engines, built on the machine"
_ORIN = "JetPack 6: TensorRT 10.3, or 10.x from the CUDA 12 packages; built on the device"

TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("rtx20", (7, 5), _BOTH, 8, "any GeForce RTX 20 or Quadro RTX; fp16 and int8 only"),
        Target("rtx2080ti", (7, 5), _BOTH, 11, "fp16 and int8 only"),
        Target("rtx30", (8, 6), _BOTH, 8, "any GeForce RTX 30"),
        Target("rtx3060", (8, 6), _BOTH, 12, ""),
        Target("rtx3080", (8, 6), _BOTH, 10, ""),
        Target("rtx3090", (8, 6), _BOTH, 24, ""),
        Target("rtxa6000", (8, 6), _BOTH, 48, ""),
        Target("rtx40", (8, 9), _BOTH, 8, "any GeForce RTX 40"),
        Target("rtx4060", (8, 9), _BOTH, 8, ""),
        Target("rtx4070", (8, 9), _BOTH, 12, ""),
        Target("rtx4080", (8, 9), _BOTH, 16, ""),
        Target("rtx4090", (8, 9), _BOTH, 24, ""),
        Target("rtx6000ada", (8, 9), _BOTH, 48, ""),
        Target("rtx50", (12, 0), _BOTH, 8, "any GeForce RTX 50"),
        Target("rtx5060", (12, 0), _BOTH, 8, ""),
        Target("rtx5070", (12, 0), _BOTH, 12, ""),
        Target("rtx5080", (12, 0), _BOTH, 16, ""),
        Target("rtx5090", (12, 0), _BOTH, 32, ""),
        Target("rtxpro6000", (12, 0), _BOTH, 96, ""),
        Target("dgx-spark", (12, 1), _BOTH, 128, "GB10", unified=True),
        Target("a100", (8, 0), ("tensorrt", "rtx"), 80, _SERVER),
        Target("h100", (9, 0), _SDK, 80, _SERVER),
        Target("h200", (9, 0), _SDK, 141, _SERVER),
        Target("jetson-orin", (8, 7), _SDK, 64, f"AGX Orin. {_ORIN}", unified=True),
        Target("jetson-orin-nx", (8, 7), _SDK, 16, _ORIN, unified=True),
        Target("jetson-orin-nano", (8, 7), _SDK, 8, _ORIN, unified=True),
        Target(
            "jetson-thor", (11, 0), _SDK, 128, "JetPack 7: TensorRT 10.13 or later; built on the device", unified=True
        ),
    )
}


def find_target(name: str, known: Iterable[str] = ()) -> Target:
    """The target of this name.

    Raises:
        UsageError: there is none; the text lists all names (and `known` ones that the caller resolves itself).
    """
    target = TARGETS.get(name.lower())
    if target is None:
        names = [*TARGETS, *known]
        close = difflib.get_close_matches(name.lower(), names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UsageError(f"There is no target {name!r}.{hint} Targets: {', '.join(names)}.")
    return target
