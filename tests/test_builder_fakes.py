"""The builder with every TensorRT version: it runs through, makes no call that the version lacks, and says what went wrong.

The versions are stand-ins made from their recorded surface (`trt_fakes`), so nothing here says that they compile.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("onnx", reason="needs the extra 'build'")
pytest.importorskip("polygraphy", reason="needs the extra 'build'")

from onnx import TensorProto, helper

from dynamictrl_edge.bundle.errors import BundleError, DeviceError, EdgeError, Interrupted
from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.bundle.tensors import sha256_of
from dynamictrl_edge.engines import builder
from dynamictrl_edge.engines.build import BuildPlan, build_set
from dynamictrl_edge.engines.builder import EngineJob, Product, build_engine
from dynamictrl_edge.engines.engine_set import BuildOptions
from dynamictrl_edge.engines.profiles import default_size
from dynamictrl_edge.engines.report import LayerReport, read_report
from dynamictrl_edge.engines.targets import find_target
from dynamictrl_edge.engines.worker import Answer
from tests.conftest import Export
from tests.engine_samples import SMALL, SMALL_TILE, some_graphs
from tests.trt_fake_compiler import Faults, calls, fake_tensorrt, install
from tests.trt_fakes import FakeModule
from tests.trt_snapshot import BUILDERS, snapshot

OLD, NEW, RTX = "tensorrt-10.3.0", "tensorrt-11.4.0.106", "tensorrt_rtx-1.7.1.116"
SDK = tuple(version for version in BUILDERS if version != RTX)
CHIPS = ((7, 5), (8, 9))
PROFILE = {"x": ((1, 1, 64), (1, 8, 64), (2, 16, 64))}
Make = Callable[..., FakeModule]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """`fake(version, **faults)` is what polygraphy and the builder import from then on."""

    def make(version: str, **faults: Any) -> FakeModule:
        module = fake_tensorrt(version, Faults(**faults))
        forget_polygraphy()  # it chooses its TensorRT once, when it is imported
        monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "0")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return module

    yield make
    forget_polygraphy()


def forget_polygraphy() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "polygraphy"]:
        del sys.modules[name]


def attention(domain: str = "", **changes: Any) -> Any:
    """x [B, N, 64] and a weight: one product with the weight, one attention; the first operator is of `domain`."""
    axes, half = ["B", "N", 64], TensorProto.FLOAT16
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("MatMul", ["x", "q_weight"], ["q"], "linear", domain=domain),
        helper.make_node("Transpose", ["x"], ["k"], "turn", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "k"], ["scores"], "scores"),
        helper.make_node("Softmax", ["scores"], ["weights"], "softmax", axis=-1),
        helper.make_node("MatMul", ["weights", "x"], ["y"], "mix"),
    ]
    inputs = [value("x", half, axes), value("q_weight", half, [64, 64])]
    graph = helper.make_graph(nodes, "block", inputs, [value("y", half, axes)], **changes)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def job_for(version: str, folder: Path, data: bytes | None = None, **changes: Any) -> EngineJob:
    path = folder / "block.onnx"
    path.write_bytes(attention().SerializeToString() if data is None else data)
    values: dict[str, Any] = {
        "graph": "block",
        "onnx": str(path),
        "sha256": sha256_of(path),
        "weights": str(folder),
        "ports": ("x", "q_weight"),
        "profile": PROFILE,
        "flavour": "rtx" if version == RTX else "tensorrt",
        "capabilities": CHIPS if version == RTX else ((8, 7),),
        "engine": str(folder / "block.engine"),
        "report": str(folder / "block.report.json"),
    }
    return EngineJob(**(values | changes))


def build(version: str, folder: Path, data: bytes | None = None, **changes: Any) -> tuple[Product, LayerReport]:
    return build_engine(job_for(version, folder, data, **changes), lambda phase, done, total: True)


# What is called


@pytest.mark.parametrize("version", BUILDERS)
def test_every_version_builds_a_graph(version: str, fake: Make, tmp_path: Path) -> None:
    trt = fake(version)
    seen: list[tuple[str, int, int]] = []

    def progress(phase: str, done: int, total: int) -> bool:
        seen.append((phase, done, total))
        return True

    product, report = build_engine(job_for(version, tmp_path), progress)
    engine = tmp_path / "block.engine"
    assert (product.bytes, product.sha256) == (engine.stat().st_size, sha256_of(engine)) and product.bytes > 0
    assert (report.graph, len(report.gemms), report.fused_attention) == ("block", 1, 1)
    assert report.activation_bytes == Faults().activation
    assert ("Building Engine", 0, 3) in seen and ("Building Engine", 3, 3) in seen
    (set_for_x,) = [c for c in trt.called("IOptimizationProfile.set_shape") if c["input"] == "x"]
    assert tuple(tuple(set_for_x[key]) for key in ("min", "opt", "max")) == PROFILE["x"]
    assert [c["value"].name for c in trt.called("IBuilderConfig.profiling_verbosity")] == ["DETAILED"]


@pytest.mark.parametrize("version", BUILDERS)
def test_networks_are_strongly_typed_by_the_number_that_the_version_has(
    version: str, fake: Make, tmp_path: Path
) -> None:
    trt = fake(version)
    build(version, tmp_path)
    number = snapshot(version).names["NetworkDefinitionCreationFlag"].numbers["STRONGLY_TYPED"]
    assert [c["flags"] for c in trt.called("Builder.create_network")] == [1 << number]
    assert number == (1 if version.startswith("tensorrt-10") else 0)


@pytest.mark.parametrize("version", BUILDERS)
def test_engines_are_streamed_where_the_version_can(version: str, fake: Make, tmp_path: Path) -> None:
    trt = fake(version)
    build(version, tmp_path)
    streamed, whole = (len(trt.called(f"Builder.build_serialized_network{end}")) for end in ("_to_stream", ""))
    assert (streamed, whole) == ((0, 1) if version == OLD else (1, 0))


@pytest.mark.parametrize("version", BUILDERS)
def test_no_precision_is_asked_for_but_the_graphs_own(version: str, fake: Make, tmp_path: Path) -> None:
    trt = fake(version)
    build(version, tmp_path)
    asked = [call["flag"] for call in trt.called("IBuilderConfig.set_flag")]
    # Who gives the memory is no precision, and RTX alone can be asked.
    assert asked == ([trt.BuilderFlag.REQUIRE_USER_ALLOCATION] if version.startswith("tensorrt_rtx") else [])


@pytest.mark.parametrize("version", BUILDERS)
def test_workspace_and_optimization_level_arrive(version: str, fake: Make, tmp_path: Path) -> None:
    trt = fake(version)
    build(version, tmp_path, workspace=1 << 30, optimization_level=2)
    (pool,) = trt.called("IBuilderConfig.set_memory_pool_limit")
    assert (pool["pool"].name, pool["pool_size"]) == ("WORKSPACE", 1 << 30)
    assert trt.called("IBuilderConfig.builder_optimization_level") == [{"value": 2}]


@pytest.mark.parametrize("version", BUILDERS)
def test_capabilities_are_set_for_rtx_alone(version: str, fake: Make, tmp_path: Path) -> None:
    trt = fake(version)
    build(version, tmp_path)
    count = [c["value"] for c in trt.called("IBuilderConfig.num_compute_capabilities")]
    chosen = [(c["index"], c["compute_capability"].name) for c in trt.called("IBuilderConfig.set_compute_capability")]
    assert (count, chosen) == (([2], [(0, "SM75"), (1, "SM89")]) if version == RTX else ([], []))


@pytest.fixture
def lean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """TensorRT's lean runtime is installed."""
    library = tmp_path / "libnvinfer_lean.so.10"
    library.touch()
    monkeypatch.setattr(builder, "lean_library", lambda: library)
    return library


