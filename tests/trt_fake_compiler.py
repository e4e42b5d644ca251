"""A fake TensorRT that builds: networks from real ONNX files, profiles, flags, progress, a log, engines that can be opened.

`install(folder, "tensorrt-10.3.0", build_error="...")` writes a module into `folder` that any process finds under its real
name once the folder is on PYTHONPATH; every call goes to `folder/calls.jsonl`, which `calls(folder)` reads.

Behaves as measured with TensorRT-RTX 1.7 without a GPU: errors are logged and then told by False, None or -1, never raised;
an empty file parses "successfully"; a refused profile is noticed when the network is built. Where versions are
documented to differ, so does this. Engines are a few bytes that say what they were built with.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.trt_fakes import FakeModule, fake_module

__all__ = ["Call", "Faults", "calls", "fake_tensorrt", "install"]

_ROOT = Path(__file__).parent.parent
_MAGIC = b"ftrt"
_NO_DRIVER = (
    "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError (cudaError 35: CUDA driver "
    "version is insufficient for CUDA runtime version))"
)


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What is to go wrong, and how the compiler behaves."""

    parse_error: str = ""  # refuses the graph with this
    build_error: str = ""  # refuses to compile it with this
    needs_lean: bool = False  # opens no engine that was built without the lean runtime, unless that is loaded
    unopened: str = ""  # builds an engine that cannot be opened, with this
    crash: bool = False  # dies of a signal while it builds
    steps: int = 3  # of its one phase
    seconds: float = 0.0  # for each step
    attention: bool = True  # fuses it
    weights: int = 132  # bytes of constants that it reports
    activation: int = 8290304  # bytes
    padding: int = 0  # bytes that the engine is larger


Call = tuple[str, dict[str, Any]]


def install(folder: Path, version: str, **faults: Any) -> Path:
    """Makes `import tensorrt` (or tensorrt_rtx, tensorrt_lean) find a fake of `version` in `folder`; returns the folder."""
    given = Faults(**faults)
    module = fake_module(version).surface.module
    (folder / module).mkdir(parents=True, exist_ok=True)
    (folder / "calls.jsonl").touch()
    (folder / module / "__init__.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(_ROOT)!r})\n"
        "from tests.trt_fake_compiler import Faults, fake_tensorrt\n"
        f"fake = fake_tensorrt({version!r}, Faults(**{asdict(given)!r}), {str(folder / 'calls.jsonl')!r})\n"
        "fake.__path__, fake.__spec__ = __path__, __spec__\n"
        "sys.modules[__name__] = fake\n"
    )
    info = folder / f"{module}-{version.partition('-')[2]}.dist-info"  # so that its version is known without an import
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: {version.partition('-')[2]}\n")
    return folder


def calls(folder: Path) -> list[Call]:
    """Every call so far, of all processes; arguments that are not plain values as their repr."""
    return [(name, arguments) for name, arguments in map(json.loads, (folder / "calls.jsonl").read_text().splitlines())]


def fake_tensorrt(version: str, faults: Faults | None = None, record: str | None = None) -> FakeModule:
    """The module itself, for use in this process; `record`: a file to which calls are appended."""
    module = fake_module(version)
    if record is not None:
        module.calls = _Record(record)
    _Compiler(module, faults or Faults()).teach()
    return module


