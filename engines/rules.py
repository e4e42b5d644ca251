"""What an engine must be, held against what the compiler did: every broken rule is a sentence.

The compiler never refuses what these rules refuse: it builds something slower, larger or less exact, and says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ..bundle.errors import UsageError
from ..bundle.manifest import BLOCK_KINDS, Manifest, graph_kind
from ..bundle.precision import PRECISIONS, Precision
from .report import Kernel, LayerReport, Operand

__all__ = ["Expectation", "QuantizedType", "broken_rules", "expectation", "heads_of", "quantized_type"]

QuantizedType = Literal["int8", "fp8"]

ATTENTION_GRAPHS = (*BLOCK_KINDS, "text_block")
NARROWEST_HEAD = 9  # TensorRT-RTX fuses attention whose heads are wider than 8, for every capability
CONSTANTS_LIMIT = 4_000_000  # bytes that an engine may hold where the bundle gives weights as inputs

# precisions in the compiler's words
_TYPES: dict[Precision, str] = {"fp32": "float", "fp16": "half", "bf16": "bfloat16"}
_HOST_KINDS = frozenset({"cjmp", "jmp"})


@dataclass(frozen=True)
class Expectation:
    """What one engine must be.

    `types`: dtypes in which matrices may be multiplied. `fused_attention`: kernels of whole attentions, per profile.
    `quantized_linears` of type `quantized_type` must be products of that type. Sizes are bytes; None: no limit.
    """

    graph: str
    types: frozenset[str]
    fused_attention: int = 0
    quantized_linears: int = 0
    quantized_type: QuantizedType | None = None
    constants_limit: int | None = None
    activation_budget: int | None = None


def expectation(
    graph: str,
    precision: Precision,
    *,
    heads: tuple[int, int] | None = None,
    quantized_linears: int = 0,
    quantized_type: QuantizedType | None = None,
    activation_budget: int | None = None,
) -> Expectation:
    """What the engine of a bundle's graph must be.

    Attention must be fused in `ATTENTION_GRAPHS`, but for cases in which the compiler has no fused kernel: float32, and in toy
    models heads of 8 or less (every capability) and a single head (SM75, SM86). The `vae_*` graphs hold their weights as
    constants, all others take them as inputs.

    Args:
        heads: attention heads and the width of one; None: as usual.
        precision: floating type of the bundle; of a quantized one, that of what is not quantized.
        quantized_linears: linears (and convolutions) with quantized weights and activations; those with quantized weights
            alone do not count, they multiply in `precision`.
        activation_budget: bytes that one execution may use for activations.

    Raises:
        UsageError: the precision does not exist, or quantized linears have no type.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"There is no precision {precision!r}; there are {', '.join(PRECISIONS)}.")
    if quantized_linears and quantized_type is None:
        raise UsageError(
            f"{quantized_linears} linears of graph {graph!r} are to be quantized, but to which type is not said."
        )
    usual = heads is None or (heads[0] > 1 and heads[1] >= NARROWEST_HEAD)
    fusible = graph_kind(graph) in ATTENTION_GRAPHS and precision != "fp32" and usual
    return Expectation(
        graph=graph,
        types=frozenset({_TYPES[precision], quantized_type or _TYPES[precision]}),
        fused_attention=int(fusible),
        quantized_linears=quantized_linears,
        quantized_type=quantized_type,
        constants_limit=None if graph.startswith("vae_") else CONSTANTS_LIMIT,
        activation_budget=activation_budget,
    )


def heads_of(manifest: Manifest, graph: str) -> tuple[int, int] | None:
    """Attention heads of this graph of a bundle and the width of one; None where there is no attention."""
    text, transformer = manifest.text, manifest.transformer
    if graph == "text_block":
        return (text.num_heads, text.d_kv) if text else None
    return (
        (transformer.num_attention_heads, transformer.attention_head_dim) if graph_kind(graph) in BLOCK_KINDS else None
    )


def quantized_type(manifest: Manifest) -> QuantizedType | None:
    """The type in which a bundle's quantized linears multiply; None where they multiply in the bundle's own precision."""
    scheme = None if manifest.quantization is None else manifest.quantization.scheme
    return scheme if scheme in ("int8", "fp8") else None


def broken_rules(report: LayerReport, expected: Expectation) -> list[str]:
    """Every rule that the engine breaks, as sentences for people: what was found and where, what it means, what to do.

    An empty list: the engine is what it must be. Kernels are held against the rules profile by profile.
    """
    found = list(_memory(report, expected))
    for number, kernels in enumerate(report.profiles):
        place = f"In optimization profile {number}: " if len(report.profiles) > 1 else ""
        for rule in (_attention, _quantized, _types, _weights, _host):
            found.extend(place + reason for reason in rule(kernels, expected))
    return found


def _memory(report: LayerReport, expected: Expectation) -> Iterator[str]:
    budget, limit = expected.activation_budget, expected.constants_limit
    if budget is not None and report.activation_bytes > budget:
        advice = "smaller tiles (--tile)" if expected.graph.startswith("vae_") else "smaller or shorter clips (--size)"
        yield (
            f"It needs {_megabytes(report.activation_bytes)} for activations, more than the {_megabytes(budget)} there are: "
            f"build for {advice}, or for a target with more memory."
        )
    if limit is not None and report.weights_bytes > limit:
        yield (
            f"It holds {_megabytes(report.weights_bytes)} of constants, although weights are inputs of graph "
            f"{expected.graph!r} (at most {_megabytes(limit)} are usual): a weight became part of the graph, and would be the "
            "same in every block and every checkpoint. Export the checkpoint again with this version."
        )