@pytest.mark.parametrize("version", SDK)
def test_version_compatible_engines_have_the_flags_of_the_version(
    version: str, fake: Make, tmp_path: Path, lean: Path
) -> None:
    trt = fake(version)
    build(version, tmp_path, version_compatible=True)
    flags = {c["flag"].name: int(c["flag"]) for c in trt.called("IBuilderConfig.set_flag")}
    assert flags.keys() <= {"VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"}
    assert flags["VERSION_COMPATIBLE"] == (12 if version == NEW else 13)
    assert [c["value"] for c in trt.called("Runtime.engine_host_code_allowed")] in ([True], [])


@pytest.mark.parametrize("version", BUILDERS)
def test_the_report_tells_what_the_engine_holds(version: str, fake: Make, tmp_path: Path) -> None:
    """The engine's `streamable_weights_size` is 0 where weight streaming is off; the log has the figure in every version."""
    fake(version, weights=9_000_000)
    _, report = build(version, tmp_path)
    assert (report.activation_bytes, report.weights_bytes) == (Faults().activation, 9_000_000)


@pytest.mark.parametrize("version", SDK)
def test_an_engine_without_the_lean_runtime_is_reported_too(
    version: str, fake: Make, tmp_path: Path, lean: Path
) -> None:
    """NVIDIA's manual: such a plan needs the lean runtime of its version, loaded by `Runtime.load_runtime`."""
    fake(version, needs_lean=True)
    _, report = build(version, tmp_path, version_compatible=True)
    assert report.fused_attention == 1


