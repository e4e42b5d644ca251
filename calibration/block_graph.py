"""The block's graph with quantized linears, in the unit-scale form, and the graph that shows what goes into its linears.

One graph serves every block, so no number of a block can be in it. It quantizes with a constant (`Grid.unit`), and what
makes that right for a block comes as vectors: the inputs of `qkv` and `ff_in` arrive divided by their scales (the modulation table
does it, see `modulation_graph`), those of `out` and `ff_out` are multiplied by `<linear>_in_scale`, and every product by
`<linear>_out_scale`. Constant scales are what TensorRT makes real integer products of.

The graph for ONNX Runtime says the same in its own operator, whose fast form takes unsigned activations: the same integers
with 128 added. The weights are such that it gives exact results on every processor (see `pairs`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..bundle.errors import BundleError
from ..bundle.manifest import SCHEMES, Scheme
from .grids import grid_of

__all__ = [
    "CONDITIONING_LINEARS",
    "LINEARS",
    "MODULATION_LINEARS",
    "SCALED",
    "TEXT_LINEARS",
    "inputs_of",
    "modulation_graph",
    "observed",
    "quantized",
]

LINEARS = ("qkv", "out", "ff_in", "ff_out")  # of the denoiser's block, in the order of computation
SCALED = ("out", "ff_out")  # those whose input is multiplied in the block itself: no norm precedes them
TEXT_LINEARS = ("qkv", "attn_out", "wi", "wo")
MODULATION_LINEARS = ("norm1_linear", "norm2_linear", "pose_norm_linear")
CONDITIONING_LINEARS = ("text", "patch_image", "patch_pose")

Form = Literal["portable", "cpu"]

_MIDDLE = 128  # the unsigned zero point
_RUNTIME = "com.microsoft"  # ONNX Runtime's own operators


def inputs_of(model: ModelProto, linears: Sequence[str] = LINEARS) -> dict[str, str]:
    """Linear -> name of the tensor that goes into its matrix product. `BundleError` if the graph lacks one."""
    return {name: node.input[0] for name, node in _products(model.graph, linears).items()}


def observed(model: ModelProto, linears: Sequence[str] = LINEARS, axes: Sequence[str] = ("B", "S")) -> ModelProto:
    """A copy whose further outputs `<linear>_in` are what goes into each linear: [*axes, channels]."""
    made = ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    ports = {port.name: port.type.tensor_type for port in graph.input}
    for name, tensor in inputs_of(made, linears).items():
        weight = ports[f"{name}_weight"]
        # An output of its own: two linears may read one tensor, and a graph's output may not be listed twice.
        graph.node.append(helper.make_node("Identity", [tensor], [f"{name}_in"], name=f"node_{name}_in"))
        shape = [*axes, weight.shape.dim[0].dim_value]
        graph.output.append(helper.make_tensor_value_info(f"{name}_in", weight.elem_type, shape))
    return made


def quantized(model: ModelProto, linears: Collection[str], scheme: Scheme, form: Form = "portable") -> ModelProto:
    """A copy of the block's graph in which `linears` are quantized; their weights become int8 (or E4M3) inputs.

    Args:
        scheme: int8, fp8 (weights and activations), or int8-weights (weights alone).
        form: "portable" for every runtime, "cpu" for ONNX Runtime's integer kernels; the latter differs for int8 only.

    Raises:
        BundleError: the graph lacks a linear.
        ValueError: an unknown scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"there is no scheme {scheme!r}")
    made = ModelProto()
    made.CopyFrom(model)
    _Rewriter(made, scheme, form == "cpu" and scheme == "int8").rewrite(list(linears))
    return made


def modulation_graph(model: ModelProto) -> ModelProto:
    """A copy of graph `modulation` whose table [T, 15, D] is multiplied by the further input `row_scale` [15, D] float32.

    A factor in the table is exact in every precision. (In the modulation's weights it would be rounded once more, and
    the pose gate, of which the weights hold what is added to 1, would lose its digits.)
    """
    made = ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    table = graph.output[0]
    rows = [dim.dim_value for dim in table.type.tensor_type.shape.dim[1:]]
    graph.input.append(helper.make_tensor_value_info("row_scale", TensorProto.FLOAT, rows))
    for node in graph.node:
        for i, name in enumerate(node.output):
            if name == table.name:
                node.output[i] = "table_unscaled"
        for i, name in enumerate(node.input):
            if name == table.name:
                node.input[i] = "table_unscaled"
    graph.node.append(helper.make_node("Mul", ["table_unscaled", "row_scale"], [table.name], name="node_row_scale"))
    return made


