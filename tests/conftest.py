"""Fixtures that are made once: exported bundles of the golden models, a cache folder that is not the user's."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from filelock import FileLock, Timeout
from hypothesis import settings

from tests.cli_samples import Inputs, small_inputs, without_graphs
from tests.golden import model_dir
from tests.gpu_samples import TRT, Machinery, assert_nothing_left, machinery, with_engines

# The same examples in every run; what a search finds elsewhere becomes an explicit example.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither use nor fill the user's cache."""
    before = os.environ.get("DYNAMICTRL_CACHE")
    os.environ["DYNAMICTRL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["DYNAMICTRL_CACHE"]
    else:
        os.environ["DYNAMICTRL_CACHE"] = before


Share = Callable[[str, Callable[[Path], None]], Path]
MANY = 1000  # tests of a run that will need all of `EXPORTS`


@pytest.fixture(scope="session")
def share(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Share:
    """`share(name, make)`: a folder that `make(folder)` fills once per test run, for all of its processes.

    In a run of `MANY` tests a process that would wait for another one's folder makes a bundle of `EXPORTS` meanwhile.
    """
    root = tmp_path_factory.getbasetemp()
    root = (root if worker_id == "master" else root.parent) / "shared"
    root.mkdir(exist_ok=True)
    helps = worker_id != "master" and len(request.session.items) >= MANY and find_spec("torch") is not None
    others = list(EXPORTS) if helps else []

    def filled(name: str, make: Callable[[Path], None]) -> None:
        folder, done = root / name, root / f"{name}.done"
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()

    def made(name: str, make: Callable[[Path], None]) -> Path:
        lock = FileLock(root / f"{name}.lock")
        while not (root / f"{name}.done").exists():
            try:
                with lock.acquire(timeout=-1 if not others else 0):
                    filled(name, make)
            except Timeout:
                other = others.pop(0)
                made(_named(*other), partial(_export, made, *other))
        return root / name

    return made


Export = Callable[..., Path]
# What takes tests the longest; with the graphs of reuse between steps, or without.
EXPORTS = {
    ("cogvideox15-tiny", "fp32"): True,
    ("cogvideox15-tiny", "fp16"): True,
    ("cogvideox10-tiny", "fp32"): True,
    ("cogvideox15-tiny", "bf16"): True,
    ("learned", "fp32"): True,
}


@pytest.fixture(scope="session")
def exported(share: Share) -> Export:
    """`exported(model, precision="fp32")`: bundle of a golden model or of a spec in `benchmarks.checkpoints`.

    Do not write into it: copy it. The model "learned" is the 1.0-style one with a stored positional table; its text encoder
    and VAE are the 1.0 model's and have no graphs. `EXPORTS` says whose bundles hold the graphs of reuse between steps.
    """
    pytest.importorskip("torch", reason="exporting needs the extra 'export'")

    def bundle(model: str, precision: str = "fp32") -> Path:
        return share(_named(model, precision), partial(_export, share, model, precision)) / "bundle"

    return bundle


def _named(model: str, precision: str) -> str:
    return f"{model}-{precision}"


def _export(share: Share, model: str, precision: str, folder: Path) -> None:
    from benchmarks.checkpoints import SPECS, write_checkpoint
    from dynamictrl_edge.export.exporter import export_checkpoint

    if model in SPECS:
        checkpoint = folder / "checkpoint"
        write_checkpoint(checkpoint, SPECS[model])
    else:
        checkpoint = _learned(share) if model == "learned" else model_dir(model)
    reuse = EXPORTS.get((model, precision), False)
    with pytest.MonkeyPatch.context() as patch:
        if model == "learned":
            without_graphs(patch, "text_encoder", "vae")
        export_checkpoint(checkpoint, folder / "bundle", precision=precision, reuse=reuse)  # type: ignore[arg-type]


def _learned(share: Share) -> Path:
    def make(folder: Path) -> None:
        shutil.copytree(model_dir("cogvideox10-tiny"), folder / "checkpoint")
        shutil.rmtree(folder / "checkpoint" / "transformer")
        shutil.copytree(model_dir("cogvideox10-learnedpos-tiny") / "transformer", folder / "checkpoint" / "transformer")

    return share("learned-checkpoint", make) / "checkpoint"


@pytest.fixture(scope="session")
def bundle10(exported: Export) -> Path:
    """float32 bundle of the 1.0-style golden model. Do not write into it: copy it."""
    return exported("cogvideox10-tiny")


@pytest.fixture(scope="session")
def bundle15(exported: Export) -> Path:
    """float32 bundle of the 1.5-style golden model. Do not write into it: copy it."""
    return exported("cogvideox15-tiny")


Quantized = Callable[..., Path]


@pytest.fixture(scope="session")
def quantized(share: Share, exported: Export) -> Quantized:
    """`quantized(scheme, precision="fp32", kept=None)`: the 1.5-style golden model, calibrated, with so many linears left in
    high precision. Do not write into it: copy it."""

    def bundle(scheme: str, precision: str = "fp32", kept: int | None = None) -> Path:
        def make(folder: Path) -> None:
            from dynamictrl_edge.calibration.calibrate import calibrate
            from tests.calibration_samples import quick, some_samples

            source = exported("cogvideox15-tiny", precision)
            options = quick(scheme, smooth=True, most_high_precision=kept)
            calibrate(source, folder / "bundle", some_samples(), options, threads=1)

        return share(f"quantized-{scheme}-{precision}" + (f"-{kept}" if kept else ""), make) / "bundle"

    return bundle


@pytest.fixture(scope="session")
def learned_checkpoint(share: Share) -> Path:
    """The golden transformer with the stored positional table, completed with the other components of the 1.0 model."""
    return _learned(share)


@pytest.fixture(scope="session")
def learned_bundle(exported: Export) -> Path:
    """float32 bundle of `learned_checkpoint`."""
    return exported("learned")


@pytest.fixture(scope="session")
def demo(share: Share) -> Path:
    """What `dynamictrl demo` made: clip.mp4 and its sheet in a new folder, the bundle, and its answer in result.json."""
    pytest.importorskip("torch", reason="the demo exports, which needs the extra 'export'")

    def make(folder: Path) -> None:
        from dynamictrl_edge.cli.main import run

        out, bundle = folder / "new" / "folder" / "clip.mp4", folder / "bundle"
        with (folder / "result.json").open("w") as answer, contextlib.redirect_stdout(answer):
            assert run(["demo", "--out", str(out), "--bundle", str(bundle), "--json"]) == 0

    return share("demo", make)


@pytest.fixture(scope="session")
def pocket_bundle(demo: Path) -> Path:
    """float32 bundle of the pocket model."""
    return demo / "bundle"


@pytest.fixture(scope="module")
def root(bundle10: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model with engines; a module may have its own."""
    return with_engines(bundle10, tmp_path_factory.mktemp("gpu"), TRT)


@pytest.fixture
def gpu(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machinery]:
    """A backend on fakes that must leave nothing behind."""
    made = machinery(root, TRT, monkeypatch)
    yield made
    made.animator.close()
    assert_nothing_left(made)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A small photo and pose clip, whatever they show."""
    return small_inputs(tmp_path_factory.mktemp("inputs"))
