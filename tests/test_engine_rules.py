"""Rules about engines, held against what TensorRT-RTX really makes of tiny graphs, right ones and wrong ones."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from dynamictrl_edge.bundle.errors import UsageError
from dynamictrl_edge.bundle.precision import Precision
from dynamictrl_edge.engines.report import Kernel, LayerReport, Operand, parse_log
from dynamictrl_edge.engines.rules import QuantizedType, broken_rules, expectation, heads_of
from tests.bundle_samples import TEXT, small_manifest
from tests.layer_logs import Case, built, recorded

FP8 = ("SM89", "SM120")
HALF_32ND, HALF_ONE = 10240, 15360  # 1/32 and 1 as float16 bits, which ONNX's text form wants


def quantized(dtype: str, *, scale_is_input: bool, capabilities: tuple[str, ...], weight_scale: int = HALF_ONE) -> Case:
    """Two linears with quantized activations and weights; weights are inputs, as in a bundle."""
    given, constant = (", float16 scale", "") if scale_is_input else ("", f"float16 scale = {{{HALF_32ND}}}, ")
    return Case(
        f"g (float16[M,128] x, {dtype}[128,256] a_weight, {dtype}[256,128] b_weight{given}) => (float16[M,128] y)"
        f"<{constant}float16 one = {{{weight_scale}}}, {dtype} zero = {{0}}> {{"
        "  [quantize_x] xq = QuantizeLinear (x, scale, zero)"
        "  [dequantize_x] xd = DequantizeLinear (xq, scale, zero)"
        "  [dequantize_a] a = DequantizeLinear (a_weight, one, zero)"
        "  [first_linear] h = MatMul (xd, a)"
        "  [gelu] g = Gelu (h)"
        "  [quantize_g] gq = QuantizeLinear (g, scale, zero)"
        "  [dequantize_g] gd = DequantizeLinear (gq, scale, zero)"
        "  [dequantize_b] b = DequantizeLinear (b_weight, one, zero)"
        "  [second_linear] y = MatMul (gd, b)"
        "}",
        capabilities,
    )


def attention(
    dtype: str = "float16", size: int = 64, *, scores_in_float: bool = False, float_softmax: bool = True
) -> Case:
    """softmax(q k) v over two heads of `size`; keys come transposed, [B, H, D, S]."""
    number = {"float16": 10, "bfloat16": 16, "float": 1}[dtype]
    q, k = ("qf", "kf") if scores_in_float else ("q", "k")
    casts = "[cast_q] qf = Cast<to = 1> (q)  [cast_k] kf = Cast<to = 1> (k)" if scores_in_float else ""
    widen = "[widen] sf = Cast<to = 1> (s)" if float_softmax and not scores_in_float else "[widen] sf = Identity (s)"
    extents = [((1, 2, 16, size), (2, 2, 256, size), (2, 2, 1024, size))] * 2
    return Case(
        f"g ({dtype}[B,2,S,{size}] q, {dtype}[B,2,{size},S] k, {dtype}[B,2,S,{size}] v) => ({dtype}[B,2,S,{size}] y) {{"
        f"  {casts}"
        f"  [scores] s = MatMul ({q}, {k})"
        f"  {widen}"
        "  [softmax] p = Softmax<axis = -1> (sf)"
        f"  [narrow] ph = Cast<to = {number}> (p)"
        "  [context] y = MatMul (ph, v)"
        "}",
        profiles=({"q": extents[0], "v": extents[1], "k": ((1, 2, size, 16), (2, 2, size, 256), (2, 2, size, 1024))},),
    )


LINEAR = "float16[M,128] x, float16[128,128] a_weight) => (float16[M,128] y)"
BRANCHES = (
    "then_branch = a () => (float16[M,128] t) { [taken] t = MatMul (x, a_weight) }, "
    "else_branch = b () => (float16[M,128] e) { [other] e = Mul (x, x) }"
)
CASES = {
    "int8": quantized("int8", scale_is_input=False, capabilities=("SM75", "SM86", "SM89", "SM120")),
    "fp8": quantized("float8e4m3fn", scale_is_input=False, capabilities=FP8),
    "int8, scale is an input": quantized("int8", scale_is_input=True, capabilities=("SM75", "SM86", "SM89", "SM120")),
    "fp8, scale is an input": quantized("float8e4m3fn", scale_is_input=True, capabilities=FP8, weight_scale=HALF_32ND),
    "int8 weights alone": Case(
        "g (float16[M,128] x, int8[128,128] a_weight) => (float16[M,128] y)"
        f"<float16 one = {{{HALF_ONE}}}, int8 zero = {{0}}> {{"
        "  [dequantize_a] a = DequantizeLinear (a_weight, one, zero)"
        "  [only_linear] y = MatMul (x, a)"
        "}"
    ),
    "three int8 linears in one": Case(
        "g (float16[M,128] x) => (float16[M,2] y)"
        f"<float16 scale = {{{HALF_32ND}}}, int8 zero = {{0}}, "
        + ", ".join(
            f"int8[128,2] {name}_constant = {{{','.join(['1', digit] * 128)}}}"
            for name, digit in zip("qkv", "234", strict=True)
        )
        + "> { [quantize_x] xq = QuantizeLinear (x, scale, zero)  [dequantize_x] xd = DequantizeLinear (xq, scale, zero)"
        + "".join(
            f"  [wd_{n}] {n}w = DequantizeLinear ({n}_constant, scale, zero)  [{n}] {n} = MatMul (xd, {n}w)"
            for n in "qkv"
        )
        + "  [sum] qk = Mul (q, k)  [all] y = Add (qk, v) }"
    ),
    "attention fp16": dataclasses.replace(attention(), capabilities=("SM75", "SM86", "SM89", "SM120")),
    "attention bf16": attention("bfloat16"),
    "attention fp32": attention("float"),
    "attention, scores in float32": attention(scores_in_float=True),
    "attention, narrow heads": attention(size=8),
    "float32 linear": Case(
        "g (float16[M,128] x, float[128,256] a_weight, float16[256,128] b_weight) => (float16[M,128] y) {"
        "  [widen] xf = Cast<to = 1> (x)"
        "  [island] h = MatMul (xf, a_weight)"
        "  [narrow] n = Cast<to = 10> (h)"
        "  [rest] y = MatMul (n, b_weight)"
        "}"
    ),
    "float32 input, narrowed": Case(
        "g (float[M,128] x, bfloat16[128,128] a_weight, bfloat16[128] a_bias) => (bfloat16[M,128] y) {"
        "  [narrow] n = Cast<to = 16> (x)"
        "  [linear] h = MatMul (n, a_weight)"
        "  [bias] y = Add (h, a_bias)"
        "}"
    ),
    "float32 convolution": Case(
        "g (float[1,16,T,64,64] x, float[16,16,3,3,3] a_weight) => (float[1,16,T2,64,64] y) {"
        "  [conv] y = Conv<pads = [0,1,1,0,1,1], kernel_shape = [3,3,3]> (x, a_weight)"
        "}",
        profiles=({"x": ((1, 16, 3, 64, 64), (1, 16, 5, 64, 64), (1, 16, 9, 64, 64))},),
    ),
    "weight cast every time": Case(
        "g (float16[M,1024] x, float[1024,2048] a_weight) => (float16[M,2048] y) {"
        "  [narrow_weight] w = Cast<to = 10> (a_weight)"
        "  [linear] y = MatMul (x, w)"
        "}",
        profiles=({"x": ((1, 1024), (4096, 1024), (4096, 1024))},),
    ),
    "a branch": Case(f"g (bool c, {LINEAR} {{ [branch] y = If<{BRANCHES}> (c) }}"),
    "two profiles": Case(
        "g (float16[M,128] x, float[128,256] a_weight) => (float[M,256] y) {"
        "  [widen] xf = Cast<to = 1> (x)"
        "  [island] y = MatMul (xf, a_weight)"
        "}",
        profiles=({"x": ((1, 128), (8, 128), (16, 128))}, {"x": ((1, 128), (512, 128), (4096, 128))}),
    ),
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LayerReport]:
    return {name: parse_log("g", log) for name, log in built(CASES, tmp_path_factory.mktemp("logs")).items()}


@pytest.mark.parametrize(
    ("log", "graph", "precision"),
    [
        ("block_fp16", "block", "fp16"),
        ("block_fp32", "block", "fp32"),
        ("text_block_bf16", "text_block", "bf16"),
        ("stem_bf16", "stem", "bf16"),
        ("vae_decoder_first_fp16", "vae_decoder_first", "fp16"),
    ],
)
def test_engines_of_exported_bundles_break_no_rule(log: str, graph: str, precision: Precision) -> None:
    report = parse_log(graph, recorded(log))
    assert broken_rules(report, expectation(graph, precision, activation_budget=100_000_000)) == []


@pytest.mark.parametrize(
    ("case", "graph", "precision", "linears", "dtype"),
    [
        ("int8", "head", "fp16", 2, "int8"),
        ("fp8", "head", "fp16", 2, "fp8"),
        ("int8 weights alone", "head", "fp16", 0, None),
        ("three int8 linears in one", "vae_encoder_first", "fp16", 3, "int8"),
        ("attention fp16", "block", "fp16", 0, None),
        ("attention bf16", "text_block", "bf16", 0, None),
        ("attention fp32", "block", "fp32", 0, None),
        ("attention, narrow heads", "text_block", "fp16", 0, None),
        ("float32 input, narrowed", "stem", "bf16", 0, None),
        ("float32 convolution", "vae_encoder_first", "fp32", 0, None),
    ],
)
def test_graphs_made_as_they_must_be_break_no_rule(
    case: str,
    graph: str,
    precision: Precision,
    linears: int,
    dtype: QuantizedType | None,
    reports: dict[str, LayerReport],
) -> None:
    size = 8 if "narrow" in case else 64
    wanted = expectation(
        graph, precision, heads=(2, size) if size else None, quantized_linears=linears, quantized_type=dtype
    )
    assert broken_rules(reports[case], wanted) == []


@pytest.mark.parametrize(("dtype", "fake"), [("int8", "gemm half"), ("fp8", "runtime_fusion fp8/half")])
def test_a_scale_that_is_an_input_makes_fake_quantization_which_is_refused(
    dtype: QuantizedType, fake: str, reports: dict[str, LayerReport]
) -> None:
    report = reports[f"{dtype}, scale is an input"]
    (reason,) = broken_rules(report, expectation("head", "fp16", quantized_linears=2, quantized_type=dtype))
    assert reason.startswith(f"Only 0 of 2 quantized linears are {dtype.upper()} products")
    assert "first_linear" in reason
    assert "second_linear" in reason
    assert reason.count(f"({fake})") == 2
    assert "not a constant" in reason
    assert "Calibrate the bundle again" in reason


def test_one_linear_too_few_is_noticed(reports: dict[str, LayerReport]) -> None:
    for case, linears in (("int8", 3), ("three int8 linears in one", 4)):
        wanted = expectation("vae_encoder_first", "fp16", quantized_linears=linears, quantized_type="int8")
        (reason,) = broken_rules(reports[case], wanted)
        assert f"Only {linears - 1} of {linears}" in reason
        assert broken_rules(reports[case], dataclasses.replace(wanted, quantized_linears=linears - 1)) == []
    wanted = expectation("head", "fp16", quantized_linears=1, quantized_type="int8")
    (reason,) = broken_rules(reports["int8 weights alone"], wanted)
    assert "only_linear" in reason  # quantized weights alone are no quantized linear


def kernel(kind: str, *types: str) -> Kernel:
    operands = tuple(Operand("x", dtype, (-1, 64)) for dtype in types)
    name = "__myl_FcAdd_myl0_1" if kind == "runtime_fusion" else "fc_myl0_1"
    return Kernel(name=name, kind=kind, tactic="", inputs=operands, constants=(), outputs=(), onnx=("fc",))


def alone(made: Kernel) -> LayerReport:
    return LayerReport(graph="head", kernels=(made,), activation_bytes=0, scratch_bytes=0, weights_bytes=0)


@pytest.mark.parametrize(
    ("made", "real"),
    [
        (kernel("gemm", "int8", "int8"), True),
        (kernel("correlation", "int8", "int8", "half"), True),  # a residual is added in half
        (kernel("gemm", "int8"), True),  # TensorRT does not list a weight that is a constant
        (kernel("gemm", "int8", "half"), False),
        (kernel("gemm", "half", "half"), False),
        (kernel("gemm"), False),
        (kernel("runtime_fusion", "int8", "int8"), False),
        (kernel("kgen", "int8", "int8"), False),
    ],
)
def test_a_quantized_linear_is_a_product_whose_factors_both_have_the_type(made: Kernel, real: bool) -> None:
    reasons = broken_rules(alone(made), expectation("head", "fp16", quantized_linears=1, quantized_type="int8"))
    assert (reasons == []) is real
    assert real or reasons[0].startswith("Only 0 of 1")


@pytest.mark.parametrize("graph", ["block", "text_block"])
def test_scores_in_float32_break_the_fusion_of_attention(graph: str, reports: dict[str, LayerReport]) -> None:
    reasons = broken_rules(reports["attention, scores in float32"], expectation(graph, "fp16", heads=(2, 64)))
    assert len(reasons) == 2
    assert reasons[0].startswith("Attention is not fused (0 of 1 kernels): scores (gemm float), context (gemm half)")
    assert "queries and keys is done in float32" in reasons[0]
    assert reasons[1].startswith("Matrices are multiplied in float32, where float16 was asked: scores (gemm float)")
    # Other graphs have no attention.
    assert len(broken_rules(reports["attention, scores in float32"], expectation("conditioning", "fp16"))) == 1


def test_attention_of_narrow_heads_is_excused_only_by_their_size(reports: dict[str, LayerReport]) -> None:
    report = reports["attention, narrow heads"]
    assert report.fused_attention == 0
    (reason,) = broken_rules(report, expectation("text_block", "fp16"))
    assert "Attention is not fused" in reason
    assert "keeps the compiler from joining them" in reason
    assert broken_rules(report, expectation("text_block", "fp16", heads=(4, 8))) == []
    assert broken_rules(report, expectation("text_block", "fp16", heads=(1, 64))) == []
    assert broken_rules(report, expectation("text_block", "fp16", heads=(2, 64))) != []


def test_attention_that_is_missing_altogether_is_noticed(reports: dict[str, LayerReport]) -> None:
    (reason,) = broken_rules(reports["float32 input, narrowed"], expectation("block", "bf16"))
    assert reason.startswith("Attention is not fused (0 of 1 kernels), so that")


@pytest.mark.parametrize(
    ("case", "precision", "words"),
    [
        ("float32 linear", "fp16", ("in float32, where float16 was asked", "island", "slower")),
        ("float32 convolution", "bf16", ("in float32, where bfloat16 was asked", "conv (correlation float)", "slower")),
        ("attention bf16", "fp16", ("in bfloat16, where float16 was asked", "context", "range")),
        ("attention fp16", "bf16", ("in float16, where bfloat16 was asked", "context", "range")),
        ("attention fp16", "fp32", ("in float16, where float32 was asked", "context", "range")),
        ("int8", "fp16", ("in int8, where float16 was asked", "first_linear", "second_linear")),
    ],
)
def test_products_in_a_type_that_was_not_asked_are_refused(
    case: str, precision: Precision, words: tuple[str, ...], reports: dict[str, LayerReport]
) -> None:
    (reason,) = broken_rules(reports[case], expectation("vae_decoder_next", precision))
    for word in words:
        assert word in reason


def test_one_factor_of_the_asked_type_is_enough_and_unknown_types_are_not_judged() -> None:
    wanted = expectation("head", "bf16")
    for types in (("float", "bfloat16"), ("unknown", "unknown"), ()):
        assert broken_rules(alone(kernel("gemm", *types)), wanted) == []
    (reason,) = broken_rules(alone(kernel("gemm", "float", "half")), wanted)
    assert "multiplied in float16 and float32, where bfloat16 was asked" in reason


PER_LAYER = dataclasses.replace(expectation("block", "fp16"), fused_attention=0)  # its weights are inputs


def test_a_product_with_one_row_reads_a_weight_but_rewrites_nothing() -> None:
    made = msgspec.structs.replace(
        kernel("kgen"), inputs=(Operand("ofs_weight", "half", (64, 64)),), outputs=(Operand("y", "half", (1, 64)),)
    )
    assert broken_rules(alone(made), PER_LAYER) == []
    copied = msgspec.structs.replace(made, outputs=(Operand("y", "half", (1, 64, 64)),))
    assert "ofs_weight" in broken_rules(alone(copied), PER_LAYER)[0]
    # Graphs that run once per schedule or hold their weights may.
    for graph in ("head_modulation", "vae_encoder_next"):
        assert broken_rules(alone(copied), expectation(graph, "fp16")) == []


def test_in_an_engine_of_two_profiles_each_is_held_against_the_rules(reports: dict[str, LayerReport]) -> None:
    reasons = broken_rules(reports["two profiles"], expectation("head", "fp16"))
    assert [reason[:26] for reason in reasons] == ["In optimization profile 0:", "In optimization profile 1:"]


def test_weights_that_are_rewritten_in_every_execution_are_named(reports: dict[str, LayerReport]) -> None:
    (reason,) = broken_rules(reports["weight cast every time"], PER_LAYER)
    assert reason.startswith("Weights are rewritten in every execution")
    assert "a_weight (1 kernels)" in reason


def test_a_branch_that_the_processor_decides_is_refused(reports: dict[str, LayerReport]) -> None:
    (reason,) = broken_rules(reports["a branch"], expectation("head", "fp16"))
    assert reason.startswith("The processor decides in the middle of graph 'head'")
    assert "branch (cjmp)" in reason


def test_activations_over_budget_are_refused_with_what_to_change() -> None:
    report = parse_log("block", recorded("block_fp16"))
    need = report.activation_bytes
    assert broken_rules(report, expectation("block", "fp16", activation_budget=need)) == []
    (reason,) = broken_rules(report, expectation("block", "fp16", activation_budget=need - 1))
    assert "9.7 MB for activations" in reason
    assert "--size" in reason
    tile = parse_log("vae_decoder_first", recorded("vae_decoder_first_fp16"))
    (reason,) = broken_rules(tile, expectation("vae_decoder_first", "fp16", activation_budget=50_000_000))
    assert "95.2 MB for activations, more than the 50.0 MB" in reason
    assert "--tile" in reason


def test_constants_are_refused_where_weights_are_inputs() -> None:
    heavy = msgspec.structs.replace(parse_log("stem", recorded("stem_bf16")), weights_bytes=226_000_000)
    (reason,) = broken_rules(heavy, expectation("stem", "bf16"))
    assert "226.0 MB of constants" in reason
    assert "'stem'" in reason
    assert broken_rules(heavy, expectation("vae_encoder_next", "bf16")) == []


def test_a_constant_weight_counts_in_the_compilers_figure(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A weight that became part of the graph is seen in a real log, not only in a figure of ours."""
    numbers = ",".join(["1", "-2", "3", "0"] * (64 * 128 // 4))
    constant = f"float[64,128] w = {{{numbers}}}"
    graph = f"g (float16[M,64] x) => (float16[M,128] y) <{constant}> {{ c = Cast<to = 10> (w) y = MatMul (x, c) }}"
    case = Case(graph, profiles=({"x": ((1, 64), (8, 64), (16, 64))},))
    report = parse_log("head", built({"constant": case}, tmp_path_factory.mktemp("constant"))["constant"])
    assert report.weights_bytes >= 2 * 64 * 128
    wanted = dataclasses.replace(expectation("head", "fp16"), constants_limit=10_000)
    assert "of constants" in broken_rules(report, wanted)[0]


def test_all_that_is_wrong_is_told_at_once(reports: dict[str, LayerReport]) -> None:
    report = msgspec.structs.replace(reports["attention, scores in float32"], weights_bytes=10**9)
    wanted = expectation("block", "fp16", quantized_linears=4, quantized_type="int8", activation_budget=1)
    reasons = broken_rules(report, wanted)
    assert len(reasons) == 5
    assert all(reason.endswith(".") for reason in reasons)


def test_an_expectation_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="int3"):
        expectation("block", "int3")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="4 linears of graph 'block'"):
        expectation("block", "fp16", quantized_linears=4)


def test_heads_come_from_the_bundle() -> None:
    manifest = msgspec.structs.replace(small_manifest({}), text=TEXT)
    assert heads_of(manifest, "block") == (2, 64)
    assert heads_of(manifest, "text_block") == (4, 8)
    assert heads_of(manifest, "stem") is None
    assert heads_of(small_manifest({}), "text_block") == (4, 8)
    assert heads_of(msgspec.structs.replace(manifest, text=None), "text_block") is None
