"""`dynamictrl build`: from the command line to engines for several GPUs, and every way of asking wrongly."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.cli import build as build_verb
from dynamictrl_edge.cli import engine_tables
from dynamictrl_edge.cli.main import run
from dynamictrl_edge.engines import build, machine
from dynamictrl_edge.engines.engine_set import read_engine_set
from dynamictrl_edge.engines.machine import Gpu, Machine
from dynamictrl_edge.engines.profiles import buildable_graphs
from dynamictrl_edge.engines.report import read_report
from dynamictrl_edge.engines.targets import TARGETS
from tests.conftest import EXPORTS, Export
from tests.engine_samples import SMALL, needs_rtx, some_graphs

Capture = pytest.CaptureFixture[str]

WORKSTATIONS = ("rtx30", "rtx40", "rtx50")
PRECISIONS = ("fp16", "bf16", "fp32")
# From inputs to outputs with nothing in between.
POINTWISE = ("trunk_keep", "trunk_reuse", "tokens_take", "tokens_put", "cache_widen")
# Two models in every precision, for every capability that has it; float32 attention has no fused kernel. What the others differ
# in (heads beside each other, a stored table of positions) is of one kind in all precisions. The checkpoint with the stored table
# has the 1.0 model's text encoder and VAE, which are not built twice.
CASES = [
    *((model, precision, 12) for model in ("cogvideox10-tiny", "cogvideox15-tiny") for precision in PRECISIONS),
    ("bench-27m", "fp16", 12),
    ("bench-27m", "bf16", 12),
    ("learned", "fp16", 6),
]


def build_json(bundle: Path, *options: str, capsys: Capture) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert run(["build", str(bundle), *options, "--json"]) == 0, capsys.readouterr().err
    sets: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["sets"]
    return sets


def refused(code: int, arguments: list[str], capsys: Capture) -> str:
    capsys.readouterr()
    assert run(["build", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    return err


@needs_rtx
@pytest.mark.parametrize(("model", "precision", "count"), CASES)
def test_every_graph_of_every_model_builds_for_every_workstation(
    model: str, precision: str, count: int, exported: Export, tmp_path: Path, capsys: Capture
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(exported(model, precision), bundle)
    targets = [*WORKSTATIONS, *(["rtx20"] if precision == "fp16" else [])]
    options = [word for target in targets for word in ("--target", target)]
    (made,) = build_json(bundle, *options, "--tile", "64x48", capsys=capsys)
    manifest = Bundle(bundle).manifest
    assert (
        set(made["engines"])
        == set(buildable_graphs(manifest))
        == set(manifest.graphs) - {*("block_cpu", "tokens_keep_cpu", "tokens_reuse_cpu")}
    )
    assert len(made["engines"]) == count + (10 if EXPORTS.get((model, precision)) else 0)
    assert {tuple(pair) for pair in made["capabilities"]} == {TARGETS[name].capability for name in targets}
    engines = read_engine_set(Path(made["folder"]))
    for name, entry in engines.engines.items():
        report = read_report(Path(made["folder"]) / entry.report)
        assert entry.kernels == len(report.kernels) > 0
        assert entry.activation_bytes > 0 or name in POINTWISE
        if not name.startswith("vae_"):
            # Weights are inputs; engines stay small whatever the model's size.
            assert entry.weights_bytes < 100_000
            assert entry.bytes < 4e6
    if precision == "fp32":
        assert engines.engines["block"].fused_attention == 0
    elif manifest.transformer.num_attention_heads > 1:
        assert engines.engines["block"].fused_attention == 1


@pytest.fixture(scope="module")
def source(exported: Export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return some_graphs(exported("cogvideox15-tiny", "fp16"), tmp_path_factory.mktemp("small") / "bundle")


@pytest.fixture
def bundle(source: Path, tmp_path: Path) -> Path:
    return some_graphs(source, tmp_path / "bundle")


@needs_rtx
def test_three_targets_from_one_call_and_nothing_to_do_the_second_time(
    bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--target", "rtx3060", "--target", "rtx4090", "--target", "rtx5090"]
    (first,) = build_json(bundle, *options, capsys=capsys)
    assert set(first["built"]) == set(SMALL)
    assert first["targets"] == ["rtx3060", "rtx4090", "rtx5090"]
    monkeypatch.setattr(build.subprocess, "Popen", lambda *a, **k: pytest.fail("a compiler was started"))
    (second,) = build_json(bundle, *options, capsys=capsys)
    assert (second["built"], second["folder"]) == ([], first["folder"])
    assert run(["build", str(bundle), *options]) == 0
    assert "Nothing to do" in capsys.readouterr().err


@needs_rtx
def test_sizes_and_tile_shape_the_engines(bundle: Path, capsys: Capture) -> None:
    options = ["--target", "rtx4090", "--size", "64x48x9", "--size", "32x96x5", "--steps", "30", "--batch", "1"]
    (made,) = build_json(bundle, *options, "--tile", "64x32", "--workspace", "1", capsys=capsys)
    assert made["options"]["sizes"] == [
        {"height": 48, "width": 64, "frames": 9},
        {"height": 96, "width": 32, "frames": 5},
    ]
    assert made["options"]["tile"] == [4, 8]
    assert (made["options"]["steps"], made["options"]["workspace"]) == (30, 10**9)
    assert made["engines"]["block"]["profile"]["video"][2] == [1, 2 * 3 * 4, 128]


@needs_rtx
def test_the_table_says_what_was_built(bundle: Path, capsys: Capture) -> None:
    assert run(["build", str(bundle), "--target", "rtx4090"]) == 0
    out = capsys.readouterr().out
    assert "block" in out and "3 engines in" in out and "engines/rtx-" in out.replace("\n", "")


def test_every_target_is_listed(capsys: Capture) -> None:
    assert run(["build", "--list-targets"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in TARGETS)


def test_an_unknown_target_lists_the_known(bundle: Path, capsys: Capture) -> None:
    err = refused(2, [str(bundle), "--target", "rtx4O90"], capsys)
    assert "'rtx4O90'" in err and "Did you mean 'rtx4090'?" in err
    assert all(name in err for name in (*TARGETS, "local"))


def test_local_without_a_gpu(bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "look_at_machine", lambda **_: Machine(gpu=None, flavours={"rtx": "1.7"}))
    assert "--target" in refused(5, [str(bundle)], capsys)


@pytest.mark.parametrize("target", ["rtx4090", "jetson-orin"])
def test_a_builder_that_is_not_installed(
    target: str, bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    orin = Gpu("Orin", (8, 7), None, 10**10, unified=True)
    monkeypatch.setattr(machine, "look_at_machine", lambda **_: Machine(gpu=orin))
    extra = "rtx" if target == "rtx4090" else "tensorrt"
    assert f'pip install "dynamictrl-edge[build,{extra}]"' in refused(5, [str(bundle), "--target", target], capsys)


def test_tensorrt_builds_only_on_the_gpu_itself(bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    ada = Gpu("NVIDIA GeForce RTX 4090", (8, 9), "580.65", 24 * 10**9)
    monkeypatch.setattr(machine, "look_at_machine", lambda **_: Machine(gpu=ada, flavours={"tensorrt": "10.13.3.9"}))
    err = refused(5, [str(bundle), "--target", "jetson-orin"], capsys)
    assert "jetson-orin (SM87)" in err and "RTX 4090 (SM89)" in err and "--print-trtexec" in err


def test_a_precision_that_the_target_lacks(exported: Export, tmp_path: Path, capsys: Capture) -> None:
    bundle = some_graphs(exported("cogvideox15-tiny", "bf16"), tmp_path / "bundle")
    err = refused(5, [str(bundle), "--target", "rtx20"], capsys)
    assert "rtx20 (SM75) has no bf16" in err and "fp16, int8" in err and "--precision fp16" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--size", "64x48"], "WIDTHxHEIGHTxFRAMES"),
        (["--size", "64x50x9"], "--height 50"),
        (["--tile", "64"], "WIDTHxHEIGHT"),
        (["--tile", "60x48"], "multiples of 8"),
        (["--steps", "0"], "--steps 0"),
        (["--workspace", "0"], "--workspace 0"),
        (["--batch", "3"], "batch"),
        (["--backend", "rtx", "--version-compatible"], "--version-compatible"),
        (["--backend", "cuda"], "--backend"),
    ],
)
def test_wrong_usage(options: list[str], words: str, bundle: Path, capsys: Capture) -> None:
    assert words in refused(2, [str(bundle), "--target", "rtx4090", *options], capsys)
    assert not (bundle / "engines").exists() or not list((bundle / "engines").glob("[!.]*"))


def test_a_backend_that_does_not_know_the_target(bundle: Path, capsys: Capture) -> None:
    err = refused(2, [str(bundle), "--target", "jetson-orin", "--backend", "rtx"], capsys)
    assert "--backend tensorrt" in err


def test_no_bundle(tmp_path: Path, capsys: Capture) -> None:
    assert "There is no bundle" in refused(4, [str(tmp_path / "nothing"), "--target", "rtx4090"], capsys)


def test_trtexec_commands_need_neither_builder_nor_gpu(
    bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "look_at_machine", lambda **_: Machine(gpu=None))
    assert run(["build", str(bundle), "--target", "jetson-orin", "--print-trtexec"]) == 0
    out = capsys.readouterr().out
    assert sum(line.startswith("trtexec ") for line in out.splitlines()) == len(SMALL)
    assert not (bundle / "engines").exists()


def test_default_workers_leave_a_gpu_to_one_builder() -> None:
    assert build_verb._workers("tensorrt") == 1
    assert 1 <= build_verb._workers("rtx") <= 4


@needs_rtx
def test_the_installed_version_is_the_librarys_own(bundle: Path, capsys: Capture) -> None:
    import tensorrt_rtx

    assert version("tensorrt-rtx") == tensorrt_rtx.__version__


@pytest.fixture(scope="module")
def built_bundle(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With one engine set. Do not write into it."""
    bundle = some_graphs(source, tmp_path_factory.mktemp("built") / "bundle")
    assert run(["build", str(bundle), "--target", "rtx4090", "--json"]) == 0
    return bundle


