"""One way from a torch module to an ONNX graph: traced on the meta device, fixed names, symbolic axes, no traces of home."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import optimizer

from ..bundle.garbage import uncollected

__all__ = ["IR_VERSION", "OPSET", "Port", "Signature", "exporting", "trace"]

Port = tuple[str, torch.dtype, tuple[int | str, ...]]  # name, type, shape

OPSET = 20  # what TensorRT 10.3's parser reads
IR_VERSION = 10

ELEMENT_TYPES: dict[torch.dtype, str] = {
    torch.float32: "float",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int64: "int64",
    torch.int8: "int8",
}


@dataclass(frozen=True)
class Signature:
    """Names, types and symbolic shapes of a graph, in order. A string in a shape is a dynamic axis.

    `sizes` gives each dynamic axis the length that it is traced at (2 or more: 0 and 1 would be specialised).
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """Around everything that traces: no gradients, no notes to developers, and without three habits that cost most of the time
    of a small graph: garbage collections, over and over through a growing graph; a table of translations made anew for
    every one; and a second trace that would find nothing to decompose."""
    exporter = "torch.onnx._internal.exporter."
    with (
        _quiet(),
        uncollected(),
        _replaced(exporter + "_registration", "ONNXRegistry.from_torchlib", _same_translations),
        _replaced(exporter + "_fx_passes", "decompose_with_registry", _needed_decompositions),
        torch.no_grad(),
    ):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The tracing libraries warn about their own internals; a person exporting a model cannot act on that."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "diffusers", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _replaced(module: str, path: str, make: Callable[[Any, Any], Any]) -> Iterator[None]:
    """What `path` names in a module of PyTorch's own, replaced by `make(owner, original)`. PyTorch has no public way to do it;
    where there is no such thing, nothing changes but the time that an export takes."""
    *owners, name = path.split(".")
    try:
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        original = vars(owner)[name]
    except (ImportError, AttributeError, KeyError):
        yield
        return
    setattr(owner, name, make(owner, original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def _same_translations(registry: Any, original: Any) -> Any:
    """Exports take copies of one table."""

    def copied(**options: Any) -> Any:
        key = tuple(sorted(options.items()))
        if key not in _TABLES:
            _TABLES[key] = original.__get__(None, registry)(**options)
        table = copy.copy(_TABLES[key])
        table.functions = {target: list(functions) for target, functions in table.functions.items()}
        return table

    return staticmethod(copied)


_TABLES: dict[tuple[Any, ...], Any] = {}


def _needed_decompositions(_: Any, original: Any) -> Any:
    """What was traced is traced again, operator by operator, to decompose those that have no translation to ONNX. In our graphs
    these are conversions and squares, which are put into other words here; a graph that holds any other takes the long way."""

    def decomposed(program: Any, registry: Any) -> Any:
        graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
        called = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
        if len(graphs) > 1 or not all(_has_translation(node.target, registry) for node in called):
            return original(program, registry)
        for node in called:
            _reword(node)
        program.graph_module.recompile()
        return program

    return decomposed


CONVERSIONS = (torch.ops.aten.to.dtype, torch.ops.aten.to.dtype_layout, torch.ops.aten.to.device)
# PyTorch removes these itself.
ASSERTIONS = (torch.ops.aten._assert_scalar.default, torch.ops.aten._assert_tensor_metadata.default)


def _has_translation(target: Any, registry: Any) -> bool:
    if target in CONVERSIONS or target in ASSERTIONS or target is torch.ops.aten.square.default:
        return True
    schema = getattr(target, "_schema", None)
    return (schema is None or not schema.is_mutable) and registry.is_registered(target)


def _reword(node: torch.fx.Node) -> None:
    """A conversion becomes what decomposing makes of it: nothing between equal types, else a copy of the other type."""
    aten = torch.ops.aten
    if node.target is aten.square.default:
        node.target, node.args = aten.pow.Tensor_Scalar, (*node.args, 2)
    elif node.target in CONVERSIONS:
        source = node.args[0]
        assert isinstance(source, torch.fx.Node)
        old, new = source.meta["val"], node.meta["val"]
        if old.dtype != new.dtype or old.device != new.device:
            node.target, node.args = aten._to_copy.default, (source,)
            node.kwargs = {"dtype": new.dtype, "device": new.device}
        elif any(user.op == "output" for user in node.users):  # the program knows its outputs by name
            node.target, node.args, node.kwargs = aten.clone.default, (source,), {}
        else:
            node.replace_all_uses_with(source)
            node.graph.erase_node(node)


def trace(module: torch.nn.Module, signature: Signature, *, name: str, device: str = "meta") -> onnx.ModelProto:
    """Exports `module` with the given signature to an ONNX model (opset 20) whose dynamic axes carry our names.

    Traced on the meta device: no weight is allocated. (`device` "cpu" is for modules with operators that exist in ONNX
    only, which PyTorch places there; the arguments are never touched, so they cost no memory either.) Raises
    `RuntimeError` if an axis that must stay dynamic was specialised by the trace, which would make a graph that silently
    accepts one size only.
    """
    with torch.device(device):
        arguments = tuple(
            torch.empty([signature.sizes[n] if isinstance(n, str) else n for n in shape], dtype=dtype)
            for _, dtype, shape in signature.inputs
        )
    dynamic = tuple(
        {axis: torch.export.Dim.AUTO for axis, n in enumerate(shape) if isinstance(n, str)}
        for _, _, shape in signature.inputs
    )
    with exporting():
        program = torch.onnx.export(
            module.eval(),
            arguments,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,  # folding cannot read meta tensors; it runs below
            dynamic_shapes=_like_parameters(module, dynamic),
            input_names=[n for n, _, _ in signature.inputs],
            output_names=[n for n, _, _ in signature.outputs],
            verbose=False,
        )
    if program is None:
        raise RuntimeError(f"the exporter returned nothing for graph {name!r}")
    model = program.model
    model.ir_version = IR_VERSION
    optimizer.optimize_ir(model, should_fold=lambda node: False if node.op_type == "Transpose" else None)
    _name_axes(model, signature, name)
    _forget_home(model, name)
    return ir.serde.serialize_model(model)


def _like_parameters(module: torch.nn.Module, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """`values`, one per argument, nested as `forward` takes them: those of `*arguments` are one tuple at the end."""
    parameters = inspect.signature(module.forward).parameters.values()
    if all(p.kind is not inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return values
    named = len(parameters) - 1
    return (*values[:named], values[named:]) if values[named:] else values


def _name_axes(model: ir.Model, signature: Signature, name: str) -> None:
    for values, side in ((model.graph.inputs, signature.inputs), (model.graph.outputs, signature.outputs)):
        if len(values) != len(side):
            raise RuntimeError(f"graph {name!r} has {len(values)} inputs or outputs where {len(side)} were declared")
        for value, (port, dtype, shape) in zip(values, side, strict=True):
            if value.name != port:
                raise RuntimeError(f"graph {name!r}: {value.name!r} stands where {port!r} was declared")
            found = value.shape
            if found is None or len(found) != len(shape):
                raise RuntimeError(f"graph {name!r}: {port!r} has the shape {found} where {shape} was declared")
            for got, wanted in zip(found, shape, strict=True):
                if isinstance(got, int) and got != wanted:
                    raise RuntimeError(f"graph {name!r}: axis {wanted!r} of {port!r} was specialised to {got}")
            value.shape = ir.Shape(shape)
            value.type = ir.TensorType(getattr(ir.DataType, ELEMENT_TYPES[dtype].upper()))


def _forget_home(model: ir.Model, name: str) -> None:
    """Removes stack traces and other notes: they hold paths of the exporting machine and would change every hash."""
    model.graph.name = name
    model.doc_string = None
    model.producer_name = "dynamictrl-edge"
    model.producer_version = None
    model.metadata_props.clear()
    for graph in (model.graph, *(f.graph for f in model.functions.values())):
        graph.metadata_props.clear()
        graph.doc_string = None
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
            value.metadata_props.clear()
        for node in ir.traversal.RecursiveGraphIterator(graph):
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
                value.doc_string = None
