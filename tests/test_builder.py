"""One graph, one real compiler: engines come out, and every refusal says why in words that lead somewhere."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs the extra 'build'")

from onnx import TensorProto, helper, numpy_helper

from dynamictrl_edge.bundle.errors import BundleError, DeviceError, EdgeError, Interrupted
from dynamictrl_edge.bundle.tensors import sha256_of
from dynamictrl_edge.engines import builder
from dynamictrl_edge.engines.builder import EngineJob, Product, build_engine, has, load_tensorrt
from dynamictrl_edge.engines.report import LayerReport
from tests.engine_samples import needs_rtx

PROFILE = {"x": ((1, 8), (4, 8), (8, 8))}


def linear(width: int = 8, op: str = "MatMul", kind: int = TensorProto.FLOAT16, batch: int | str = "N") -> Any:
    """A graph with one node: x [N, 8] and a weight."""
    weight = numpy_helper.from_array(np.ones((width, 8), np.float16), "w")
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"])],
        "g",
        [value("x", kind, [batch, 8])],
        [value("y", kind, [batch, 8])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def save(model: Any, folder: Path) -> Path:
    path = folder / "graph.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


def job(path: Path, **changes: Any) -> EngineJob:
    values: dict[str, Any] = {
        "graph": "stem",
        "onnx": str(path),
        "sha256": sha256_of(path),
        "weights": str(path.parent),
        "ports": ("x",),
        "profile": PROFILE,
        "flavour": "rtx",
        "capabilities": ((8, 6), (8, 9)),
        "engine": str(path.parent / "stem.engine"),
        "report": str(path.parent / "stem.report.json"),
    }
    return EngineJob(**{**values, **changes})


def build(path: Path, **changes: Any) -> tuple[Product, LayerReport]:
    return build_engine(job(path, **changes), lambda phase, done, total: True)


def refusal(path: Path, kind: type[EdgeError] = BundleError, **changes: Any) -> str:
    with pytest.raises(kind) as caught:
        build(path, **changes)
    text = str(caught.value)
    assert "cudaError" not in text and "/_src/" not in text and "CUDA initialization" not in text
    return text


pytestmark = needs_rtx


def test_an_engine_and_what_the_compiler_did(tmp_path: Path) -> None:
    product, report = build(save(linear(), tmp_path))
    engine = tmp_path / "stem.engine"
    assert (product.sha256, product.bytes) == (sha256_of(engine), engine.stat().st_size)
    assert engine.read_bytes()[:4] == b"vtrt"
    assert report.graph == "stem"
    assert len(report.gemms) == 1


def test_a_workspace_bound_is_kept_to(tmp_path: Path) -> None:
    """The compiler wants more than a kilobyte of scratch memory for a convolution of this size."""
    value, weight = helper.make_tensor_value_info, np.ones((64, 64, 3, 3, 3), np.float16)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["h"], pads=[1] * 6),
            helper.make_node("Conv", ["h", "w"], ["y"], pads=[1] * 6),
        ],
        "g",
        [value("x", TensorProto.FLOAT16, [1, 64, 8, 64, 64])],
        [value("y", TensorProto.FLOAT16, [1, 64, 8, 64, 64])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = save(model, tmp_path)
    _, report = build(path, profile={}, workspace=10**9)
    assert report.activation_bytes > 1024
    text = refusal(path, DeviceError, profile={}, workspace=1024)
    assert "workspace limit" in text and "raise --workspace" in text


def test_cancelling_ends_the_build(tmp_path: Path) -> None:
    calls = []

    def progress(phase: str, done: int, total: int) -> bool:
        calls.append(phase)
        return len(calls) < 5

    with pytest.raises(Interrupted):
        build_engine(job(save(linear(), tmp_path)), progress)
    assert len(calls) < 100


def test_a_full_disk(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError, match="No space left"):
        build(save(linear(), tmp_path), engine="/dev/full")


@pytest.mark.parametrize(("data", "words"), [(b"", "holds nothing"), (b"some text", "holds nothing|cannot be read")])
def test_what_is_no_graph(tmp_path: Path, data: bytes, words: str) -> None:
    import re

    assert re.search(words, refusal(save(data, tmp_path)))


def test_a_graph_that_changed_since_it_was_hashed(tmp_path: Path) -> None:
    assert "changed while it was being read" in refusal(save(linear(), tmp_path), sha256="0" * 64)


def test_an_operator_that_does_not_exist(tmp_path: Path) -> None:
    text = refusal(save(linear(op="Sharpen"), tmp_path))
    assert "'stem' cannot be read for SM86, SM89" in text
    assert "Sharpen" in text or "Plugin not found" in text


def test_types_that_do_not_go_together(tmp_path: Path) -> None:
    text = refusal(save(linear(kind=TensorProto.FLOAT), tmp_path))
    assert "must have same input types" in text


def test_shapes_that_do_not_go_together(tmp_path: Path) -> None:
    assert "must match" in refusal(save(linear(width=9), tmp_path))


def test_missing_constants_are_named(tmp_path: Path) -> None:
    model = linear()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "gone.safetensors"), ("offset", "0"), ("length", "128")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    path = save(model, tmp_path)
    text = refusal(path)
    assert "gone.safetensors" in text and "Copy the bundle again" in text
    (tmp_path / "gone.safetensors").write_bytes(b"\0" * 60)
    assert "out of range" in refusal(path)
    (tmp_path / "gone.safetensors").write_bytes(np.ones((8, 8), np.float16).tobytes())
    build(path)


def test_a_profile_out_of_order(tmp_path: Path) -> None:
    text = refusal(save(linear(), tmp_path), profile={"x": ((5, 8), (4, 8), (8, 8))})
    assert "'x'" in text and "not in order" in text


def test_a_dynamic_input_without_profile_is_refused_although_polygraphy_would_guess(tmp_path: Path) -> None:
    assert "'x' (-1, 8) has no profile" in refusal(save(linear(), tmp_path), profile={})


@pytest.mark.parametrize("was", [True, False])
def test_no_compiler_of_before_is_freed_inside_a_message(
    was: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end would wait for the lock that is held around the message."""
    collecting, real = [], builder._make_log

    def watched(trt: Any) -> Any:
        log = real(trt)

        class Watched(type(log)):  # type: ignore[misc]
            def log(self, severity: Any, msg: str) -> None:
                collecting.append(gc.isenabled())
                super().log(severity, msg)

        return Watched()

    monkeypatch.setattr(builder, "_make_log", watched)
    try:
        (gc.enable if was else gc.disable)()
        build(save(linear(), tmp_path))
        refusal(save(linear(), tmp_path), profile={})
        assert gc.isenabled() == was
    finally:
        gc.enable()
    assert collecting and not any(collecting)


