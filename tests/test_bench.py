"""`dynamictrl bench`: what it measures adds up, on the processor and on a fake GPU; what it prints is whole and readable."""

from __future__ import annotations

import gc
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamictrl_edge.bundle.errors import DeviceError, UsageError
from dynamictrl_edge.cli import console
from dynamictrl_edge.cli.main import run
from dynamictrl_edge.runtime import Animator
from dynamictrl_edge.runtime import bench as bench_module
from dynamictrl_edge.runtime.bench import STAGES, BenchSettings, bench, pose_clip
from dynamictrl_edge.runtime.measure import NumpyCeiling, numpy_ceiling
from dynamictrl_edge.runtime.timeline import STEP, CopySpan, Part, Timeline, hidden_seconds
from tests.cli_samples import flags, listing, refused
from tests.cuda_fakes import FakeCuda
from tests.gpu_samples import TINY, TRT, Machinery, look, machinery, with_engines, zeros
from tests.test_animator import arguments
from tests.test_lean import WITHOUT_HEAVY
from tests.trt_fake_runtime import FakeEngines, fake_machine

Capture = pytest.CaptureFixture[str]

CEILING = NumpyCeiling(100.0, {"1024": 90.0, "2048": 100.0}, 1)
SMALL = BenchSettings(size=(48, 32, 9), steps=3, rounds=2, warmup=1)
RANGE = {"median", "min", "max"}


@pytest.fixture(autouse=True)
def ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not measured, which takes seconds."""
    monkeypatch.setattr(bench_module, "numpy_ceiling", lambda threads, seconds: CEILING)


@pytest.fixture(scope="module")
def animator(bundle10: Path) -> Animator:
    return Animator.from_bundle(bundle10, cache=False, threads=1)


def command(bundle: Path, **options: Any) -> list[str]:
    values = {"size": "48x32x5", "steps": 2, "guidance": 1, "rounds": 1, "warmup": 0, **options}
    return ["bench", str(bundle), *flags(values)]


def assert_adds_up(figures: dict[str, Any], rounds: int) -> None:
    """Stages, and what is measured inside the loop, in a clip's time. Of several rounds only the smallest and largest compare."""
    stages = dict(figures["stage_seconds"])
    whole = stages.pop("whole")
    assert tuple(stages) == STAGES
    for spread in (whole, *stages.values()):
        assert set(spread) == RANGE and 0 < spread["min"] <= spread["median"] <= spread["max"]
    assert sum(spread["min"] for spread in stages.values()) <= whole["max"]
    if rounds == 1:
        assert sum(spread["median"] for spread in stages.values()) <= whole["median"] + 1e-9


# What is measured


def test_stages_steps_and_blocks_add_up(animator: Animator) -> None:
    found = bench(animator, SMALL)
    figures, loop = found["figures"], found["figures"]["loop_seconds"]
    assert_adds_up(figures, SMALL.rounds)
    assert len(figures["warmup_seconds"]) == 1 and figures["warmup_seconds"][0] > 0
    assert len(loop["steps"]) == SMALL.steps and len(loop["blocks"]) == found["settings"]["blocks"] == 3
    steps = sum(step["min"] for step in loop["steps"])
    assert 0 < steps <= figures["stage_seconds"]["denoise"]["max"]
    # Both guidance halves of every block, one after the other, in a step.
    least = loop["stem"]["min"] + 2 * sum(block["min"] for block in loop["blocks"]) + loop["head"]["min"]
    assert 0 < least <= loop["step"]["max"]
    assert figures["halves"] == "in turn"
    assert figures["memory"]["process_peak_bytes"] > 50e6 and figures["memory"]["device_peak_bytes"] is None
    assert figures["copies"] is None and figures["reuse"] is None


