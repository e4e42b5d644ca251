"""What is read from a compiler's log or inspector: recorded logs, graphs built now, and damage."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamictrl_edge.bundle.errors import BundleError
from dynamictrl_edge.engines.report import (
    Kernel,
    LayerReport,
    Operand,
    describe,
    parse_inspector_json,
    parse_log,
    read_report,
    write_report,
)
from tests.layer_logs import RECORDED, Case, built, recorded

MEMORY = ["Max Scratch Memory: 7 bytes", "Total Activation Memory: 9 bytes", "Total Weights Memory: 5 bytes"]
LINE = (
    "Name: fc_myl0_1, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [-1,8], Strides: [8,1], StrideOrder: [1,0], "
    "Datatype: Half, Format: (Linear) Row major linear format }], Constants: [], Outputs: [ { Name: y, Dimensions: [], "
    "Strides: [], StrideOrder: [], Datatype: Float, Format: (Linear) Row major linear format }], "
    "TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: fc]"
)


def types_of(kernels: tuple[Kernel, ...]) -> list[tuple[str, ...]]:
    return [kernel.types for kernel in kernels]


@pytest.mark.parametrize("name", RECORDED)
def test_every_layer_of_a_recorded_log_is_read_whole(name: str) -> None:
    messages = recorded(name)
    report = parse_log(name, messages)
    text = next(message for message in messages if message.startswith("Layers:")).partition("\n\n")[0]
    assert len(report.kernels) == len(re.findall(r"^Name: ", text, re.MULTILINE))
    tensors = [o for k in report.kernels for o in k.inputs + k.constants + k.outputs]
    assert len(tensors) == text.count("{ Name: ")
    assert {tensor.dtype for tensor in tensors} <= {"float", "half", "bfloat16", "int32", "int64"}
    assert sum(len(kernel.onnx) for kernel in report.kernels) == text.count("[ONNX Layer: ")
    assert report.scratch_bytes > 0
    assert report.activation_bytes >= report.scratch_bytes


def test_a_half_precision_block_has_four_half_gemms_and_one_fused_attention() -> None:
    report = parse_log("block", recorded("block_fp16"))
    assert len(report.kernels) == 17
    assert report.kinds == {"kgen": 12, "gemm": 4, "shape_call": 1}
    assert types_of(report.gemms) == [("half", "half")] * 4
    assert [kernel.merged for kernel in report.gemms] == [
        ("node_matmul",),
        ("node_matmul_3",),
        ("node_matmul_4",),
        ("node_matmul_5",),
    ]
    assert report.fused_attention == 1
    assert (report.activation_bytes, report.scratch_bytes, report.weights_bytes) == (9716224, 9716224, 514)
    attention = next(kernel for kernel in report.products if kernel.product == "attention")
    assert attention.tactic.startswith("_gemm_mha_v2_0x")
    assert set(attention.onnx) >= {"node_matmul_1", "node_softmax", "node_matmul_2"}
    qkv = report.gemms[0]
    assert qkv.inputs[1] == Operand("qkv_weight", "half", (128, 384))
    assert [operand.dtype for operand in qkv.constants] == ["float", "float"]  # alpha and beta, not what is multiplied


def test_a_float32_block_has_six_float_gemms_and_no_fused_attention() -> None:
    report = parse_log("block", recorded("block_fp32"))
    assert types_of(report.gemms) == [("float", "float")] * 6
    assert report.fused_attention == 0


def test_gemms_fused_with_their_neighbours_are_found() -> None:
    text = parse_log("text_block", recorded("text_block_bf16"))
    assert sorted(kernel.kind for kernel in text.gemms) == ["gemm", "gemm", "gemm", "runtime_fusion"]
    assert text.fused_attention == 1
    stem = parse_log("stem", recorded("stem_bf16"))
    assert types_of(stem.gemms) == [("float", "bfloat16", "bfloat16")]  # noise is narrowed by the kernel; a full bias


def test_a_vae_decoder_has_a_kernel_for_each_of_its_68_convolutions() -> None:
    report = parse_log("vae_decoder_first", recorded("vae_decoder_first_fp16"))
    assert [kernel.product for kernel in report.products] == ["convolution"] * 68
    assert {dtype for kernel in report.products for dtype in kernel.types} == {"half"}
    assert not report.gemms


ODD = "plain, LayerType: gemm, Inputs: [x] { Name: }"
CASES = {
    "two profiles, odd names": Case(
        "g (float16[M,128] x, float[128,256] a_weight, float16[256,128] b_weight) => (float16[M,128] y) {"
        "  [cast] wide = Cast<to = 1> (x)"
        '  ["island/Mat Mul, [0]"] h = MatMul (wide, a_weight)'
        "  [narrow] n = Cast<to = 10> (h)"
        "  [gelu] g = Gelu (n)"
        f'  ["{ODD}"] y = MatMul (g, b_weight)'
        "}",
        profiles=({"x": ((1, 128), (64, 128), (256, 128))}, {"x": ((1, 128), (512, 128), (4096, 128))}),
    ),
}


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return built(CASES, tmp_path_factory.mktemp("logs"))


def test_names_with_commas_and_brackets_and_two_profiles_come_out_of_a_real_log(logs: dict[str, list[str]]) -> None:
    report = parse_log("g", logs["two profiles, odd names"])
    first, second = report.profiles
    assert [kernel.kind for kernel in first] == [kernel.kind for kernel in second]
    assert {kernel.profile for kernel in second} == {1}
    for kernels in (first, second):
        gemms = [kernel for kernel in kernels if kernel.product == "gemm"]
        assert [kernel.types for kernel in gemms] == [("float", "float"), ("half", "half")]
        assert gemms[0].product == "gemm" and gemms[0].merged == ()  # fused: its name tells operations, not nodes
        assert set(gemms[0].onnx) == {"island/Mat Mul, [0]", "narrow", "gelu"}
        assert gemms[1].merged == gemms[1].onnx == (ODD,)
    figures = [int(m.split()[-2]) for m in logs["two profiles, odd names"] if m.startswith("Total Activation")]
    assert len(figures) == 2
    assert report.activation_bytes == max(figures)


nasty = st.text(st.sampled_from("ab1_ ,.:/+[]{}()\x1e"), min_size=1, max_size=20)
shapes = st.lists(st.integers(-1, 4096), max_size=5).map(tuple)
operands = st.lists(
    st.builds(Operand, nasty, st.sampled_from(["half", "float", "bfloat16", "int8", "fp8", "int64", "bool"]), shapes),
    max_size=3,
).map(tuple)
kernels = st.builds(
    Kernel,
    name=nasty,
    kind=st.sampled_from(["gemm", "kgen", "runtime_fusion"]),
    tactic=st.sampled_from(["", "__myl_FcAdd_0x12", "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_tilesize32x32x64"]),
    inputs=operands,
    constants=operands,
    outputs=operands,
    onnx=st.lists(nasty.filter(lambda name: "\x1e" not in name), unique=True, max_size=3).map(tuple),
)
WRITTEN = {
    "half": "Half",
    "float": "Float",
    "bfloat16": "BFloat16",
    "int8": "Int8",
    "fp8": "FP8",
    "int64": "Int64",
    "bool": "Bool",
}


def as_logged(kernel: Kernel) -> str:
    def tensors(operands: tuple[Operand, ...]) -> str:
        texts = [
            f"{{ Name: {o.name}, Dimensions: [{','.join(map(str, o.shape))}], Strides: [1], StrideOrder: [0], "
            f"Datatype: {WRITTEN[o.dtype]}, Format: (Arbitrary) Format with stride order = [1,2,0] }}"
            for o in operands
        ]
        return f"[ {', '.join(texts)}]" if texts else "[]"

    return (
        f"Name: {kernel.name}, LayerType: {kernel.kind}, Inputs: {tensors(kernel.inputs)}, Constants: "
        f"{tensors(kernel.constants)}, Outputs: {tensors(kernel.outputs)}, TacticName: {kernel.tactic}, StreamId: 0, Metadata: "
        + "".join(f"[ONNX Layer: {name}]" for name in kernel.onnx)
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(kernels, min_size=1, max_size=3))
def test_whatever_the_names_are_a_log_is_read_back(made: list[Kernel]) -> None:
    log = "Layers:\n" + "\n".join(map(as_logged, made)) + "\n\nI/O Tensors:\n Name: x, IOMode: Input\n"
    assert parse_log("g", [*MEMORY, log]).kernels == tuple(made)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_torn_list_of_layers_is_refused_or_read(data: st.DataObject) -> None:
    text = "\n".join(["Layers:", *[LINE] * 3])
    start = data.draw(st.integers(0, len(text)))
    torn = text[:start] + text[data.draw(st.integers(start, len(text))) :]
    try:
        report = parse_log("block", [*MEMORY, torn])
    except BundleError as refusal:
        assert "'block'" in str(refusal)
    else:
        assert all(kernel.kind for kernel in report.kernels)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "no list of layers"),
        (MEMORY, "no list of layers"),
        ([*MEMORY[:1], MEMORY[2], f"Layers:\n{LINE}"], "activation memory"),
        ([*MEMORY[1:], f"Layers:\n{LINE}"], "scratch memory"),
        ([*MEMORY[:2], f"Layers:\n{LINE}"], "weights memory"),
        ([*MEMORY, "Layers:\nConv_0 + Relu_1\nMatMul_2\n\nBindings:\nx"], "names of layers only"),
        ([*MEMORY, "Layers:\n"], "names of layers only, or none"),
    ],
)
def test_a_log_that_lacks_something_says_what_and_how_to_get_it(messages: list[str], words: str) -> None:
    with pytest.raises(BundleError, match=words) as refusal:
        parse_log("head", messages)
    assert "'head'" in str(refusal.value)
    assert "DETAILED" in str(refusal.value)
    assert "VERBOSE" in str(refusal.value)


def test_a_layer_in_another_form_is_refused_and_shown() -> None:
    with pytest.raises(BundleError, match="Tensors: none"):
        parse_log("head", [*MEMORY, f"Layers:\n{LINE}\nName: odd, Tensors: none"])


@pytest.mark.parametrize("shape", ["[-1,]", "[,8]", "[8,,8]", "[eight]", "-1,8"])
def test_a_tensor_in_another_form_is_not_passed_over(shape: str) -> None:
    with pytest.raises(BundleError, match="cannot read"):
        parse_log("head", [*MEMORY, "Layers:\n" + LINE.replace("[-1,8]", shape)])


def test_of_several_builds_with_one_logger_the_last_counts() -> None:
    later = [message.replace("9", "4") for message in MEMORY]
    report = parse_log("g", [*MEMORY, f"Layers:\n{LINE}\n{LINE}", *later, f"Layers:\n{LINE}"])
    assert len(report.kernels) == 1
    assert report.activation_bytes == 4


def test_tensorrts_one_line_form_is_the_same() -> None:
    """As TensorRT 10 writes it: no constants, type and format in one word, control characters between nodes."""
    gemm = (
        "Name: /q/MatMul+/k/MatMul_myl0_16, LayerType: gemm, Inputs: [ { Name: __mye1, Location: Device, Dimensions: "
        "[1,40,256], Format/Datatype: Half }], Outputs: [ { Name: __mye2, Location: Device, Dimensions: [2,40,256], "
        "Format/Datatype: Half }], TacticName: sm80_xmma_gemm_f16f16, TacticValue: 0x12, StreamId: 0, Metadata: "
        "[ONNX Layer: /q/MatMul]\x1e[ONNX Layer: /k/MatMul]\x1f[ONNX Layer: /k/Add]"
    )
    reformat = (
        "Name: Reformatting CopyNode for Input Tensor 0 to conv, LayerType: Reformat, Inputs: [ { Name: x, Location: Device, "
        "Dimensions: [1,3,8,8], Format/Datatype: Row major linear FP32 }], Outputs: [ { Name: r, Location: Device, Dimensions: "
        "[1,3,8,8], Format/Datatype: Thirty-two wide channel vectorized row major Int8 format }], ParameterType: Reformat, "
        "Origin: REFORMAT, TacticValue: 0x00000000000003e8, StreamId: 0, Metadata: "
    )
    report = parse_log("g", [*MEMORY, f"Layers:\n{gemm}\n{reformat}\n\nBindings:\nx\ny\n"])
    first, second = report.kernels
    assert first.merged == ("/q/MatMul", "/k/MatMul")
    assert first.onnx == ("/q/MatMul", "/k/MatMul", "/k/Add")
    assert (first.tactic, first.types, first.product) == ("sm80_xmma_gemm_f16f16", ("half",), "gemm")
    assert [operand.dtype for operand in second.inputs + second.outputs] == ["float", "int8"]
    assert second.product is None


def test_a_graph_node_that_is_called_mha_is_no_fused_attention() -> None:
    line = LINE.replace("Name: fc_myl0_1", "Name: /encoder/mha/fmha/fc_myl0_1")
    assert parse_log("g", [*MEMORY, f"Layers:\n{line}"]).fused_attention == 0


def layer(**changes: object) -> dict[str, object]:
    tensor = {"Name": "x", "Location": "Device", "Dimensions": [1, -1, 64], "Format/Datatype": "Half"}
    return {
        "Name": "_gemm_mha_v2_myl0_17",
        "LayerType": "kgen",
        "Inputs": [tensor, tensor | {"Format/Datatype": "Row major linear FP16 format"}],
        "Outputs": [tensor | {"Datatype": "BFloat16", "Format/Datatype": "N/A due to dynamic shapes"}],
        "TacticName": "_gemm_mha_v2_0x957a",
        "StreamId": 0,
        "Metadata": "[ONNX Layer: qk]\x1e[ONNX Layer: softmax]",
    } | changes


def inspected(*layers: object) -> str:
    # As the inspector prints it: control characters in names are not escaped.
    return json.dumps({"Layers": layers, "Bindings": ["x"]}).replace("\\u001e", "\x1e")


def test_the_inspectors_json_gives_the_same_report() -> None:
    conv = layer(Name="conv + relu", LayerType="CaskConvolution", TacticName="sm80_xmma_fprop_int8", Metadata="")
    text = inspected(layer(), conv, layer(Name="_gemm_mha_v2 [profile 1]_myl1_17"))
    report = parse_inspector_json("block", text, activation_bytes=3, weights_bytes=2)
    attention = report.kernels[0]
    assert attention.onnx == ("qk", "softmax")
    assert attention.types == ("half", "half")
    assert attention.outputs == (Operand("x", "bfloat16", (1, -1, 64)),)
    assert [kernel.product for kernel in report.kernels] == ["attention", "convolution", "attention"]
    assert [kernel.profile for kernel in report.kernels] == [0, 0, 1]
    assert (report.activation_bytes, report.weights_bytes, report.scratch_bytes) == (3, 2, 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (inspected("conv + relu", "fc"), "DETAILED"),
        (inspected(layer(), "fc"), "DETAILED"),
        (inspected(), "DETAILED"),
        ("", "cannot be read"),
        ('{"Layers": [', "cannot be read"),
        ('{"Bindings": []}', "Layers"),
        (inspected({"Name": "fc"}), "LayerType"),
        (inspected(layer(Inputs=[{"Name": "x", "Dimensions": ["a"]}])), "Dimensions"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_inspector_output_that_cannot_serve_is_refused(text: str, words: str) -> None:
    with pytest.raises(BundleError, match=words) as refusal:
        parse_inspector_json("block", text, activation_bytes=0, weights_bytes=0)
    assert "'block'" in str(refusal.value)


@pytest.mark.parametrize("name", RECORDED)
def test_a_report_is_read_back_as_it_was_written_and_is_small(name: str, tmp_path: Path) -> None:
    report = parse_log(name, recorded(name))
    path = tmp_path / "report.json"
    write_report(path, report)
    assert read_report(path) == report
    assert path.stat().st_size < 150_000
    assert path.read_text().count("\n") == len(report.kernels) + 2  # a kernel per line, for people and diffs


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: b"", "damaged"),
        (lambda data: data[: len(data) // 2], "damaged"),
        (lambda data: data.replace(b'"kind"', b'"sort"', 1), "kind"),
        (lambda data: data.replace(b'"scratch_bytes":', b'"scratch_bytes":-'), "damaged"),
        (lambda data: data.replace(b"block", b"bl\xffck"), "damaged"),
        (lambda data: b"[" * 100_000, "damaged"),
    ],
)
def test_a_damaged_report_is_refused_by_name(damage: Callable[[bytes], bytes], words: str, tmp_path: Path) -> None:
    path = tmp_path / "block.report.json"
    write_report(path, parse_log("block", recorded("block_fp16")))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BundleError, match=words) as refusal:
        read_report(path)
    assert "block.report.json" in str(refusal.value)


def test_a_missing_report_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"There is no layer report .*block\.json"):
        read_report(tmp_path / "block.json")
    with pytest.raises(BundleError, match="Cannot read"):
        read_report(tmp_path)


def test_a_report_of_nothing_is_written_too(tmp_path: Path) -> None:
    empty = LayerReport(graph="g", kernels=(), activation_bytes=0, scratch_bytes=0, weights_bytes=0)
    write_report(tmp_path / "r.json", empty)
    assert read_report(tmp_path / "r.json") == empty
    assert empty.profiles == ((),)
    assert describe(empty)[1:3] == ["products: none", "attention: no fused kernel"]


def test_a_report_is_described_in_four_lines() -> None:
    assert describe(parse_log("block", recorded("block_fp16"))) == [
        "17 kernels: 12 kgen, 4 gemm, 1 shape_call",
        "products: 4 gemm half",
        "attention: 1 fused",
        "memory: activations 9.7 MB, scratch 9.7 MB, weights 0.0 MB",
    ]
    report = parse_log("stem", recorded("stem_bf16"))
    assert describe(report)[1] == "products: 1 gemm float/bfloat16"
    assert describe(msgspec.structs.replace(report, kernels=()))[0] == "0 kernels: none"