def test_a_profile_that_contradicts_the_graph(tmp_path: Path) -> None:
    text = refusal(save(linear(), tmp_path), profile={"x": ((1, 9), (4, 9), (8, 9))})
    assert "x" in text and "8" in text and "9" in text


def test_inputs_that_the_manifest_does_not_name(tmp_path: Path) -> None:
    assert "different inputs: noise, x" in refusal(save(linear(), tmp_path), ports=("noise",))


def test_a_type_that_a_target_lacks(tmp_path: Path) -> None:
    model = linear(kind=TensorProto.BFLOAT16)
    model.graph.initializer[0].CopyFrom(helper.make_tensor("w", TensorProto.BFLOAT16, [8, 8], [1.0] * 64))
    path = save(model, tmp_path)
    build(path)
    text = refusal(path, capabilities=((7, 5), (8, 9)))
    assert "sm75" in text and "precision that all targets have" in text


def test_fp8_on_ampere(tmp_path: Path) -> None:
    scale = numpy_helper.from_array(np.float16(0.1), "s")
    zero = helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], [0.0])
    model = linear()
    graph = model.graph
    del graph.node[:]
    graph.initializer.extend([scale, zero])
    graph.node.extend(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
            helper.make_node("QuantizeLinear", ["w", "s", "z"], ["wq"]),
            helper.make_node("DequantizeLinear", ["wq", "s", "z"], ["wd"]),
            helper.make_node("MatMul", ["xd", "wd"], ["y"]),
        ]
    )
    path = save(model, tmp_path)
    build(path, capabilities=((8, 9),))
    assert "fp8_e4m3" in refusal(path, capabilities=((8, 6),))


def test_a_capability_that_this_version_does_not_build_for(tmp_path: Path) -> None:
    text = refusal(save(linear(), tmp_path), DeviceError, capabilities=((9, 0),))
    assert "does not build for SM90" in text and "Update tensorrt-rtx" in text


def test_tensorrt_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(builder.MODULES, "tensorrt", "tensorrt_that_is_not_there")
    with pytest.raises(DeviceError, match=r'pip install "dynamictrl-edge\[build,tensorrt\]"'):
        load_tensorrt("tensorrt")


def test_polygraphy_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "polygraphy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    with pytest.raises(DeviceError, match=r"polygraphy.*pip install"):
        build(save(linear(), tmp_path))


def test_has_looks_into_classes() -> None:
    trt = load_tensorrt("rtx")
    assert has(trt, "Builder.build_serialized_network_to_stream") and has(trt, "ComputeCapability.SM89")
    assert not has(trt, "Builder.platform_has_fast_fp16") and not has(trt, "IInt8Calibrator.anything")