@pytest.mark.parametrize("version", SDK)
def test_without_a_lean_runtime_a_version_compatible_engine_cannot_be_checked(
    version: str, fake: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "lean_library", lambda: None)
    fake(version, needs_lean=True)
    assert "pip install tensorrt-lean" in refusal(DeviceError, version, tmp_path, version_compatible=True)


# What is said when it goes wrong


def refusal(kind: type[EdgeError], version: str, folder: Path, data: bytes | None = None, **changes: Any) -> str:
    with pytest.raises(kind) as caught:
        build(version, folder, data, **changes)
    text = str(caught.value)
    assert "cudaError" not in text and "/_src/" not in text
    assert text[0].isupper() and text.rstrip()[-1] in ".!?)" and "\n" not in text
    return text


@pytest.mark.parametrize("version", BUILDERS)
def test_the_compilers_cause_is_told(version: str, fake: Make, tmp_path: Path) -> None:
    fake(version, build_error="Error Code 1: Myelin ([pass.cpp:1500] Cannot compile operation 'node_7'.)")
    text = refusal(BundleError, version, tmp_path)
    assert "'block' does not compile" in text and "Cannot compile operation 'node_7'" in text
    assert ("SM75, SM89" if version == RTX else "SM87") in text


@pytest.mark.parametrize("version", BUILDERS)
def test_the_parsers_cause_is_told(version: str, fake: Make, tmp_path: Path) -> None:
    fake(version, parse_error="In node 3 with name: fancy and operator: Fancy (checkUnique): UNSUPPORTED_NODE: false")
    text = refusal(BundleError, version, tmp_path)
    assert "'block' cannot be read" in text and "fancy" in text and "UNSUPPORTED_NODE" in text


@pytest.mark.parametrize("version", [OLD, NEW, RTX])
def test_a_type_that_the_gpu_lacks(version: str, fake: Make, tmp_path: Path) -> None:
    why = "Cannot compile for target(s) sm75, because the model contains HW-specific datatypes: fp8_e4m3"
    fake(
        version,
        build_error=f"Error Code 1: Myelin ([pass.cpp:1500: run_passes] {why}. In compileGraph at /_src/a.cpp:7)",
    )
    text = refusal(BundleError, version, tmp_path)
    assert why in text and "compileGraph" not in text and "precision" in text


@pytest.mark.parametrize("version", [OLD, NEW, RTX])
def test_no_memory_is_the_machines_fault(version: str, fake: Make, tmp_path: Path) -> None:
    fake(version, build_error="Error Code 2: OutOfMemory (Requested size was 68719476736 bytes.)")
    assert "68719476736 bytes" in refusal(DeviceError, version, tmp_path, workspace=1 << 20)


@pytest.mark.parametrize("version", BUILDERS)
def test_a_cancelled_build_is_interrupted(version: str, fake: Make, tmp_path: Path) -> None:
    fake(version, steps=1000)
    asked = 0

    def progress(phase: str, done: int, total: int) -> bool:
        nonlocal asked
        asked += 1
        return done < 5

    with pytest.raises(Interrupted, match="'block'"):
        build_engine(job_for(version, tmp_path), lambda *a: progress(*a) and asked < 8)
    assert asked < 20


FILES = {
    "an empty file": (b"", "holds nothing"),
    "some text": (b"Not Found", "Failed to parse"),
    "a truncated file": (attention().SerializeToString()[:-40], "Failed to parse"),
    "another maker's operator": (attention(domain="com.example").SerializeToString(), "Plugin not found"),
}


