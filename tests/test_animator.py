"""The public door of the runtime, on the golden models: same numbers as published, and what an application relies on."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamictrl_edge.bundle.errors import DeviceError, InputError, Interrupted, UsageError
from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.runtime import Animator
from dynamictrl_edge.runtime import animator as animator_module
from dynamictrl_edge.runtime.denoiser import BlockStore
from dynamictrl_edge.runtime.memory import plan_memory
from dynamictrl_edge.runtime.noise import NoiseSource
from dynamictrl_edge.runtime.reinit import first_word, gaussian_low_pass, reinitialised
from dynamictrl_edge.runtime.request import Request
from dynamictrl_edge.runtime.scheduler import SchedulerConfig
from tests.golden import case, max_abs

CASES = {
    "pipeline10_cfg3": "bundle10",
    "pipeline10_nocfg": "bundle10",
    "pipeline10_tiled_resized": "bundle10",
    "pipeline15_cfg3_f13": "bundle15",
    "pipeline15_cfg3_f9": "bundle15",
    "pipeline15_nocfg_f9": "bundle15",
}


def arguments(name: str, **changes: Any) -> dict[str, Any]:
    """The arguments that make a golden pipeline case."""
    tensors, facts = case(name)
    settings = facts["settings"]
    return {
        "image": tensors["image_u8"],
        "pose": tensors["control_u8"],
        "fit": "stretch",
        "tiling": "on" if settings["vae_tiling_and_slicing"] else "off",
        **{
            key: settings[key] for key in ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "seed")
        },
        **{key: settings[key] for key in ("height", "width", "num_frames")},
        **changes,
    }


@pytest.fixture(scope="module")
def animator(bundle10: Path) -> Animator:
    return Animator.from_bundle(bundle10, cache=False)


@pytest.mark.parametrize("name", CASES)
def test_latents_and_frames_equal_the_published_pipeline(name: str, request: pytest.FixtureRequest) -> None:
    tensors, facts = case(name)
    clip = Animator.from_bundle(request.getfixturevalue(CASES[name]), cache=False)(**arguments(name))
    wanted = tensors["decoder_input"][0].transpose(1, 0, 2, 3) * np.float32(0.7)
    assert max_abs(clip.latents, wanted) < 5e-4
    frames = tensors["frames_u8"][: facts["settings"]["num_frames"]]
    assert clip.frames.shape == frames.shape
    assert np.abs(clip.frames.astype(int) - frames.astype(int)).max() <= 1


def test_stream_yields_the_same_frames_in_chunks_as_they_are_decoded(animator: Animator) -> None:
    chunks = list(animator.stream(**arguments("pipeline10_cfg3", num_frames=17)))
    assert [len(chunk) for chunk in chunks] == [9, 8]
    assert np.array_equal(np.concatenate(chunks), animator(**arguments("pipeline10_cfg3", num_frames=17)).frames)


def test_the_first_frames_leave_before_the_last_are_decoded(animator: Animator) -> None:
    calls: list[tuple[str, int, int]] = []
    stream = animator.stream(**arguments("pipeline10_cfg3", num_frames=17), progress=lambda *now: calls.append(now))
    next(stream)
    assert calls[-1] == ("decode", 9, 17)
    stream.close()


def test_callback_sees_every_step_and_may_replace_the_latents(animator: Animator) -> None:
    seen: list[tuple[int, int]] = []

    def watch(who: Animator, step: int, timestep: int, tensors: dict[str, Any]) -> None:
        assert who is animator
        assert tensors["latents"].shape == (1, 3, 16, 8, 8)
        seen.append((step, timestep))

    plain = animator(**arguments("pipeline10_cfg3"), callback_on_step_end=watch)
    assert seen == [(0, 999), (1, 749), (2, 499), (3, 249)]
    zeroed = animator(
        **arguments("pipeline10_cfg3"),
        callback_on_step_end=lambda who, i, t, x: {"latents": np.zeros_like(x["latents"])} if i == 3 else None,
    )
    assert np.all(zeroed.latents == 0)
    assert np.any(plain.latents != 0)


def test_cancel_ends_the_request_and_the_next_one_works(animator: Animator) -> None:
    def cancel(who: Animator, step: int, timestep: int, tensors: dict[str, Any]) -> None:
        thread = threading.Thread(target=who.cancel)
        thread.start()
        thread.join()

    with pytest.raises(Interrupted, match="cancelled"):
        animator(**arguments("pipeline10_cfg3"), callback_on_step_end=cancel)
    animator.cancel()  # without a request: no effect
    assert animator(**arguments("pipeline10_cfg3")).frames.shape == (9, 64, 64, 3)


def test_streamed_blocks_give_the_same_clip(
    bundle10: Path, animator: Animator, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = animator(**arguments("pipeline10_cfg3"))
    with pytest.raises(DeviceError, match=r"Give at least --memory ([0-9.]+)") as refusal:
        Animator.from_bundle(bundle10, memory=0.01, cache=False)(**arguments("pipeline10_cfg3"))
    least = float(re.findall(r"at least --memory ([0-9.]+)", str(refusal.value))[0])
    released: list[int] = []
    monkeypatch.setattr(BlockStore, "done", lambda store, index: released.append(index))
    # At this size the VAE needs more than all blocks: what is tested is a plan that keeps one.
    monkeypatch.setattr(
        animator_module, "plan_memory", lambda *a, **k: replace(plan_memory(*a, **k), resident_blocks=1)
    )
    tight = Animator.from_bundle(bundle10, memory=least, cache=False)(**arguments("pipeline10_cfg3"))
    assert released == [0, 1, 2] * 4
    # One after the other, the halves use all cores each, which rounds otherwise; nothing else may change.
    assert max_abs(tight.latents, free.latents) < 1e-4
    assert np.abs(tight.frames.astype(int) - free.frames.astype(int)).max() <= 1


def test_a_store_releases_all_but_the_resident_blocks(bundle10: Path) -> None:
    store = BlockStore(Bundle(bundle10), 3)
    store.resident = 1
    before = [store[i]["qkv_weight"].copy() for i in range(3)]
    gone: list[int] = []
    for i in range(3):
        store[i].release = lambda i=i: gone.append(i)  # type: ignore[method-assign]
    for i in range(3):
        store.ahead(i)
        store.done(i)
    assert gone == [1, 2]
    assert all(np.array_equal(store[i]["qkv_weight"], before[i]) for i in range(3))


def test_drop_prefix_leaves_out_the_first_frames_only(animator: Animator) -> None:
    whole = animator(**arguments("pipeline10_cfg3"))
    rest = animator(**arguments("pipeline10_cfg3", drop_prefix=3))
    assert np.array_equal(rest.frames, whole.frames[3:])
    assert np.array_equal(rest.latents, whole.latents)


def test_short_names_mean_the_same_and_mistakes_are_named(animator: Animator) -> None:
    long = arguments("pipeline10_nocfg")
    steps, guidance = long.pop("num_inference_steps"), long.pop("guidance_scale")
    short = dict(long, steps=steps, guidance=guidance)
    assert np.array_equal(animator(**short).frames, animator(**arguments("pipeline10_nocfg")).frames)
    with pytest.raises(UsageError, match="'strength'"):
        animator(**short, strength=1)
    with pytest.raises(UsageError, match="given twice"):
        animator(**short, num_inference_steps=4)
    with pytest.raises(UsageError, match="'prompt' is missing"):
        animator(image=long["image"], pose=long["pose"])


def test_notices_tell_what_was_done_to_the_input(animator: Animator) -> None:
    few = case("pipeline10_cfg3")[0]["control_u8"][:4]
    clip = animator(**arguments("pipeline10_cfg3", pose=few))
    assert any("4" in notice and "repeat" in notice for notice in clip.notices)


def test_a_step_count_whose_last_step_extrapolates_is_told_with_its_neighbours(animator: Animator) -> None:
    def told(steps: int) -> list[str]:
        run = animator._checked(Request.of(**arguments("pipeline10_nocfg", num_inference_steps=steps)))
        return [notice for notice in run.notices if "extrapolates" in notice]

    assert "of 13 steps" in told(13)[0] and "12 or 14 steps" in told(13)[0]
    assert told(12) == told(25) == []


def test_empty_prompt_is_refused_before_any_model_is_loaded(bundle10: Path) -> None:
    fresh = Animator.from_bundle(bundle10, cache=False)
    with pytest.raises(InputError, match="empty"):
        fresh(**arguments("pipeline10_cfg3", prompt="  "))
    assert fresh.backend._graphs == {}  # type: ignore[attr-defined]


def test_reinitialised_noise_is_the_published_mix(animator: Animator) -> None:
    torch = pytest.importorskip("torch")
    config = SchedulerConfig.from_dict(animator.bundle.manifest.scheduler)
    random = np.random.default_rng(5)
    initial, image = (random.standard_normal((1, 3, 16, 4, 6)).astype(np.float32) for _ in range(2))
    got = reinitialised(initial, image, NoiseSource(7), 7, config)

    # The published formulas, with PyTorch's own generators, noise schedule and FFT.
    from diffusers import CogVideoXDPMScheduler

    scheduler = CogVideoXDPMScheduler.from_config(animator.bundle.manifest.scheduler)
    torch.manual_seed(7)
    timesteps = torch.randint(0, 1000, (1,), dtype=torch.int64)
    assert int(timesteps) == first_word(7) % 1000
    diffused = scheduler.add_noise(torch.from_numpy(image), torch.from_numpy(initial), timesteps)
    fresh = torch.randn(initial.shape, generator=torch.Generator().manual_seed(7))
    low = torch.from_numpy(gaussian_low_pass(initial.shape[-3:])).float()
    spectra = [torch.fft.fftshift(torch.fft.fftn(x, dim=(-3, -2, -1)), dim=(-3, -2, -1)) for x in (diffused, fresh)]
    mixed = torch.fft.ifftshift(spectra[0] * low + spectra[1] * (1 - low), dim=(-3, -2, -1))
    wanted = torch.fft.ifftn(mixed, dim=(-3, -2, -1)).real.numpy()
    assert max_abs(got, wanted) < 1e-5


def test_re_init_noise_gives_another_clip_and_the_same_one_again(animator: Animator) -> None:
    clips = [animator(**arguments("pipeline10_nocfg", re_init_noise=True)) for _ in range(2)]
    assert np.array_equal(clips[0].frames, clips[1].frames)
    assert not np.array_equal(clips[0].latents, animator(**arguments("pipeline10_nocfg")).latents)


def test_overflow_is_an_error_that_names_the_remedy(animator: Animator) -> None:
    with pytest.raises(DeviceError, match="not finite"):
        animator(
            **arguments("pipeline10_nocfg"),
            callback_on_step_end=lambda who, i, t, x: {"latents": np.full_like(x["latents"], np.nan)},
        )
