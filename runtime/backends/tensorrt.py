"""Engines and their execution, for TensorRT, its lean runtime and TensorRT-RTX. The only file of the runtime that imports them.

One execution context per engine; its activation memory comes from the caller, so that engines which take turns share it. What
a version lacks is asked for with `has` before it is used. Nothing here synchronizes.

TensorRT reports failures as None or False and gives the cause to its logger only: `Library.cause` has it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ...bundle.errors import BundleError, DeviceError
from ...engines.cause import cause_of
from ...engines.surface import has, lean_library

__all__ = ["CACHE_NAME", "Engine", "Library"]

CACHE_NAME = "runtime.cache"  # in the engine set's folder: kernels that TensorRT-RTX compiled on this machine's GPU
_REMEMBERED = 20  # of the logger's errors


class Library:
    """A TensorRT module with one runtime. `cache`: the file to keep compiled kernels in; None: nowhere."""

    def __init__(self, name: str, *, cache: Path | None = None, version_compatible: bool = False):
        """`name`: tensorrt, tensorrt_lean or tensorrt_rtx. `version_compatible`: of the engines that will be opened.

        Raises:
            DeviceError: the module is missing or cannot be loaded, or its runtime does not start.
        """
        trt = _load(name)
        self._trt = trt
        self._log = _make_log(trt)
        self._runtime = trt.Runtime(self._log)
        if version_compatible and name == "tensorrt":
            # Such engines were built without the lean runtime that runs them.
            library = lean_library()
            self._runtime = self._runtime.load_runtime(str(library)) if library is not None else None
            if self._runtime is None:
                raise DeviceError(
                    "The engines are version-compatible, which needs TensorRT's lean runtime in the version of TensorRT. "
                    "Install it: pip install tensorrt-lean"
                )
        self._cache_file, self._cached = cache, b""
        self._cache: Any = None

    @property
    def version(self) -> str:
        return str(self._trt.__version__)

    def cause(self) -> str:
        """Why the last call failed, in TensorRT's words."""
        found = cause_of(list(self._log.errors)) or "TensorRT gave no cause."
        self._log.errors.clear()
        return found

    def open(self, graph: str, path: Path) -> Engine:
        """Deserializes the engine of `graph`, which takes device memory for the weights that it holds.

        Raises:
            BundleError: the file cannot be read.
            DeviceError: TensorRT refuses it; the text has its cause.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BundleError(f"Cannot read the engine {str(path)!r}: {error.strerror}.") from error
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise DeviceError(f"The engine of {graph!r} ({str(path)!r}) cannot be opened: {self.cause()}")
        context, config = self._context(engine)
        if context is None:
            del engine, config  # now, in the GPU's context: the error's traceback would keep them until later
            raise DeviceError(f"The engine of {graph!r} gets no execution context: {self.cause()}")
        return Engine(self, graph, engine, context, config)

    def _context(self, engine: Any) -> tuple[Any, Any]:
        """The execution context, None if it is refused, and the configuration that must live as long."""
        trt, config = self._trt, None
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if has(trt, "IRuntimeConfig"):
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if has(trt, "DynamicShapesKernelSpecializationStrategy"):
                # The default changes kernels while a clip is made, whenever a compilation in the background is done: the same
                # request could give other numbers.
                config.dynamic_shapes_kernel_specialization_strategy = (
                    trt.DynamicShapesKernelSpecializationStrategy.EAGER
                )
            if has(trt, "IRuntimeConfig.create_runtime_cache"):
                config.set_runtime_cache(self._shared_cache(config))
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(strategy)
        return context, config

    def _shared_cache(self, config: Any) -> Any:
        """One for all engines. A file of another GPU or version is ignored by the library and replaced later."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._cache_file is not None:
                with contextlib.suppress(OSError):
                    self._cached = self._cache_file.read_bytes()
                if self._cached:
                    self._cache.deserialize(self._cached)
        return self._cache

    def save_cache(self) -> None:
        """Writes kernels that were compiled since the file was read. Never an error: it is only a cache."""
        if self._cache is None or self._cache_file is None:
            return
        made = self._cache.serialize()
        data = b"" if made is None else bytes(memoryview(made))
        if not data or data == self._cached:
            return
        with contextlib.suppress(OSError):
            temporary = self._cache_file.with_name(f".{CACHE_NAME}.{secrets.token_hex(4)}")
            temporary.write_bytes(data)
            os.replace(temporary, self._cache_file)
            self._cached = data


class Engine:
    """One engine with its execution context. `memory`: bytes of activation memory that it needs, for any shapes it takes."""

    def __init__(self, library: Library, graph: str, engine: Any, context: Any, config: Any):
        self._library, self._trt, self.graph = library, library._trt, graph
        self._engine, self._config, self._context = engine, config, context
        self.memory = int(engine.device_memory_size_v2)
        self.names = tuple(engine.get_tensor_name(i) for i in range(engine.num_io_tensors))
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None

    def item_bytes(self, name: str) -> int:
        """Bytes of a number of this input or output."""
        return int(self._engine.get_tensor_dtype(name).itemsize)

    def set_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Shapes of inputs. Raises `DeviceError` for one that the engine was not built for."""
        for name, shape in shapes.items():
            if self._shapes.get(name) == shape:
                continue
            if not self._context.set_input_shape(name, shape):
                raise DeviceError(
                    f"The engine of {self.graph!r} does not take {name!r} as {list(shape)}: {self._library.cause()}"
                )
            self._shapes[name] = shape

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an output, for the inputs' shapes."""
        shape = tuple(self._context.get_tensor_shape(name))
        if any(n < 0 for n in shape):
            raise DeviceError(
                f"The engine of {self.graph!r} does not say the shape of {name!r}: {self._library.cause()}"
            )
        return shape

    def use_memory(self, address: int, nbytes: int) -> None:
        """Activations lie there from now on."""
        if self._memory != (address, nbytes):
            self._context.set_device_memory(address, nbytes)
            self._memory = (address, nbytes)

    def recordable(self, stream: int) -> bool:
        """Whether a run with the shapes and addresses of the last one may be recorded from this stream, as far as can be asked."""
        if not has(self._trt, "IExecutionContext.is_stream_capturable"):
            return True
        return bool(self._context.is_stream_capturable(stream))

    def close(self) -> None:
        """Frees what TensorRT holds, whoever still refers to this object; the caller has made the GPU's context current."""
        self._context = self._config = self._engine = None

    def enqueue(self, addresses: Mapping[str, int], stream: int) -> None:
        """Puts one run into a stream; it returns before that is done.

        Raises:
            DeviceError: TensorRT refuses; the text has its cause.
        """
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                if not self._context.set_tensor_address(name, address):
                    raise DeviceError(
                        f"The engine of {self.graph!r} refuses the memory of {name!r}: {self._library.cause()}"
                    )
                self._addresses[name] = address
        if not self._context.execute_async_v3(stream):
            raise DeviceError(f"The graph {self.graph!r} failed: {self._library.cause()}")


def _load(name: str) -> ModuleType:
    package = name.replace("_", "-")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, f"{name}_bindings", f"{name}_libs"):
            raise
        raise DeviceError(f"The engines need the package {package}. Install it: pip install {package}") from None
    except (ImportError, OSError) as error:  # its shared libraries are missing or were made for another system
        raise DeviceError(f"The package {package} is installed but cannot be loaded: {error}.") from error


def _make_log(trt: ModuleType) -> Any:
    class Log(trt.ILogger):  # type: ignore[name-defined]  # a class of the module at hand
        """Keeps errors, for messages."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=_REMEMBERED)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(msg)

    return Log()
