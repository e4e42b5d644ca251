"""Reuse between steps on the GPU backend: the processor's numbers, in the planned memory, without a wait that is not told.

Nothing here ran on a GPU; see test_gpu_backend.py.
"""

from __future__ import annotations

import gc
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamictrl_edge.bundle.errors import BundleError, DeviceError, UsageError
from dynamictrl_edge.bundle.manifest import MANIFEST_NAME
from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.cli.main import run
from dynamictrl_edge.runtime import Animator
from dynamictrl_edge.runtime.backends.arena import Arena
from dynamictrl_edge.runtime.backends.gpu_backend import OF_CACHES, SLACK, TensorRTBackend
from dynamictrl_edge.runtime.reuse import POLICIES
from dynamictrl_edge.runtime.reuse import device as device_module
from tests.cli_samples import animate, small_inputs
from tests.conftest import Export, Quantized
from tests.cuda_fakes import FakeCuda
from tests.engine_samples import edit
from tests.gpu_samples import (
    IN_THE_LOOP,
    RTX,
    SIZES,
    TINY,
    TRT,
    Machinery,
    assert_nothing_left,
    assert_same,
    look,
    machinery,
    on_processor,
    with_engines,
    zeros,
)
from tests.trt_fake_runtime import FakeEngines, engine_set, fake_machine

SHORT = "warmup=1,final=1"
REUSED = (
    f"quality,{SHORT}",
    f"balanced,{SHORT}",
    f"guidance,{SHORT}",
    f"trunk,{SHORT}",
    f"trunk-linear,{SHORT},guidance_period=2",
    f"table,{SHORT},trunk_threshold=0.5",
    f"adaptive,{SHORT},trunk_threshold=99,longest_run=2,guidance_period=3",
    f"tokens,{SHORT}",
    f"combined,{SHORT}",
    f"combined,{SHORT},trunk_order=1,guidance_period=1",
    f"tokens,{SHORT},token_cache=int8",
    "combined,warmup=2,final=1,token_cache=int8,token_changed=1",
    "tokens,warmup=2,final=1,token_changed=0.5",
)
STEPS = 8


def wanted(reuse: str, *, size: tuple[int, int, int] = (32, 48, 9), **changes: Any) -> dict[str, Any]:
    """A clip with something drawn, of a height, a width and frames."""
    height, width, frames = size
    pose = np.zeros((frames, height, width, 3), np.uint8)
    pose[:, 4:20, 10:18] = 200
    return {
        **TINY,
        "pose": pose,
        "steps": STEPS,
        "height": height,
        "width": width,
        "frames": frames,
        "reuse": reuse,
        **changes,
    }


# The same numbers


def test_every_policy_is_tried_here() -> None:
    assert {text.partition(",")[0] for text in REUSED} == set(POLICIES)


@pytest.mark.parametrize("reuse", REUSED)
def test_a_clip_is_the_processors_bit_for_bit_with_every_policy(reuse: str, gpu: Machinery, root: Path) -> None:
    ours, theirs = gpu.animator(**wanted(reuse)), on_processor(root, **wanted(reuse))
    assert_same(ours, theirs)
    assert ours.reuse is not None and theirs.reuse is not None
    assert ours.reuse.as_json() == theirs.reuse.as_json() and ours.notices == theirs.notices
    assert 0 < ours.reuse.plan.reused < STEPS


