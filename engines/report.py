"""What the compiler did with a graph, as data: kernels, types, memory. Read from its log, so no GPU is needed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from ..bundle.atomic import atomic_file
from ..bundle.errors import BundleError

__all__ = [
    "Kernel",
    "LayerReport",
    "Operand",
    "Product",
    "describe",
    "memory_of",
    "parse_inspector_json",
    "parse_log",
    "read_report",
    "write_report",
]

Product = Literal["gemm", "convolution", "attention"]
Bytes = Annotated[int, msgspec.Meta(ge=0)]


class Operand(msgspec.Struct, frozen=True):
    """A tensor that a kernel reads or writes: `dtype` as the compiler names it in lower case (half, bfloat16, float, int8,
    fp8, int64, ...), `shape` with -1 for dynamic axes."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        """At least two axes are longer than one, or dynamic. Scales, biases and vectors of any rank are not matrices."""
        return sum(length != 1 for length in self.shape) >= 2


class Kernel(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the engine: `kind` is the compiler's layer type (gemm, kgen, runtime_fusion, ...); `onnx` names the graph
    nodes that it computes; `profile` is the optimization profile that it serves."""

    name: str
    kind: str
    tactic: str
    inputs: tuple[Operand, ...]
    constants: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    onnx: tuple[str, ...]
    profile: int = 0

    @property
    def product(self) -> Product | None:
        """What it multiplies, if it is one of the kernels that do the engine's matrix products.

        Kinds are those of TensorRT-RTX (gemm, correlation) and of TensorRT (MatrixMultiply, CaskConvolution, ...). A
        `runtime_fusion` lists its operations in its name: Fc is a matrix product, Corr a convolution. Fused attention is
        known by its tactic, or by its name where that is not made from the graph's.
        """
        kind = self.kind.lower()
        if _ATTENTION.search(self.tactic) or _ATTENTION.match(self.name):
            return "attention"
        if kind in ("runtime_fusion", "fusion"):
            operations = re.findall(r"[A-Z][a-z]+", self.name) if self.name.startswith("__myl") else []
            return "gemm" if "Fc" in operations else "convolution" if {"Corr", "Conv"} & set(operations) else None
        if "conv" in kind or kind == "correlation":
            return "convolution"
        return "gemm" if "gemm" in kind or "matrixmultiply" in kind else None

    @property
    def factors(self) -> tuple[Operand, ...]:
        """The matrices that it reads: of a product what is multiplied, without the compiler's float32 scalars (alpha, beta),
        without biases and scales. TensorRT leaves weights that are constants out."""
        return tuple(operand for operand in self.inputs + self.constants if operand.is_matrix)

    @property
    def types(self) -> tuple[str, ...]:
        """dtypes of `factors`: ("half", "half") for a half product."""
        return tuple(operand.dtype for operand in self.factors)

    @property
    def merged(self) -> tuple[str, ...]:
        """Graph nodes that the compiler joined into this one product, which it names a+b+c; () where the name does not tell."""
        parts = _PART.sub("", _PROFILE.sub("", self.name)).split("+")
        joined = {*parts, *(_UNIQUE.sub("", part) for part in parts)}
        return tuple(node for node in self.onnx if node in joined)


class LayerReport(msgspec.Struct, frozen=True, kw_only=True):
    """An engine as its compiler describes it; all sizes in bytes, the largest of all optimization profiles."""

    graph: str
    kernels: tuple[Kernel, ...]
    activation_bytes: Bytes
    scratch_bytes: Bytes
    weights_bytes: Bytes

    @property
    def kinds(self) -> dict[str, int]:
        """Number of kernels by kind, the most frequent first."""
        return dict(Counter(kernel.kind for kernel in self.kernels).most_common())

    @property
    def products(self) -> tuple[Kernel, ...]:
        """Kernels that multiply matrices: GEMMs, convolutions, fused attention."""
        return tuple(kernel for kernel in self.kernels if kernel.product)

    @property
    def gemms(self) -> tuple[Kernel, ...]:
        """Matrix products, those fused with their neighbours among them; not convolutions, not fused attention."""
        return tuple(kernel for kernel in self.kernels if kernel.product == "gemm")

    @property
    def fused_attention(self) -> int:
        """Number of kernels that do a whole attention: both products and the softmax."""
        return sum(kernel.product == "attention" for kernel in self.kernels)

    @property
    def profiles(self) -> tuple[tuple[Kernel, ...], ...]:
        """The kernels of each optimization profile: an engine holds them once per profile, and runs one profile's."""
        last = max((kernel.profile for kernel in self.kernels), default=0)
        return tuple(tuple(k for k in self.kernels if k.profile == index) for index in range(last + 1))


