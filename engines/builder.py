"""The one door to the TensorRT builders: one ONNX graph in, one engine file and its layer report out.

Runs in a process of its own (see `worker`). The same code drives TensorRT 10.3 to 11.x and TensorRT-RTX; what a version
lacks is asked for with `has` before it is used.

polygraphy makes profiles and builder configurations: it knows which flag exists in which version. The raw API does the
rest, because polygraphy's loaders hide what is needed here: the log (the only account of what was compiled without a GPU,
and the only place where causes of failures stand), networks that come out empty, a dynamic input without a profile (filled
in silently, which builds an engine for one shape), cancelling, and streaming the engine to disk.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import msgspec

from ..bundle.errors import BundleError, DeviceError, EdgeError, Interrupted
from ..bundle.garbage import uncollected
from .cause import cause_of
from .profiles import Profile
from .report import LayerReport, memory_of, parse_inspector_json, parse_log
from .surface import has, lean_library
from .targets import Capability, Flavour, capability_name

__all__ = ["MODULES", "EngineJob", "Product", "build_engine", "has", "lean_library", "load_tensorrt"]

MODULES: dict[Flavour, str] = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
_CHOICE = "POLYGRAPHY_USE_TENSORRT_RTX"
_INSTALL: dict[Flavour, str] = {"rtx": "build,rtx", "tensorrt": "build,tensorrt"}

Progress = Callable[[str, int, int], bool]
"""Called with (phase, steps done, steps in all); returning False cancels the build."""


class EngineJob(msgspec.Struct, frozen=True, kw_only=True):
    """All that one build needs. `onnx` holds the graph with SHA-256 `sha256`; constants kept outside of it are looked for in
    the folder `weights`. `ports` names the inputs that the graph must have. `profile` gives least, best and most shape of
    each dynamic one."""

    graph: str
    onnx: str
    sha256: str
    weights: str
    ports: tuple[str, ...]
    profile: Profile
    flavour: Flavour
    capabilities: tuple[Capability, ...]
    engine: str  # the files to write
    report: str
    workspace: int | None = None
    version_compatible: bool = False
    optimization_level: int | None = None


class Product(msgspec.Struct, frozen=True, kw_only=True):
    """What came out: SHA-256 and size of the engine file, and the seconds that it took."""

    sha256: str
    bytes: int
    seconds: float


def load_tensorrt(flavour: Flavour) -> ModuleType:
    """The TensorRT module; `DeviceError` with the command that installs it."""
    name = MODULES[flavour]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, f"{name}_bindings", f"{name}_libs"):
            raise
        raise DeviceError(
            f"Building {flavour} engines needs the package {name.replace('_', '-')}. "
            f'Install it: pip install "dynamictrl-edge[{_INSTALL[flavour]}]"'
        ) from None
    except (ImportError, OSError) as error:  # its shared libraries are missing or were made for another system
        raise DeviceError(
            f"The package {name.replace('_', '-')} is installed but cannot be loaded: {error}."
        ) from error


def build_engine(job: EngineJob, progress: Progress, trt: ModuleType | None = None) -> tuple[Product, LayerReport]:
    """Compiles the graph of `job`, writes its engine to `job.engine`, and says what the compiler did.

    `progress` is called often while the compiler works.

    Raises:
        BundleError: the graph is damaged, or the compiler refuses it; the text holds the compiler's cause.
        DeviceError: TensorRT is not installed, the GPU it needs is missing, or memory ran out.
        Interrupted: `progress` returned False.
        OSError: the engine cannot be written.
    """
    if trt is None:
        trt = load_tensorrt(job.flavour)
    # A collection while the compiler hands over a message can free an earlier compiler (one that an exception kept alive),
    # whose end waits, for ever, for the lock that is held around messages.
    with uncollected():
        return _build(trt, job, progress)


def _build(trt: ModuleType, job: EngineJob, progress: Progress) -> tuple[Product, LayerReport]:
    start = time.perf_counter()
    log = _make_log(trt)
    if job.version_compatible:
        _lean_runtime(job, trt.Runtime(log))  # before minutes of building
    builder = trt.Builder(log)
    # Ignored by versions that know strongly typed networks only.
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)  # kept until the end: the network's constants point into what it read
    _parse(trt, job, parser, network, log)
    config = _configure(trt, job, builder, network, log, progress)
    digest, size = _serialize(trt, job, builder, network, config, log, progress)
    seconds = time.perf_counter() - start
    return Product(sha256=digest, bytes=size, seconds=seconds), _report(trt, job, log)


def _make_log(trt: ModuleType) -> Any:
    class Log(trt.ILogger):  # type: ignore[name-defined]  # a class of the module at hand
        """Keeps every message: the layer list is one of them."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            self.messages.append(msg)
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(msg)

    return Log()


