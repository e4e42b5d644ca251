"""Which backend is taken, what is said where the GPU, its driver or pycuda is missing, and `animate` on the (fake) GPU."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dynamictrl_edge.bundle.errors import DeviceError
from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.cli.main import run
from dynamictrl_edge.engines.machine import Gpu, Machine
from dynamictrl_edge.runtime import Animator
from dynamictrl_edge.runtime.backends.gpu_backend import TensorRTBackend
from tests.cli_samples import animate, refused, small_inputs
from tests.cuda_fakes import FakeCuda
from tests.gpu_samples import (
    TINY,
    TRT,
    look,
    on_processor,
)
from tests.trt_fake_runtime import FakeEngines, fake_machine

# Which backend


GPU = Machine(
    gpu=Gpu("Fake GPU", (8, 9), "580.65.06", 8 << 30), flavours={"tensorrt": "10.13.3.9"}, platform="linux-x86_64"
)


def test_auto_takes_the_gpu_where_engines_fit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(races=False).install(monkeypatch)
    FakeEngines(TRT, root, cuda).install(monkeypatch)
    look(monkeypatch, fake_machine(TRT, cuda))
    animator = Animator.from_bundle(root)
    assert animator.backend.name == "tensorrt"
    animator.close()
    assert (cuda.memory, cuda.locked) == (0, 0)


def test_auto_passes_over_a_gpu_with_a_reason(bundle10: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look(monkeypatch, GPU)
    animator = Animator.from_bundle(bundle10, cache=False)
    assert animator.backend.name == "onnxruntime"
    clip = animator(**TINY)
    assert any("not on the GPU" in text and "dynamictrl build" in text for text in clip.notices)


def test_auto_says_nothing_where_there_is_no_gpu(bundle10: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look(monkeypatch, Machine(gpu=None, no_gpu="none here"))
    assert Animator.from_bundle(bundle10, cache=False)(**TINY).notices == on_processor(bundle10, **TINY).notices


def test_tensorrt_without_a_gpu_is_refused(bundle10: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look(monkeypatch, Machine(gpu=None, no_gpu="none here"))
    with pytest.raises(DeviceError, match=r"none here.*--backend onnxruntime"):
        Animator.from_bundle(bundle10, backend="tensorrt")


def test_a_bundle_that_no_backend_takes_tells_both_reasons(
    bundle10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.engine_samples import edit

    shutil.copytree(bundle10, tmp_path / "bundle")
    edit(tmp_path / "bundle", lambda manifest: manifest.update(precision="bf16"))
    look(monkeypatch, GPU)
    with pytest.raises(DeviceError, match=r"bf16.*On the GPU: .*has no engines"):
        Animator.from_bundle(tmp_path / "bundle")


# pycuda and the driver


def test_missing_pycuda_and_driver_are_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def refuse(error: Exception) -> None:
        def imported(name: str, *rest: Any) -> Any:
            if name.partition(".")[0] == "pycuda":
                raise error
            return real(name, *rest)

        monkeypatch.setattr(builtins, "__import__", imported)

    machine = fake_machine(TRT, FakeCuda())
    for error, words in (
        (ModuleNotFoundError("No module named 'pycuda'", name="pycuda"), "pip install pycuda"),
        (ImportError("libcuda.so.1: cannot open shared object file"), r"driver is not installed.*nvidia\.com/drivers"),
        (ImportError("_driver.so: undefined symbol: cuX"), "built for another CUDA"),
    ):
        refuse(error)
        with pytest.raises(DeviceError, match=words):
            TensorRTBackend.open(Bundle(root), machine=machine)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cuInit failed: no CUDA-capable device is detected", "CUDA finds no GPU"),
        ("cuInit failed: CUDA driver version is insufficient for CUDA runtime version", "driver is too old"),
    ],
)
def test_what_the_driver_says_at_the_start(text: str, words: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda().install(monkeypatch)
    cuda.fail = lambda name: cuda.error(text, "RuntimeError") if name == "init" else None
    with pytest.raises(DeviceError, match=words):
        TensorRTBackend.open(Bundle(root), machine=fake_machine(TRT, cuda))


def test_another_gpu_than_nvidia_smi_lists_first_is_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(capability=(8, 9)).install(monkeypatch)
    machine = fake_machine(TRT, cuda)
    cuda.capability = (7, 5)
    with pytest.raises(DeviceError, match=r"Fake GPU \(SM75\).*CUDA_DEVICE_ORDER"):
        TensorRTBackend.open(Bundle(root), machine=machine)


# The command line


def test_animate_on_the_gpu_gives_it_back(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda = FakeCuda(races=False).install(monkeypatch)
    FakeEngines(TRT, root, cuda).install(monkeypatch)
    look(monkeypatch, fake_machine(TRT, cuda))
    line = animate(root, small_inputs(tmp_path), tmp_path / "clip.mp4", backend="tensorrt", json=True)
    assert run(line) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["backend"], told["frames"], told["resident_blocks"]) == ("tensorrt", 5, 3)
    assert told["planned_peak_gb"] > 0.6
    gc.collect()
    assert (cuda.memory, cuda.locked) == (0, 0)


def test_animate_on_a_gpu_that_fails_ends_with_5_and_gives_it_back(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda = FakeCuda(races=False).install(monkeypatch)
    engines = FakeEngines(TRT, root, cuda).install(monkeypatch)
    look(monkeypatch, fake_machine(TRT, cuda))
    cuda.fail = lambda name: (
        cuda.error("cuMemcpy failed: unspecified launch failure", "LaunchError")
        if engines.runs.count("block") == 4
        else None
    )
    inputs = small_inputs(tmp_path)
    refused(
        capsys,
        tmp_path,
        animate(root, inputs, tmp_path / "clip.mp4", backend="tensorrt"),
        5,
        "Step 2 of 2: block 0",
        "launch failure",
    )


def test_animate_with_tensorrt_and_no_gpu_ends_with_5(
    bundle10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    look(monkeypatch, Machine(gpu=None, no_gpu="no nvidia-smi, so no NVIDIA driver"))
    line = animate(bundle10, small_inputs(tmp_path), tmp_path / "clip.mp4", backend="tensorrt")
    refused(capsys, tmp_path, line, 5, "no NVIDIA driver", "--backend onnxruntime")
