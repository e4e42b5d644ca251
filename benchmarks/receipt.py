"""Receipts: what was measured, on which commit and machine, with which libraries; and the helpers that measure.

A figure is printed in a table only when a file under `benchmarks/results/` vouches for it.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import json
import os
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynamictrl_edge.bundle.atomic import atomic_file
from dynamictrl_edge.runtime.measure import machine, median_seconds, numpy_product, output, peak_rss, versions

__all__ = ["RESULTS", "Ceiling", "Paired", "gemm_ceiling", "machine", "paired", "peak_rss", "run_json", "write_receipt"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def write_receipt(
    name: str,
    settings: Mapping[str, Any],
    figures: Mapping[str, Any],
    *,
    seeds: Sequence[int] = (),
    folder: Path = RESULTS,
) -> Path:
    """Writes `folder/NAME.json` and returns its path.

    settings: what was run (sizes, steps, precision, threads). figures: what came out, with its spread (`Paired` and
    `Ceiling` and other dataclasses are written as objects) and the peer's figures from the same run.
    """
    receipt = {
        "name": name,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
        "seeds": list(seeds),
        "figures": figures,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(receipt, indent=2, default=_as_json) + "\n")
    return path


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return value.name  # a receipt says nothing of where things lie on a machine
    raise TypeError(f"a receipt cannot hold {type(value).__name__}")


def commit() -> dict[str, Any]:
    """`{"hash", "dirty"}`; both None outside a repository. Receipts themselves do not make it dirty."""
    head = output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changes = output("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return {"hash": head, "dirty": None if changes is None else bool(changes)}


# Processes


def run_json(command: Sequence[str], **environment: str) -> dict[str, Any]:
    """Runs a command in its own process and returns the JSON object on the last line of its standard output.

    Raises `subprocess.CalledProcessError` when it fails; its standard error goes to ours.
    """
    result = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env={**os.environ, **environment}
    )
    answer: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return answer


# Comparing


@dataclasses.dataclass(frozen=True)
class Paired:
    """Two contenders measured in turn. `ratios` are a / b, pair by pair: above 1, b needs less."""

    a: tuple[float, ...]
    b: tuple[float, ...]
    a_median: float
    b_median: float
    ratios: tuple[float, ...]
    ratio_median: float
    ratio_min: float
    ratio_max: float


def paired(run_a: Callable[[], float], run_b: Callable[[], float], rounds: int) -> Paired:
    """Runs both `rounds` times, side by side, and compares within each pair, so that slow drift cancels out.

    Each call returns its own figure (seconds, bytes). The order within a pair alternates: a b, b a, a b, ...
    """
    a: list[float] = []
    b: list[float] = []
    for index in range(rounds):
        if index % 2 == 0:
            a.append(run_a())
            b.append(run_b())
        else:
            b.append(run_b())
            a.append(run_a())
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return Paired(
        a=tuple(a),
        b=tuple(b),
        a_median=statistics.median(a),
        b_median=statistics.median(b),
        ratios=tuple(ratios),
        ratio_median=statistics.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
    )


# The machine's ceiling


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """The best float32 matrix product of this machine. `by_library`: median GFLOP/s per library and size."""

    gflops: float
    by_library: Mapping[str, Mapping[str, float]]


def gemm_ceiling(seconds: float = 6.0, sizes: Sequence[int] = (1024, 2048)) -> Ceiling:
    """Measures square float32 products in numpy, torch and ONNX Runtime, those of them that are installed.

    `seconds` are shared out among libraries and sizes; a figure is the median over its repetitions, the ceiling the
    best of these figures. Threads are as each library is configured.
    """
    makers = {"numpy": numpy_product, "torch": _torch_product, "onnxruntime": _onnxruntime_product}
    needs = {"numpy": ("numpy",), "torch": ("torch",), "onnxruntime": ("onnxruntime", "onnx")}
    present = [name for name in makers if all(importlib.util.find_spec(need) for need in needs[name])]
    share = seconds / (len(present) * len(sizes))
    figures: dict[str, dict[str, float]] = {}
    for library in present:
        figures[library] = {}
        for size in sizes:
            figures[library][str(size)] = 2 * size**3 / median_seconds(makers[library](size), share) / 1e9
    return Ceiling(max(max(by_size.values()) for by_size in figures.values()), figures)


def _operands(size: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.random((size, size), np.float32), generator.random((size, size), np.float32)


def _torch_product(size: int) -> Callable[[], object]:
    import torch

    a, b = (torch.from_numpy(operand) for operand in _operands(size))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _onnxruntime_product(size: int) -> Callable[[], object]:
    import onnxruntime
    from onnx import TensorProto, helper

    def value(name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [size, size])

    node = helper.make_node("MatMul", ["a", "b"], ["c"])
    graph = helper.make_graph([node], "product", [value("a"), value("b")], [value("c")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    a, b = _operands(size)
    binding = session.io_binding()
    binding.bind_cpu_input("a", a)
    binding.bind_cpu_input("b", b)
    binding.bind_ortvalue_output("c", onnxruntime.OrtValue.ortvalue_from_numpy(np.empty_like(a)))
    return lambda: session.run_with_iobinding(binding)
