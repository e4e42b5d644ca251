"""Fixtures that are made once: exported bundles of the golden models, a cache folder that is not the user's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.golden import model_dir


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


def _exported(checkpoint: Path, folder: Path, precision: str = "fp32") -> Path:
    pytest.importorskip("torch", reason="exporting needs the extra 'export'")
    from dynamictrl_edge.export.exporter import export_checkpoint

    export_checkpoint(checkpoint, folder / "bundle", precision=precision)  # type: ignore[arg-type]
    return folder / "bundle"


@pytest.fixture(scope="session")
def bundle10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float32 bundle of the 1.0-style golden model. Do not write into it: copy it."""
    return _exported(model_dir("cogvideox10-tiny"), tmp_path_factory.mktemp("bundle10"))


@pytest.fixture(scope="session")
def bundle15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float32 bundle of the 1.5-style golden model. Do not write into it: copy it."""
    return _exported(model_dir("cogvideox15-tiny"), tmp_path_factory.mktemp("bundle15"))


@pytest.fixture(scope="session")
def learned_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden transformer with the stored positional table, completed with the other components of the 1.0 model."""
    folder = tmp_path_factory.mktemp("learned") / "checkpoint"
    shutil.copytree(model_dir("cogvideox10-tiny"), folder)
    shutil.rmtree(folder / "transformer")
    shutil.copytree(model_dir("cogvideox10-learnedpos-tiny") / "transformer", folder / "transformer")
    return folder


@pytest.fixture(scope="session")
def learned_bundle(learned_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float32 bundle of `learned_checkpoint`."""
    return _exported(learned_checkpoint, tmp_path_factory.mktemp("learned_bundle"))