@pytest.mark.parametrize("reuse", [f"combined,{SHORT}", f"adaptive,{SHORT},trunk_threshold=99"])
def test_without_guidance_too(reuse: str, gpu: Machinery, root: Path) -> None:
    assert_same(gpu.animator(**wanted(reuse, guidance=1.0)), on_processor(root, **wanted(reuse, guidance=1.0)))


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_other_precisions_and_padded_frames_too(
    kind: str, exported: Export, quantized: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of two bytes a number; and blocks of which each has its own mixture of quantized linears."""
    version, source = (RTX, exported("cogvideox15-tiny", kind)) if kind == "fp16" else (TRT, quantized(kind, kept=3))
    root = with_engines(source, tmp_path, version)
    made = machinery(root, version, monkeypatch)
    clip = wanted(f"combined,{SHORT},token_cache=int8,token_share=0.3")
    assert_same(made.animator(**clip), on_processor(root, **clip))
    made.animator.close()
    assert_nothing_left(made)


@pytest.mark.parametrize("reuse", [f"trunk,{SHORT}", f"combined,{SHORT}", f"guidance,{SHORT},guidance_period=3"])
@pytest.mark.parametrize(("resident", "ring", "lockable"), [(0, 2, 0), (1, 2, 1 << 30), (2, 1, 0)])
def test_streamed_weights_change_nothing(
    resident: int, ring: int, lockable: int, reuse: str, gpu: Machinery, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that run no block, and those that run them for one half, leave the ring as it should be."""
    gpu.keep_blocks(monkeypatch, resident, ring, lockable=lockable)
    gpu.cuda.copy_rate = 1e6  # copies take longer than blocks
    assert_same(gpu.animator(**wanted(reuse)), on_processor(root, **wanted(reuse)))


def test_halves_go_in_turn_under_reuse_and_together_without(
    bundle10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = with_engines(bundle10, tmp_path, TRT, batch=2)
    made = machinery(root, TRT, monkeypatch)
    blocks = []
    for reuse in ("off", f"guidance,{SHORT}", "off"):
        made.engines.runs.clear()
        clip = made.animator(**wanted(reuse, steps=4))
        blocks.append(made.engines.runs.count("block") // 3)
        if reuse != "off":
            assert_same(clip, on_processor(root, **wanted(reuse, steps=4)))
    assert blocks == [4, 2 + 1 + 2 + 2, 4]  # runs of each block: the second step leaves a half out
    made.animator.close()
    assert_nothing_left(made)


# The loop


@pytest.mark.parametrize("reuse", REUSED)
def test_nothing_is_loaded_allocated_or_waited_for_in_the_loop(
    reuse: str, gpu: Machinery, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    taken: list[str] = []
    take = Arena.take

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "denoise" and done:
            seen.append((len(gpu.cuda.calls), len(gpu.engines.module.calls)))
        if stage == "denoise" and done == 1:
            monkeypatch.setattr(Arena, "take", lambda self, *rest: (taken.append(rest[1]), take(self, *rest))[1])
        if stage == "denoise" and done == STEPS - 1:
            monkeypatch.setattr(Arena, "take", take)

    clip = gpu.animator(**wanted(reuse), progress=progress)
    (first, asked_first), (last, asked_last) = seen[0], seen[STEPS - 2]
    between = gpu.cuda.calls[first:last]
    assert set(between) - {"memcpy_dtoh_async"} <= IN_THE_LOOP
    asked = {name for name, _ in gpu.engines.module.calls[asked_first:asked_last]}
    # An engine that runs for the first time is told its shapes, and where its activations go.
    first_run = {"IExecutionContext.set_input_shape", "IExecutionContext.set_device_memory"}
    assert asked - first_run == {"IExecutionContext.execute_async_v3", "IExecutionContext.set_tensor_address"}
    assert taken == []
    # What is read back: a number in every step, or the prediction of steps in which all tokens ran.
    assert clip.reuse is not None
    policy, steps = clip.reuse.plan.policy, clip.reuse.plan.steps[1 : STEPS - 1]
    whole = sum(step.trunk == "full" for step in steps)
    reads = len(steps) if policy.adaptive else whole if policy.follows_changes else 0
    assert between.count("memcpy_dtoh_async") == reads


def test_a_fault_in_a_graph_of_reuse_is_named_and_the_next_clip_works(gpu: Machinery, root: Path) -> None:
    def fail(name: str) -> str | None:
        late = name == "IExecutionContext.execute_async_v3" and gpu.engines.runs.count("trunk_reuse") == 1
        return "Error Code 1: odd" if late else None

    gpu.engines.fail = fail
    with pytest.raises(DeviceError, match=r"^Step 2 of 8: .*'trunk_reuse' failed: Error Code 1: odd"):
        gpu.animator(**wanted(f"trunk,{SHORT}"))
    gpu.engines.fail = lambda name: None
    assert_same(gpu.animator(**wanted(f"trunk,{SHORT}")), on_processor(root, **wanted(f"trunk,{SHORT}")))


# Memory

LARGE = (96, 160, 17)


@pytest.mark.parametrize("reuse", ["off", *REUSED])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_denoising_stage_takes_what_was_planned(
    reuse: str, guidance: float, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = machinery(root, TRT, monkeypatch, races=False)
    zeros(made)
    backend, peaks = made.backend, []

    def progress(stage: str, done: int, total: int) -> None:
        arena = backend._gpu.arena
        if stage == "denoise" and arena is not None:
            peaks.append(arena.peak)
            arena.peak = 0 if done == 0 else arena.peak

    for _ in range(2):  # the second finds the modulation tables, so that the stage begins with its own buffers
        peaks.clear()
        run, chunks = made.animator.start(
            **wanted(reuse, size=LARGE, steps=4, guidance=guidance, tiling="off"), progress=progress
        )
        list(chunks)
    plan: Any = run.plan
    (planned,) = (stage.arena - plan.kept for stage in plan.stages if stage.name == "denoise")
    alignment = SLACK + plan.layers * OF_CACHES
    assert peaks[-1] == pytest.approx(planned, abs=alignment)
    assert backend.peak <= backend._gpu.held
    # Caches that are large beside what alignment may add: a plan without them would be found out.
    assert plan.caches > 2 * alignment or not reuse.startswith(("tokens", "combined", "adaptive", "trunk-linear"))
    made.animator.close()
    assert_nothing_left(made)


def test_caches_that_do_not_fit_are_refused_with_their_bytes_and_what_does(
    gpu: Machinery, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The golden model's own are small beside what its VAE needs.
    real = device_module.cache_bytes
    monkeypatch.setattr(device_module, "cache_bytes", lambda *given, **how: 1000 * real(*given, **how))

    def start(reuse: str, memory: float) -> Any:
        animator = Animator(Bundle(root), gpu.backend, memory=memory, cache=False)
        return animator.start(**wanted(reuse, size=LARGE))[0].plan

    reuse = f"tokens,{SHORT},token_share=0.05"
    names = ("off", *POLICIES, f"{reuse},token_cache=int8")
    needs = {name: start(name, 8.0).smallest_budget for name in names}
    memory = (needs[names[-1]] + 1000) / 1e9
    with pytest.raises(DeviceError) as refusal:
        start(reuse, memory)
    text = str(refusal.value)
    assert re.search(r"with --reuse tokens does not fit into .* GB of it caches\)\. Give at least", text)
    fits = [name for name in names[:-1] if needs[name] <= memory * 1e9]
    assert "off" in fits and "trunk" in fits and "tokens" not in fits
    assert f"with --reuse, these fit: {', '.join((*fits, 'the same with token_cache=int8'))})" in text
    assert start("trunk", memory).caches > 0
    (stated,) = re.findall(r"at least ([\d.]+) GB", text)
    assert start(reuse, float(stated)).fits


def test_a_policy_that_keeps_no_token_is_refused(gpu: Machinery) -> None:
    with pytest.raises(UsageError, match=r"token_share=1 all 18 tokens.*at most token_share=0\.94"):
        gpu.animator.start(**wanted(f"tokens,{SHORT},token_share=1"))
    gpu.animator.start(**wanted(f"tokens,{SHORT},token_share=0.94"))


def test_requests_with_different_policies_leave_nothing_behind(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = machinery(root, TRT, monkeypatch, races=False)
    zeros(made)

    def state() -> tuple[Any, ...]:
        gc.collect()
        cuda, arena = made.cuda, made.backend._gpu.arena
        assert arena is not None
        return cuda.memory, cuda.locked, dict(cuda.live), len(cuda._starts), arena.used

    states, objects = [], []
    for _ in range(3):
        for reuse in (*REUSED, "off"):
            made.animator(**wanted(reuse, steps=6))
        made.cuda.calls.clear()
        made.engines.module.calls.clear()
        made.engines.runs.clear()
        for stream in made.cuda.streams.values():
            stream.idle.clear()
        states.append(state())
        objects.append(len(gc.get_objects()))
    assert states[1] == states[2]
    assert abs(objects[2] - objects[1]) < 50
    made.animator.close()
    assert_nothing_left(made)


# Engines


def test_a_set_that_was_built_before_the_bundle_had_reuse_is_refused_with_the_command(
    bundle10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "bundle"
    shutil.copytree(bundle10, root)
    whole = (root / MANIFEST_NAME).read_bytes()
    kinds = ("head_reuse", "trunk_", "tokens_", "cache_")

    def without(manifest: dict[str, Any]) -> None:
        manifest["graphs"] = {name: spec for name, spec in manifest["graphs"].items() if not name.startswith(kinds)}

    edit(root, without)
    engine_set(root, TRT, sizes=SIZES)
    old = machinery(root, TRT, monkeypatch, races=False)
    with pytest.raises(BundleError, match=r"lacks the graphs of --reuse trunk.*Export the checkpoint again"):
        old.animator.start(**wanted("trunk"))
    old.animator.close()
    (root / MANIFEST_NAME).write_bytes(whole)  # exported again, in the same place
    with pytest.raises(BundleError, match=r"has a graph '\w+'; the set has no engine for it.*dynamictrl build"):
        TensorRTBackend.open(Bundle(root), machine=fake_machine(TRT, FakeCuda().install(monkeypatch)))


# The command line


def test_animate_reuses_on_the_gpu(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda = FakeCuda(races=False).install(monkeypatch)
    FakeEngines(TRT, root, cuda).install(monkeypatch)
    look(monkeypatch, fake_machine(TRT, cuda))
    options = {"steps": 4, "guidance": 3, "backend": "tensorrt", "reuse": "trunk,warmup=1,final=0", "json": True}
    assert run(animate(root, small_inputs(tmp_path), tmp_path / "clip.mp4", **options)) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["backend"] == "tensorrt" and told["reuse"]["steps"] == ["full", "trunk", "full", "trunk"]
    gc.collect()
    assert (cuda.memory, cuda.locked) == (0, 0)
