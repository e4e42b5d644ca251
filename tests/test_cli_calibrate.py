"""`dynamictrl calibrate`: from a folder of clips to a quantized bundle, on to engines, and every way of asking wrongly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynamictrl_edge.bundle.manifest import BLOCK_KINDS, read_manifest
from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.calibration import calibrate as module
from dynamictrl_edge.calibration.samples import fingerprint, pocket_samples
from dynamictrl_edge.cli.main import run
from dynamictrl_edge.engines.report import read_report
from dynamictrl_edge.runtime import Animator
from tests.calibration_samples import some_samples, write_set
from tests.conftest import Quantized
from tests.engine_samples import edit, needs_rtx, some_graphs

Capture = pytest.CaptureFixture[str]
QUICK = ("--steps", "2", "--threads", "1", "--no-report")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_set(tmp_path / "data")


def refused(code: int, capsys: Capture, *arguments: str) -> str:
    capsys.readouterr()
    assert run(["calibrate", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    return " ".join(err.split())


def test_a_folder_of_clips_makes_a_quantized_bundle(
    bundle15: Path, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "q"
    assert run(["calibrate", str(bundle15), str(out), "--data", str(data), *QUICK]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    for words in ("Wrote", "int8", "dB at t=", "Block graphs", "Most sensitive", "ff_out"):
        assert words in shown
    assert run(["inspect", str(out)]) == 0
    assert "Quantized to int8, all else fp32" in capsys.readouterr().out
    assert run(["inspect", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["precision"] == "int8" and facts["block_graphs"] == {"block": facts["blocks"]}
    (sample,) = some_samples(1)
    clip = Animator.from_bundle(out, cache=False, threads=1)(**sample.request(1, 1.0))
    assert len(clip.frames) == sample.frames


def test_json_has_every_linear(bundle15: Path, data: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = ["calibrate", str(bundle15), str(tmp_path / "q"), "--data", str(data), *QUICK, "--json"]
    assert run([*arguments, "--precision", "int8-weights", "--max-high-precision", "1", "--keep-text-encoder"]) == 0
    facts = json.loads(capsys.readouterr().out)
    manifest = read_manifest(tmp_path / "q")
    assert len(facts["linears"]) == 4 * manifest.transformer.num_layers
    assert facts["high_precision"] == 1 and sum(row["kept"] for row in facts["linears"]) == 1
    assert facts["text_encoder"] is None
    assert manifest.quantization is not None and "text_block" not in manifest.quantization.linears
    assert sum(facts["graphs"].values()) == manifest.transformer.num_layers and len(facts["graphs"]) == 2


# Engines

SETS: list[tuple[str, str, tuple[str, ...], str]] = [
    ("int8", "fp32", ("rtx30", "rtx50"), "int8"),
    ("int8", "fp16", ("rtx30", "rtx50"), "int8"),
    ("fp8", "fp32", ("rtx40", "rtx50"), "fp8"),
    ("int8-weights", "fp16", ("rtx30", "rtx50"), "half"),
]


@needs_rtx
@pytest.mark.parametrize(("scheme", "precision", "targets", "dtype"), SETS)
def test_engines_multiply_in_the_quantized_type(
    scheme: str,
    precision: str,
    targets: tuple[str, ...],
    dtype: str,
    quantized: Quantized,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    graphs = (*BLOCK_KINDS, "modulation", "conditioning", "text_block")
    bundle = some_graphs(quantized(scheme, precision), tmp_path / "bundle", graphs)
    options = [word for name in targets for word in ("--target", name)]
    assert run(["build", str(bundle), *options, "--tile", "64x48", "--json"]) == 0, capsys.readouterr().err
    (made,) = json.loads(capsys.readouterr().out)["sets"]
    assert made["precision"] == scheme and f"-{scheme}-" in Path(made["folder"]).name
    for name in BLOCK_KINDS:
        report = read_report(Path(made["folder"]) / made["engines"][name]["report"])
        products = [kernel for kernel in report.gemms if dtype in kernel.types]
        assert sum(max(1, len(kernel.merged)) for kernel in products) >= 4
        assert not made["engines"][name]["broken"]


@needs_rtx
def test_a_linear_that_is_not_quantized_by_the_compiler_is_found(
    quantized: Quantized, tmp_path: Path, capsys: Capture
) -> None:
    bundle = some_graphs(quantized("int8-weights"), tmp_path / "bundle", ("block",))

    def claim(manifest: dict[str, Any]) -> None:
        manifest["quantization"].update(scheme="int8", weights_only=[])

    edit(bundle, claim)
    assert run(["build", str(bundle), "--target", "rtx30", "--tile", "64x48"]) == 4
    assert "0 of 4 quantized linears are INT8 products" in " ".join(capsys.readouterr().err.split())


def test_a_gpu_without_fp8_is_refused(
    quantized: Quantized, bundle15: Path, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert run(["build", str(quantized("fp8")), "--target", "rtx30"]) == 5
    err = " ".join(capsys.readouterr().err.split())
    assert "rtx30 (SM86) has no fp8, in which this bundle's linears are" in err and "--precision int8" in err
    text = refused(
        2, capsys, str(bundle15), str(tmp_path / "q"), "--data", str(data), "--precision=fp8", "--target=rtx30"
    )
    assert "rtx30 (SM86) has no fp8" in text and "rtx40" in text


# Bad sets


def without(folder: Path) -> None:
    (folder / "samples.json").unlink()


def rewritten(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "samples.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def with_sample(**changes: Any) -> Callable[[Path], None]:
    entry = {"image": "0.png", "pose": "pose0", "prompt": "a person"}
    return rewritten(samples=[entry | changes])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no list": (without, "is not a calibration set: it has no samples.json"),
    "no folder": (lambda folder: shutil.rmtree(folder), "There is no calibration set at"),
    "empty": (rewritten(samples=[]), "lists no samples"),
    "no JSON": (lambda folder: (folder / "samples.json").write_text("{"), "cannot be used"),
    "binary": (lambda folder: (folder / "samples.json").write_bytes(b"\xff\xfe"), "cannot be used"),
    "unknown field": (rewritten(colour="red"), "unknown field `colour`"),
    "no prompt": (with_sample(prompt="  "), "the prompt of sample 0 is empty"),
    "seed": (with_sample(seed=-1), "cannot be used"),
    "missing photo": (with_sample(image="9.png"), "sample 0 names the image '9.png', which does not exist"),
    "missing pose": (with_sample(pose="9"), "sample 0 names the pose '9', which does not exist"),
    "outside": (with_sample(image="../../etc/passwd"), "which lies outside the folder"),
    "no photo": (with_sample(image="samples.json"), "samples.json"),
    "impossible size": (rewritten(width=7), "--width 7 is not possible"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sets_are_named(case: str, bundle15: Path, data: Path, tmp_path: Path, capsys: Capture) -> None:
    change, words = BAD[case]
    change(data)
    code = 2 if case == "impossible size" else 3
    assert words in refused(code, capsys, str(bundle15), str(tmp_path / "q"), "--data", str(data), *QUICK)
    assert not (tmp_path / "q").exists()


def test_the_built_in_set_is_for_the_pocket_model(
    demo: Path, bundle15: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = refused(2, capsys, str(bundle15), "q", "--data", "pocket", *QUICK)
    assert "is for the pocket model" in words and "Give --data a folder" in words
    samples = pocket_samples(read_manifest(demo / "bundle"), "bundle", 4)
    assert [sample.seed for sample in samples] == [0, 1, 2, 3] and len({sample.prompt for sample in samples}) == 4
    black = [(sample.image == 0).all(axis=2).mean() for sample in samples]
    assert black[1] > 0.2 > max(black[0], black[2])  # the second has a masked background
    assert fingerprint(samples) == fingerprint(pocket_samples(read_manifest(demo / "bundle"), "elsewhere", 4))
    (tmp_path / "pocket").mkdir()  # as in this project's source, where it is no calibration set
    assert "is for the pocket model" in refused(2, capsys, str(bundle15), "q", "--data", "pocket", *QUICK)
    (tmp_path / "pocket/samples.json").write_text("{")  # that folder is meant before the built-in set
    assert "samples.json" in refused(3, capsys, str(bundle15), "q", "--data", "pocket", *QUICK)


def test_bad_bundles_are_refused(
    quantized: Quantized, bundle15: Path, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = str(tmp_path / "q")
    assert "quantized already (int8)" in refused(4, capsys, str(quantized("int8")), out, "--data", str(data))
    assert "There is no bundle" in refused(4, capsys, str(tmp_path / "none"), out, "--data", str(data))
    damaged = shutil.copytree(bundle15, tmp_path / "damaged")
    (damaged / "weights/block_01.safetensors").write_bytes(b"nothing")
    assert "block_01.safetensors" in refused(4, capsys, str(damaged), out, "--data", str(data), *QUICK)
    assert not (tmp_path / "q").exists()


def test_an_interruption_ends_with_130_and_the_next_run_goes_on(
    bundle15: Path, data: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    arguments = [str(bundle15), str(tmp_path / "q"), "--data", str(data), *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr(module, "decide_blocks", interrupted)
        assert "Interrupted" in refused(130, capsys, *arguments)
    assert (tmp_path / ".q.calibration" / "statistics.npz").exists() and not (tmp_path / "q").exists()
    with monkeypatch.context() as patch:
        patch.setattr(module, "observe", lambda animator, prepared, plan, work, tick: _seen(animator, plan, work))
        assert run(["calibrate", *arguments]) == 0
    Bundle(tmp_path / "q").verify()


def _seen(animator: Any, plan: Any, work: Any) -> Any:
    """The stored statistics, all of them: nothing is observed again."""
    from dynamictrl_edge.calibration.observe import Observations

    found = Observations.load(work.statistics, animator.bundle.manifest.transformer)
    assert found is not None and found.done == plan.samples
    return found