class _Record(list[Call]):
    """Calls, on disk as soon as they are made: the process may be killed."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def append(self, call: Call) -> None:
        super().append(call)
        with open(self._path, "a") as file:
            file.write(json.dumps([call[0], {key: _plain(value) for key, value in call[1].items()}]) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{memoryview(value).nbytes} bytes>"
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value) if type(value).__str__ is not object.__str__ else f"<{type(value).__name__}>"


class _Compiler:
    """What the classes of one fake module do, by name of the method."""

    def __init__(self, module: FakeModule, faults: Faults) -> None:
        self.trt: Any = module
        self.module = module
        self.faults = faults
        self.names = module.surface.names

    def teach(self) -> None:
        for name in dir(self):
            owner, _, method = name.partition("__")
            if owner in self.names and method:
                self.module.behaviours[f"{owner}.{method}"] = getattr(self, name)
        self.module.behaviours["IOptimizationProfile.__bool__"] = lambda profile: all(
            map(_in_order, profile.state.get("shapes", {}).values())
        )

    def log(self, thing: Any, severity: str, text: str) -> None:
        thing.state["logger"].log(getattr(self.trt.ILogger.Severity, severity), text)

    def error(self, thing: Any, text: str) -> None:
        self.log(thing, "ERROR", text)
        self.log(thing, "ERROR", _NO_DRIVER)

    def bit(self, enum: str, name: str, flags: int) -> bool:
        number = self.names[enum].numbers.get(name)
        return number is not None and bool(flags >> number & 1)

    # Builder

    def Builder____init__(self, builder: Any, logger: Any) -> None:
        builder.state["logger"] = logger

    def Builder__create_network(self, builder: Any, flags: int = 0) -> Any:
        network = self.module.make("INetworkDefinition")
        network.state.update(flags=int(flags), inputs=[], outputs=[], layers=[])
        return network

    def Builder__create_builder_config(self, builder: Any) -> Any:
        config = self.module.make("IBuilderConfig")
        config.state.update(logger=builder.state["logger"], flags=1 << self.names["BuilderFlag"].numbers["TF32"])
        config.state.update(profiles=[], pools={}, capabilities=[], invalid=False)
        return config

    def Builder__create_optimization_profile(self, builder: Any) -> Any:
        return self.module.make("IOptimizationProfile")

    def Builder__build_serialized_network(self, builder: Any, network: Any, config: Any, **_: Any) -> Any:
        plan = self.build(builder, network, config)
        return None if plan is None else self.trt.IHostMemory(plan)

    def Builder__build_serialized_network_to_stream(self, builder: Any, network: Any, config: Any, writer: Any) -> bool:
        plan = self.build(builder, network, config)
        if plan is None:
            return False
        for start in range(0, len(plan), 4096):
            piece = plan[start : start + 4096]
            if writer.write(piece) != len(piece):
                self.error(
                    builder, "IBuilder::buildSerializedNetworkToStream: Error Code 1: Serialization (write failed)"
                )
                return False
        return True

    def build(self, builder: Any, network: Any, config: Any) -> bytes | None:
        refusal = self.refusal(network, config)
        if refusal:
            self.error(builder, f"IBuilder::buildSerializedNetwork: {refusal}")
            return None
        if not self.work(config):
            self.error(
                builder, "IBuilder::buildSerializedNetwork: Error Code 7: BuildCanceled (Build canceled by user)"
            )
            return None
        if self.faults.crash:
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.faults.build_error:
            self.error(builder, f"IBuilder::buildSerializedNetwork: {self.faults.build_error}")
            return None
        most = "Total" if self.trt.__version__.startswith("10.3") else "Max"
        self.log(builder, "INFO", f"{most} Scratch Memory: {self.faults.activation // 2} bytes")
        self.log(builder, "INFO", f"Total Activation Memory: {self.faults.activation} bytes")
        self.log(builder, "INFO", f"Total Weights Memory: {self.faults.weights} bytes")
        kernels = list(self.kernels(network))
        if self.module.__name__ == "tensorrt_rtx":
            self.log(builder, "VERBOSE", "Layers:\n" + "\n".join(map(_line, kernels)) + "\n\nI/O Tensors:\n")
        flags = config.state["flags"]
        facts = {
            "kernels": kernels,
            "compatible": self.bit("BuilderFlag", "VERSION_COMPATIBLE", flags),
            "lean": not self.bit("BuilderFlag", "EXCLUDE_LEAN_RUNTIME", flags),
            "streaming": self.bit("BuilderFlag", "WEIGHT_STREAMING", flags),
        }
        return _MAGIC + json.dumps(facts).encode() + bytes(self.faults.padding)

    def refusal(self, network: Any, config: Any) -> str:
        """Why the network cannot be built as configured."""
        state, flags = config.state, config.state["flags"]
        strong = self.bit("NetworkDefinitionCreationFlag", "STRONGLY_TYPED", network.state["flags"])
        if self.trt.__version__.startswith("10.") and not strong:
            return "fake: the network is not strongly typed"
        if not network.state["outputs"]:
            return _misuse("Network must have at least one output. In validate at /_src/optimizer/api/network.cpp:3810")
        lean = self.bit("BuilderFlag", "EXCLUDE_LEAN_RUNTIME", flags)
        if lean and not self.bit("BuilderFlag", "VERSION_COMPATIBLE", flags):
            return _misuse("EXCLUDE_LEAN_RUNTIME needs VERSION_COMPATIBLE")
        dynamic = {t.name: t.shape for t in network.state["inputs"] if any(n < 0 for n in t.shape)}
        if dynamic and not state["profiles"]:
            return _misuse("Network has dynamic or shape inputs, but no optimization profile has been defined.")
        for profile in state["profiles"]:
            shapes = profile.state.get("shapes", {})
            for name, shape in dynamic.items():
                if name not in shapes:
                    return _misuse(f"Dynamic input tensor {name} is missing dimensions in profile 0")
                given = len(shapes[name][0])
                if given != len(shape):
                    ranks = f"has {len(shape)} dimensions but profile 0 has {given} dimensions"
                    return _misuse(f"Dynamic-shaped input tensor {name} {ranks}")
        return ""

    def work(self, config: Any) -> bool:
        """Goes through the steps; False where the monitor said stop."""
        monitor, phase = config.state.get("progress_monitor"), "Building Engine"
        if monitor is not None:
            monitor.phase_start(phase, None, self.faults.steps)
        goes_on = True
        for step in range(self.faults.steps):
            time.sleep(self.faults.seconds)
            goes_on = monitor is None or bool(monitor.step_complete(phase, step))
            if not goes_on:
                break
        if monitor is not None:
            monitor.phase_finish(phase)
        return goes_on

    def kernels(self, network: Any) -> Iterator[dict[str, Any]]:
        """One per product: the two around a softmax become one, the others stay, in the type of their input."""
        products = [layer for layer in network.state["layers"] if layer.state["operation"] in ("MatMul", "Gemm")]
        softmax = [layer for layer in network.state["layers"] if layer.state["operation"] == "Softmax"]
        dtype = next((t.dtype.name for t in network.state["inputs"] if t.name.endswith("_weight")), "HALF")
        named = {"HALF": "Half", "BF16": "BFloat16", "FLOAT": "Float"}.get(dtype, "Half")
        fused = 2 * len(softmax) if self.faults.attention else 0
        for layer in softmax if self.faults.attention else ():
            yield _kernel(f"_gemm_mha_v2_{layer.name}", "kgen", "_gemm_mha_v2_0x1", (2, -1, 64), named, layer.name)
        for layer in products[fused:]:
            yield _kernel(layer.name, "gemm", "sm80_xmma_gemm", (-1, 64), named, layer.name)
        yield _kernel("__myl_Cast_myl0_9", "kgen", "__myl_Cast_0x1", (-1,), named, "cast")

    # IBuilderConfig

    def IBuilderConfig__set_flag(self, config: Any, flag: Any) -> None:
        config.state["flags"] |= 1 << int(flag)

    def IBuilderConfig__clear_flag(self, config: Any, flag: Any) -> None:
        config.state["flags"] &= ~(1 << int(flag))

    def IBuilderConfig__get_flag(self, config: Any, flag: Any) -> bool:
        return bool(config.state["flags"] >> int(flag) & 1)

    def IBuilderConfig__set_memory_pool_limit(self, config: Any, pool: Any, pool_size: int) -> None:
        config.state["pools"][pool] = pool_size

    def IBuilderConfig__get_memory_pool_limit(self, config: Any, pool: Any) -> int:
        return config.state["pools"].get(pool, 1 << 36)

    def IBuilderConfig__add_optimization_profile(self, config: Any, profile: Any) -> int:
        wrong = [name for name, shapes in profile.state.get("shapes", {}).items() if not _in_order(shapes)]
        if wrong:
            self.error(
                config,
                f"Invalid optimization profiles for input tensors {', '.join(wrong)}, please ensure that the optimization "
                "profiles satisfy MIN<=OPT<=MAX",
            )
            return -1
        config.state["profiles"].append(profile)
        return len(config.state["profiles"]) - 1

    def IBuilderConfig__num_optimization_profiles(self, config: Any) -> int:
        return len(config.state["profiles"])

    def IBuilderConfig__set_compute_capability(self, config: Any, compute_capability: Any, index: int) -> bool:
        if index >= config.state.get("num_compute_capabilities", 0):
            self.error(
                config, "IBuilderConfig::setComputeCapability: Error Code 3: API Usage Error (Index out of range)"
            )
            return False
        config.state["capabilities"].append(compute_capability)
        return True

    # IOptimizationProfile

    def IOptimizationProfile__set_shape(self, profile: Any, input: str, min: Any, opt: Any, max: Any) -> None:
        profile.state.setdefault("shapes", {})[input] = tuple(tuple(map(int, shape)) for shape in (min, opt, max))

    def IOptimizationProfile__get_shape(self, profile: Any, input: str) -> list[Any]:
        return [self.dims(shape) for shape in profile.state.get("shapes", {}).get(input, ())]

    # INetworkDefinition

    def INetworkDefinition__num_inputs(self, network: Any) -> int:
        return len(network.state["inputs"])

    def INetworkDefinition__num_outputs(self, network: Any) -> int:
        return len(network.state["outputs"])

    def INetworkDefinition__num_layers(self, network: Any) -> int:
        return len(network.state["layers"])

    def INetworkDefinition__get_input(self, network: Any, index: int) -> Any:
        return _at(network.state["inputs"], index)

    def INetworkDefinition__get_output(self, network: Any, index: int) -> Any:
        return _at(network.state["outputs"], index)

    def INetworkDefinition__get_layer(self, network: Any, index: int) -> Any:
        return _at(network.state["layers"], index)

    # OnnxParser

    def OnnxParser____init__(self, parser: Any, network: Any, logger: Any) -> None:
        parser.state.update(network=network, logger=logger, errors=[], flags=0)

    def OnnxParser__set_flag(self, parser: Any, flag: Any) -> None:
        parser.state["flags"] |= 1 << int(flag)

    def OnnxParser__clear_flag(self, parser: Any, flag: Any) -> None:
        parser.state["flags"] &= ~(1 << int(flag))

    def OnnxParser__num_errors(self, parser: Any) -> int:
        return len(parser.state["errors"])

    def OnnxParser__get_error(self, parser: Any, index: int) -> Any:
        return _at(parser.state["errors"], index)

    def OnnxParser__parse_from_file(self, parser: Any, model: str) -> bool:
        try:
            data = Path(model).read_bytes()
        except OSError:
            return self.refuse(parser, f"Input file cannot be found, or is not a regular file: {model}")
        return self.OnnxParser__parse(parser, data, model)

    def OnnxParser__parse(self, parser: Any, model: Any, path: str | None = None) -> bool:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

        data = bytes(model)
        try:
            graph = onnx.load_from_string(data).graph
        except DecodeError:
            return self.refuse(parser, "MODEL_DESERIALIZE_FAILED: Failed to parse the ONNX model.")
        folder = Path(path or "").parent
        for tensor in graph.initializer:
            outside = {entry.key: entry.value for entry in tensor.external_data}
            if outside and not (folder / outside["location"]).is_file():
                return self.refuse(
                    parser, f"WeightsContext.cpp:203: Failed to open file: {folder / outside['location']}"
                )
        for node in graph.node:
            if node.domain not in ("", "ai.onnx", "trt"):
                text = 'creator && "Plugin not found, are the plugin name, version, and namespace correct?"'
                return self.refuse(
                    parser, f"In node 0 with name: {node.name} and operator: {node.op_type}: INVALID_NODE: {text}"
                )
        if self.faults.parse_error:
            return self.refuse(parser, self.faults.parse_error)
        state = parser.state["network"].state
        constants = {tensor.name for tensor in graph.initializer}
        state["inputs"] += [self.tensor(value, onnx) for value in graph.input if value.name not in constants]
        state["outputs"] += [self.tensor(value, onnx) for value in graph.output]
        for node in graph.node:
            layer = self.module.make("ILayer")
            layer.state.update(name=node.name, operation=node.op_type)
            state["layers"].append(layer)
        return True

    def refuse(self, parser: Any, text: str) -> bool:
        self.error(parser, text)
        found = self.module.make("ParserError")
        found.state["desc"] = text
        parser.state["errors"].append(found)
        return False

    def ParserError__desc(self, error: Any) -> str:
        return error.state["desc"]

    def tensor(self, value: Any, onnx: Any) -> Any:
        names = {"FLOAT16": "HALF", "BFLOAT16": "BF16", "FLOAT8E4M3FN": "FP8"}
        kind = value.type.tensor_type
        dtype = onnx.TensorProto.DataType.Name(kind.elem_type)
        made = self.module.make("ITensor")
        shape = [axis.dim_value if axis.HasField("dim_value") else -1 for axis in kind.shape.dim]
        made.state.update(
            name=value.name,
            shape=self.dims(shape),
            dtype=getattr(self.trt.DataType, names.get(dtype, dtype)),
            is_network_input=True,
        )
        return made

    def dims(self, shape: Any) -> Any:
        made = self.module.make("Dims")
        made.state["shape"] = tuple(shape)
        return made

    def Dims____init__(self, dims: Any, shape: Any = ()) -> None:
        dims.state["shape"] = tuple(shape)

    # Runtime

    def Runtime____init__(self, runtime: Any, logger: Any) -> None:
        runtime.state["logger"] = logger

    def Runtime__load_runtime(self, runtime: Any, path: str) -> Any:
        loaded = self.module.make("Runtime")
        loaded.state.update(runtime.state, lean=path)
        return loaded

    def Runtime__deserialize_cuda_engine(self, runtime: Any, serialized_engine: Any, **_: Any) -> Any:
        data, allowed = bytes(serialized_engine), runtime.state.get("engine_host_code_allowed", False)
        why = self.faults.unopened
        if not data.startswith(_MAGIC):
            why = "Error Code 1: Serialization (Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG failed.)"
        facts = json.loads(data[len(_MAGIC) :].rstrip(b"\0")) if data.startswith(_MAGIC) else {}
        if facts.get("compatible") and facts["lean"] and not allowed:
            why = "Error Code 4: API Usage Error (The engine contains host code, which this runtime is not allowed to run.)"
        if self.faults.needs_lean and facts.get("compatible") and not (facts["lean"] or "lean" in runtime.state):
            why = "Error Code 4: API Usage Error (The engine has no lean runtime, and none was loaded.)"
        if why:
            self.error(runtime, f"IRuntime::deserializeCudaEngine: {why}")
            return None
        engine = self.module.make("ICudaEngine")
        engine.state["facts"] = facts
        return engine

    def ICudaEngine__device_memory_size_v2(self, engine: Any) -> int:
        return self.faults.activation

    def ICudaEngine__streamable_weights_size(self, engine: Any) -> int:
        return self.faults.weights if engine.state["facts"]["streaming"] else 0

    def ICudaEngine__create_engine_inspector(self, engine: Any) -> Any:
        inspector = self.module.make("EngineInspector")
        inspector.state["facts"] = engine.state["facts"]
        return inspector

    def EngineInspector__get_engine_information(self, inspector: Any, format: Any) -> str:
        kernels = inspector.state["facts"]["kernels"]
        if format.name == "JSON":
            return json.dumps({"Layers": kernels, "Bindings": []})
        return "Layers:\n" + "\n".join(map(_line, kernels)) + "\n\nBindings:\n"


def _misuse(text: str) -> str:
    return f"Error Code 4: API Usage Error ({text})"


def _in_order(shapes: tuple[tuple[int, ...], ...]) -> bool:
    least, best, most = shapes
    return all(a <= b <= c for a, b, c in zip(least, best, most, strict=True))


def _at(items: list[Any], index: int) -> Any:
    return items[index] if 0 <= index < len(items) else None


def _kernel(name: str, kind: str, tactic: str, shape: tuple[int, ...], dtype: str, node: str) -> dict[str, Any]:
    def tensor(called: str) -> dict[str, Any]:
        return {"Name": called, "Dimensions": list(shape), "Format/Datatype": f"Row major linear {dtype} format"}

    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [tensor(f"{name}_a"), tensor(f"{name}_b")],
        "Outputs": [tensor(f"{name}_out")],
        "TacticName": tactic,
        "StreamId": 0,
        "Metadata": f"[ONNX Layer: {node}]",
    }


def _line(kernel: dict[str, Any]) -> str:
    """A kernel as the log has it."""

    def tensors(key: str) -> str:
        listed = (
            f"{{ Name: {t['Name']}, Dimensions: [{','.join(map(str, t['Dimensions']))}], Strides: [1], StrideOrder: [0], "
            f"Datatype: {t['Format/Datatype'].split()[3]}, Format: (Linear) Row major linear format }}"
            for t in kernel[key]
        )
        return f"[ {', '.join(listed)}]"

    return (
        f"Name: {kernel['Name']}, LayerType: {kernel['LayerType']}, Inputs: {tensors('Inputs')}, Constants: [], "
        f"Outputs: {tensors('Outputs')}, TacticName: {kernel['TacticName']}, StreamId: 0, Metadata: {kernel['Metadata']}"
    )