@needs_rtx
def test_inspect_shows_the_sets_and_whether_they_fit(
    built_bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada = Gpu("NVIDIA GeForce RTX 4090", (8, 9), "580.65", 24 * 10**9)
    here = Machine(gpu=ada, flavours={"rtx": version("tensorrt-rtx")}, platform="linux-x86_64")
    for gpu, fits in ((here, True), (Machine(gpu=None, no_gpu="none"), False)):
        monkeypatch.setattr(engine_tables, "look_at_machine", lambda gpu=gpu: gpu)
        capsys.readouterr()
        assert run(["inspect", str(built_bundle), "--no-verify", "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)["engine_sets"]
        assert found["fits"] is fits and bool(found["reason"]) is not fits
        assert set(found["engines"]) == set(SMALL)
        assert run(["inspect", str(built_bundle), "--no-verify"]) == 0
        out = capsys.readouterr().out
        assert ("fits this machine" in out) is fits
        assert "for rtx4090" in out and "4 gemm half" in " ".join(out.split())


@needs_rtx
def test_inspect_shows_what_the_compiler_did(built_bundle: Path, capsys: Capture) -> None:
    assert run(["inspect", str(built_bundle), "--engine", "block"]) == 0
    out = capsys.readouterr().out
    assert "attention: 1 fused" in out and "products: 4 gemm half" in out and "_gemm_mha" in out
    assert run(["inspect", str(built_bundle), "--engine", "block", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out).values()
    assert report["graph"] == "block" and report["kernels"]
    assert run(["inspect", str(built_bundle), "--engine", "vae_encoder_first"]) == 2
    assert "There are block, head, stem." in capsys.readouterr().err


def test_inspect_of_a_damaged_set_says_so(bundle: Path, capsys: Capture) -> None:
    (bundle / "engines" / "old").mkdir(parents=True)
    (bundle / "engines" / "old" / "engines.json").write_text("{")
    assert run(["inspect", str(bundle), "--no-verify", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["engine_sets"]
    assert not found["fits"] and "damaged" in found["reason"]
    assert run(["inspect", str(bundle), "--engine", "block"]) == 2
    assert "dynamictrl build" in capsys.readouterr().err
