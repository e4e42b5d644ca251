"""The stand-ins for TensorRT are as strict as what they stand for."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from typing import Any

import pytest

from tests.trt_fake_compiler import fake_tensorrt
from tests.trt_fakes import FakeModule, fake_module
from tests.trt_snapshot import ALL, BUILDERS, snapshot

RTX = "tensorrt_rtx-1.7.1.116"
HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None and version("tensorrt_rtx") == RTX.partition("-")[2]


@pytest.mark.parametrize("name", ALL)
def test_a_fake_has_every_recorded_name(name: str) -> None:
    module = fake_module(name)
    missing = []
    for key, entry in snapshot(name).names.items():
        owner: Any = module
        for part in key.split("."):
            owner = getattr(owner, part, None)
        if entry.kind in ("class", "enum"):
            missing += [f"{key}.{member}" for member in (*entry.members, *entry.numbers) if not hasattr(owner, member)]
        elif owner is None and entry.kind != "submodule":
            missing.append(key)
    assert missing == []
    assert module.__version__ == snapshot(name).version


@pytest.mark.parametrize("name", ALL)
def test_a_fake_has_nothing_else(name: str) -> None:
    module: Any = fake_module(name)
    elsewhere = {key for other in ALL for key in snapshot(other).names} - snapshot(name).names.keys()
    assert [key for key in elsewhere if "." not in key and hasattr(module, key)] == []
    flags = {flag for other in ALL for flag in snapshot(other).names["BuilderFlag"].numbers}
    assert {flag for flag in flags if hasattr(module.BuilderFlag, flag)} == snapshot(name).names[
        "BuilderFlag"
    ].numbers.keys()


@pytest.mark.parametrize("name", BUILDERS)
def test_members_that_the_version_lacks_can_be_neither_read_nor_set(name: str) -> None:
    trt: Any = fake_tensorrt(name)
    config = trt.Builder(trt.Logger()).create_builder_config()
    for member in ("int8_calibrator", "num_compute_capabilities", "nothing_has_this"):
        if snapshot(name).exists(f"IBuilderConfig.{member}"):
            getattr(config, member)
        else:
            with pytest.raises(AttributeError):
                getattr(config, member)
            with pytest.raises(AttributeError):
                setattr(config, member, None)


def test_calls_are_recorded_with_the_names_of_the_arguments() -> None:
    trt: Any = fake_module("tensorrt-10.3.0")
    logger = trt.Logger()
    trt.Builder(logger).create_network(flags=2)
    assert trt.called("Builder.__init__") == [{"logger": logger}]
    assert trt.calls[-1] == ("Builder.create_network", {"flags": 2})


# Each line runs with the real TensorRT-RTX and with its fake: the same value, or an error of the same kind.
LINES = [
    "trt.BuilderFlag.REFIT",
    "trt.BuilderFlag.FP16",
    "int(trt.BuilderFlag.STRIP_PLAN), trt.BuilderFlag.STRIP_PLAN.name, trt.BuilderFlag.STRIP_PLAN.value",
    "1 << trt.BuilderFlag.REFIT",
    "1 << int(trt.BuilderFlag.REFIT)",
    "trt.BuilderFlag.REFIT == 4",
    "trt.BuilderFlag(4) == trt.BuilderFlag.REFIT",
    "isinstance(trt.BuilderFlag.REFIT, int)",
    "trt.BuilderFlag('REFIT')",
    "sorted(trt.BuilderFlag.__members__)",
    "trt.Logger.Severity is trt.ILogger.Severity, trt.Logger.VERBOSE",
    "trt.float16, trt.float16.itemsize, trt.DataType.HALF == trt.float16",
    "trt.nothing",
    "trt.Builder()",
    "trt.Builder(None)",
    "trt.Builder(logger=log).num_DLA_cores",
    "trt.ITensor()",
    "trt.INetworkDefinition()",
    "trt.OnnxParser(network)",
    "builder.nothing",
    "builder.gpu_allocator",
    "builder.create_network(1.0)",
    "builder.create_network('x')",
    "builder.build_serialized_network(network, None)",
    "builder.build_serialized_network(network)",
    "builder.build_serialized_network(network, config)",
    "config.flags",
    "config.set_flag(4)",
    "config.set_flag(flg=trt.BuilderFlag.REFIT)",
    "config.set_flag(trt.BuilderFlag.REFIT), config.get_flag(trt.BuilderFlag.REFIT), config.flags",
    "config.int8_calibrator",
    "setattr(config, 'nothing', 1)",
    "setattr(config, 'num_optimization_profiles', 1)",
    "setattr(config, 'profiling_verbosity', 'DETAILED')",
    "setattr(config, 'builder_optimization_level', '3')",
    "setattr(config, 'profiling_verbosity', trt.ProfilingVerbosity.DETAILED), config.profiling_verbosity",
    "config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1.5)",
    "config.set_compute_capability(trt.ComputeCapability.SM75, 0)",
    "setattr(config, 'num_compute_capabilities', 1), config.set_compute_capability(trt.ComputeCapability.SM75, 0)",
    "trt.ComputeCapability.SM90",
    "profile.set_shape('x', (1, 2), (1, 2))",
    "profile.set_shape('x', min=(1, 2), opt=[3, 4], max=(5, 6)), profile.get_shape('x'), bool(profile)",
    "profile.set_shape('x', (9, 2), (1, 2), (1, 2)), bool(profile), config.add_optimization_profile(profile)",
    "network.num_inputs, network.num_layers, len(network), list(network), network.get_input(0)",
    "network.nothing",
    "trt.Dims((1, 2)), tuple(trt.Dims((1, 2))), trt.Dims((1, 2)) == (1, 2)",
    "parser.parse(b''), network.num_outputs, parser.num_errors",
    "parser.parse(b'some text'), network.num_outputs",
    "parser.parse('some text')",
    "parser.parse_from_file('/nothing/here.onnx')",
    "type('L', (trt.ILogger,), {'__init__': lambda self: None})()",
    "type('L', (trt.ILogger,), {'log': lambda self, severity, text: None})().nothing",
    "trt.init_libnvinfer_plugins(log, '')",
    "trt.Runtime(log).engine_host_code_allowed",
    "trt.Runtime(log).deserialize_cuda_engine(b'not an engine')",
]


def outcome(trt: Any, line: str) -> str:
    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            pass

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network()
    names = {"trt": trt, "log": log, "builder": builder, "network": network, "parser": trt.OnnxParser(network, log)}
    names.update(config=builder.create_builder_config(), profile=builder.create_optimization_profile())
    try:
        return repr(eval(line, names))  # noqa: S307
    except Exception as error:
        return type(error).__name__


@pytest.mark.skipif(not HAS_RTX, reason="needs TensorRT-RTX in the version that was recorded")
@pytest.mark.parametrize("line", LINES)
def test_the_fake_does_what_tensorrt_rtx_does(line: str) -> None:
    import tensorrt_rtx

    fake: FakeModule = fake_tensorrt(RTX)
    assert outcome(fake, line) == outcome(tensorrt_rtx, line)


@pytest.mark.skipif(not HAS_RTX, reason="needs TensorRT-RTX in the version that was recorded")
def test_the_record_is_of_the_installed_tensorrt_rtx() -> None:
    import tensorrt_rtx

    found = {
        key for key in dir(tensorrt_rtx) if not key.startswith("_") and isinstance(getattr(tensorrt_rtx, key), type)
    }
    recorded = {k for k, entry in snapshot(RTX).names.items() if entry.kind in ("class", "enum") and "." not in k}
    assert recorded <= found
