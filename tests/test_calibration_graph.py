"""The quantized block's graph: exact where it must be, and the same integers in every form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from dynamictrl_edge.bundle.errors import BundleError
from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.calibration.block_graph import LINEARS, SCALED, inputs_of, modulation_graph, observed, quantized
from dynamictrl_edge.calibration.blocks import row_scale
from dynamictrl_edge.calibration.graphs import read_model
from dynamictrl_edge.calibration.grids import FP8, INT8, Grid
from dynamictrl_edge.calibration.measure import spread_steps
from tests.calibration_samples import Arrays, block_inputs, run

ALL = list(LINEARS)


@pytest.fixture(scope="module")
def bundle(bundle15: Path) -> Bundle:
    return Bundle(bundle15)


def scales(arrays: Arrays, seed: int = 1) -> Arrays:
    """A random input scale for every channel of every linear."""
    random = np.random.default_rng(seed)
    return {
        name: np.exp(random.normal(-3, 0.7, arrays[f"{name}_weight"].shape[0])).astype(np.float32) for name in LINEARS
    }


def quantized_inputs(arrays: Arrays, grid: Grid, linears: list[str]) -> Arrays:
    """The inputs of the quantized graph: modulation and weights with `scales` worked in, weights on the grid."""
    made = dict(arrays)
    found = scales(arrays)
    folded = {name: found[name] for name in linears if name not in SCALED}
    if folded:
        made["modulation"] = arrays["modulation"] * row_scale(folded)
    for name in linears:
        weight = arrays[f"{name}_weight"] / found[name][:, None]
        steps = np.abs(weight).max(axis=0) / (grid.limit / 2)  # half of the range: every pair of weights fits
        made[f"{name}_weight"] = grid.encode(grid.rounded(weight / steps))
        made[f"{name}_out_scale"] = (steps / np.float32(grid.unit)).astype(np.float32)
        if name in SCALED:
            made[f"{name}_in_scale"] = found[name]
    return made


def without_rounding(model: onnx.ModelProto) -> onnx.ModelProto:
    """The quantized graph before quantization: quantizers pass values on, weights are float."""
    for port in model.graph.input:
        if port.type.tensor_type.elem_type == TensorProto.INT8:
            port.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.CopyFrom(helper.make_node("Identity", [node.input[0]], node.output))
    return model


@pytest.mark.parametrize("seed", range(3))
def test_folding_is_exact(bundle: Bundle, seed: int) -> None:
    original = read_model(bundle, "block")
    arrays = block_inputs(bundle, seed=seed)
    smoothed = dict(arrays)
    found = scales(arrays, seed)
    smoothed["modulation"] = arrays["modulation"] * row_scale({name: found[name] for name in ("qkv", "ff_in")})
    for name in LINEARS:
        smoothed[f"{name}_weight"] = arrays[f"{name}_weight"] / found[name][:, None]
        smoothed[f"{name}_out_scale"] = np.ones(arrays[f"{name}_weight"].shape[1], np.float32)
        smoothed[f"{name}_in_scale"] = found[name]
    exact, folded = run(original, arrays), run(without_rounding(quantized(original, ALL, "int8")), smoothed)
    for name, value in exact.items():
        assert np.abs(folded[name] - value).max() <= 1e-4 * max(1.0, np.abs(value).max()), name


def test_the_table_is_multiplied_in_the_modulation_graph(bundle: Bundle) -> None:
    config = bundle.manifest.transformer
    feeds = {"time_sinusoid": np.random.default_rng(0).standard_normal((3, config.width)).astype(np.float32)}
    if config.ofs_embed_dim is not None:
        feeds["ofs_sinusoid"] = np.ones((1, config.ofs_embed_dim), np.float32)
    feeds = {**feeds, **bundle.tensors("denoiser"), **bundle.tensors("modulation_00")}
    factors = np.random.default_rng(1).uniform(0.1, 10, (15, config.width)).astype(np.float32)
    plain = run(read_model(bundle, "modulation"), feeds)["table"]
    made = modulation_graph(read_model(bundle, "modulation"))
    onnx.checker.check_model(made, full_check=True)
    np.testing.assert_array_equal(run(made, {**feeds, "row_scale": factors})["table"], plain * factors)


def simulated(arrays: Arrays, model: onnx.ModelProto, grid: Grid, linears: list[str]) -> Arrays:
    """What the quantized graph means, each linear in float64: inputs are taken from the graph that observes itself."""
    made: Arrays = {}
    seen = run(observed(model), arrays)
    found = scales(arrays)
    for name in linears:
        x = seen[f"{name}_in"][0].astype(np.float64)
        values = grid.rounded((x * found[name] / grid.unit).astype(np.float32)).astype(np.float64)
        weight = arrays[f"{name}_weight"] / found[name][:, None]
        steps = (np.abs(weight).max(axis=0) / (grid.limit / 2)).astype(np.float64)
        product = values @ grid.rounded(weight / steps.astype(np.float32)).astype(np.float64)
        made[name] = product * steps * grid.unit + arrays[f"{name}_bias"]
    return made


def tapped(model: onnx.ModelProto, name: str, form: str) -> onnx.ModelProto:
    """The graph with the result of one linear, bias included, as a further output."""
    bias = f"{name}_bias"
    node = next(node for node in model.graph.node if bias in node.input)
    assert node.op_type == ("MatMulIntegerToFloat" if form == "cpu" else "Add")
    model.graph.node.append(helper.make_node("Identity", [node.output[0]], ["tapped"]))
    model.graph.output.append(helper.make_tensor_value_info("tapped", TensorProto.FLOAT, None))
    return model


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("form", ["portable", "cpu"])
def test_every_integer_product_is_the_one_computed_in_float64(bundle: Bundle, name: str, form: str) -> None:
    base = read_model(bundle, "block")
    arrays = block_inputs(bundle)
    expected = simulated(arrays, base, INT8, [name])[name]
    model = tapped(quantized(base, [name], "int8", form), name, form)  # type: ignore[arg-type]
    found = run(model, quantized_inputs(arrays, INT8, [name]))["tapped"][0]
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", LINEARS)
def test_fp8_products_are_those_computed_in_float64(bundle: Bundle, name: str) -> None:
    import onnxruntime

    base = read_model(bundle, "block")
    arrays = block_inputs(bundle)
    expected = simulated(arrays, base, FP8, [name])[name]
    model = tapped(quantized(base, [name], "fp8"), name, "portable")
    inputs = quantized_inputs(arrays, FP8, [name])
    inputs[f"{name}_weight"] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
        inputs[f"{name}_weight"], TensorProto.FLOAT8E4M3FN
    )
    found = run(model, inputs)["tapped"][0]
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_both_forms_of_the_whole_block_agree(bundle: Bundle) -> None:
    inputs = quantized_inputs(block_inputs(bundle), INT8, ALL)
    portable = run(quantized(read_model(bundle, "block"), ALL, "int8"), inputs)
    cpu = run(quantized(read_model(bundle, "block_cpu"), ALL, "int8", "cpu"), inputs)
    for name, value in portable.items():
        noise = np.square(value - cpu[name]).sum() / np.square(value).sum()
        assert noise < 1e-5, name  # attention is computed in another order: an integer here and there is another


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-weights"])
def test_quantizers_have_constant_scales(bundle: Bundle, scheme: str) -> None:
    model = quantized(read_model(bundle, "block"), ALL, scheme)  # type: ignore[arg-type]
    onnx.checker.check_model(model, full_check=True)
    constants = {tensor.name for tensor in model.graph.initializer}
    quantizers = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(quantizers) == (4 if scheme == "int8-weights" else 12)
    assert all(set(node.input[1:]) <= constants for node in quantizers)
    narrow = TensorProto.FLOAT8E4M3FN if scheme == "fp8" else TensorProto.INT8
    types = {port.name: port.type.tensor_type.elem_type for port in model.graph.input}
    assert all(types[f"{name}_weight"] == narrow for name in LINEARS)


def test_some_linears_stay_as_they_were(bundle: Bundle) -> None:
    base = read_model(bundle, "block")
    assert quantized(base, [], "int8") == base
    model = quantized(base, ["out"], "int8")
    ports = {port.name: port.type.tensor_type.elem_type for port in model.graph.input}
    assert [name for name in LINEARS if ports[f"{name}_weight"] == TensorProto.INT8] == ["out"]
    assert {"out_in_scale", "out_out_scale"} == set(ports) - {port.name for port in base.graph.input}


def test_what_goes_into_the_linears_is_shown(bundle: Bundle) -> None:
    base, arrays = read_model(bundle, "block"), block_inputs(bundle)
    found = run(observed(base), arrays)
    exact = run(base, arrays)
    width = bundle.manifest.transformer.width
    for name in LINEARS:
        assert found[f"{name}_in"].shape == (1, 31, 4 * width if name == "ff_out" else width)
    for name, value in exact.items():
        np.testing.assert_array_equal(found[name], value)
    assert set(inputs_of(base)) == set(LINEARS)


def test_a_graph_without_the_linears_is_refused(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="no matrix product for qkv, out"):
        quantized(read_model(bundle, "stem"), ALL, "int8")


def test_steps_are_spread() -> None:
    assert spread_steps(10, 5) == (0, 2, 4, 7, 9)
    assert spread_steps(3, 5) == (0, 1, 2)
    assert spread_steps(1, 4) == (0,)
