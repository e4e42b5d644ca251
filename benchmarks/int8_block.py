"""The block quantized in the unit-scale form, with made-up scales: for figures about compiler and GPU, not for pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["quantize"]


def quantize(model: Any, precision: str = "int8") -> Any:
    """Quantizes the block's matrix products with unit scales, in place, and returns the model.

    `precision`: int8, fp8 or int8-weights. Activations are quantized with a constant scale of 1, after a multiplied vector
    where no norm precedes; products are multiplied by a vector; both vectors are inputs, as are the weights in their new type.
    """
    from onnx import TensorProto, helper

    graph = model.graph
    ports = {port.name: port.type.tensor_type for port in graph.input}
    wide = ports["qkv_weight"].elem_type
    narrow = TensorProto.FLOAT8E4M3FN if precision == "fp8" else TensorProto.INT8
    graph.initializer.append(helper.make_tensor("unit", wide, [], [1.0]))
    graph.initializer.append(helper.make_tensor("zero", narrow, [], [0]))
    nodes: list[Any] = []

    def add(operator: str, inputs: Sequence[str], output: str) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], name=f"node_{output}"))
        return output

    def vector(name: str, length: int) -> str:
        graph.input.append(helper.make_tensor_value_info(name, wide, [length]))
        return name

    for node in list(graph.node):
        weight = node.input[1] if node.op_type == "MatMul" else ""
        if not weight.endswith("_weight"):
            nodes.append(node)
            continue
        name = weight.removesuffix("_weight")
        rows, columns = (dim.dim_value for dim in ports[weight].shape.dim)
        ports[weight].elem_type = narrow
        x = node.input[0]
        if precision != "int8-weights":
            if name in ("out", "ff_out"):
                x = add("Mul", [x, vector(f"{name}_in_scale", rows)], f"{name}_scaled")
            x = add("QuantizeLinear", [x, "unit", "zero"], f"{name}_narrow")
            x = add("DequantizeLinear", [x, "unit", "zero"], f"{name}_rounded")
        w = add("DequantizeLinear", [weight, "unit", "zero"], f"{name}_wide")
        product = add("MatMul", [x, w], f"{name}_product")
        add("Mul", [product, vector(f"{name}_out_scale", columns)], node.output[0])
    del graph.node[:]
    graph.node.extend(nodes)
    return model