def test_one_round_adds_up_exactly_and_its_parts_lie_in_their_steps(animator: Animator) -> None:
    timeline = Timeline()
    started, chunks = animator.start(timeline=timeline, **arguments("pipeline10_cfg3"))
    list(chunks)
    assert started.timeline is timeline and timeline.copies == []
    steps = [part for part in timeline.parts if part.name == STEP]
    assert [part.step for part in steps] == list(range(started.request.num_inference_steps))
    for before, after in itertools.pairwise(steps):
        assert 0 <= before.begin < before.end <= after.begin
    for part in timeline.parts:
        step = steps[part.step]
        assert step.begin <= part.begin <= part.end <= step.end
    inside = [part for part in timeline.parts if part.step == 1 and part.name != STEP]
    assert [(part.name, part.block, part.half) for part in inside] == [
        ("stem", -1, 0),
        *(("block", block, half) for block in range(3) for half in range(2)),
        ("head", -1, 0),
    ]
    assert sum(part.seconds for part in inside) <= steps[1].seconds
    assert sum(part.seconds for part in steps) <= started.seconds["denoise"] - timeline.schedule


def test_measuring_changes_no_number(animator: Animator) -> None:
    wanted = arguments("pipeline10_cfg3")
    plain = animator(**wanted)
    started, chunks = animator.start(timeline=Timeline(), **wanted)
    frames = np.concatenate(list(chunks))
    assert np.array_equal(frames, plain.frames) and np.array_equal(started.latents, plain.latents)  # type: ignore[arg-type]


def test_the_schedule_is_computed_in_every_round_and_known_to_the_next_clip(animator: Animator) -> None:
    for forget, computed in ((True, True), (False, False), (True, True)):
        if forget:
            animator.forget_schedule()
        timeline = Timeline()
        list(animator.start(timeline=timeline, **TINY)[1])
        assert (timeline.schedule > 0) == computed


@pytest.mark.parametrize(
    ("threads", "guidance", "halves"), [(1, 1.0, "one"), (1, 3.0, "in turn"), (2, 3.0, "side by side")]
)
def test_how_guidance_halves_go_through_a_block_is_said(
    threads: int, guidance: float, halves: str, bundle10: Path
) -> None:
    animator = Animator.from_bundle(bundle10, cache=False, threads=threads)
    settings = BenchSettings(size=(48, 32, 5), steps=2, guidance=guidance, rounds=1, warmup=0, threads=threads)
    found = bench(animator, settings)
    assert found["figures"]["halves"] == halves
    assert found["settings"]["threads"] == threads
    assert len(found["figures"]["loop_seconds"]["blocks"]) == 3


def test_the_share_is_of_the_operations_in_the_loop(animator: Animator) -> None:
    figures = bench(animator, SMALL)["figures"]
    config, tokens = animator.bundle.manifest.transformer, 3 * 2 * 3
    d, n = config.width, tokens + config.max_text_seq_length
    blocks = 2 * config.num_layers * (24 * n * d * d + 4 * n * n * d)
    ends = 3 * 2 * tokens * config.patch_elements * d
    assert figures["gflop"] == pytest.approx(SMALL.steps * (blocks + ends) / 1e9)
    assert figures["gflops"] == pytest.approx(figures["gflop"] / figures["stage_seconds"]["denoise"]["median"])
    assert figures["share_of_ceiling"] == pytest.approx(figures["gflops"] / CEILING.gflops)
    assert figures["ceiling"] == {"gflops": 100.0, "by_size": CEILING.by_size, "threads": 1}
    assert "numpy" in figures["ceiling_note"]


def test_reuse_is_measured_by_the_kind_of_step(bundle15: Path) -> None:
    animator = Animator.from_bundle(bundle15, cache=False, threads=1)
    policy = "combined,warmup=1,final=1"
    found = bench(animator, BenchSettings(size=(64, 64, 9), steps=6, rounds=1, warmup=0, reuse=policy))
    figures, loop = found["figures"], found["figures"]["loop_seconds"]
    kinds = ["full", "trunk", "tokens+guidance", "trunk+guidance", "full", "full"]
    assert [step["kind"] for step in loop["steps"]] == kinds == figures["reuse"]["steps"]
    full = bench(animator, BenchSettings(size=(64, 64, 9), steps=6, rounds=1, warmup=0))["figures"]
    assert figures["gflop"] / full["gflop"] == pytest.approx(figures["reuse"]["flop_fraction"], abs=1e-4)
    assert_adds_up(figures, 1)


