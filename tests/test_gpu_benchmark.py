"""The command for machines with a GPU, as far as it goes without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the first part measures with PyTorch")
pytest.importorskip("diffusers", reason="the loop is compared with diffusers' pieces")

from benchmarks import gpu_clip, gpu_loop
from benchmarks.gpu import tokens
from benchmarks.loop import Job, Server, Worker, relative_rms, write_inputs
from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.engines.engine_set import ClipSize
from dynamictrl_edge.engines.machine import Machine
from dynamictrl_edge.runtime.backends import gpu_backend
from tests.conftest import Quantized
from tests.cuda_fakes import FakeCuda
from tests.golden import model_dir
from tests.gpu_samples import TINY, TRT, look, with_engines
from tests.trt_fake_runtime import FakeEngines, fake_machine

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"
CHECKPOINT = model_dir("cogvideox15-tiny")


def folder_with(folder: Path, **things: Path) -> Path:
    """A folder in which the loop's measurement finds these, so that it exports nothing."""
    (folder / "tiny15").mkdir()
    for name, path in things.items():
        (folder / "tiny15" / name).symlink_to(path)
    return folder


def test_the_dry_run_goes_through_every_measurement(bundle15: Path, quantized: Quantized, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, checkpoint=CHECKPOINT, fp32=bundle15, int8=quantized("int8"))
    line = [sys.executable, str(SCRIPT), "--dry-run", "--folder", str(folder), "--rounds", "1", "--steps", "6"]
    # Threads of PyTorch that wait for a busy core take longer than all that they compute here.
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=one)
    assert done.returncode == 0, done.stderr
    assert "skipped" not in done.stdout, done.stderr
    found = json.loads(done.stdout)
    toy = found["torch"]["toy"]
    assert toy["tokens"] == 24 and toy["block_seconds"] > 0
    assert set(toy["active_tokens"]) == {"0.2", "0.4", "0.6"}
    for share, row in toy["active_tokens"].items():
        assert float(share) < row["by_flop"] < 1
    assert toy["streaming"]["block_bytes"] == 4 * 12 * 64**2
    for name in ("both_halves_together", "guidance_reuse", "trunk_reuse"):
        assert toy[name] > 0

    loop = found["loop"]["64x64x13"]
    assert loop["video_tokens"] == 32 and loop["torch"]["step_seconds"]["median"] > 0
    for precision, close in (("fp32", 1e-5), ("int8", 0.2)):
        cases = loop[precision]
        assert set(cases) == {"denoiser_bytes", "exact", "exact, least", "quality", "balanced"}
        for name in ("exact", "exact, least"):
            assert cases[name]["relative_rms_to_torch"] < close
            assert 0 < cases[name]["step_seconds"]["median"] < cases[name]["loop_seconds"]["median"]
            assert cases[name]["peak_rss_bytes"] > 10e6
        assert cases["exact"]["resident_blocks"] > cases["exact, least"]["resident_blocks"] == 0
        assert cases["exact, least"]["relative_rms_to_exact"] < 1e-5
        for name in ("quality", "balanced"):
            assert "trunk" in cases[name]["step_kinds"] and cases[name]["flop_fraction"] < 1
            assert 1e-4 < cases[name]["relative_rms_to_exact"] < 1
    assert loop["int8"]["denoiser_bytes"] < loop["fp32"]["denoiser_bytes"]


class Here(Worker):
    """A worker without a process of its own, where the driver is a fake."""

    def __init__(self, job: Job):
        self._server, self.last = Server(job), {}

    def _answer(self) -> dict[str, Any]:
        return json.loads(json.dumps(self._server.answer()))

    def close(self) -> int:
        self._server.close()
        return int(self.last.get("rss", 0))