# _gemm_mha_v2, _gemv_mha_v1 (TensorRT, TensorRT-RTX), fmha_v2_flash_attention_... (TensorRT)
_ATTENTION = re.compile(r"_*gem[mv]_mha|fmha_|_fmha")

_MEMORY = re.compile(r"(Total Activation|Max Scratch|Total Scratch|Total Weights) Memory: (\d+)")
# Names are the graph's and may hold anything, commas and brackets too: what stands between is matched, not split.
_DIMENSIONS = r", (?:Location: \w+, )?Dimensions: \["
_NAME = rf"(?:(?!{_DIMENSIONS}).)*"
_SHAPE = r"(?:-?\d+(?:, ?-?\d+)*)?"
_FORMAT = r"(?:(?!\}, \{ Name: |\}\]).)*"
_TENSOR = rf"\{{ Name: {_NAME}{_DIMENSIONS}{_SHAPE}\], {_FORMAT}\}}"
_LIST = rf"\[(?: {_TENSOR}(?:, {_TENSOR})*)?\]"
_LINE = re.compile(
    rf"(?P<name>.*?), LayerType: (?P<kind>[^,]*), Inputs: (?P<inputs>{_LIST}), "
    rf"(?:Constants: (?P<constants>{_LIST}), )?Outputs: (?P<outputs>{_LIST})(?P<rest>(?:, .*)?)",
    re.DOTALL,
)
_OPERAND = re.compile(rf"\{{ Name: ({_NAME}){_DIMENSIONS}({_SHAPE})\], ({_FORMAT})\}}", re.DOTALL)
_TACTIC = re.compile(r", TacticName: (.*?)(?:, TacticValue: [^,]*)?, StreamId: ", re.DOTALL)
_METADATA = re.compile(r", StreamId: \d+.*?, Metadata: (.*)", re.DOTALL)
_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f]?\[ONNX Layer: |\s*\Z)", re.DOTALL)
_PROFILE = re.compile(r" \[profile (\d+)\]")
_PART = re.compile(r"_myl(\d+)_\d+\Z")
_UNIQUE = re.compile(r"_U\d+\Z")  # appended to a node that is called as one of the graph's tensors

_DTYPES: Mapping[str, str] = {
    "float": "float",
    "fp32": "float",
    "half": "half",
    "fp16": "half",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    **{name: name for name in ("fp8", "fp4", "e8m0", "int4", "int8", "int32", "int64", "uint8", "bool")},
}


def parse_log(graph: str, messages: Iterable[str]) -> LayerReport:
    """The report in a build log: `messages` as the logger got them, in order, of one build (of several: the last one's).

    TensorRT-RTX writes the layers itself, in one message; of TensorRT, append what the engine inspector prints in its
    one-line format (`LayerInformationFormat.ONELINE`), which is the same.

    Raises:
        BundleError: layers or memory figures are missing, or not in the form that this program reads. Compilers give
            them only with profiling verbosity DETAILED and to a logger that takes VERBOSE messages.
    """
    layers: str | None = None
    before: list[str] = []
    lines: list[str] = []
    for message in messages:
        if message.startswith("Layers:"):
            layers, before, lines = message, lines, []
        else:
            lines.append(message)
    if layers is None:
        raise _incomplete(graph, "no list of layers")
    memory = memory_of(graph, before)
    text = layers.removeprefix("Layers:").strip("\n").partition("\n\n")[0].partition("\nBindings:")[0]
    if not text.startswith("Name: "):
        raise _incomplete(graph, "names of layers only, or none")
    return LayerReport(
        graph=graph,
        kernels=_by_profile(_kernel(graph, entry) for entry in text.removeprefix("Name: ").split("\nName: ")),
        **memory,
    )