def test_without_a_second_process_there_is_no_ceiling(
    animator: Animator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_module, "numpy_ceiling", numpy_ceiling)
    for broken in (str(tmp_path / "none"), "/bin/false"):
        monkeypatch.setattr(sys, "executable", broken)
        figures = bench(animator, BenchSettings(size=(48, 32, 5), steps=1, guidance=1.0, rounds=1, warmup=0))["figures"]
        assert figures["ceiling"] is None and figures["share_of_ceiling"] is None
        assert "not measured" in figures["ceiling_note"] and figures["gflops"] > 0


def test_the_ceiling_is_the_best_of_numpys_products() -> None:
    found = numpy_ceiling(1, seconds=0.01, sizes=(32, 64))
    assert found is not None and found.threads == 1
    assert set(found.by_size) == {"32", "64"} and min(found.by_size.values()) > 0
    assert found.gflops == max(found.by_size.values())


def test_the_process_of_the_ceiling_is_told_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, str] = {}

    def started(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        given.update(env)
        return subprocess.CompletedProcess(command, 0, '{"32": 5.0}', "")

    monkeypatch.setattr(subprocess, "run", started)
    assert numpy_ceiling(3) == NumpyCeiling(5.0, {"32": 5.0}, 3)
    assert {given[name] for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")} == {"3"}


def test_hidden_copies_are_counted_by_hand() -> None:
    timeline = Timeline()
    timeline.parts = [
        Part(STEP, 0, -1, 0, 0.0, 9.0),  # a step is no computing of its own
        Part("block", 0, 1, 0, 5.0, 6.0),
        Part("stem", 0, -1, 0, 1.0, 2.0),
        Part("block", 0, 0, 0, 3.0, 5.0),
    ]
    timeline.copies = [CopySpan(4.5, 7.0, 10), CopySpan(0.0, 3.5, 10), CopySpan(7.0, 8.0, 10)]
    assert hidden_seconds(timeline) == pytest.approx((1.0 + 0.5) + (0.5 + 1.0))


def test_a_timeline_of_a_loop_that_was_left_stays_empty(animator: Animator) -> None:
    timeline = Timeline()

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    _, chunks = animator.start(timeline=timeline, callback_on_step_end=fail, **TINY)
    with pytest.raises(ZeroDivisionError):
        list(chunks)
    assert timeline.parts == [] and timeline._marks == []
    with pytest.raises(RuntimeError, match="outside a loop"), timeline.part("stem"):
        pass


def test_the_figure_waves_and_is_the_same_every_time() -> None:
    clip = pose_clip(64, 48, 9)
    assert clip.shape == (9, 64, 48, 3) and clip.dtype == np.uint8
    drawn = clip.any(-1).mean((1, 2))
    assert (drawn > 0.02).all() and (drawn < 0.4).all()
    assert all((clip[i] != clip[i + 1]).any() for i in range(8))
    assert np.array_equal(clip, pose_clip(64, 48, 9))
    assert pose_clip(16, 16, 1).any()


# On a GPU


def seconds(block: float) -> Callable[[str], float]:
    return lambda graph: block if graph == "block" else 1e-3


def streaming(gpu: Machinery, patch: pytest.MonkeyPatch, *, copy: float) -> dict[str, Any]:
    """Figures of blocks of twice 10 ms, all of which stream, each copied in so many seconds."""
    gpu.keep_blocks(patch, 0, 2)
    gpu.engines.seconds = seconds(0.010)
    gpu.cuda.copy_rate = gpu.backend.buffers.weights(gpu.animator.bundle, 3)._bytes / copy
    figures: dict[str, Any] = bench(gpu.animator, BenchSettings(size=(48, 32, 9), steps=6, rounds=2, warmup=1))[
        "figures"
    ]
    return figures


def test_on_a_gpu_steps_and_blocks_have_the_gpus_times(gpu: Machinery, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = streaming(gpu, monkeypatch, copy=0.015)
    loop, copies = figures["loop_seconds"], figures["copies"]
    for spread in (loop["block"], *loop["blocks"]):
        assert spread["min"] == pytest.approx(0.010, abs=1e-6) and spread["max"] == pytest.approx(0.010, abs=1e-6)
    assert [loop[name]["median"] for name in ("stem", "head")] == pytest.approx([1e-3, 1e-3], abs=1e-6)
    # Copies that are quicker than blocks are hidden, but for the first one of the clip.
    assert 0.064 < loop["steps"][0]["median"] < 0.080
    for step in loop["steps"][1:]:
        assert step["median"] == pytest.approx(0.062, abs=2e-3)
    assert 6 * 3 <= copies["count"] <= 6 * 3 + 2
    assert copies["seconds"] == pytest.approx(0.015 * copies["count"], rel=0.01)
    assert copies["bytes_per_second"] == pytest.approx(gpu.cuda.copy_rate, rel=0.01)
    assert 0.9 < copies["hidden_share"] < 1
    assert copies["hidden_seconds"] == pytest.approx(copies["hidden_share"] * copies["seconds"])


def test_on_a_gpu_copies_that_take_longer_than_blocks_show(gpu: Machinery, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = streaming(gpu, monkeypatch, copy=0.050)
    assert figures["loop_seconds"]["block"]["median"] == pytest.approx(0.010, abs=1e-6)
    assert figures["loop_seconds"]["steps"][3]["median"] == pytest.approx(3 * 0.050, rel=0.05)
    assert 0.3 < figures["copies"]["hidden_share"] < 0.5  # 20 of 50 ms


def test_on_a_gpu_the_arenas_peak_is_told_and_blocks_that_stay_are_not_copied_again(gpu: Machinery) -> None:
    found = bench(gpu.animator, SMALL)
    figures = found["figures"]
    assert_adds_up(figures, SMALL.rounds)
    assert figures["memory"]["device_peak_bytes"] == gpu.backend.peak > 0
    assert figures["memory"]["device_peak_bytes"] <= figures["memory"]["planned_peak_bytes"]
    assert figures["copies"] == {
        **{"count": 0, "bytes": 0, "seconds": 0, "hidden_seconds": 0},
        **{"bytes_per_second": None, "hidden_share": None},
    }
    assert figures["ceiling"] is None and figures["share_of_ceiling"] is None and figures["gflops"] > 0
    assert "not measured" in figures["ceiling_note"]
    assert found["settings"]["backend"] == "tensorrt" and figures["halves"] == "in turn"


def test_on_a_gpu_measuring_changes_no_number_and_leaves_no_event(
    gpu: Machinery, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.keep_blocks(monkeypatch, 1, 2)
    wanted = arguments("pipeline10_cfg3")
    plain = gpu.animator(**wanted)
    made = []
    for _ in range(3):
        frames = np.concatenate(list(gpu.animator.start(timeline=Timeline(), **wanted)[1]))
        assert np.array_equal(frames, plain.frames)
        made.append(gpu.cuda.live["Event"])
    assert made[0] == made[1] == made[2]
    gpu.cuda.calls.clear()
    gpu.animator(**wanted)
    assert "Event" not in gpu.cuda.calls and gpu.backend._gpu.clock is None


def test_on_a_gpu_halves_that_go_together_are_one_call(
    bundle10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = machinery(with_engines(bundle10, tmp_path, TRT, batch=2), TRT, monkeypatch, races=False)
    zeros(made)
    made.engines.seconds = seconds(0.020)
    found = bench(made.animator, BenchSettings(size=(48, 32, 9), steps=2, rounds=1, warmup=0))["figures"]
    made.animator.close()
    assert found["halves"] == "together"
    assert found["loop_seconds"]["step"]["median"] >= 3 * 0.020
    assert found["loop_seconds"]["block"]["median"] == pytest.approx(0.020, abs=1e-6)


def test_a_fault_while_measuring_leaves_a_gpu_that_works(gpu: Machinery) -> None:
    gpu.engines.fail = lambda name: "Error Code 1" if gpu.engines.runs.count("block") == 4 else None
    with pytest.raises(DeviceError, match="Step 1 of 3: block"):
        bench(gpu.animator, SMALL)
    gpu.engines.fail = lambda name: None
    assert gpu.backend._gpu.clock is None
    assert len(bench(gpu.animator, SMALL)["figures"]["loop_seconds"]["steps"]) == 3


# The command line


def test_the_json_is_whole_and_in_the_file_too(bundle10: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "bench.json"
    out.write_text("an older one")
    assert run(command(bundle10, out=out, json=True, rounds=2, threads=1)) == 0
    printed, err = capsys.readouterr()
    found = json.loads(printed)
    assert err == "" and json.loads(out.read_text()) == found
    assert list(found) == ["name", "date", "machine", "versions", "settings", "seeds", "figures", "notices"]
    assert found["name"] == "bench" and found["date"].endswith("+00:00") and found["seeds"] == [42]
    assert set(found["machine"]) == {"cpu", "cores", "memory_bytes", "system", "python", "gpus"}
    assert found["versions"]["numpy"] == np.__version__
    assert found["settings"] == {
        **{"bundle": bundle10.name, "precision": "fp32", "width": 128, "blocks": 3, "video_tokens": 12},
        **{"text_tokens": found["settings"]["text_tokens"], "size": "48x32x5", "steps": 2, "guidance": 1.0},
        **{"reuse": "off", "rounds": 2, "warmup": 0, "backend": "onnxruntime", "threads": 1, "memory_gb": None},
    }
    figures = found["figures"]
    assert set(figures) == {
        *("stage_seconds", "warmup_seconds", "halves", "loop_seconds", "memory", "gflop", "gflops"),
        *("ceiling", "ceiling_note", "share_of_ceiling", "copies", "reuse"),
    }
    assert set(figures["loop_seconds"]) == {"step", "stem", "block", "head", "steps", "blocks"}
    assert all(set(step) == {"kind", *RANGE} for step in figures["loop_seconds"]["steps"])
    assert all(set(block) == RANGE for block in figures["loop_seconds"]["blocks"])
    assert_adds_up(figures, 2)
    assert str(bundle10.parent) not in printed


def test_the_table_names_what_it_shows(bundle10: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run(command(bundle10, guidance=3, threads=1, warmup=1)) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    for word in (
        *STAGES,
        "whole",
        "a step",
        "block 2",
        "step 2",
        "48x32x5, 2 steps, guidance 3, onnxruntime, 1 threads",
    ):
        assert word in printed, word
    for word in (
        "the other follows",
        "The first clip",
        "MB at most in this process",
        "GFLOP/s",
        "of 100.0: the best float32",
    ):
        assert word in printed, word
    assert listing(tmp_path) == {}


def test_a_fake_gpu_is_measured_from_the_command_line(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    cuda = FakeCuda(races=False).install(monkeypatch)
    FakeEngines(TRT, root, cuda).install(monkeypatch)
    look(monkeypatch, fake_machine(TRT, cuda))
    out = tmp_path / "gpu.json"
    assert run(command(root, backend="tensorrt", out=out)) == 0
    printed, _ = capsys.readouterr()
    for word in (
        "tensorrt. Median",
        "MB of the GPU's arena",
        "copies of weights",
        "while blocks computed",
        "not measured",
    ):
        assert word in printed, word
    copies = json.loads(out.read_text())["figures"]["copies"]
    assert copies["count"] == 3 and copies["bytes"] > 0  # the first clip's
    assert run(command(root, backend="tensorrt", warmup=1)) == 0
    assert "No weights were copied" in capsys.readouterr().out
    gc.collect()
    assert (cuda.memory, cuda.locked) == (0, 0)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"backend": "cuda"}, 2, ("'cuda'", "onnxruntime")),
        ({"rounds": 0}, 2, ("--rounds 0", "from 1 to 1000")),
        ({"rounds": 1001}, 2, ("--rounds 1001",)),
        ({"warmup": -1}, 2, ("--warmup -1", "from 0")),
        ({"size": "48x32"}, 2, ("--size '48x32'", "WIDTHxHEIGHTxFRAMES")),
        ({"size": "50x32x5"}, 2, ("--size 50x32x5", "multiple of 16", "48 and 64")),
        ({"size": "48x32x6"}, 2, ("--size 48x32x6", "4 * n + 1")),
        ({"steps": 0}, 2, ("--steps 0",)),
        ({"guidance": -1}, 2, ("--guidance -1",)),
        ({"reuse": "fast"}, 2, ("--reuse 'fast'",)),
        ({"threads": 0}, 2, ("--threads 0",)),
        ({"memory": 0}, 2, ("--memory 0",)),
        ({"memory": 0.001}, 5, ("does not fit", "--memory")),
    ],
)
def test_bad_values_are_refused_by_name(
    options: dict[str, Any], code: int, words: tuple[str, ...], bundle10: Path, tmp_path: Path, capsys: Capture
) -> None:
    refused(capsys, tmp_path, command(bundle10, out=tmp_path / "a.json", **options), code, *words)


def test_outputs_and_bundles_that_cannot_be_are_refused_before_the_work(
    bundle10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(bench_module, "_round", lambda *_: pytest.fail("work was done"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "bundle").mkdir()
    for out, code, words in (
        (tmp_path / "none" / "a.json", 3, "does not exist"),
        (tmp_path / "folder", 3, "existing folder"),
        (bundle10 / "bundle.json", 2, "lies in the bundle"),
    ):
        refused(capsys, tmp_path, command(bundle10, out=out), code, words)
    refused(capsys, tmp_path, command(tmp_path / "bundle", out=tmp_path / "a.json"), 4, "bundle")
    refused(capsys, tmp_path, command(tmp_path / "none"), 4, "none")


def test_tensorrt_without_a_gpu_ends_with_5(
    bundle10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from dynamictrl_edge.engines.machine import Machine

    look(monkeypatch, Machine(gpu=None, no_gpu="no nvidia-smi, so no NVIDIA driver"))
    refused(capsys, tmp_path, command(bundle10, backend="tensorrt"), 5, "no NVIDIA driver", "--backend onnxruntime")


def test_a_number_of_rounds_is_checked_in_python_too() -> None:
    with pytest.raises(UsageError, match="--rounds 0"):
        BenchSettings(rounds=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("late", [("Warming up, 1 of 1", 1), ("Round 1 of 1", 1), ("Measuring the processor", 0)])
def test_an_interrupt_leaves_the_older_file(
    late: tuple[str, int],
    number: signal.Signals,
    bundle10: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    def heard(bars: object, label: str, done: int, total: int) -> None:
        if (label, done) == late:
            signal.raise_signal(number)

    monkeypatch.setattr(console.Bars, "__call__", heard)
    (tmp_path / "bench.json").write_text("an older one")
    handlers = signal.signal(number, signal.SIG_DFL)  # test runners in the background have them ignored
    try:
        assert run(command(bundle10, warmup=1, out=tmp_path / "bench.json", json=True)) == 130
    finally:
        signal.signal(number, handlers)
    printed, err = capsys.readouterr()
    assert (printed, err.strip()) == ("", "dynamictrl: Interrupted. No half-written output was left.")
    assert listing(tmp_path) == {"bench.json": b"an older one"}


def test_it_runs_where_the_heavy_libraries_cannot_be_imported(bundle10: Path) -> None:
    code = f"""
{WITHOUT_HEAVY}
from dynamictrl_edge.runtime import bench
bench.numpy_ceiling = lambda threads, seconds: None
from dynamictrl_edge.cli.main import main
main(sys.argv[1:])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *command(bundle10, json=True, backend="onnxruntime")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["figures"]["ceiling"] is None