def _products(graph: GraphProto, linears: Sequence[str]) -> dict[str, NodeProto]:
    """Linear -> its matrix product."""
    found = {
        node.input[1].removesuffix("_weight"): node
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1].endswith("_weight")
    }
    missing = [name for name in linears if name not in found]
    if missing:
        raise BundleError(
            f"The graph {graph.name!r} has no matrix product for {', '.join(missing)}. "
            "Export the checkpoint again with this version."
        )
    return {name: found[name] for name in linears}


class _Rewriter:
    """Replaces matrix products of one graph, in place."""

    def __init__(self, model: ModelProto, scheme: Scheme, integer: bool):
        self.graph, self.scheme, self.integer = model.graph, scheme, integer
        self.model = model
        self.ports = {port.name: port.type.tensor_type for port in model.graph.input}
        self.narrow = TensorProto.FLOAT8E4M3FN if scheme == "fp8" else TensorProto.INT8
        self.nodes: list[NodeProto] = []

    def rewrite(self, linears: Sequence[str]) -> None:
        graph = self.graph
        if not linears:
            return
        products = {node.output[0]: name for name, node in _products(graph, linears).items()}
        biases = self._biases(products)
        self._constants(self.ports[f"{linears[0]}_weight"].elem_type)
        for node in graph.node:
            name = products.get(node.output[0]) if node.output else None
            if name is not None:
                self._linear(name, node, biases)
            elif not (self.integer and node.output[0] in biases.values()):
                self.nodes.append(node)
        del graph.node[:]
        graph.node.extend(self.nodes)

    def _biases(self, products: dict[str, str]) -> dict[str, str]:
        """Linear -> output of the addition of its bias, which ONNX Runtime's kernel does itself."""
        return {
            products[other]: node.output[0]
            for node in self.graph.node
            if node.op_type == "Add"
            for other, bias in (node.input, reversed(node.input))
            if other in products and bias == f"{products[other]}_bias"
        }

    def _constants(self, wide: int) -> None:
        add = self.graph.initializer.append
        unit = grid_of(self.scheme).unit
        add(helper.make_tensor("unit", wide, [], [unit]))
        if self.integer:
            add(helper.make_tensor("unit_squared", wide, [], [unit**2]))
            add(numpy_helper.from_array(np.array(_MIDDLE, np.uint8), "middle"))
            if all(opset.domain != _RUNTIME for opset in self.model.opset_import):
                self.model.opset_import.append(helper.make_opsetid(_RUNTIME, 1))
        add(helper.make_tensor("zero", self.narrow, [], [0]))

    def _add(self, operator: str, inputs: Sequence[str], output: str, domain: str = "") -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"node_{output}", domain=domain))
        return output

    def _vector(self, name: str, wide: int, length: int) -> str:
        self.graph.input.append(helper.make_tensor_value_info(name, wide, [length]))
        return name

    def _linear(self, name: str, node: NodeProto, biases: dict[str, str]) -> None:
        port = self.ports[f"{name}_weight"]
        wide = port.elem_type
        rows, columns = (dim.dim_value for dim in port.shape.dim)
        port.elem_type = self.narrow
        x = node.input[0]
        if self.scheme != "int8-weights" and name in SCALED:
            x = self._add("Mul", [x, self._vector(f"{name}_in_scale", wide, rows)], f"{name}_scaled")
        scale = self._vector(f"{name}_out_scale", wide, columns)
        if self.integer:
            self._integer_product(name, x, scale, biases.get(name), node.output[0])
            return
        if self.scheme != "int8-weights":
            x = self._add("QuantizeLinear", [x, "unit", "zero"], f"{name}_narrow")
            x = self._add("DequantizeLinear", [x, "unit", "zero"], f"{name}_rounded")
        w = self._add("DequantizeLinear", [f"{name}_weight", "unit", "zero"], f"{name}_wide")
        product = self._add("MatMul", [x, w], f"{name}_product")
        self._add("Mul", [product, scale], node.output[0])

    def _integer_product(self, name: str, x: str, scale: str, biased: str | None, output: str) -> None:
        x = self._add("QuantizeLinear", [x, "unit", "middle"], f"{name}_narrow")
        inputs = [x, f"{name}_weight", "unit_squared", scale, "middle", "zero"]
        inputs += [f"{name}_bias"] if biased is not None else []
        self._add("MatMulIntegerToFloat", inputs, biased or output, _RUNTIME)
