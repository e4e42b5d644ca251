"""What the tests of engine builds share: bundles with few graphs, plans, and the condition that a builder is installed."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.engines.build import BuildPlan
from dynamictrl_edge.engines.engine_set import BuildOptions
from dynamictrl_edge.engines.profiles import default_size
from dynamictrl_edge.engines.targets import find_target

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None or importlib.util.find_spec("polygraphy") is None,
    reason="building engines needs the extras 'build' and 'rtx'",
)
SMALL = ("stem", "block", "head")  # the quickest graphs to build
SMALL_TILE = (6, 8)


def some_graphs(bundle: Path, into: Path, graphs: tuple[str, ...] = SMALL) -> Path:
    """A copy of a bundle that lists only these graphs."""
    shutil.copytree(bundle, into)
    edit(into, lambda manifest: manifest.update(graphs={name: manifest["graphs"][name] for name in graphs}))
    return into


def edit(bundle: Path, change: Any) -> None:
    """Changes `bundle.json` by `change(dict)`."""
    path = bundle / "bundle.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def plan_for(bundle: Path, *targets: str, **changes: Any) -> BuildPlan:
    """A plan of TensorRT-RTX for these targets, at the bundle's default size."""
    values: dict[str, Any] = {
        "sizes": (default_size(Bundle(bundle).manifest),),
        "tile": SMALL_TILE,
    }
    budget = changes.pop("activation_budget", None)
    values.update(changes)
    from importlib.metadata import version

    return BuildPlan(
        targets=tuple(find_target(name) for name in targets),
        flavour="rtx",
        library_version=version("tensorrt-rtx"),
        platform="any",
        options=BuildOptions(**values),
        activation_budget=budget,
    )