def _attention(kernels: Sequence[Kernel], expected: Expectation) -> Iterator[str]:
    fused = sum(kernel.product == "attention" for kernel in kernels)
    if fused >= expected.fused_attention:
        return
    # Activations are multiplied with each other, batch by batch; weights have two axes and no batch.
    apart = [
        k for k in kernels if k.product == "gemm" and len(k.factors) > 1 and all(len(f.shape) > 2 for f in k.factors)
    ]
    where = f": {_listed(apart)} run by themselves" if apart else ""
    cause = (
        "The product of queries and keys is done in float32, for which there is no fused kernel; only the softmax may be"
        if any("float" in kernel.types for kernel in apart)
        else "What lies between the two products keeps the compiler from joining them"
    )
    yield (
        f"Attention is not fused ({fused} of {expected.fused_attention} kernels){where}, so that a score for every pair of "
        f"tokens goes through memory, which the compiler does not count among the activations. {cause}. Export the checkpoint "
        "again with this version."
    )


def _quantized(kernels: Sequence[Kernel], expected: Expectation) -> Iterator[str]:
    """Merged products count once per linear; a product that a fused kernel does on dequantized values does not count."""
    wanted, dtype = expected.quantized_linears, expected.quantized_type
    products = [kernel for kernel in kernels if kernel.product in ("gemm", "convolution")]
    real = [kernel for kernel in products if _is_real(kernel, dtype)]
    count = sum(max(1, len(kernel.merged)) for kernel in real)
    if dtype is None or count >= wanted:
        return
    fake = [kernel for kernel in products if kernel not in real]
    fake = [kernel for kernel in fake if dtype in kernel.types] or fake  # those that read quantized weights tell more
    yield (
        f"Only {count} of {wanted} quantized linears are {dtype.upper()} products; the others compute on dequantized values, "
        f"slower than without quantization: {_listed(fake) or 'not among the kernels'}. The compiler does that without a "
        "warning where the scale of an activation is not a constant of the graph. Calibrate the bundle again with this version."
    )


def _is_real(kernel: Kernel, dtype: str | None) -> bool:
    """Both factors have the type (TensorRT lists one only, where the other is a constant); a bias or residual may differ."""
    return kernel.kind != "runtime_fusion" and kernel.types.count(str(dtype)) >= min(2, max(1, len(kernel.types)))


def _types(kernels: Sequence[Kernel], expected: Expectation) -> Iterator[str]:
    """One factor of an asked type is enough: the kernel narrows the other while it reads. What is unknown is not judged."""
    wrong: dict[frozenset[str], list[Kernel]] = {}
    for kernel in kernels:
        types = frozenset(kernel.types) - {"unknown"}
        if kernel.product and types and not types & expected.types:
            wrong.setdefault(types, []).append(kernel)
    asked = " and ".join(sorted(map(_in_words, expected.types)))
    for types, found in wrong.items():
        means = "several times slower" if "float" in types else "of another range and exactness"
        yield (
            f"Matrices are multiplied in {' and '.join(sorted(map(_in_words, types)))}, where {asked} was asked: "
            f"{_listed(found)}. That is {means}; the types stand in the graph. Export the checkpoint again with this version."
        )


def _weights(kernels: Sequence[Kernel], expected: Expectation) -> Iterator[str]:
    """A kernel that writes as many values as a weight matrix has, from that matrix, rewrites it: cast or transposed.

    It matters where a graph runs for every layer: `modulation` runs once per schedule, and the compiler widens its one-row
    products' small weights. Quantized weights are excused: where activations are not quantized too, dequantizing them is
    what was asked.
    """
    copies = [
        (kernel, weight.name)
        for kernel in kernels
        if graph_kind(expected.graph) in ATTENTION_GRAPHS and kernel.product is None
        for weight in kernel.inputs
        if weight.name.endswith("_weight") and weight.is_matrix and weight.dtype in _TYPES.values()
        if any(_same_size(weight, output) for output in kernel.outputs)
    ]
    if copies:
        names = ", ".join(dict.fromkeys(name for _, name in copies))
        yield (
            f"Weights are rewritten in every execution, into copies that take memory: {names} ({len(copies)} kernels). They must "
            "be inputs in the form in which they are multiplied, [in, out] and of the graph's type. Export the checkpoint again "
            "with this version."
        )


def _host(kernels: Sequence[Kernel], expected: Expectation) -> Iterator[str]:
    branches = [k for k in kernels if k.kind in _HOST_KINDS or "devicetoshapehost" in k.name.lower()]
    if branches:
        yield (
            f"The processor decides in the middle of graph {expected.graph!r} what runs next ({_listed(branches)}), and the GPU "
            "waits for it: an If, a Loop or a shape that depends on values. Export the checkpoint again with this version."
        )


def _same_size(a: Operand, b: Operand) -> bool:
    return sorted(n for n in a.shape if n != 1) == sorted(n for n in b.shape if n != 1)


def _listed(kernels: Sequence[Kernel], most: int = 6) -> str:
    """Kernels by their graph nodes, which people know; each with its kind and types."""
    names = [
        f"{'+'.join(k.merged or k.onnx[:4]) or k.name} ({' '.join((k.kind, '/'.join(dict.fromkeys(k.types)))).rstrip()})"
        for k in kernels[:most]
    ]
    return ", ".join(names) + (f" and {len(kernels) - most} more" if len(kernels) > most else "")


def _in_words(dtype: str) -> str:
    return {"float": "float32", "half": "float16"}.get(dtype, dtype)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