def memory_of(graph: str, messages: Iterable[str]) -> dict[str, int]:
    """`activation_bytes`, `scratch_bytes` and `weights_bytes` as a build's log gives them, the largest of all profiles.

    Raises:
        BundleError: a figure is missing; the logger must take VERBOSE messages.
    """
    figures: dict[str, int] = {}
    for message in messages:
        if found := _MEMORY.match(message):
            what = f"{found[1].split()[1].lower()}_bytes"
            figures[what] = max(figures.get(what, 0), int(found[2]))
    for what in ("activation_bytes", "scratch_bytes", "weights_bytes"):
        if what not in figures:
            raise _incomplete(graph, f"no figure for {what.removesuffix('_bytes')} memory")
    return figures


def _incomplete(graph: str, what: str) -> BundleError:
    return BundleError(
        f"What the compiler did with graph {graph!r} cannot be checked: its log has {what}. It writes that only with "
        "profiling verbosity DETAILED and to a logger that takes VERBOSE messages."
    )


def _kernel(graph: str, entry: str) -> Kernel:
    """One line of the list of layers, without the word `Name: ` that begins it."""
    found = _LINE.fullmatch(entry)
    if found is None:
        raise BundleError(
            f"The compiler's log of graph {graph!r} describes a layer in a form that this program cannot read: "
            f"'{entry[:200]}'. Please report it, with the version of TensorRT."
        )
    tactic, metadata = _TACTIC.search(found["rest"]), _METADATA.search(found["rest"])
    return Kernel(
        name=found["name"],
        kind=found["kind"],
        tactic=tactic[1] if tactic else "",
        inputs=_operands(found["inputs"]),
        constants=_operands(found["constants"] or ""),
        outputs=_operands(found["outputs"]),
        onnx=_nodes(metadata[1]) if metadata else (),
    )


def _operands(text: str) -> tuple[Operand, ...]:
    return tuple(
        Operand(name, _dtype(rest.rpartition("Datatype: ")[2]), tuple(map(int, filter(None, shape.split(",")))))
        for name, shape, rest in _OPERAND.findall(text)
    )


def _nodes(metadata: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_NODE.findall(metadata)))


def _dtype(text: str) -> str:
    """'Half, Format: (Linear) ...' and 'Row major linear FP16 format' -> 'half'; 'unknown' where no type is named."""
    words = (word.lower() for word in re.findall(r"[A-Za-z]+\d*", text))
    return next((_DTYPES[word] for word in words if word in _DTYPES), "unknown")


def _by_profile(kernels: Iterable[Kernel]) -> tuple[Kernel, ...]:
    """Gives each kernel its profile. Only names from the graph carry it (`x [profile 1]`); kernels that touch none are known
    by the part of the engine in which they stand (`..._myl1_7`)."""
    kernels = tuple(kernels)
    parts: dict[str, int] = {}
    for kernel in kernels:
        for label in _labels(kernel):
            parts[_part(kernel)] = label
    return tuple(
        msgspec.structs.replace(kernel, profile=next(_labels(kernel), parts.get(_part(kernel), 0)))
        for kernel in kernels
    )


def _labels(kernel: Kernel) -> Iterator[int]:
    names = (kernel.name, *(operand.name for operand in kernel.inputs + kernel.constants + kernel.outputs))
    return (int(found[1]) for name in names if (found := _PROFILE.search(name)))


def _part(kernel: Kernel) -> str:
    found = _PART.search(kernel.name)
    return found[1] if found else kernel.name


class _InspectorTensor(msgspec.Struct, rename="pascal"):
    name: str
    dimensions: tuple[int, ...] = ()
    datatype: str = ""
    format: str = msgspec.field(default="", name="Format/Datatype")


class _InspectorLayer(msgspec.Struct, rename="pascal"):
    name: str
    layer_type: str
    inputs: tuple[_InspectorTensor, ...] = ()
    constants: tuple[_InspectorTensor, ...] = ()
    outputs: tuple[_InspectorTensor, ...] = ()
    tactic_name: str = ""
    metadata: str = ""


