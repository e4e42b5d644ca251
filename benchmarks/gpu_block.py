"""Runs the denoiser's block on this machine's NVIDIA GPU: right, how fast, and how near to the GPU's own matrix products.

    python benchmarks/gpu_block.py [--flavour rtx tensorrt] [--size 1024x576x37 1360x768x37] [--dry-run]

For each installed flavour: the block at the real width with random weights, fp16 and int8, weights as inputs and as constants
of the engine. The output at a small size is compared with ONNX Runtime's on the CPU; latency at the sizes asked for is held
against the largest square matrix product of the same type. A GPU that TensorRT-RTX does not name (H100, H200) is given the
engine for SM80, which shows whether engines for "SM80 and later" run there. Needs pycuda; writes results/gpu_block.json.
`--dry-run` stops after building, which works without a GPU (flavour rtx).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

sys.path.append(str(Path(__file__).resolve().parents[1]))  # so that this file also runs as a script

from benchmarks.checkpoints import SPECS, transformer_config
from benchmarks.receipt import write_receipt
from dynamictrl_edge.bundle.config import TransformerConfig, geometry
from dynamictrl_edge.bundle.errors import DeviceError, EdgeError
from dynamictrl_edge.calibration.block_graph import LINEARS, quantized
from dynamictrl_edge.calibration.grids import INT8
from dynamictrl_edge.engines.builder import MODULES, EngineJob, build_engine, load_tensorrt
from dynamictrl_edge.engines.machine import look_at_machine
from dynamictrl_edge.engines.profiles import Profile, parse_size
from dynamictrl_edge.engines.report import LayerReport
from dynamictrl_edge.engines.targets import Capability, Flavour, types_of

Arrays = dict[str, np.ndarray]

DATA = ("video", "text", "pose", "modulation", "rope_cos", "rope_sin")  # what is no weight
CHECKED_TOKENS = 320  # size of the comparison with ONNX Runtime
GEMM = 8192
WARM, RUNS = 3, 20
FALLBACK: Capability = (8, 0)
NAMED_BY_RTX = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flavour", nargs="+", choices=sorted(MODULES), help="default: all that are installed")
    parser.add_argument("--size", nargs="+", default=["1024x576x37", "1360x768x37"])
    parser.add_argument("--spec", default="full", choices=sorted(SPECS))
    parser.add_argument("--batch", type=int, default=1, choices=(1, 2))
    parser.add_argument("--dry-run", action="store_true", help="build only")
    arguments = parser.parse_args()
    machine = look_at_machine()
    if machine.gpu is None and not arguments.dry_run:
        raise SystemExit(f"No NVIDIA GPU: {machine.no_gpu}. --dry-run builds without one.")
    flavours: list[Flavour] = arguments.flavour or sorted(machine.flavours)
    if not flavours:
        raise SystemExit('No TensorRT: pip install "dynamictrl-edge[build,rtx]" or "dynamictrl-edge[build,tensorrt]"')
    capability = machine.gpu.capability if machine.gpu else (8, 9)
    figures: dict[str, Any] = {}
    for flavour in flavours:
        try:
            figures[flavour] = measure(flavour, capability, arguments)
        except EdgeError as error:
            figures[flavour] = {"failed": str(error)}
        print(json.dumps({flavour: figures[flavour]}, indent=1))
    if not arguments.dry_run:
        settings = {"spec": arguments.spec, "sizes": arguments.size, "batch": arguments.batch, "runs": RUNS}
        print(write_receipt("gpu_block", settings, figures, seeds=[0]))
    if any("failed" in found for found in figures.values()):
        raise SystemExit(5)


def measure(flavour: Flavour, capability: Capability, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one flavour."""
    spec = SPECS[arguments.spec]
    config = msgspec.convert(transformer_config(spec), TransformerConfig)
    half = traced(config)
    built_for = capability if flavour == "tensorrt" or capability in NAMED_BY_RTX else FALLBACK
    found: dict[str, Any] = {"built_for": built_for, "block": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gemm = {}
        for kind in ("fp16", "int8"):
            if kind not in types_of(capability):
                continue
            model = gemm_model(kind)
            engine, report = build(model, {}, flavour, built_for, folder / f"gemm-{kind}")
            gemm[kind] = engine
            found[f"gemm_{kind}"] = {"types": [kernel.types for kernel in report.gemms]}
            if not arguments.dry_run:
                seconds = Running(flavour, engine, random_arrays(model, {})).seconds()
                found[f"gemm_{kind}"]["tops"] = 2 * GEMM**3 / seconds / 1e12
        for kind in gemm:
            inputs = half if kind == "fp16" else quantized(half, LINEARS, "int8")
            for place in ("inputs", "constants"):
                for text in arguments.size:
                    row = one(flavour, built_for, config, inputs, place, text, kind, folder, arguments)
                    ceiling = found[f"gemm_{kind}"].get("tops")
                    if ceiling:
                        row["share_of_gemm_ceiling"] = row["tflops"] / ceiling
                    found["block"].append(row)
                    print(row, file=sys.stderr)
    return found


def one(
    flavour: Flavour,
    capability: Capability,
    config: TransformerConfig,
    model: onnx.ModelProto,
    place: str,
    text: str,
    kind: str,
    folder: Path,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """One engine: built, compared, timed."""
    size = parse_size(text)
    tokens = geometry(config, vae_of(arguments.spec), size.height, size.width, size.frames).video_tokens
    most = {"B": arguments.batch, "N": tokens, "L": config.max_text_seq_length}
    few = {"B": 1, "N": min(CHECKED_TOKENS, tokens), "L": config.max_text_seq_length}
    weights = {k: v for k, v in random_arrays(model, with_s(few)).items() if k not in DATA}
    if place == "constants":
        model = with_constants(model, weights)
    profile = profile_between(model, {**few, "N": 1}, most)
    engine, report = build(model, profile, flavour, capability, folder / "block")
    row: dict[str, Any] = {
        "kind": kind,
        "weights": place,
        "size": text,
        "tokens": tokens,
        "batch": arguments.batch,
        "engine_bytes": engine.stat().st_size,
        "activation_bytes": report.activation_bytes,
        "fused_attention": report.fused_attention,
        "gemms": [list(kernel.types) for kernel in report.gemms],
    }
    if arguments.dry_run:
        return row
    small = random_arrays(model, with_s(few))
    if place == "inputs":
        small.update(weights)
    row["relative_rms_to_onnxruntime"] = difference(Running(flavour, engine, small).outputs(), reference(model, small))
    large = random_arrays(model, with_s(most))
    if place == "inputs":
        large.update(weights)
    running = Running(flavour, engine, large)
    seconds = running.seconds()
    s, d = tokens + config.max_text_seq_length, config.width
    flops = arguments.batch * (24 * s * d * d + 4 * s * s * d)
    row.update(first_run_seconds=running.first, seconds=seconds, tflops=flops / seconds / 1e12)
    return row


def traced(config: TransformerConfig) -> onnx.ModelProto:
    from dynamictrl_edge.export.trace import trace
    from dynamictrl_edge.export.transformer import graph_modules

    module, signature = graph_modules(config, "fp16")["block"]
    return trace(module, signature, name="block")


def vae_of(spec: str) -> Any:
    from benchmarks.checkpoints import vae_config
    from dynamictrl_edge.bundle.config import VaeConfig

    return msgspec.convert(vae_config(SPECS[spec]), VaeConfig)


def with_s(axes: Mapping[str, int]) -> dict[str, int]:
    return {**axes, "S": axes["N"] + axes["L"]}


def shapes(model: onnx.ModelProto, axes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    return {
        value.name: tuple(axes[d.dim_param] if d.dim_param else d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in model.graph.input
    }


def profile_between(model: onnx.ModelProto, least: Mapping[str, int], most: Mapping[str, int]) -> Profile:
    low, high = shapes(model, with_s(least)), shapes(model, with_s(most))
    dynamic = {v.name for v in model.graph.input if any(d.dim_param for d in v.type.tensor_type.shape.dim)}
    return {name: (low[name], high[name], high[name]) for name in dynamic}


def random_arrays(model: onnx.ModelProto, axes: Mapping[str, int]) -> Arrays:
    """Normals that keep activations near 1: matrices scaled by their rows, norm weights and scales near 1."""
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
    made: Arrays = {}
    for name, shape in shapes(model, axes).items():
        random = np.random.default_rng(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
        dtype = helper.tensor_dtype_to_np_dtype(types[name])
        if dtype == np.int8:
            made[name] = random.integers(-127, 128, shape, dtype=np.int8)
            continue
        values = random.standard_normal(shape, dtype=np.float32)
        if name.endswith("_weight") and len(shape) == 2:
            values /= np.sqrt(np.float32(shape[0]))
        elif name.endswith("_in_scale"):
            values = 32 * INT8.unit + 0 * values
        elif name.endswith("_out_scale"):  # int8 weights of up to 127 and inputs of about 32
            values = 1 / (INT8.unit**2 * 32 * 73 * np.sqrt(np.float32(shape[0]))) + 0 * values
        elif name.endswith("norm_weight"):
            values = 1 + 0.1 * values
        made[name] = values.astype(dtype)
    return made


def with_constants(model: onnx.ModelProto, weights: Arrays) -> onnx.ModelProto:
    made = onnx.ModelProto.FromString(model.SerializeToString())
    kept = [value for value in made.graph.input if value.name not in weights]
    del made.graph.input[:]
    made.graph.input.extend(kept)
    made.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return made


def gemm_model(kind: str) -> onnx.ModelProto:
    """One square product, of type `kind`, weights as input."""
    half, eight = TensorProto.FLOAT16, TensorProto.INT8
    value = helper.make_tensor_value_info
    nodes, given = [], [value("x", half, [GEMM, GEMM]), value("w", half if kind == "fp16" else eight, [GEMM, GEMM])]
    constants = []
    if kind == "fp16":
        nodes.append(helper.make_node("MatMul", ["x", "w"], ["y"]))
    else:
        constants = [numpy_helper.from_array(np.float16(1), "one"), numpy_helper.from_array(np.int8(0), "zero")]
        nodes += [
            helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "one", "zero"], ["xd"]),
            helper.make_node("DequantizeLinear", ["w", "one", "zero"], ["wd"]),
            helper.make_node("MatMul", ["xd", "wd"], ["y"]),
        ]
    graph = helper.make_graph(nodes, "gemm", given, [value("y", half, [GEMM, GEMM])], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def build(
    model: onnx.ModelProto, profile: Profile, flavour: Flavour, capability: Capability, stem: Path
) -> tuple[Path, LayerReport]:
    data = model.SerializeToString()
    path, engine = stem.with_suffix(".onnx"), stem.with_suffix(".engine")
    path.write_bytes(data)
    job = EngineJob(
        graph=stem.name,
        onnx=str(path),
        sha256=hashlib.sha256(data).hexdigest(),
        weights=str(path.parent),
        ports=tuple(value.name for value in model.graph.input),
        profile=profile,
        flavour=flavour,
        capabilities=(capability,),
        engine=str(engine),
        report="",
    )
    return engine, build_engine(job, lambda *_: True)[1]


def reference(model: onnx.ModelProto, arrays: Arrays) -> Arrays:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, arrays), strict=True))


def difference(ours: Arrays, theirs: Arrays) -> dict[str, float]:
    return {
        name: float(
            np.sqrt(np.mean((ours[name].astype(np.float32) - array) ** 2) / np.mean(array.astype(np.float32) ** 2))
        )
        for name, array in theirs.items()
    }


class Running:
    """An engine on the GPU with its own buffers, at fixed shapes."""

    def __init__(self, flavour: Flavour, path: Path, arrays: Arrays):
        import pycuda.driver as cuda

        self._cuda, trt = cuda, load_tensorrt(flavour)
        cuda.init()
        self._device = cuda.Device(0).retain_primary_context()
        self._device.push()
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise DeviceError(f"The {flavour} engine cannot be opened on this GPU.")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise DeviceError(f"The {flavour} engine cannot be given a context on this GPU.")
        self._stream = cuda.Stream()
        self._buffers: dict[str, Any] = {}
        self._results: Arrays = {}
        for name, array in arrays.items():
            self._context.set_input_shape(name, array.shape)
            self._buffers[name] = cuda.mem_alloc(array.nbytes)
            cuda.memcpy_htod(self._buffers[name], np.ascontiguousarray(array))
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            if self._engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT:
                shape = tuple(self._context.get_tensor_shape(name))
                self._results[name] = np.empty(shape, trt.nptype(self._engine.get_tensor_dtype(name)))
                self._buffers[name] = cuda.mem_alloc(self._results[name].nbytes)
            self._context.set_tensor_address(name, int(self._buffers[name]))
        start = time.perf_counter()
        self._enqueue()
        self._stream.synchronize()
        self.first = time.perf_counter() - start  # TensorRT-RTX compiles its kernels here

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise DeviceError("The engine refused to run.")

    def outputs(self) -> Arrays:
        for name, array in self._results.items():
            self._cuda.memcpy_dtoh(array, self._buffers[name])
        return self._results

    def seconds(self) -> float:
        """Median time of one run on the GPU."""
        for _ in range(WARM):
            self._enqueue()
        times = []
        for _ in range(RUNS):
            begin, end = self._cuda.Event(), self._cuda.Event()
            begin.record(self._stream)
            self._enqueue()
            end.record(self._stream)
            end.synchronize()
            times.append(begin.time_till(end) / 1e3)
        return statistics.median(times)


if __name__ == "__main__":
    main()
