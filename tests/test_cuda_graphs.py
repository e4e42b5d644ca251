"""A denoising step as one CUDA graph, on the fake driver: what is recorded, when it is not, and faults."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamictrl_edge.bundle.errors import DeviceError, Interrupted
from dynamictrl_edge.runtime import Animator
from dynamictrl_edge.runtime.animator import Clip
from dynamictrl_edge.runtime.backends import cuda as cuda_door
from dynamictrl_edge.runtime.timeline import STEP, Timeline
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

WANTED: dict[str, Any] = {**TINY, "steps": 4}
LAUNCH = "cuGraphLaunch"


@pytest.fixture(scope="module")
def reference(root: Path) -> Clip:
    return on_processor(root, **WANTED)


def recording(made: Machinery) -> Machinery:
    """The same with an animator that wants CUDA graphs."""
    made.animator = Animator(made.animator.bundle, made.backend, cache=False, cuda_graphs=True)
    return made


@pytest.fixture
def gpu(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machinery]:
    made = recording(machinery(root, TRT, monkeypatch))
    yield made
    made.cuda.fail = lambda name: None
    made.animator.close()
    assert_nothing_left(made)
    assert not made.cuda.graphs and made.cuda.recording is None


def test_the_clip_is_the_same_and_each_later_step_is_one_launch(gpu: Machinery, reference: Clip) -> None:
    seen: dict[int, int] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "denoise":
            seen[done] = len(gpu.cuda.calls)

    clip = gpu.animator(**WANTED, progress=progress)
    assert_same(clip, reference)
    assert not clip.notices
    assert LAUNCH not in gpu.cuda.calls[: seen[1]]
    for step in (2, 3):  # the third and fourth
        calls = gpu.cuda.calls[seen[step] : seen[step + 1]]
        assert calls.count(LAUNCH) == 1 and "execute_async_v3" not in calls
        if step == 2:  # the result of the last one is waited for
            assert set(calls) <= IN_THE_LOOP | {LAUNCH}


def test_a_warm_animator_records_anew(gpu: Machinery, reference: Clip) -> None:
    for _ in range(3):
        assert_same(gpu.animator(**WANTED), reference)
    assert gpu.cuda.calls.count("cuGraphExecDestroy") == gpu.cuda.calls.count("cuGraphInstantiateWithFlags") == 3
    guided_less = {**WANTED, "guidance": 1.0}
    assert_same(gpu.animator(**guided_less), on_processor(gpu.animator.bundle.root, **guided_less))


def test_halves_that_go_together_are_recorded_too(
    bundle10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Clip
) -> None:
    root = with_engines(bundle10, tmp_path, TRT, batch=2)
    made = recording(machinery(root, TRT, monkeypatch))
    clip = made.animator(**WANTED)
    assert made.engines.runs.count("block") == 4 * made.engines.manifest.transformer.num_layers
    assert made.cuda.calls.count(LAUNCH) == 3 and not clip.notices
    made.animator.close()
    assert_nothing_left(made)


def test_what_a_callback_puts_in_counts(gpu: Machinery, root: Path) -> None:
    """Recorded steps read what is in the buffers when they run."""

    def halve(who: Animator, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] / 2}

    expected = on_processor(root, **WANTED, callback_on_step_end=halve)
    assert_same(gpu.animator(**WANTED, callback_on_step_end=halve), expected)
    assert gpu.cuda.calls.count(LAUNCH) == 3


# When nothing is recorded


def test_streamed_weights_are_not_recorded(gpu: Machinery, reference: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.keep_blocks(monkeypatch, 1, 2)
    clip = gpu.animator(**WANTED)
    assert_same(clip, reference)
    assert clip.notices == ("The steps did not run as CUDA graphs: not all weights stay in the GPU's memory.",)


def test_on_the_processor_a_notice_says_that_there_are_none(root: Path, reference: Clip) -> None:
    made = Animator.from_bundle(root, backend="onnxruntime", threads=1, cache=False, cuda_graphs=True)
    clip = made(**WANTED)
    assert_same(clip, reference)
    assert any("CUDA graphs" in text and "processor" in text for text in clip.notices)


def test_steps_that_reuse_are_not_recorded(gpu: Machinery) -> None:
    zeros(gpu)
    clip = gpu.animator(**WANTED, reuse="guidance")
    assert any("CUDA graphs: steps reuse" in text for text in clip.notices)
    assert LAUNCH not in gpu.cuda.calls


def test_a_graph_that_tensorrt_cannot_record_is_named(
    bundle10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Clip
) -> None:
    made = recording(machinery(with_engines(bundle10, tmp_path, RTX), RTX, monkeypatch))
    assert_same(made.animator(**WANTED), reference)
    assert made.cuda.calls.count(LAUNCH) == 3
    made.engines.fail = lambda name: "no" if name == "IExecutionContext.is_stream_capturable" else None
    clip = made.animator(**WANTED)
    assert_same(clip, reference)
    assert clip.notices == ("The steps did not run as CUDA graphs: TensorRT cannot record the graph 'stem'.",)
    made.animator.close()
    assert_nothing_left(made)


def test_an_old_driver_is_told(gpu: Machinery, reference: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(type(gpu.cuda.driver), "cuGraphInstantiateWithFlags")
    clip = gpu.animator(**WANTED)
    assert_same(clip, reference)
    assert "too old to record" in clip.notices[0]


def test_without_the_drivers_library_steps_run_as_ever(
    gpu: Machinery, reference: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(cuda_door, "_load_driver", missing)
    clip = gpu.animator(**WANTED)
    assert_same(clip, reference)
    assert "libcuda.so.1" in clip.notices[0]


# Faults


def test_a_fault_at_every_call_of_recording_ends_in_plain_steps(gpu: Machinery, reference: Clip) -> None:
    """From the begin of the recording to the executable graph."""
    gpu.animator(**WANTED)
    begin = gpu.cuda.calls.index("cuStreamBeginCapture_v2")
    end = gpu.cuda.calls.index("cuGraphInstantiateWithFlags")
    for number in range(end - begin + 1):
        gpu.cuda.calls.clear()
        gpu.cuda.forget()

        def fail(name: str, number: int = number) -> Exception | None:
            calls = gpu.cuda.calls
            at = calls.index("cuStreamBeginCapture_v2") if "cuStreamBeginCapture_v2" in calls else None
            failed = at is not None and len(calls) - 1 - at == number
            return gpu.cuda.error(f"{name} failed: invalid value") if failed else None

        gpu.cuda.fail = fail
        clip = gpu.animator(**WANTED)
        assert_same(clip, reference)
        assert len(clip.notices) == 1 and "failed while" in clip.notices[0], (number, clip.notices)
        assert gpu.cuda.recording is None and not gpu.cuda.graphs
        assert gpu.cuda.stack == ["the host application's"]


@pytest.mark.parametrize("number", [1, 2])
def test_an_event_that_cannot_be_made_leaves_no_graph(number: int, gpu: Machinery, reference: Clip) -> None:
    gpu.animator(**WANTED)
    gpu.cuda.calls.clear()  # a warm animator makes no other events
    gpu.cuda.fail = lambda name: (
        gpu.cuda.error("Event failed: invalid value")
        if name == "Event" and gpu.cuda.calls.count("Event") == number
        else None
    )
    clip = gpu.animator(**WANTED)
    assert_same(clip, reference)
    assert "making an event" in clip.notices[0] and not gpu.cuda.graphs


def test_a_launch_that_fails_names_the_step(gpu: Machinery, reference: Clip) -> None:
    gpu.cuda.fail = lambda name: (
        gpu.cuda.error("cuGraphLaunch failed: invalid value")
        if name == LAUNCH and gpu.cuda.calls.count(LAUNCH) == 2
        else None
    )
    with pytest.raises(DeviceError, match=r"^Step 3 of 4: CUDA failed while running a CUDA graph"):
        gpu.animator(**WANTED)
    gpu.cuda.fail = lambda name: None
    assert_same(gpu.animator(**WANTED), reference)


def test_a_gpu_that_is_lost_in_a_recorded_step_is_told(gpu: Machinery) -> None:
    lost = False

    def fail(name: str) -> Exception | None:
        nonlocal lost
        lost = lost or name == LAUNCH
        dead = lost and not name.startswith(("Context", "DeviceAllocation", "Pagelocked"))
        return gpu.cuda.error(f"{name} failed: an illegal memory access was encountered") if dead else None

    gpu.cuda.fail = fail
    with pytest.raises(DeviceError, match=r"Step 2 of 4: The GPU failed.*start the program again"):
        gpu.animator(**WANTED)


def test_cancelling_ends_between_recorded_steps(gpu: Machinery, reference: Clip) -> None:
    def cancel(who: Animator, step: int, timestep: int, tensors: dict[str, Any]) -> None:
        if step == 2:
            who.cancel()

    with pytest.raises(Interrupted):
        gpu.animator(**WANTED, callback_on_step_end=cancel)
    assert gpu.cuda.calls.count(LAUNCH) == 2
    assert_same(gpu.animator(**WANTED), reference)


def test_an_interruption_while_recording_leaves_the_stream_usable(gpu: Machinery, reference: Clip) -> None:
    real, calls = gpu.cuda.submit, 0

    def interrupted(stream: int, work: Any) -> None:
        nonlocal calls
        calls += gpu.cuda.recording is not None
        if calls == 3:
            raise KeyboardInterrupt
        real(stream, work)

    gpu.cuda.submit = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        gpu.animator(**WANTED)
    gpu.cuda.submit = real  # type: ignore[method-assign]
    assert_same(gpu.animator(**WANTED), reference)


# Measuring


def test_steps_are_timed_and_blocks_of_the_first_one_only(gpu: Machinery, reference: Clip) -> None:
    gpu.engines.seconds = lambda graph: 0.01 if graph == "block" else 0.001
    timeline = Timeline()
    run, chunks = gpu.animator.start(**WANTED, timeline=timeline)
    list(chunks)
    layers = gpu.engines.manifest.transformer.num_layers
    assert {part.step for part in timeline.parts if part.name == "block"} == {0}
    steps = [part.seconds for part in timeline.parts if part.name == STEP]
    assert len(steps) == 4
    assert steps[1:] == pytest.approx([2 * layers * 0.01 + 0.002] * 3, rel=0.05)
    assert not any("CUDA" in notice for notice in run.notices)


def test_the_command_line_asks_for_graphs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dynamictrl_edge.cli.main import run

    line = ["bench", str(root), "--cuda-graphs", "--backend", "onnxruntime", "--size", "48x32x9", "--steps", "2"]
    assert run([*line, "--rounds", "1", "--warmup", "0", "--threads", "1"]) == 0
    told = capsys.readouterr()
    assert re.search(r"did not run as CUDA graphs: the processor has none", told.err)
