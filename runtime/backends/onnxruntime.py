"""ONNX Runtime on the CPU. The only file of the runtime that imports onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...bundle.errors import BundleError, DeviceError
from ...bundle.manifest import OWN, GraphSpec, Port
from ...bundle.store import Bundle
from ..measure import cores

__all__ = ["OnnxRuntimeBackend"]

FP8 = "float8e4m3fn"
NUMPY: dict[str, type[np.generic]] = {
    "float": np.float32,
    "float16": np.float16,
    "int64": np.int64,
    "int8": np.int8,
    FP8: np.uint8,  # numpy has no such type; the bytes are passed on
}
ELEMENT_TYPES = {FP8: 17}  # ONNX's number of what the binding cannot know from numpy's type


class OnnxRuntimeBackend:
    """Executes a bundle's graphs with ONNX Runtime's CPU provider; weights are used where they are mapped, uncopied."""

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, *, threads: int | None = None):
        """`threads`: for one operator, default the cores that this process may use.

        Raises `DeviceError` for a bf16 bundle (ONNX Runtime has no CPU kernels for it) and when ONNX Runtime is missing.
        """
        if bundle.manifest.precision == "bf16":
            raise DeviceError(
                f"The bundle {str(bundle.root)!r} is bf16, which ONNX Runtime cannot compute on a CPU. "
                "Export it with --precision fp32 for this machine."
            )
        try:
            import onnxruntime
        except ImportError as error:
            raise DeviceError(
                f"ONNX Runtime cannot be loaded ({error}). Install it: pip install onnxruntime"
            ) from error
        self._ort = onnxruntime
        self._bundle = bundle
        self._threads = threads or cores()
        self.lanes = min(2, self._threads)
        self._graphs: dict[tuple[str, int, int], OrtGraph] = {}

    def graph(self, name: str, lane: int = 0, lanes: int = 1) -> OrtGraph:
        key = (name, lane, lanes)
        if key not in self._graphs:
            self._graphs[key] = self._load(name, max(1, self._threads // lanes))
        return self._graphs[key]

    def own_name(self, name: str) -> str:
        """The graph that is run for `name`: its form in ONNX Runtime's own operators, where the bundle has one (float32
        bundles have it of the block's graphs; the interface is the same)."""
        return name + OWN if name + OWN in self._bundle.manifest.graphs else name

    def drop(self, *names: str) -> None:
        self._graphs = {key: graph for key, graph in self._graphs.items() if key[0] not in names}

    def _load(self, name: str, threads: int) -> OrtGraph:
        spec, model = self._bundle.graph(self.own_name(name))
        return self.load(name, spec, model, threads)

    def load(self, name: str, spec: GraphSpec, model: bytes, threads: int | None = None) -> OrtGraph:
        """A serialized ONNX model as a graph of this bundle; `threads`: None for all. Raises `BundleError`."""
        threads = threads or self._threads
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Only the block is called often enough for waiting threads to be worth a busy core; those of several block graphs
        # would wait on each other's cores.
        spin = set(self._bundle.manifest.block_graphs) == {name}
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
        if any(port.dtype == FP8 for port in spec.inputs):
            # Its rewriting of quantized products takes any 8-bit type for an integer, and then refuses its own graph.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if name.startswith("vae_"):
            # The arena keeps what it once had and fragments from chunk to chunk: twice the memory at the same speed.
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        if spec.weights is not None:
            # The model comes as bytes, so its external initializers are looked for here; the file has been verified.
            folder = self._bundle.path(spec.weights).parent
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        try:
            session = self._ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises many unrelated types
            raise BundleError(
                f"ONNX Runtime {self._ort.__version__} cannot load the graph {name!r} of {str(self._bundle.root)!r}: "
                f"{_first_line(error)}"
            ) from error
        return OrtGraph(name, spec, session)


class OrtGraph:
    """A loaded session."""

    def __init__(self, name: str, spec: GraphSpec, session: Any):
        self.name, self.spec, self.session = name, spec, session
        ports = (*spec.inputs, *spec.outputs)
        self._dtypes = {port.name: np.dtype(NUMPY[port.dtype]) for port in ports}
        self._elements = {port.name: ELEMENT_TYPES.get(port.dtype, NUMPY[port.dtype]) for port in ports}

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            values = self.session.run(
                None, {port.name: self._value(port, feeds[port.name]) for port in self.spec.inputs}
            )
        except Exception as error:
            raise self._failure(error) from error
        return {port.name: value for port, value in zip(self.spec.outputs, values, strict=True)}

    def _value(self, port: Port, array: np.ndarray) -> Any:
        if (element := ELEMENT_TYPES.get(port.dtype)) is None:
            return array
        from onnxruntime import OrtValue

        return OrtValue.ortvalue_from_numpy_with_onnx_type(array, element)

    def prepare(self, arrays: Mapping[str, np.ndarray]) -> OrtCall:
        call = OrtCall(self)
        for port in (*self.spec.inputs, *self.spec.outputs):
            call.bind(port.name, arrays[port.name])
        return call

    def _failure(self, error: Exception) -> DeviceError:
        if isinstance(error, DeviceError):
            return error
        text = _first_line(error)
        if "allocat" in text.lower() or isinstance(error, MemoryError):
            return DeviceError(f"Out of memory in the graph {self.name!r}. Make a smaller or shorter clip. ({text})")
        return DeviceError(f"The graph {self.name!r} failed: {text}")


class OrtCall:
    """One session with fixed buffers."""

    def __init__(self, graph: OrtGraph):
        self._graph = graph
        self._binding = graph.session.io_binding()
        self._outputs = {port.name for port in graph.spec.outputs}
        self._alive: dict[str, np.ndarray] = {}

    def bind(self, name: str, array: np.ndarray) -> None:
        dtype = self._graph._dtypes[name]
        if array.dtype != dtype or not array.flags.c_contiguous:
            raise ValueError(
                f"{name!r} of graph {self._graph.name!r} needs a C-contiguous {dtype} array, not {array.dtype}"
            )
        bind = self._binding.bind_output if name in self._outputs else self._binding.bind_input
        bind(name, "cpu", 0, self._graph._elements[name], list(array.shape), array.ctypes.data)
        self._alive[name] = array

    def __call__(self) -> None:
        try:
            self._graph.session.run_with_iobinding(self._binding)
        except Exception as error:
            raise self._graph._failure(error) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