def _parse(trt: ModuleType, job: EngineJob, parser: Any, network: Any, log: Any) -> None:
    data = Path(job.onnx).read_bytes()
    if hashlib.sha256(data).hexdigest() != job.sha256:
        raise BundleError(f"The bundle file {job.onnx!r} changed while it was being read. Refused.")
    if has(trt, "OnnxParserFlag.NATIVE_INSTANCENORM") and job.version_compatible:
        parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)  # the plugin is not in the lean runtime
    # The second argument only says in which folder external constants lie.
    good = parser.parse(data, str(Path(job.weights) / "graph.onnx"))
    # A loop over num_errors would give the same texts as the log, with less around them.
    if not good:
        raise _refused(job, log, "cannot be read")
    # An empty file, or any text, parses "successfully" into an empty network.
    if network.num_outputs == 0:
        raise BundleError(
            f"The graph {job.graph!r} ({job.onnx}) holds nothing. Export the checkpoint again, or copy the bundle again."
        )
    found = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    if unknown := sorted(set(found) ^ set(job.ports)):
        raise BundleError(
            f"The graph {job.graph!r} ({job.onnx}) and the bundle's manifest name different inputs: {', '.join(unknown)}."
        )
    for name, tensor in found.items():
        shape = tuple(tensor.shape)
        if any(n < 0 for n in shape) and name not in job.profile:
            raise BundleError(f"The graph {job.graph!r}: the dynamic input {name!r} {shape} has no profile.")


