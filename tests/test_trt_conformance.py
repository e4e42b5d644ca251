"""Our code uses nothing of TensorRT that a version it supports lacks, except behind a gate that names it."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from textwrap import dedent

import pytest

from tests.trt_snapshot import ALL, BUILDERS, snapshot
from tests.trt_usage import problems, uses

ROOT = Path(__file__).parent.parent
OLD, NEW, RTX, LEAN = "tensorrt-10.3.0", "tensorrt-11.4.0.106", "tensorrt_rtx-1.7.1.116", "tensorrt_lean-11.4.0.106"


@cache
def program() -> dict[str, str]:
    """Every file that may touch TensorRT, by module name."""
    files = [path for folder in ("engines", "runtime") for path in sorted((ROOT / folder).rglob("*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    return {name: path.read_text() for name, path in zip(names, files, strict=True)}


def checked(version: str) -> set[str]:
    """The files that must work with `version`: the lean runtime has no builder, so only `runtime/` is its business."""
    return {name for name in program() if name.split(".")[0] == "runtime" or version in BUILDERS}


@pytest.mark.parametrize("version", ALL)
def test_the_program_uses_only_what_the_version_has(version: str) -> None:
    found = problems(program(), version, within=checked(version))
    assert not found, "\n".join(map(str, found))


@pytest.mark.parametrize("version", BUILDERS)
def test_the_check_sees_the_builder_at_work(version: str) -> None:
    seen = uses({"engines.builder": program()["engines.builder"]}, version)
    expected = {
        "Builder.create_network",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "INetworkDefinition.get_input",
        "ITensor.shape",
        "OnnxParser",
        "ILogger.__init__",
        "ProfilingVerbosity.DETAILED",
    }
    assert expected <= seen
    assert ("Builder.build_serialized_network_to_stream" in seen) == (version != OLD)


RUNTIME = "runtime.backends.tensorrt"


@pytest.mark.parametrize("version", ALL)
def test_the_check_sees_the_runtime_at_work(version: str) -> None:
    seen = uses({RUNTIME: program()[RUNTIME]}, version)
    everywhere = {
        "Runtime.deserialize_cuda_engine",
        "ExecutionContextAllocationStrategy.USER_MANAGED",
        "ICudaEngine.create_execution_context",
        "ICudaEngine.device_memory_size_v2",
        "IExecutionContext.set_input_shape",
        "IExecutionContext.set_tensor_address",
        "IExecutionContext.set_device_memory",
        "IExecutionContext.execute_async_v3",
    }
    assert everywhere <= seen
    assert ("ICudaEngine.create_runtime_config" in seen) == (version != OLD)
    for name in ("IRuntimeConfig.set_runtime_cache", "IRuntimeCache.serialize"):
        assert (name in seen) == (version == RTX)


@pytest.mark.parametrize(
    ("line", "lacking"),
    [
        ("engine.device_memory_size", (NEW, RTX, LEAN)),
        ("engine.create_execution_context_without_device_memory()", (NEW, RTX, LEAN)),
        ("engine.create_runtime_config()", (OLD,)),
        ("engine.create_execution_context().is_stream_capturable(0)", tuple(v for v in ALL if v != RTX)),
        ("engine.create_execution_context().execute_async_v2(0)", ALL),
    ],
)
def test_a_call_planted_into_the_runtime_is_found(line: str, lacking: tuple[str, ...]) -> None:
    source = program()[RUNTIME]
    anchor = "        if engine is None:\n"
    assert source.count(anchor) == 1
    planted = {RUNTIME: source.replace(anchor, f"        {line}\n{anchor}")}
    assert tuple(version for version in ALL if problems(planted, version)) == lacking


# Calls planted into the real builder: (function, line put in front of its body, versions that lack it)
OLD_ONLY_FLAGS = (NEW, RTX)
PLANTED = [
    ("build_engine", "trt.BuilderFlag.FP16", OLD_ONLY_FLAGS),
    ("build_engine", "trt.Builder(None).platform_has_fast_fp16", OLD_ONLY_FLAGS),
    ("_parse", "parser.supports_model(b'')", OLD_ONLY_FLAGS),
    ("_parse", "network.get_input(0).set_dynamic_range(0.0, 1.0)", OLD_ONLY_FLAGS),
    ("_parse", "network.get_input(0).dtype = trt.float32", OLD_ONLY_FLAGS),
    ("_parse", "network.add_attention", (OLD, "tensorrt-10.13.3.9")),
    ("_configure", "builder.create_builder_config().int8_calibrator = None", OLD_ONLY_FLAGS),
    (
        "_configure",
        "builder.create_builder_config().num_compute_capabilities = 1",
        tuple(v for v in BUILDERS if v != RTX),
    ),
    ("_serialize", "config.set_quantization_flag", OLD_ONLY_FLAGS),
    ("_serialize", "builder.build_serialized_network_to_stream(network, config, None)", (OLD,)),
    ("_serialize", "builder.build_serialized_network(network, config, kernel_text='')", (OLD, RTX)),
]


@pytest.mark.parametrize(("function", "line", "lacking"), PLANTED, ids=[f"{f}:{line}" for f, line, _ in PLANTED])
def test_a_call_planted_into_the_builder_is_found(function: str, line: str, lacking: tuple[str, ...]) -> None:
    source = program()["engines.builder"]
    node = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.name == function)
    at = next(s for s in node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)))
    lines = source.splitlines()
    lines.insert(at.lineno - 1, " " * at.col_offset + line)
    planted = {"engines.builder": "\n".join(lines)}
    for version in BUILDERS:
        found = problems(planted, version)
        assert bool(found) == (version in lacking), f"{version}: {[str(problem) for problem in found]}"
        assert all(problem.line == at.lineno for problem in found)


def lacking(source: str, **others: str) -> list[str]:
    """The versions in which the snippet uses what is not there."""
    files = {"engines.snippet": dedent(source), **{f"engines.{name}": dedent(text) for name, text in others.items()}}
    return [version for version in ALL if problems(files, version)]


GONE = [NEW, RTX]  # "in 10.x only", when lean has the enclosing class, is gone there too
GONE_EVERYWHERE = [NEW, RTX, LEAN]

BINDINGS = {
    "import as": "import tensorrt as trt\ntrt.BuilderFlag.FP16",
    "import as another name": "import tensorrt_rtx as x\nx.BuilderFlag.FP16",
    "plain import": "import tensorrt\ntensorrt.BuilderFlag.FP16",
    "import_module": "import importlib\nt = importlib.import_module('tensorrt')\nt.BuilderFlag.FP16",
    "import_module of a variable, bound to trt": "import importlib\ntrt = importlib.import_module(NAME)\ntrt.BuilderFlag.FP16",
    "__import__": "__import__('tensorrt').BuilderFlag.FP16",
    "from import": "from tensorrt import BuilderFlag\nBuilderFlag.FP16",
    "from import as": "from tensorrt import BuilderFlag as F\nF.FP16",
    "import inside a function": "def f():\n    import tensorrt as t\n    return t.BuilderFlag.FP16",
    "parameter by convention": "def f(trt):\n    trt.BuilderFlag.FP16",
    "parameter told by the caller": "import tensorrt as t\ndef f(m):\n    m.BuilderFlag.FP16\nf(t)",
    "attribute by convention": "def f(self):\n    self.trt.BuilderFlag.FP16",
    "attribute that is assigned": """
        import tensorrt
        class A:
            def __init__(self):
                self.lib = tensorrt
            def f(self):
                return self.lib.BuilderFlag.FP16
        """,
    "field of a dataclass": """
        import tensorrt
        @dataclass
        class A:
            lib: Any
            def f(self):
                return self.lib.BuilderFlag.FP16
        A(tensorrt)
        """,
    "alias of the module": "import tensorrt\nt = tensorrt\nt.BuilderFlag.FP16",
    "alias of the enum": "import tensorrt as trt\nflag = trt.BuilderFlag\nflag.FP16",
    "getattr": "def f(trt):\n    getattr(trt.BuilderFlag, 'FP16')",
    "getattr of the module": "def f(trt):\n    getattr(trt, 'BuilderFlag').FP16",
    "result of a function": "def lib():\n    import tensorrt\n    return tensorrt\nlib().BuilderFlag.FP16",
    "in a comprehension": "def f(trt):\n    return [trt.BuilderFlag.FP16 for _ in range(3)]",
    "as a default": "import tensorrt as trt\ndef f(flag=trt.BuilderFlag.FP16): ...",
    "in a lambda": "def f(trt):\n    return lambda: trt.BuilderFlag.FP16",
    "in a nested function": "def f(trt):\n    def g():\n        return trt.BuilderFlag.FP16\n    return g",
    "of another enum's value": "def f(trt):\n    trt.BuilderFlag.TF32.FP16",
    "in a match": "def f(trt, x):\n    match x:\n        case trt.BuilderFlag.FP16:\n            pass",
    "in a decorator": "import tensorrt as trt\n@register(trt.BuilderFlag.FP16)\ndef f(): ...",
    "after try": "def f(trt):\n    try:\n        trt.BuilderFlag.FP16\n    except AttributeError:\n        pass",
}


@pytest.mark.parametrize("source", BINDINGS.values(), ids=BINDINGS)
def test_a_flag_that_11_lacks_is_found_through_every_binding(source: str) -> None:
    assert lacking(source) == GONE_EVERYWHERE


def test_the_same_flag_is_fine_where_it_exists_and_others_everywhere() -> None:
    assert lacking("import tensorrt as trt\ntrt.BuilderFlag.TF32") == []
    assert (
        lacking("import tensorrt as trt\ntrt.float16, trt.volume((1, 2)), trt.__version__, trt.Logger.VERBOSE.name")
        == []
    )


OBJECTS = {
    "constructor": ("def f(trt):\n    b = trt.Builder(log)\n    b.platform_has_fast_fp16", GONE),
    "alias of a method": ("def f(trt):\n    make = trt.Builder\n    make(log).platform_has_fast_fp16", GONE),
    "factory": ("def f(trt):\n    c = trt.Builder(log).create_builder_config()\n    c.int8_calibrator", GONE),
    "set": ("def f(trt):\n    c = trt.Builder(log).create_builder_config()\n    c.int8_calibrator = x", GONE),
    "chain": ("def f(trt):\n    trt.Builder(log).create_network().get_input(0).dynamic_range", GONE),
    "annotation": ("import tensorrt as trt\ndef f(c: trt.IBuilderConfig):\n    c.int8_calibrator", GONE),
    "quoted annotation": (
        "import tensorrt as trt\ndef f(c: 'trt.IBuilderConfig | None'):\n    c.int8_calibrator",
        GONE,
    ),
    "annotated variable": ("def f(trt):\n    c: trt.IBuilderConfig = make()\n    c.int8_calibrator", GONE),
    "cast": ("def f(trt, x):\n    cast('trt.IBuilderConfig', x).int8_calibrator", GONE),
    "argument of our own function": (
        "def f(trt):\n    g(trt.Builder(log).create_builder_config())\ndef g(c):\n    c.int8_calibrator",
        GONE,
    ),
    "keyword argument": (
        "def f(trt):\n    g(c=trt.Builder(log).create_builder_config())\ndef g(*, c):\n    c.int8_calibrator",
        GONE,
    ),
    "result of our own function": (
        "def f(trt):\n    g(trt).int8_calibrator\ndef g(trt):\n    return trt.Builder(log).create_builder_config()",
        GONE,
    ),
    "attribute of our own class": (
        """
        class A:
            def __init__(self, trt):
                self.config = trt.Builder(log).create_builder_config()
            def f(self):
                self.config.int8_calibrator
        """,
        GONE,
    ),
    "property of our own class": (
        """
        class A:
            def __init__(self, trt):
                self.trt = trt
            @property
            def config(self):
                return self.trt.Builder(log).create_builder_config()
        def f(trt):
            A(trt).config.int8_calibrator
        """,
        GONE,
    ),
    "with": ("def f(trt):\n    with trt.Builder(log) as b:\n        b.platform_has_fast_fp16", GONE),
    "own context manager": (
        """
        @contextlib.contextmanager
        def made(trt):
            yield trt.Builder(log)
        def f(trt):
            with made(trt) as b:
                b.platform_has_fast_fp16
        """,
        GONE,
    ),
    "loop": ("def f(trt):\n    for layer in trt.Builder(log).create_network():\n        layer.precision", GONE),
    "list": (
        "def f(trt):\n    n = trt.Builder(log).create_network()\n"
        "    for t in [n.get_input(i) for i in range(n.num_inputs)]:\n        t.dynamic_range",
        GONE,
    ),
    "list that grows": (
        "def f(trt):\n    n, found = trt.Builder(log).create_network(), []\n    found.append(n.get_input(0))\n"
        "    found[0].dynamic_range",
        GONE,
    ),
    "dictionary": (
        "def f(trt):\n    n = trt.Builder(log).create_network()\n    d = {i: n.get_input(i) for i in range(3)}\n"
        "    for _, t in d.items():\n        t.dynamic_range",
        GONE,
    ),
    "either of two": ("def f(trt, a):\n    b = trt.Builder(log) if a else None\n    b.platform_has_fast_fp16", GONE),
    "polygraphy": (
        "from polygraphy.backend.trt import CreateConfig\ndef f(b, n):\n    CreateConfig(fp16=True)(b, n).int8_calibrator",
        GONE,
    ),
    "derived class": (
        "def f(trt):\n    class C(trt.IInt8EntropyCalibrator2):\n        pass",
        GONE_EVERYWHERE,
    ),
    "self of a derived class": (
        "def f(trt):\n    class L(trt.ILogger):\n        def g(self):\n            self.nothing_has_this",
        list(ALL),
    ),
    "runtime": ("def f(trt):\n    trt.Runtime(log).deserialize_cuda_engine(b'').device_memory_size", GONE_EVERYWHERE),
    "context": (
        "def f(trt):\n    e = trt.Runtime(log).deserialize_cuda_engine(b'')\n"
        "    c = e.create_execution_context()\n    c.all_shape_inputs_specified",
        GONE_EVERYWHERE,
    ),
    "write-only": (
        "def f(trt):\n    e = trt.Runtime(log).deserialize_cuda_engine(b'')\n"
        "    e.create_execution_context().device_memory",
        list(ALL),
    ),
    "streaming": (
        "def f(trt, n, c, w):\n    trt.Builder(log).build_serialized_network_to_stream(n, c, w)",
        [OLD],
    ),
    "streaming writer": ("def f(trt):\n    class W(trt.IStreamWriter):\n        pass", [OLD]),
    "later operators": (
        "def f(trt):\n    trt.Builder(log).create_network().add_attention_v2",
        [v for v in BUILDERS if v.startswith("tensorrt-10")],
    ),
    "capabilities": (
        "def f(trt):\n    c = trt.Builder(log).create_builder_config()\n    c.set_compute_capability(x, 0)",
        [v for v in BUILDERS if v != RTX],
    ),
    "later keyword": ("def f(trt):\n    trt.Builder(log).build_serialized_network(n, c, kernel_text=x)", [OLD, RTX]),
    "too few arguments": ("def f(trt):\n    trt.Runtime()", list(ALL)),
    "no such keyword": ("def f(trt):\n    trt.Runtime(log).deserialize_cuda_engine(data=b'')", list(ALL)),
    "no constructor": ("def f(trt):\n    trt.ICudaEngine()", list(ALL)),
}


@pytest.mark.parametrize(("source", "expected"), OBJECTS.values(), ids=OBJECTS)
def test_members_of_objects_are_followed(source: str, expected: list[str]) -> None:
    found = lacking(source)
    if (
        expected != list(ALL) and LEAN not in expected
    ):  # what the lean runtime lacks for want of a Builder is not the point
        found = [version for version in found if version != LEAN]
    assert found == expected


GATED = {
    "if": "def f(trt):\n    if has(trt, 'BuilderFlag.FP16'):\n        trt.BuilderFlag.FP16",
    "another name of the same versions": "def f(trt):\n    if has(trt, 'BuilderFlag.INT8'):\n        trt.BuilderFlag.FP16",
    "else": "def f(trt):\n    if not has(trt, 'BuilderFlag.FP16'):\n        pass\n    else:\n        trt.BuilderFlag.FP16",
    "elif": "def f(trt, a):\n    if a:\n        pass\n    elif has(trt, 'BuilderFlag.FP16'):\n        trt.BuilderFlag.FP16",
    "conditional expression": "def f(trt):\n    x = trt.BuilderFlag.FP16 if has(trt, 'BuilderFlag.FP16') else None",
    "and": "def f(trt, a):\n    return a and has(trt, 'BuilderFlag.FP16') and trt.BuilderFlag.FP16",
    "or": "def f(trt, a):\n    return not has(trt, 'BuilderFlag.FP16') or trt.BuilderFlag.FP16",
    "and in a condition": "def f(trt, a):\n    if has(trt, 'BuilderFlag.FP16') and a:\n        trt.BuilderFlag.FP16",
    "guard that raises": "def f(trt):\n    if not has(trt, 'BuilderFlag.FP16'):\n        raise E\n    trt.BuilderFlag.FP16",
    "guard that returns": "def f(trt):\n    if not has(trt, 'BuilderFlag.FP16'):\n        return\n    trt.BuilderFlag.FP16",
    "guard in a loop": (
        "def f(trt):\n    for i in x:\n        if not has(trt, 'BuilderFlag.FP16'):\n            continue\n"
        "        trt.BuilderFlag.FP16"
    ),
    "kept in a variable": "def f(trt):\n    old = has(trt, 'BuilderFlag.FP16')\n    if old:\n        trt.BuilderFlag.FP16",
    "asked by a function": (
        "def f(trt):\n    if old(trt):\n        trt.BuilderFlag.FP16\n"
        "def old(trt) -> bool:\n    return has(trt, 'BuilderFlag.FP16')"
    ),
    "hasattr": "def f(trt):\n    if hasattr(trt.BuilderFlag, 'FP16'):\n        trt.BuilderFlag.FP16",
    "hasattr of an object": (
        "def f(trt):\n    b = trt.Runtime(log)\n    e = b.deserialize_cuda_engine(b'')\n"
        "    if hasattr(e, 'device_memory_size'):\n        e.device_memory_size"
    ),
    "getattr with a fallback": "def f(trt):\n    getattr(trt.BuilderFlag, 'FP16', None)",
    "assert": "def f(trt):\n    assert has(trt, 'BuilderFlag.FP16')\n    trt.BuilderFlag.FP16",
    "around all calls": (
        "def f(trt):\n    if has(trt, 'BuilderFlag.FP16'):\n        _g(trt)\ndef _g(trt):\n    trt.BuilderFlag.FP16"
    ),
    "around a class": (
        "def f(trt):\n    if has(trt, 'IInt8Calibrator'):\n"
        "        class C(trt.IInt8Calibrator):\n            def g(self):\n                trt.BuilderFlag.FP16"
    ),
}


@pytest.mark.parametrize("source", GATED.values(), ids=GATED)
def test_a_named_gate_lets_through_what_its_versions_have(source: str) -> None:
    assert lacking(source) == []


UNGATED = {
    "the wrong gate": "def f(trt):\n    if has(trt, 'IStreamWriter'):\n        trt.BuilderFlag.FP16",
    "the wrong branch": "def f(trt):\n    if has(trt, 'BuilderFlag.FP16'):\n        pass\n    else:\n        trt.BuilderFlag.FP16",
    "after the gate": "def f(trt):\n    if has(trt, 'BuilderFlag.FP16'):\n        pass\n    trt.BuilderFlag.FP16",
    "guard that goes on": "def f(trt):\n    if not has(trt, 'BuilderFlag.FP16'):\n        log()\n    trt.BuilderFlag.FP16",
    "or": "def f(trt, a):\n    if has(trt, 'BuilderFlag.FP16') or a:\n        trt.BuilderFlag.FP16",
    "comparison of versions": "def f(trt):\n    if trt.__version__ < '11':\n        trt.BuilderFlag.FP16",
    "flavour": "def f(trt, flavour):\n    if flavour != 'rtx':\n        trt.BuilderFlag.FP16",
    "computed gate": "def f(trt, name):\n    if has(trt, name):\n        trt.BuilderFlag.FP16",
    "suppress": "def f(trt):\n    with suppress(AttributeError):\n        trt.BuilderFlag.FP16",
    "a variable that is overwritten": (
        "def f(trt, a):\n    old = has(trt, 'BuilderFlag.FP16')\n    if a:\n        old = True\n"
        "    if old:\n        trt.BuilderFlag.FP16"
    ),
    "a public function": (
        "def f(trt):\n    if has(trt, 'BuilderFlag.FP16'):\n        g(trt)\ndef g(trt):\n    trt.BuilderFlag.FP16"
    ),
    "one ungated call": (
        "def f(trt):\n    if has(trt, 'BuilderFlag.FP16'):\n        _g(trt)\n    _g(trt)\n"
        "def _g(trt):\n    trt.BuilderFlag.FP16"
    ),
    "a private function that is handed on": "def f(trt):\n    run(_g)\ndef _g(trt):\n    trt.BuilderFlag.FP16",
    "a private function that nobody calls": "def _g(trt):\n    trt.BuilderFlag.FP16",
}


@pytest.mark.parametrize("source", UNGATED.values(), ids=UNGATED)
def test_anything_else_is_no_gate(source: str) -> None:
    assert lacking(source) == GONE_EVERYWHERE


def test_a_gate_that_no_version_knows_is_a_mistake() -> None:
    assert lacking("def f(trt):\n    if has(trt, 'BuilderFlag.FP61'):\n        pass") == list(ALL)


def test_a_computed_name_without_fallback_is_reported() -> None:
    assert lacking("def f(trt, name):\n    getattr(trt.BuilderFlag, name)") == list(ALL)
    assert lacking("def f(trt, name):\n    getattr(trt.BuilderFlag, name, None)") == []
    assert lacking("def f(trt, name):\n    trt.BuilderFlag.__members__[name].name") == []


def test_values_are_followed_across_files() -> None:
    library = "def load():\n    import tensorrt\n    return tensorrt"
    assert lacking(
        "from .library import load\nload().BuilderFlag.FP16", library="def load(): import tensorrt as t; return t"
    )
    user = "def use(m):\n    m.BuilderFlag.FP16"
    assert (
        lacking("from . import library, user\nuser.use(library.load())", library=library, user=user) == GONE_EVERYWHERE
    )
    absolute = "from dynamictrl_edge.engines.library import load\nload().BuilderFlag.FP16"
    assert lacking(absolute, library=library) == GONE_EVERYWHERE
    assert lacking("from . import user", library=library, user=user) == []


def test_a_problem_says_where_and_what() -> None:
    (problem,) = problems({"engines.a": "def f(trt):\n\n    trt.BuilderFlag.FP16"}, NEW)
    assert str(problem) == "engines.a:3: tensorrt-11.4.0.106: BuilderFlag has no FP16"


def test_numbers_of_flags_differ_between_versions() -> None:
    """Why flags are never written as numbers."""
    numbers = {v: snapshot(v).names["NetworkDefinitionCreationFlag"].numbers["STRONGLY_TYPED"] for v in BUILDERS}
    assert {numbers[v] for v in BUILDERS if v.startswith("tensorrt-10")} == {1}
    assert numbers[NEW] == numbers[RTX] == 0