@pytest.mark.parametrize("version", [OLD, NEW, RTX])
@pytest.mark.parametrize(("data", "words"), FILES.values(), ids=FILES)
def test_a_damaged_graph_is_refused(version: str, data: bytes, words: str, fake: Make, tmp_path: Path) -> None:
    fake(version)
    text = refusal(BundleError, version, tmp_path, data)
    assert "'block'" in text and words in text


@pytest.mark.parametrize("version", [OLD, NEW, RTX])
def test_constants_that_are_missing(version: str, fake: Make, tmp_path: Path) -> None:
    fake(version)
    tensor = TensorProto(name="c", data_type=TensorProto.FLOAT16, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="gone.safetensors")
    data = attention(initializer=[tensor]).SerializeToString()
    text = refusal(BundleError, version, tmp_path, data, weights=str(tmp_path / "weights"))
    assert str(tmp_path / "weights" / "gone.safetensors") in text and "Copy the bundle again" in text


@pytest.mark.parametrize("version", [OLD, NEW, RTX])
def test_profiles_are_complete_and_in_order(version: str, fake: Make, tmp_path: Path) -> None:
    trt = fake(version)
    assert "'x' (-1, -1, 64) has no profile" in refusal(BundleError, version, tmp_path, profile={})
    wrong = {"x": ((1, 9, 64), (1, 8, 64), (2, 16, 64))}
    assert "'x' is not in order" in refusal(BundleError, version, tmp_path, profile=wrong)
    flat = {"x": ((1, 64), (8, 64), (16, 64))}
    assert "'block'" in refusal(BundleError, version, tmp_path, profile=flat)
    unknown = {**PROFILE, "z": ((1,), (1,), (1,))}
    assert "z" in refusal(BundleError, version, tmp_path, profile=unknown)
    assert not list(tmp_path.glob("*.report.json")) and trt.called("Runtime.deserialize_cuda_engine") == []


@pytest.mark.parametrize("version", [OLD, RTX])
def test_a_graph_that_is_not_the_manifests(version: str, fake: Make, tmp_path: Path) -> None:
    fake(version)
    assert "changed while it was being read" in refusal(BundleError, version, tmp_path, sha256="0" * 64)
    assert "q_weight" in refusal(BundleError, version, tmp_path, ports=("x",))


def test_a_capability_that_this_rtx_version_does_not_know(fake: Make, tmp_path: Path) -> None:
    fake(RTX)
    text = refusal(DeviceError, RTX, tmp_path, capabilities=((8, 9), (9, 0)))
    assert "1.7.1.116" in text and "SM90" in text and "SM89" not in text


@pytest.mark.parametrize("version", SDK)
def test_an_engine_that_cannot_be_opened(version: str, fake: Make, tmp_path: Path) -> None:
    fake(version, unopened="Error Code 6: API Usage Error (The engine plan file is not compatible with this version)")
    text = refusal(BundleError, version, tmp_path)
    assert "cannot be opened" in text and "not compatible with this version" in text


