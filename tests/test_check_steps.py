"""The guard on every step: latents that are not finite end the clip, and the step is named.

On a GPU (fakes; see test_gpu_backend.py) it reads one row of the latents per step, and nothing where it was not asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamictrl_edge.bundle.errors import DeviceError, UsageError
from dynamictrl_edge.cli.main import run
from dynamictrl_edge.runtime import Animator
from dynamictrl_edge.runtime.denoiser import Denoiser
from dynamictrl_edge.runtime.request import Request
from tests.cli_samples import animate, small_inputs
from tests.gpu_samples import IN_THE_LOOP, TINY, Machinery, assert_same
from tests.test_animator import arguments

CASE = "pipeline10_cfg3"  # four steps
REMEDY = r"not finite \(NaN or infinite\)\. In fp16 this is an overflow: export with --precision fp32"
REUSES = ("off", "guidance,warmup=1,final=1", "trunk,warmup=1,final=1", "combined,warmup=1,final=1")


def poisoned(made: Machinery, graph: str, number: int, output: str, place: Any, value: float) -> None:
    """Run `number` of a graph (the first is 1) gives this value at one place of an output."""
    compute, runs = made.engines.compute, 0

    def computed(name: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        nonlocal runs
        found = compute(name, feeds)
        runs += name == graph
        if name == graph and runs == number:
            found = {key: array.copy() for key, array in found.items()}
            found[output][place] = value
        return found

    made.engines.compute = computed


# On the processor


@pytest.fixture(scope="module")
def animator(bundle10: Path) -> Animator:
    return Animator.from_bundle(bundle10, backend="onnxruntime", cache=False)


def overflow_at(step: int, place: Any = ...) -> Any:
    """A callback after which the latents are not finite, everywhere or at one place."""

    def callback(who: Animator, index: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any] | None:
        if index != step:
            return None
        latents = tensors["latents"].copy()
        latents[place] = np.inf
        return {"latents": latents}

    return callback


@pytest.mark.parametrize("check", [None, True])
@pytest.mark.parametrize("place", [..., (0, 0, 0, 0, 0), (0, -1, 3, 2, 1)])
def test_the_step_is_named(place: Any, check: bool | None, animator: Animator) -> None:
    with pytest.raises(DeviceError, match=f"^Step 3 of 4: The latents are {REMEDY}"):
        animator(**arguments(CASE, check_steps=check), callback_on_step_end=overflow_at(1, place))


def test_turned_off_only_the_end_is_looked_at(animator: Animator) -> None:
    with pytest.raises(DeviceError, match=r"^The denoising loop ended with values that are not finite\. In fp16"):
        animator(**arguments(CASE, check_steps=False), callback_on_step_end=overflow_at(1))


def test_what_comes_after_the_last_step_is_found_at_the_end(animator: Animator) -> None:
    with pytest.raises(DeviceError, match=r"^The denoising loop ended"):
        animator(**arguments(CASE), callback_on_step_end=overflow_at(3))


@pytest.mark.parametrize("reuse", REUSES)
def test_clips_that_are_finite_are_the_same_with_it_and_without(reuse: str, animator: Animator) -> None:
    on, off = (animator(**arguments(CASE, reuse=reuse, check_steps=check)) for check in (True, False))
    assert_same(on, off)


@pytest.mark.parametrize("given", ["yes", 1, 0.0])
def test_other_values_are_refused(given: Any) -> None:
    with pytest.raises(UsageError, match="'check_steps' must be True, False or None"):
        Request.of(image="a.png", pose="b.mp4", prompt="c", check_steps=given)


@pytest.mark.parametrize(("option", "wanted"), [(None, True), ("check_steps", True), ("no_check_steps", False)])
def test_the_command_line_passes_it_on(
    option: str | None, wanted: bool, bundle10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    denoise = Denoiser.denoise
    monkeypatch.setattr(
        Denoiser, "denoise", lambda self, *given: (seen.append(self.check_steps), denoise(self, *given))[1]
    )
    options = {} if option is None else {option: True}
    command = animate(bundle10, small_inputs(tmp_path), tmp_path / "clip.mp4", backend="onnxruntime", **options)
    assert run(command) == 0
    assert seen == [wanted]


# On a GPU


@pytest.mark.parametrize("check", [None, False, True])
@pytest.mark.parametrize("reuse", ["off", "trunk,warmup=1,final=1"])
def test_on_a_gpu_one_row_is_read_per_step_if_it_is_asked_for(reuse: str, check: bool | None, gpu: Machinery) -> None:
    places: list[int] = []
    reads: list[int] = []
    download = gpu.backend._gpu.download
    gpu.backend._gpu.download = lambda source: (reads.append(source.nbytes), download(source))[1]  # type: ignore[method-assign]

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "denoise":
            places.append(len(gpu.cuda.calls))
            if done == 1:
                reads.clear()
            if done == 5:
                seen.extend(reads)

    seen: list[int] = []
    wanted = {**TINY, "steps": 6, "reuse": reuse}
    clip = gpu.animator(**wanted, check_steps=check, progress=progress)
    between = gpu.cuda.calls[places[1] : places[5]]
    assert set(between) - {"memcpy_dtoh_async"} <= IN_THE_LOOP
    width = clip.latents.shape[-1] * 4  # bytes of a row
    assert seen == ([width] * 4 if check else [])
    assert between.count("memcpy_dtoh_async") == len(seen)
    assert_same(gpu.animator(**wanted), clip)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_tensor_that_overflows_on_a_gpu_is_told_at_its_step(step: int, value: float, gpu: Machinery) -> None:
    """In one number of one token: three blocks, two guidance halves."""
    finite = gpu.animator(**arguments(CASE, check_steps=True))
    poisoned(gpu, "block", 6 * (step - 1) + 1, "video_out", (0, 0, 5), value)
    with pytest.raises(DeviceError, match=f"^Step {step} of 4: The latents are {REMEDY}"):
        gpu.animator(**arguments(CASE, check_steps=True))
    assert_same(gpu.animator(**arguments(CASE)), finite)  # it came up once; nothing of it stays


def test_what_the_head_lets_overflow_outside_of_the_row_is_told_one_step_later(gpu: Machinery) -> None:
    poisoned(gpu, "head", 2, "latents_out", (0, 0, 0, 0, 0), np.inf)
    with pytest.raises(DeviceError, match=f"^Step 3 of 4: The latents are {REMEDY}"):
        gpu.animator(**arguments(CASE, check_steps=True))


def test_in_the_last_step_it_is_told_at_the_end(gpu: Machinery) -> None:
    poisoned(gpu, "head", 4, "latents_out", (0, 0, 0, 0, 0), np.inf)
    with pytest.raises(DeviceError, match=r"^The denoising loop ended with values that are not finite"):
        gpu.animator(**arguments(CASE, check_steps=True))


@pytest.mark.parametrize("reuse", REUSES[1:])
def test_steps_that_reuse_are_looked_at_too(reuse: str, gpu: Machinery) -> None:
    finite = gpu.animator(**arguments(CASE, reuse=reuse))
    assert_same(gpu.animator(**arguments(CASE, reuse=reuse, check_steps=True)), finite)
    poisoned(gpu, "block", 1, "video_out", (0, 0, 5), np.nan)
    with pytest.raises(DeviceError, match=f"^Step 1 of 4: The latents are {REMEDY}"):
        gpu.animator(**arguments(CASE, reuse=reuse, check_steps=True))


def test_steps_that_are_recorded_are_looked_at_too(gpu: Machinery) -> None:
    gpu.animator = Animator(gpu.animator.bundle, gpu.backend, cache=False, cuda_graphs=True)
    poisoned(gpu, "head", 3, "latents_out", ..., np.nan)
    with pytest.raises(DeviceError, match=f"^Step 3 of 4: The latents are {REMEDY}"):
        gpu.animator(**arguments(CASE, check_steps=True))
    assert gpu.cuda.calls.count("cuGraphLaunch") == 2