class _Inspected(msgspec.Struct, rename="pascal"):
    layers: tuple[_InspectorLayer | str, ...]


def parse_inspector_json(
    graph: str, text: str, *, activation_bytes: int, weights_bytes: int, scratch_bytes: int = 0
) -> LayerReport:
    """The report in what TensorRT's `EngineInspector.get_engine_information(LayerInformationFormat.JSON)` gives.

    The inspector does not tell memory: the figures are those of the build's log (`memory_of`).

    Raises:
        BundleError: `text` is not such JSON, or has only the layers' names, as for an engine that was built without
            profiling verbosity DETAILED.
    """
    try:
        # The inspector leaves control characters in names as they are, which strict JSON forbids.
        engine = msgspec.convert(json.loads(text, strict=False), _Inspected)
    except (ValueError, RecursionError) as error:  # msgspec's and json's errors are ValueErrors
        raise BundleError(f"The engine inspector's JSON of graph {graph!r} cannot be read ({error}).") from error
    if not engine.layers or any(isinstance(layer, str) for layer in engine.layers):
        raise BundleError(
            f"What the compiler did with graph {graph!r} cannot be checked: the engine inspector knows only names of "
            "layers, or none. It tells more of an engine that was built with profiling verbosity DETAILED."
        )

    def operands(tensors: tuple[_InspectorTensor, ...]) -> tuple[Operand, ...]:
        return tuple(
            Operand(tensor.name, _dtype(tensor.datatype or tensor.format), tensor.dimensions) for tensor in tensors
        )

    return LayerReport(
        graph=graph,
        kernels=_by_profile(
            Kernel(
                name=layer.name,
                kind=layer.layer_type,
                tactic=layer.tactic_name,
                inputs=operands(layer.inputs),
                constants=operands(layer.constants),
                outputs=operands(layer.outputs),
                onnx=_nodes(layer.metadata),
            )
            for layer in engine.layers
            if not isinstance(layer, str)
        ),
        activation_bytes=activation_bytes,
        scratch_bytes=scratch_bytes,
        weights_bytes=weights_bytes,
    )


def write_report(path: Path, report: LayerReport) -> None:
    """Writes the report as JSON, one line per kernel; `InputError` when that is not possible."""
    head = {name: getattr(report, name) for name in report.__struct_fields__ if name != "kernels"}
    kernels = b",\n".join(map(msgspec.json.encode, report.kernels))
    with atomic_file(path) as temporary:
        temporary.write_bytes(msgspec.json.encode(head)[:-1] + b',"kernels":[\n' + kernels + b"\n]}\n")


def read_report(path: Path) -> LayerReport:
    """Reads what `write_report` wrote; `BundleError` when the file is missing or damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=LayerReport)
    except FileNotFoundError:
        raise BundleError(f"There is no layer report {str(path)!r}.") from None
    except OSError as error:
        raise BundleError(f"Cannot read the layer report {str(path)!r}: {error.strerror}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"The layer report {str(path)!r} is damaged ({error}).") from error


def describe(report: LayerReport) -> list[str]:
    """The report in four lines for people: kernels by kind, products by type, attention, memory (1 MB = 1e6 bytes)."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.kinds.items())
    products = Counter(
        (kernel.product, "/".join(dict.fromkeys(kernel.types)))
        for kernel in report.products
        if kernel.product != "attention"
    )
    listed = ", ".join(f"{count} {what} {types}".rstrip() for (what, types), count in products.most_common())
    attention = f"{report.fused_attention} fused" if report.fused_attention else "no fused kernel"
    memory = (
        ("activations", report.activation_bytes),
        ("scratch", report.scratch_bytes),
        ("weights", report.weights_bytes),
    )
    return [
        f"{len(report.kernels)} kernels: {kinds or 'none'}",
        f"products: {listed or 'none'}",
        f"attention: {attention}",
        "memory: " + ", ".join(f"{what} {size / 1e6:.1f} MB" for what, size in memory),
    ]