@pytest.mark.parametrize("padding", [0, 1 << 16])
@pytest.mark.parametrize("version", [OLD, NEW, RTX])
def test_a_full_disk_is_told_as_such(version: str, padding: int, fake: Make, tmp_path: Path) -> None:
    """While it is written, and when the last bytes leave the buffer."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    fake(version, padding=padding)
    with pytest.raises(OSError, match="No space left"):
        build(version, tmp_path, engine="/dev/full")


# The process that builds


def work(version: str, folder: Path, data: bytes | None = None, **changes: Any) -> subprocess.Popen[bytes]:
    """A worker with a job, its input still open."""
    child = subprocess.Popen(
        [sys.executable, "-m", "dynamictrl_edge.engines.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(folder / "fake")},
    )
    assert child.stdin is not None
    child.stdin.write(msgspec.json.encode(job_for(version, folder, data, **changes)) + b"\n")
    child.stdin.flush()
    return child


def last_word(child: subprocess.Popen[bytes]) -> Answer | None:
    assert child.stdout is not None
    answers = [msgspec.json.decode(line, type=Answer) for line in child.stdout]
    child.wait(30)
    for pipe in (child.stdin, child.stdout, child.stderr):
        assert pipe is not None
        pipe.close()
    return next((a for a in answers if a.product is not None or a.failure is not None), None)


@pytest.mark.parametrize("version", BUILDERS)
def test_a_process_builds(version: str, tmp_path: Path) -> None:
    install(tmp_path / "fake", version)
    answer = last_word(work(version, tmp_path))
    assert answer is not None and answer.failure is None and answer.product is not None
    assert answer.product.bytes == (tmp_path / "block.engine").stat().st_size
    assert read_report(tmp_path / "block.report.json").fused_attention == 1
    names = [name for name, _ in calls(tmp_path / "fake")]
    assert names[0] == "ILogger.__init__" and "OnnxParser.parse" in names
    assert all(snapshot(version).exists(name) for name in names)


@pytest.mark.parametrize(
    ("faults", "code", "words"),
    [
        ({"build_error": "Error Code 9: Internal Error (unlucky)"}, 4, "unlucky"),
        ({"build_error": "Error Code 2: OutOfMemory (Requested size was 5 bytes.)"}, 5, "OutOfMemory"),
    ],
)
def test_a_process_answers_with_the_exit_code(faults: dict[str, Any], code: int, words: str, tmp_path: Path) -> None:
    install(tmp_path / "fake", OLD, **faults)
    answer = last_word(work(OLD, tmp_path))
    assert answer is not None and answer.failure is not None
    assert answer.failure.exit_code == code and words in answer.failure.text


def test_a_process_that_crashes_gives_no_answer(tmp_path: Path) -> None:
    install(tmp_path / "fake", NEW, crash=True)
    child = work(NEW, tmp_path)
    assert last_word(child) is None
    assert child.returncode == -signal.SIGSEGV


def test_a_process_stops_when_it_is_told(tmp_path: Path) -> None:
    install(tmp_path / "fake", NEW, steps=10000, seconds=0.01)
    child = work(NEW, tmp_path)
    assert child.stdout is not None
    assert b"Building Engine" in child.stdout.readline()
    child.terminate()
    answer = last_word(child)
    assert answer is not None and answer.failure is not None and answer.failure.exit_code == 130


def test_the_text_of_an_answer_is_json_on_one_line(tmp_path: Path) -> None:
    install(tmp_path / "fake", OLD, build_error="Error Code 9: Internal Error (first\nsecond\tthird)")
    child = work(OLD, tmp_path)
    assert child.stdout is not None
    line = child.stdout.readlines()[-1]
    last_word(child)
    assert re.search(r"first.*second", json.loads(line)["failure"]["text"])


# A whole set


def plan_for_orin(bundle: Path) -> BuildPlan:
    return BuildPlan(
        targets=(find_target("jetson-orin"),),
        flavour="tensorrt",
        library_version="10.3.0",
        platform="linux-aarch64",
        options=BuildOptions(sizes=(default_size(Bundle(bundle).manifest),), tile=SMALL_TILE),
        activation_budget=None,
    )


@pytest.fixture
def bundle(exported: Export, tmp_path: Path) -> Path:
    return some_graphs(exported("cogvideox15-tiny", "fp16"), tmp_path / "bundle")


def test_a_set_of_jetpack_6s_tensorrt(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(tmp_path / "fake", OLD)
    monkeypatch.setenv("PYTHONPATH", str(fake))
    made = build_set(Bundle(bundle), plan_for_orin(bundle), workers=2)
    assert set(made.fresh) == set(made.engines.engines) == set(SMALL)
    assert (made.engines.flavour, made.engines.capabilities) == ("tensorrt", ((8, 7),))
    assert made.engines.engines["block"].fused_attention == 1
    names = [name for name, _ in calls(fake)]
    assert names.count("Builder.build_serialized_network") == len(SMALL)
    assert build_set(Bundle(bundle), plan_for_orin(bundle)).fresh == ()


def test_a_set_whose_compiler_crashes(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(install(tmp_path / "fake", OLD, crash=True)))
    with pytest.raises(DeviceError, match="killed by signal 11") as caught:
        build_set(Bundle(bundle), plan_for_orin(bundle), workers=2)
    assert "trtexec" in str(caught.value)
    assert not [path for path in (bundle / "engines").iterdir() if not path.name.startswith(".")]


def test_a_set_whose_attention_is_not_fused(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(install(tmp_path / "fake", OLD, attention=False)))
    with pytest.raises(BundleError, match="Attention is not fused"):
        build_set(Bundle(bundle), plan_for_orin(bundle))
