"""The GPU backend on fakes: the same numbers as on the processor, in the planned memory, whatever fails.

Nothing here ran on a GPU. The driver is `cuda_fakes`, the engines are ONNX Runtime (`trt_fake_runtime`).
"""

from __future__ import annotations

import gc
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamictrl_edge.bundle.errors import BundleError, DeviceError, Interrupted
from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.runtime import Animator, Clip
from dynamictrl_edge.runtime.backends import cuda as cuda_door
from dynamictrl_edge.runtime.backends import ring as ring_module
from dynamictrl_edge.runtime.backends.gpu_backend import SLACK, TensorRTBackend
from dynamictrl_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend
from dynamictrl_edge.runtime.backends.ring import Layout
from dynamictrl_edge.runtime.memory import MemoryPlan
from tests.conftest import Export
from tests.cuda_fakes import Hazard
from tests.gpu_samples import (
    IN_THE_LOOP,
    RTX,
    TINY,
    TRT,
    Machinery,
    assert_nothing_left,
    assert_same,
    machinery,
    on_processor,
    with_engines,
    zeros,
)
from tests.test_animator import arguments
from tests.trt_fake_runtime import fake_machine
from tests.trt_snapshot import ALL

CASE = "pipeline10_cfg3"


@pytest.fixture(scope="module")
def root(bundle10: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model with engines of every version."""
    return with_engines(bundle10, tmp_path_factory.mktemp("gpu"), *ALL)


@pytest.fixture(scope="module")
def reference(root: Path) -> Clip:
    return on_processor(root, **arguments(CASE))


# The same numbers


@pytest.mark.parametrize("version", ALL)
def test_a_clip_is_the_processors_bit_for_bit_with_every_version(
    version: str, root: Path, reference: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = machinery(root, version, monkeypatch)
    assert_same(made.animator(**arguments(CASE)), reference)
    made.animator.close()
    assert_nothing_left(made)


@pytest.mark.parametrize(("model", "precision", "name"), [("cogvideox15-tiny", "fp16", "pipeline15_cfg3_f9")])
def test_half_precision_and_padded_frames_too(
    model: str,
    precision: str,
    name: str,
    exported: Export,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = with_engines(exported(model, precision), tmp_path, RTX)  # not for the bundle's usual clip
    made = machinery(root, RTX, monkeypatch)
    assert_same(made.animator(**arguments(name)), on_processor(root, **arguments(name)))
    made.animator.close()


@pytest.mark.parametrize(
    ("resident", "ring", "lockable"), [(0, 2, 0), (0, 3, 0), (1, 2, 0), (2, 1, 0), (1, 2, 1 << 30)]
)
def test_streamed_weights_change_nothing(
    resident: int, ring: int, lockable: int, gpu: Machinery, reference: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.keep_blocks(monkeypatch, resident, ring, lockable=lockable)
    for _ in range(2):  # a warm animator, too
        assert_same(gpu.animator(**arguments(CASE)), reference)


def test_halves_go_through_a_block_together_where_engines_and_memory_allow_it(
    bundle10: Path, tmp_path: Path, reference: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = with_engines(bundle10, tmp_path, TRT, batch=2)
    made = machinery(root, TRT, monkeypatch)
    clip = made.animator(**arguments(CASE))
    assert made.engines.runs.count("block") == 4 * 3  # steps and blocks
    assert made.backend.peak <= made.backend._gpu.held
    assert np.abs(clip.latents - reference.latents).max() < 1e-4  # two rows at once are rounded otherwise
    alone = made.animator(**arguments("pipeline10_nocfg"))
    assert_same(alone, on_processor(root, **arguments("pipeline10_nocfg")))
    made.animator.close()
    monkeypatch.setattr(MemoryPlan, "batch", 2)  # the processor, the same way
    assert_same(clip, on_processor(root, **arguments(CASE)))


def test_with_memory_to_spare_each_streamed_block_is_read_once(gpu: Machinery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_module, "STAGED", 2)
    read: list[int] = []
    fill = Layout.fill
    monkeypatch.setattr(Layout, "fill", lambda self, *rest: (read.append(self.nbytes), fill(self, *rest)))
    for lockable, times in ((0, 4 * 3), (1 << 30, 3)):
        gpu.keep_blocks(monkeypatch, 0, 2, lockable=lockable)
        read.clear()
        gpu.animator(**arguments(CASE, num_inference_steps=4))
        # and, where they are read anew, those that are on their way when the last step ends
        assert times <= len(read) <= times + (2 if lockable == 0 else 0)


def test_a_second_clip_finds_the_blocks_where_they_were(gpu: Machinery, reference: Clip, root: Path) -> None:
    def copied() -> list[int]:
        return [run.plan.kept, gpu.cuda.calls.count("memcpy_htod_async"), gpu.cuda.calls.count("mem_alloc")]

    seen = []
    for memory in (None, None, 0.6045, None):
        gpu.cuda.calls.clear()
        animator = Animator(Bundle(root), gpu.backend, memory=memory, cache=False)
        animator._denoiser = gpu.animator._denoiser
        run, chunks = animator.start(**arguments(CASE))
        assert np.array_equal(np.concatenate(list(chunks)), reference.frames)
        gpu.animator._denoiser = animator._denoiser
        seen.append(copied())
    first, second, tight, third = seen
    assert first[0] == second[0] > 0 == tight[0]
    assert first[1] - second[1] > 3 and second[2] == 0  # nor are modulation tables computed again
    assert tight[2] == 1 and third[2] == 2 and third[1] - second[1] == 3  # three blocks, copied again


def test_a_system_that_locks_no_more_memory_is_no_obstacle(
    gpu: Machinery, reference: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> Exception | None:
        full = (
            name == "pagelocked_empty" and gpu.cuda.calls.count(name) == 2 + 3 + 2
        )  # chunks, staging, the second block
        return gpu.cuda.error("cuMemHostAlloc failed: out of memory", "MemoryError") if full else None

    gpu.keep_blocks(monkeypatch, 0, 2, lockable=1 << 30)
    gpu.cuda.fail = fail
    assert_same(gpu.animator(**arguments(CASE)), reference)
    assert gpu.backend._gpu.lockable == 0 and gpu.cuda.calls.count("pagelocked_empty") == 7


def test_on_unified_memory_nothing_is_locked_twice(
    root: Path, reference: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = machinery(root, TRT, monkeypatch, integrated=True)
    assert made.backend._gpu.lockable == 0
    assert_same(made.animator(**arguments(CASE)), reference)
    made.animator.close()


def test_tiles_go_one_after_the_other_and_give_the_published_clip(gpu: Machinery, root: Path) -> None:
    wanted = arguments("pipeline10_tiled_resized")
    assert wanted["tiling"] == "on"
    assert_same(gpu.animator(**wanted), on_processor(root, **wanted))


def test_a_callback_sees_and_replaces_latents(gpu: Machinery, root: Path) -> None:
    def halve(who: Animator, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * np.float32(0.5)}

    wanted = arguments(CASE)
    ours = gpu.animator(**wanted, callback_on_step_end=halve)
    theirs = Animator(Bundle(root), OnnxRuntimeBackend(Bundle(root), threads=1), cache=False)(
        **wanted, callback_on_step_end=halve
    )
    assert_same(ours, theirs)


def test_any_thread_may_ask_and_the_host_keeps_its_context(gpu: Machinery, reference: Clip) -> None:
    made: list[Clip] = []
    seen: list[list[str]] = []

    def work() -> None:
        made.append(gpu.animator(**arguments(CASE), progress=lambda *_: seen.append(list(gpu.cuda.stack))))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert_same(made[0], reference)
    assert seen and all(stack == ["the host application's"] for stack in seen)


def test_several_animators_share_the_gpu_and_its_context(
    root: Path, reference: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = machinery(root, TRT, monkeypatch)
    backend = TensorRTBackend.open(Bundle(root), machine=fake_machine(TRT, first.cuda))
    second = Animator(Bundle(root), backend, cache=False)
    assert_same(first.animator(**arguments(CASE)), reference)
    assert_same(second(**arguments(CASE)), reference)
    first.animator.close()
    assert_same(second(**arguments(CASE)), reference)
    second.close()
    assert_nothing_left(first)


# Order and time


@pytest.mark.parametrize("wait", ["free", "ready", "sent"])
def test_without_one_of_its_waits_the_ring_is_caught(
    wait: str, gpu: Machinery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The detector finds each hazard that the ring's events prevent."""
    monkeypatch.setattr(ring_module, "STAGED", 2)
    gpu.keep_blocks(monkeypatch, 0, 2)
    gpu.cuda.copy_rate = 1e6  # copies that take longer than blocks

    def forget(self: Any, event: cuda_door.Event) -> None:
        blocks = gpu.backend.buffers.blocks[0]
        slots = [*blocks._slots.values(), *blocks._ring]
        if not any(getattr(slot, wait) is event for slot in slots):
            real(self, event)

    if wait == "sent":
        monkeypatch.setattr(cuda_door.Event, "wait", lambda self: None)
    else:
        real = cuda_door.Stream.wait_for
        monkeypatch.setattr(cuda_door.Stream, "wait_for", forget)
    with pytest.raises(Hazard):
        gpu.animator(**arguments(CASE))
    gpu.cuda.races = False  # what is left of it ends in peace


@pytest.mark.parametrize(("resident", "ring"), [(3, 0), (0, 2)])
def test_nothing_is_allocated_or_synchronized_in_the_loop(
    resident: int, ring: int, gpu: Machinery, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.keep_blocks(monkeypatch, resident, ring)
    seen: dict[int, int] = {}
    surface: dict[int, int] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "denoise":
            seen[done], surface[done] = len(gpu.cuda.calls), len(gpu.engines.module.calls)

    gpu.animator(**arguments(CASE, num_inference_steps=5), progress=progress)
    assert set(gpu.cuda.calls[seen[1] : seen[4]]) == IN_THE_LOOP
    asked = {name for name, _ in gpu.engines.module.calls[surface[1] : surface[4]]}
    assert asked == {"IExecutionContext.execute_async_v3", "IExecutionContext.set_tensor_address"}


@pytest.mark.parametrize(("resident", "ring"), [(3, 0), (0, 2), (1, 2)])
def test_the_gpu_is_never_idle_where_copies_are_quicker_than_blocks(
    resident: int, ring: int, gpu: Machinery, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.keep_blocks(monkeypatch, resident, ring)
    block_bytes = gpu.backend.buffers.weights(Bundle(gpu.animator.bundle.root), 3)._bytes
    gpu.engines.seconds = lambda graph: 0.01 if graph == "block" else 0.001
    gpu.cuda.copy_rate = block_bytes / 0.015  # a block has two halves of 10 ms
    compute = gpu.cuda.streams[gpu.backend._gpu.compute.handle]
    idle: dict[int, int] = {}
    gpu.animator(
        **arguments(CASE, num_inference_steps=6),
        progress=lambda stage, done, total: idle.update({done: len(compute.idle)}) if stage == "denoise" else None,
    )
    assert sum(seconds for seconds, _ in compute.idle[idle[1] : idle[5]]) < 1e-9


def test_slow_copies_cost_what_they_exceed_the_blocks_by(gpu: Machinery, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.keep_blocks(monkeypatch, 0, 2)
    block_bytes = gpu.backend.buffers.weights(Bundle(gpu.animator.bundle.root), 3)._bytes
    gpu.engines.seconds = lambda graph: 0.01 if graph == "block" else 0.0
    gpu.cuda.copy_rate = block_bytes / 0.050
    compute = gpu.cuda.streams[gpu.backend._gpu.compute.handle]
    times: dict[int, float] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "denoise":
            times[done] = compute.time

    gpu.animator(**arguments(CASE, num_inference_steps=6), progress=progress)
    # Three blocks of 20 ms wait for three copies of 50 ms.
    assert (times[5] - times[2]) / 3 == pytest.approx(0.150, rel=0.05)


# Memory


@pytest.mark.parametrize("name", [CASE, "pipeline10_nocfg", "pipeline10_tiled_resized"])
def test_every_stage_takes_what_was_planned(name: str, gpu: Machinery) -> None:
    peaks: dict[str, int] = {}
    stage = ""

    def progress(now: str, done: int, total: int) -> None:
        nonlocal stage
        arena = gpu.backend._gpu.arena
        if arena is None:
            return
        if now != stage:
            arena.peak = 0
            stage = now
        peaks[now] = max(peaks.get(now, 0), arena.peak)

    run, chunks = gpu.animator.start(**arguments(name), progress=progress)
    list(chunks)
    plan: Any = run.plan
    planned = {made.name: made.arena - plan.kept for made in plan.stages}
    # "schedule" belongs to what the caller sees as denoising.
    planned["denoise"] = max(planned["denoise"], planned.pop("schedule"))
    assert plan.kept > 0 and gpu.backend.peak == pytest.approx(plan.arena + plan.kept, abs=SLACK)
    for made, found in peaks.items():
        if made in planned:
            assert found <= planned[made] + SLACK, made
    worst = max(planned, key=lambda made: planned[made])
    assert max(peaks.values()) == pytest.approx(planned[worst], abs=SLACK)


def test_a_thousand_requests_leave_nothing_behind(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = machinery(root, TRT, monkeypatch, races=False)
    zeros(made)
    prepared = made.animator.prepare(**{**TINY, "steps": 1, "guidance": 1.0})
    run = prepared.run

    def state() -> tuple[Any, ...]:
        gc.collect()
        cuda = made.cuda
        return cuda.memory, cuda.locked, dict(cuda.live), len(cuda._starts), made.backend._gpu.arena.used  # type: ignore[union-attr]

    states, objects = [], []
    for number in range(1000):
        made.backend.begin(run.plan)
        for _ in made.animator._steps(run, prepared.latents, prepared.initial, prepared.noise, lambda *_: None):
            pass
        made.cuda.calls.clear()
        made.engines.module.calls.clear()
        made.engines.runs.clear()
        made.cuda.streams[made.backend._gpu.compute.handle].idle.clear()
        made.cuda.streams[made.backend._gpu.copying.handle].idle.clear()
        if number in (9, 999):
            states.append(state())
            objects.append(len(gc.get_objects()))
    assert states[0] == states[1]
    assert states[1][-1] <= 2 * SLACK  # the last step's latents and prediction
    assert abs(objects[1] - objects[0]) < 50
    made.animator.close()


def test_too_small_a_budget_is_refused_with_the_smallest_that_works(gpu: Machinery, root: Path) -> None:
    tight = Animator(Bundle(root), gpu.backend, memory=0.1, cache=False)
    with pytest.raises(DeviceError, match=r"Give at least ([0-9.]+) GB") as refusal:
        tight(**arguments(CASE))
    least = float(re.findall(r"at least ([0-9.]+)", str(refusal.value))[0])
    assert Animator(Bundle(root), gpu.backend, memory=least, cache=False)(**arguments(CASE)).frames.shape[0] == 9


def test_another_program_that_takes_the_memory_is_told_and_survived(gpu: Machinery, reference: Clip) -> None:
    plan = gpu.backend.plan

    def planned(*arguments: Any) -> Any:
        made = plan(*arguments)
        gpu.cuda.others = gpu.cuda.total - 1_000_000
        return made

    gpu.backend.plan = planned  # type: ignore[method-assign]
    with pytest.raises(DeviceError, match=r"Fake GPU has 0\.00 GB free of 8\.59 GB.*--memory"):
        gpu.animator(**arguments(CASE))
    gpu.cuda.others, gpu.backend.plan = 0, plan  # type: ignore[method-assign]
    assert_same(gpu.animator(**arguments(CASE)), reference)


# Faults; test_gpu_faults.py has one at every call


@pytest.mark.parametrize(
    ("call", "graph"),
    [
        ("Runtime.deserialize_cuda_engine", "text_block"),
        ("ICudaEngine.create_execution_context", "text_block"),
        ("IExecutionContext.set_input_shape", "text_block"),
        ("IExecutionContext.set_tensor_address", "text_block"),
        ("IExecutionContext.execute_async_v3", "text_block"),
    ],
)
def test_what_tensorrt_refuses_is_told_in_its_words(call: str, graph: str, gpu: Machinery, reference: Clip) -> None:
    gpu.engines.fail = lambda name: "Error Code 1: something is wrong" if name == call else None
    with pytest.raises(DeviceError, match=f"{graph!r}.*something is wrong"):
        gpu.animator(**arguments(CASE))
    gpu.engines.fail = lambda name: None
    assert_same(gpu.animator(**arguments(CASE)), reference)


def test_an_error_names_step_block_and_graph(gpu: Machinery) -> None:
    def fail(name: str) -> str | None:
        # Two steps of three blocks and two halves each: the fourth run of the second step is block 1's second half.
        late = name == "IExecutionContext.execute_async_v3" and gpu.engines.runs.count("block") == 9
        return "Error Code 1: Cask (failed)" if late else None

    gpu.engines.fail = fail
    with pytest.raises(DeviceError, match=r"^Step 2 of 4: block 1: The graph 'block' failed: Error Code 1: Cask"):
        gpu.animator(**arguments(CASE))


def test_a_lost_gpu_is_told_and_closing_does_not_fail(gpu: Machinery) -> None:
    lost = False

    def fail(name: str) -> Exception | None:
        nonlocal lost
        lost = lost or gpu.engines.runs.count("block") > 3
        dead = lost and not name.startswith(("Context", "DeviceAllocation", "Pagelocked"))
        return gpu.cuda.error(f"{name} failed: an illegal memory access was encountered") if dead else None

    gpu.cuda.fail = fail
    with pytest.raises(DeviceError, match=r"illegal memory access.*start the program again"):
        gpu.animator(**arguments(CASE))
    gpu.animator.close()
    with pytest.raises(DeviceError, match="closed"):
        gpu.animator(**arguments(CASE))


def test_out_of_memory_while_opening_an_engine_is_told(gpu: Machinery) -> None:
    real = gpu.cuda.allocate

    def allocate(nbytes: int) -> int:
        if nbytes > 100_000:
            raise gpu.cuda.error("cuMemAlloc failed: out of memory", "MemoryError")
        return real(nbytes)

    gpu.cuda.allocate = allocate  # type: ignore[method-assign]
    with pytest.raises(DeviceError, match=r"no memory left.*smaller --memory"):
        gpu.animator(**arguments(CASE))


def test_cancelling_ends_the_request_and_the_next_one_works(gpu: Machinery, reference: Clip) -> None:
    def cancel(who: Animator, step: int, timestep: int, tensors: dict[str, Any]) -> None:
        who.cancel()

    with pytest.raises(Interrupted):
        gpu.animator(**arguments(CASE), callback_on_step_end=cancel)
    assert_same(gpu.animator(**arguments(CASE)), reference)


def test_ctrl_c_in_the_middle_of_a_block_leaves_a_clean_state(gpu: Machinery, reference: Clip) -> None:
    compute = gpu.engines.compute

    def interrupted(graph: str, feeds: Any) -> Any:
        if gpu.engines.runs.count("block") == 5:
            raise KeyboardInterrupt
        return compute(graph, feeds)

    gpu.engines.compute = interrupted
    with pytest.raises(KeyboardInterrupt):
        gpu.animator(**arguments(CASE))
    assert gpu.cuda.stack == ["the host application's"]
    gpu.engines.compute = compute
    assert_same(gpu.animator(**arguments(CASE)), reference)


def test_a_stream_that_is_left_early_is_no_obstacle(gpu: Machinery, reference: Clip) -> None:
    frames = gpu.animator.stream(**arguments(CASE, num_frames=17))
    assert len(next(frames)) == 9
    frames.close()  # type: ignore[attr-defined]
    assert_same(gpu.animator(**arguments(CASE)), reference)


def test_a_clip_that_the_engines_do_not_take_is_refused_with_the_command(gpu: Machinery) -> None:
    with pytest.raises(BundleError, match=r"160 pixels.*dynamictrl build"):
        gpu.animator(**arguments(CASE, width=320, height=96))


# Kernels that were compiled


def test_rtx_keeps_its_kernels_in_the_set_and_compiles_at_once(
    bundle10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = with_engines(bundle10, tmp_path, RTX)
    made = machinery(root, RTX, monkeypatch, races=False)
    zeros(made)
    made.engines.cache = b"kernels"
    made.animator(**TINY)
    made.animator.close()
    (file,) = (root / "engines").glob("*/runtime.cache")
    assert file.read_bytes() == b"kernels"
    strategy = made.engines.module.DynamicShapesKernelSpecializationStrategy.EAGER
    for config in made.engines.configurations:
        assert config.dynamic_shapes_kernel_specialization_strategy == strategy
    again = machinery(root, RTX, monkeypatch, races=False)
    zeros(again)
    again.animator(**TINY)
    assert again.engines.cache == b"kernels"
    again.animator.close()
    file.parent.chmod(0o555)  # a bundle that cannot be written to
    try:
        last = machinery(root, RTX, monkeypatch, races=False)
        zeros(last)
        last.animator(**TINY)
        last.engines.cache = b"more"
        last.animator.close()
    finally:
        file.parent.chmod(0o755)
