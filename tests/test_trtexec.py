"""The printed trtexec script: same graphs, shapes and options as the builder's, and a shell takes it."""

from __future__ import annotations

import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import msgspec
import pytest

from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.engines.engine_set import BuildOptions
from dynamictrl_edge.engines.profiles import axes_of, buildable_graphs, default_size, profile_of
from dynamictrl_edge.engines.trtexec import trtexec_script

FAKE = """#!/bin/sh
for word in "$@"; do
  case "$word" in
    --saveEngine=*) touch "${word#--saveEngine=}" ;;
    --onnx=*) test -s "${word#--onnx=}" || exit 9 ;;
  esac
done
"""


@pytest.fixture
def options(bundle10: Path) -> BuildOptions:
    return BuildOptions(sizes=(default_size(Bundle(bundle10).manifest),), tile=(12, 20))


def commands(script: str) -> dict[str, list[str]]:
    lines = [shlex.split(line) for line in script.splitlines() if line.startswith("trtexec ")]
    return {next(w for w in line if w.startswith("--saveEngine=")).rsplit("/")[-1]: line for line in lines}


def test_one_command_per_graph_with_the_builders_shapes(bundle10: Path, options: BuildOptions) -> None:
    manifest = Bundle(bundle10).manifest
    found = commands(trtexec_script(Bundle(bundle10), options))
    axes = axes_of(manifest, options)
    assert set(found) == {f"{name}.engine" for name in buildable_graphs(manifest)}
    for name in buildable_graphs(manifest):
        profile = profile_of(name, manifest.graphs[name], axes)
        words = found[f"{name}.engine"]
        assert "--stronglyTyped" in words
        for i, flag in enumerate(("--minShapes=", "--optShapes=", "--maxShapes=")):
            given = [w.removeprefix(flag) for w in words if w.startswith(flag)]
            shapes = dict(part.split(":") for part in given[0].split(",")) if given else {}
            assert shapes == {port: "x".join(map(str, shape[i])) for port, shape in profile.items()}


def test_options_become_flags(bundle10: Path, options: BuildOptions) -> None:
    more = msgspec.structs.replace(options, workspace=2 * 2**30, version_compatible=True, optimization_level=4)
    words = commands(trtexec_script(Bundle(bundle10), more))["block.engine"]
    wanted = {
        "--memPoolSize=workspace:2048",
        "--versionCompatible",
        "--excludeLeanRuntime",
        "--builderOptimizationLevel=4",
    }
    assert wanted <= set(words)
    plain = commands(trtexec_script(Bundle(bundle10), options))["block.engine"]
    assert not wanted & set(plain)


def test_the_script_runs_in_a_shell_and_finds_graphs_and_constants(
    bundle10: Path, options: BuildOptions, tmp_path: Path
) -> None:
    bundle = tmp_path / "a bundle's folder"
    shutil.copytree(bundle10, bundle)
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "trtexec"
    tool.write_text(FAKE)
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    script = trtexec_script(Bundle(bundle), options)
    subprocess.run(["sh", "-c", script], check=True, env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}, cwd="/")
    made = bundle / "engines" / "trtexec"
    for name in buildable_graphs(Bundle(bundle).manifest):
        assert (made / f"{name}.engine").exists()
    # Constants outside of a graph must lie beside it, under the name that the graph gives.
    for weights in ("vae_encoder.safetensors", "vae_decoder.safetensors"):
        assert (made / weights).resolve() == (bundle / "weights" / weights).resolve()