def test_on_a_gpu_plans_and_presets_go_through_the_engines(
    bundle15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake one. PyTorch finds no GPU there, and is skipped; a budget that is too small as well."""
    root = with_engines(bundle15, tmp_path, TRT)
    notes: list[int] = []
    cuda = FakeCuda(races=False).install(monkeypatch)
    FakeEngines(TRT, root, cuda).install(monkeypatch)
    machine = fake_machine(TRT, cuda)
    for place in (gpu_loop, gpu_backend):
        monkeypatch.setattr(place, "look_at_machine", lambda: machine)
    monkeypatch.setattr(gpu_loop, "Worker", Here)
    built: list[list[str]] = []
    monkeypatch.setattr("dynamictrl_edge.cli.main.run", lambda line: built.append(line) or 0)
    size = ClipSize(height=32, width=48, frames=9)
    wanted = gpu_loop.Wanted("tiny15", (size,), steps=5, rounds=1, memory=(6.0, 0.1), precisions=("bf16",), keep=True)
    folder = folder_with(tmp_path, checkpoint=CHECKPOINT, bf16=root)
    found = gpu_loop.measure(wanted, folder, {}, lambda: notes.append(1))[str(size)]

    assert len(notes) == 8 and "skipped" in found["torch"]
    assert built[0][:3] == ["build", str(folder / "tiny15" / "bf16"), "--target"] and str(size) in built[0]
    cases = found["bf16"]
    assert "0.10 GB" in cases["exact, 0.1 GB"]["skipped"]
    for name in ("exact", "exact, least", "exact, 6 GB", "quality", "balanced"):
        case = cases[name]
        assert case["peak_rss_bytes"] and 0 < case["device_peak_bytes"] <= case["planned_peak_bytes"], name
        assert "bytes" in case["copies"] and "relative_rms_to_torch" not in case
    assert cases["exact, least"]["budget_bytes"] < cases["exact, 6 GB"]["budget_bytes"] == 6_000_000_000
    assert cases["exact, least"]["same_numbers"] and cases["exact, 6 GB"]["same_numbers"]
    assert "trunk" in cases["quality"]["step_kinds"] and 0 < cases["quality"]["relative_rms_to_exact"] < 1

    exact = np.load(folder / "tiny15" / f"{size}-bf16-exact.npy")
    job = Job("ours", bundle15, folder / "tiny15" / f"{size}-inputs.npz", tmp_path / "cpu.npy", 5)
    assert "error" not in Server(job).answer()
    assert relative_rms(exact, np.load(job.out)) < 1e-5


def test_a_clip_is_compared_stage_by_stage(bundle10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the fake GPU, whose engines are computed by ONNX Runtime: one that errs shows where it does."""
    root = with_engines(bundle10, tmp_path, TRT)
    cuda = FakeCuda(races=False).install(monkeypatch)
    engines = FakeEngines(TRT, root, cuda).install(monkeypatch)
    look(monkeypatch, fake_machine(TRT, cuda))
    found = gpu_clip.compare(root, {**TINY, "steps": 3})
    close = 1e-4  # the processor rounds otherwise with more threads than the fake's one
    assert list(found["stages"]) == ["text", "photo", "pose", "step", "frames"]
    assert max(found["stages"].values()) < close
    for name in ("first", "second", "least_memory", "cuda_graphs"):
        assert found[name]["latents_relative_rms"] < close and found[name]["frames_mean_difference"] < 0.1, name
        assert name == "first" or found[name]["same_numbers"]
        assert found[name]["device_peak_bytes"] > 0
    assert not found["cuda_graphs"]["notices"] and "cuGraphLaunch" in cuda.calls
    assert found["least_memory"]["device_peak_bytes"] < found["second"]["device_peak_bytes"]

    compute = engines.compute

    def wrong(graph: str, feeds: Any) -> Any:
        outputs = compute(graph, feeds)
        return {name: value * np.float32(1.01) for name, value in outputs.items()} if graph == "head" else outputs

    engines.compute = wrong
    found = gpu_clip.compare(root, {**TINY, "steps": 3})["stages"]
    assert found.pop("step") == pytest.approx(0.01, rel=0.01)
    assert max(found.values()) < close


def test_without_a_gpu_no_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_loop, "look_at_machine", lambda: Machine(gpu=None, no_gpu="none here"))
    wanted = gpu_loop.Wanted("full", (ClipSize(32, 48, 9),), steps=2, rounds=1)
    with pytest.raises(gpu_loop.DeviceError, match="none here"):
        gpu_loop.measure(wanted, tmp_path, {}, lambda: None)
    assert not list(tmp_path.iterdir())


def test_pytorch_computes_in_bfloat16_with_the_same_noise(bundle15: Path, tmp_path: Path) -> None:
    """What a GPU is given; here on the processor."""
    manifest = Bundle(bundle15).manifest
    write_inputs(tmp_path / "inputs.npz", manifest.transformer, manifest.vae, (32, 48, 9))
    made = {}
    for dtype in ("float32", "bfloat16"):
        job = Job("torch", CHECKPOINT, tmp_path / "inputs.npz", tmp_path / f"{dtype}.npy", 4, dtype=dtype)
        assert "error" not in Server(job).answer()
        made[dtype] = np.load(job.out)
    assert 1e-4 < relative_rms(made["bfloat16"], made["float32"]) < 0.1


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    job = Job("ours", tmp_path / "nothing", tmp_path / "no.npz", tmp_path / "out.npy")
    with Worker(job) as worker, pytest.raises(RuntimeError, match=r"FileNotFoundError.*no\.npz"):
        worker.run()


def test_a_machine_without_the_package_or_a_gpu_says_what_was_skipped(tmp_path: Path) -> None:
    """Only Python, PyTorch and numpy: everything else cannot be imported."""
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("msgspec", "av", "onnxruntime", "click"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, {str(SCRIPT.parents[1])!r})
from benchmarks import gpu
import benchmarks.receipt
from pathlib import Path
benchmarks.receipt.write_receipt.__kwdefaults__["folder"] = Path({str(tmp_path)!r})
sys.argv = ["gpu.py"]
gpu.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    figures = json.loads((tmp_path / "gpu.json").read_text())["figures"]
    assert "no GPU" in figures["torch"]["skipped"]
    assert figures["engines"]["skipped"] and figures["loop"]["skipped"]


def test_tokens_of_a_clip() -> None:
    assert (tokens("1360x768x37"), tokens("1024x576x37"), tokens("512x288x17")) == (20400, 11520, 1728)
