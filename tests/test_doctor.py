"""`dynamictrl doctor`: what it finds on this machine, and what it says where something is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from typing import Any

import pytest

from dynamictrl_edge.cli import doctor
from dynamictrl_edge.cli.main import run

Capture = pytest.CaptureFixture[str]


def findings(capsys: Capture, code: int = 0) -> dict[str, dict[str, str]]:
    assert run(["doctor", "--json"]) == code
    out, err = capsys.readouterr()
    assert err == ""
    result = json.loads(out)
    assert result["can_animate"] == (code == 0)
    return {found["name"]: found for found in result["findings"]}


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in missing else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_this_machine_can_animate(capsys: Capture) -> None:
    import numpy

    found = findings(capsys)
    assert found["numpy"] == {
        "name": "numpy", "state": "ok", "found": numpy.__version__, "needed_for": "animate", "mend": "",
    }  # fmt: skip
    for name in ("Python", "av", "Pillow", "tokenizers", "onnxruntime", "H.264 encoder"):
        assert found[name]["state"] == "ok", name
    assert "cores" in found["processor"]["found"]
    assert found["memory"]["found"].endswith(" GB")
    for entry in found.values():
        assert entry["state"] in ("ok", "missing", "info")
        assert entry["found"] and entry["needed_for"]


def test_the_table_says_the_same(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert run(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "This machine can animate a bundle." in out
    for word in ("onnxruntime", "how to get it", "processor", "animate"):
        assert word in out


def test_a_package_that_animating_needs_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    without(monkeypatch, "onnxruntime", "tokenizers")
    monkeypatch.setenv("COLUMNS", "160")
    found = findings(capsys, code=5)
    assert (found["onnxruntime"]["state"], found["onnxruntime"]["mend"]) == ("missing", "pip install onnxruntime")
    assert (found["tokenizers"]["state"], found["tokenizers"]["mend"]) == ("missing", "pip install dynamictrl-edge")
    assert run(["doctor"]) == 5
    out = capsys.readouterr().out
    assert "pip install onnxruntime" in out and "missing" in out
    assert "This machine cannot animate yet" in out


def test_a_package_that_only_exporting_needs_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    without(monkeypatch, "torch")
    monkeypatch.setenv("COLUMNS", "160")
    assert findings(capsys)["torch"]["mend"] == 'pip install "dynamictrl-edge[export]"'
    assert run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert 'pip install "dynamictrl-edge[export]"' in out  # the brackets, too


def test_a_package_that_is_there_and_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    real = importlib.import_module

    def import_module(name: str, package: str | None = None) -> Any:
        if name == "onnxruntime":
            raise ImportError("libstdc++.so.6: version `GLIBCXX_3.4.30' not found")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)
    found = findings(capsys, code=5)["onnxruntime"]
    assert found["state"] == "missing" and "GLIBCXX_3.4.30" in found["found"]
    assert found["mend"] == "pip install --force-reinstall onnxruntime"


def test_an_encoder_that_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    import av

    class Codec:
        def __init__(self, name: str, mode: str) -> None:
            if name == "libx264":
                raise av.codec.codec.UnknownCodecError(name)

    monkeypatch.setattr(av, "Codec", Codec)
    found = findings(capsys)
    assert (found["H.264 encoder"]["state"], found["VP9 encoder"]["state"]) == ("missing", "ok")
    assert "pip install --force-reinstall av" in found["H.264 encoder"]["mend"]


def test_a_python_that_is_too_old(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.18")
    monkeypatch.setattr(doctor.platform, "python_version_tuple", lambda: ("3", "9", "18"))
    found = findings(capsys, code=5)["Python"]
    assert (found["state"], found["found"]) == ("missing", "3.9.18")
    assert "3.10" in found["mend"]


def test_building_needs_one_of_two_libraries(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    mend = {
        "TensorRT-RTX": 'pip install "dynamictrl-edge[build,rtx]"',
        "TensorRT": 'pip install "dynamictrl-edge[build,tensorrt]"',
        "polygraphy": 'pip install "dynamictrl-edge[build]"',
    }
    without(monkeypatch, "tensorrt_rtx", "tensorrt", "tensorrt_lean", "polygraphy")
    found = findings(capsys)  # engines are not needed to animate
    for name, command in mend.items():
        assert (found[name]["state"], found[name]["needed_for"], found[name]["mend"]) == ("missing", "build", command)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: ModuleSpec(name, None))
    versions = {"tensorrt_cu12": "10.9.0.34", "tensorrt_lean": "10.9.0.34", "polygraphy": "0.53.6"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or missing(name))
    found = findings(capsys)
    assert (found["TensorRT"]["state"], found["TensorRT"]["found"]) == ("ok", "10.9.0.34 (CUDA 12)")
    assert (found["TensorRT-RTX"]["state"], found["TensorRT-RTX"]["mend"]) == ("info", mend["TensorRT-RTX"])
    assert (found["polygraphy"]["state"], found["polygraphy"]["found"]) == ("ok", "0.53.6")
    assert found["TensorRT's lean runtime"]["found"] == "10.9.0.34"


def missing(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


def test_gpus_are_listed_one_by_one(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    answer = (
        "NVIDIA H200, 9.0, 575.57, 143771\nNVIDIA L4, 8.9, 575.57, 23034\nNVIDIA GeForce GTX 1080, 6.1, [N/A], 8192\n"
    )
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, stdout=answer, stderr="")
    )
    assert run(["doctor", "--json"]) == 0
    gpus = [f for f in json.loads(capsys.readouterr().out)["findings"] if f["name"] == "NVIDIA GPU"]
    assert [gpu["found"] for gpu in gpus] == [
        "NVIDIA H200, SM90, 150.8 GB, driver 575.57, target h200: bf16, fp16, fp32, fp8, int8",
        "NVIDIA L4, SM89, 24.2 GB, driver 575.57, target local: bf16, fp16, fp32, fp8, int8",
        "NVIDIA GeForce GTX 1080, SM61, 8.6 GB, too old for engines",
    ]
    assert {gpu["state"] for gpu in gpus} == {"ok"}


@pytest.mark.parametrize(
    "failure",
    [subprocess.TimeoutExpired("nvidia-smi", 20), subprocess.CalledProcessError(9, "nvidia-smi"), OSError("no")],
)
def test_a_driver_that_does_not_answer_is_told(
    failure: Exception, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail(command: Sequence[str], **_: object) -> None:
        raise failure

    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(subprocess, "run", fail)
    assert "nvidia-smi failed" in findings(capsys)["NVIDIA GPU"]["found"]


def test_a_machine_without_a_gpu_is_told_what_that_means(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = findings(capsys)["NVIDIA GPU"]
    assert found["state"] == "info" and "processor" in found["found"]


@pytest.mark.parametrize(
    ("name", "capability", "words"), [("RTX 4090", (8, 9), "CUDA_ROOT"), ("Orin", (8, 7), "nvidia-jetpack")]
)
def test_pycuda_is_asked_for_where_there_is_a_gpu(
    name: str, capability: tuple[int, int], words: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from dynamictrl_edge.engines import machine

    gpu = machine.Gpu(name, capability, "580.1", 8 << 30)
    monkeypatch.setattr(machine, "look_at_gpus", lambda: ([gpu], ""))
    without(monkeypatch, "pycuda")
    found = findings(capsys)["pycuda"]
    assert found["state"] == "missing" and words in found["mend"] and "pip install pycuda" in found["mend"]


def test_a_pycuda_that_does_not_load_is_told(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    from dynamictrl_edge.engines import machine

    monkeypatch.setattr(machine, "look_at_gpus", lambda: ([machine.Gpu("RTX 4090", (8, 9), "580.1", 8 << 30)], ""))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, p=None: real("json") if n == "pycuda" else real(n, p))
    monkeypatch.setattr(doctor, "_unloadable", lambda module: "libcuda.so.1: not found" if "pycuda" in module else None)
    found = findings(capsys)["pycuda"]
    assert "libcuda.so.1" in found["found"] and "--force-reinstall" in found["mend"]