def _configure(trt: ModuleType, job: EngineJob, builder: Any, network: Any, log: Any, progress: Progress) -> Any:
    polygraphy = _load_polygraphy(job.flavour)
    profiles = []
    if job.profile:
        profile = polygraphy.profile()
        for name, (least, best, most) in job.profile.items():
            if not all(a <= b <= c for a, b, c in zip(least, best, most, strict=True)):
                raise BundleError(
                    f"The graph {job.graph!r}: the profile of {name!r} is not in order "
                    f"(least {least}, best {best}, most {most})."
                )
            profile.add(name, min=least, opt=best, max=most)
        profiles.append(profile)
    common: dict[str, Any] = {
        "profiles": profiles,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        "progress_monitor": _make_monitor(trt, progress),
    }
    if job.workspace is not None:
        common["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: job.workspace}
    if job.optimization_level is not None:
        common["builder_optimization_level"] = job.optimization_level
    try:
        if job.flavour == "rtx":
            missing = [c for c in job.capabilities if not has(trt, f"ComputeCapability.{capability_name(c)}")]
            if missing:
                names = ", ".join(map(capability_name, missing))
                raise DeviceError(
                    f"This TensorRT-RTX ({trt.__version__}) does not build for {names}. Update tensorrt-rtx."
                )
            config = polygraphy.config(compute_capabilities=list(job.capabilities), **common)(builder, network)
            if has(trt, "BuilderFlag.REQUIRE_USER_ALLOCATION"):
                # All memory from the runtime's arena, as planned; and runs can be recorded as CUDA graphs.
                config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
            return config
        if job.version_compatible:
            common.update(version_compatible=True, exclude_lean_runtime=True)
        return polygraphy.config(**common)(builder, network)
    except polygraphy.exception as error:
        raise _refused(job, log, "cannot be configured", str(error)) from error


class _Polygraphy(NamedTuple):
    """What is used of it: classes of profiles, of configurations, and of its errors."""

    profile: Any
    config: Any
    exception: type[Exception]


def _load_polygraphy(flavour: Flavour) -> _Polygraphy:
    """polygraphy, bound to this flavour: it reads its choice from the environment, once, when it is imported."""
    wanted = flavour == "rtx"
    loaded = sys.modules.get("polygraphy.config")
    if loaded is not None and bool(loaded.USE_TENSORRT_RTX) != wanted:
        for name in [name for name in sys.modules if name.partition(".")[0] == "polygraphy"]:
            del sys.modules[name]
    before = os.environ.get(_CHOICE)
    os.environ[_CHOICE] = "1" if wanted else "0"
    try:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
        from polygraphy.backend.trt import CreateConfig, Profile
        from polygraphy.exception import PolygraphyException
        from polygraphy.logger import G_LOGGER
    except ModuleNotFoundError as error:
        raise DeviceError(
            f"Building engines needs the package {error.name!r}. "
            f'Install it: pip install "dynamictrl-edge[{_INSTALL[flavour]}]"'
        ) from None
    finally:
        if before is None:
            del os.environ[_CHOICE]
        else:
            os.environ[_CHOICE] = before
    G_LOGGER.module_severity = G_LOGGER.CRITICAL + 10  # its errors arrive as exceptions
    return _Polygraphy(Profile, CreateConfigRTX if wanted else CreateConfig, PolygraphyException)


def _make_monitor(trt: ModuleType, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
        """Hands the compiler's phases on, and its question whether to go on."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.totals[phase_name] = num_steps
            progress(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            total = self.totals.get(phase_name, 0)
            return progress(phase_name, min(step + 1, total), total)

        def phase_finish(self, phase_name: str) -> None:
            total = self.totals.pop(phase_name, 0)
            progress(phase_name, total, total)

    return Monitor()


def _serialize(
    trt: ModuleType, job: EngineJob, builder: Any, network: Any, config: Any, log: Any, progress: Progress
) -> tuple[str, int]:
    """Builds into `job.engine`; returns SHA-256 and size. Streams where the version can: no second copy in memory."""
    digest, size = hashlib.sha256(), 0
    failed: list[OSError] = []
    with open(job.engine, "wb") as file:

        def write(data: Any) -> int:
            nonlocal size
            view = memoryview(data)
            try:
                file.write(view)
            except OSError as error:  # must not pass through the compiler
                failed.append(error)
                return 0
            digest.update(view)
            size += view.nbytes
            return view.nbytes

        if has(trt, "Builder.build_serialized_network_to_stream"):
            good = builder.build_serialized_network_to_stream(network, config, _make_writer(trt, write))
        else:
            plan = builder.build_serialized_network(network, config)
            good = plan is not None and write(plan) > 0
        if failed:
            raise failed[0]
        file.flush()
        os.fsync(file.fileno())
    if not progress("", 0, 0):
        raise Interrupted(f"The build of {job.graph!r} was cancelled.")
    if not good or size == 0:
        raise _refused(job, log, "does not compile")
    return digest.hexdigest(), size


def _make_writer(trt: ModuleType, write: Callable[[Any], int]) -> Any:
    if not has(trt, "IStreamWriter"):
        raise RuntimeError("this TensorRT cannot stream")

    class Writer(trt.IStreamWriter):  # type: ignore[name-defined]
        """Takes the engine piece by piece."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: Any) -> int:
            return write(data)

    return Writer()


def _report(trt: ModuleType, job: EngineJob, log: Any) -> LayerReport:
    if job.flavour == "rtx":
        return parse_log(job.graph, log.messages)
    # TensorRT builds on the GPU itself, so the engine can be opened and asked; what it holds, only the build's log tells.
    memory = memory_of(job.graph, log.messages)
    runtime = trt.Runtime(log)
    if job.version_compatible:
        runtime = _lean_runtime(job, runtime)
    engine = runtime.deserialize_cuda_engine(Path(job.engine).read_bytes())
    if engine is None:
        raise _refused(job, log, "was built, but its engine cannot be opened")
    inspector = engine.create_engine_inspector()
    # Without a context that knows the shapes, the inspector leaves types of dynamic tensors out.
    context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    if context is not None:
        for name, (_, best, _) in job.profile.items():
            context.set_input_shape(name, best)
        inspector.execution_context = context
    return parse_inspector_json(job.graph, inspector.get_engine_information(trt.LayerInformationFormat.JSON), **memory)


def _lean_runtime(job: EngineJob, runtime: Any) -> Any:
    """A runtime for engines that are version-compatible and do not carry the lean runtime themselves."""
    library = lean_library()
    found = runtime.load_runtime(str(library)) if library is not None else None
    if found is None:
        raise DeviceError(
            f"The version-compatible engine of {job.graph!r} can be checked only with TensorRT's lean runtime. "
            "Install it, in the version of TensorRT (pip install tensorrt-lean)."
        )
    return found


def _refused(job: EngineJob, log: Any, what: str, also: str = "") -> EdgeError:
    cause = cause_of(log.errors) or cause_of([also]) or "The compiler gave no cause."
    error = DeviceError if _is_about_the_machine(cause) else BundleError
    chips = ", ".join(map(capability_name, job.capabilities)) or "this GPU"
    return error(f"The graph {job.graph!r} {what} for {chips}. The compiler says: {cause}{_advice(cause)}")


def _is_about_the_machine(cause: str) -> bool:
    return _is_about_memory(cause) or "cudaError" in cause or "CUDA" in cause


def _is_about_memory(cause: str) -> bool:
    return any(sign in cause for sign in ("OutOfMemory", "out of memory", "workspace limit"))


def _advice(cause: str) -> str:
    if "HW-specific datatypes" in cause or ("Turing" in cause and "not supported" in cause):
        return " Export the bundle in a precision that all targets have, or build for fewer targets."
    if "external weights" in cause or "Failed to open file" in cause:
        return " Copy the bundle again, or export the checkpoint again."
    if _is_about_memory(cause):
        return " Build for smaller clips (--size) or smaller tiles (--tile), or raise --workspace."
    return ""
