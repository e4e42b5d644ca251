"""Reuse through the public doors: Python and the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamictrl_edge.bundle.errors import BundleError, DeviceError, UsageError
from dynamictrl_edge.cli.animate import command
from dynamictrl_edge.cli.main import run
from dynamictrl_edge.runtime import Animator
from dynamictrl_edge.runtime.reuse import POLICIES
from dynamictrl_edge.runtime.reuse import fit as fit_module
from tests.cli_samples import animate, refused, small_inputs
from tests.conftest import Quantized
from tests.engine_samples import edit
from tests.test_animator import arguments

CASE = "pipeline15_cfg3_f9"


@pytest.fixture(scope="module")
def animator(bundle15: Path) -> Animator:
    return Animator.from_bundle(bundle15, cache=False)


def made(animator: Animator, **changes: Any) -> Any:
    return animator(**arguments(CASE, num_inference_steps=6, **changes))


def test_a_clip_says_what_its_steps_reused(animator: Animator) -> None:
    full, off = made(animator), made(animator, reuse="off")
    assert full.reuse is None and np.array_equal(full.latents, off.latents)
    clip = made(animator, reuse="combined,warmup=1,final=1")
    assert clip.frames.shape == full.frames.shape
    assert clip.reuse.plan.kinds == ("full", "trunk", "tokens+guidance", "trunk+guidance", "full", "full")
    assert clip.reuse.cache_bytes > 0 and clip.reuse.flop_fraction < 0.8
    assert 0 < np.abs(clip.latents - full.latents).max() < 10
    again = made(animator, reuse="combined,warmup=1,final=1")
    assert np.array_equal(again.latents, clip.latents)
    assert np.array_equal(made(animator).latents, full.latents)  # nothing stays behind
    same = made(animator, reuse=POLICIES["trunk"])
    assert any("reused nothing" in notice for notice in made(animator, reuse="trunk,warmup=5").notices)
    assert not any("reused nothing" in notice for notice in same.notices)


def test_a_quantized_bundle_reuses_all_that_others_do(quantized: Quantized) -> None:
    animator = Animator.from_bundle(quantized("int8"), cache=False)
    full = made(animator)
    assert np.array_equal(made(animator, reuse="guidance,guidance_period=1").latents, full.latents)
    clip = made(animator, reuse="trunk,warmup=1,final=1")
    assert clip.reuse.flop_fraction < 0.9 and 0 < np.abs(clip.latents - full.latents).max() < 10
    combined = made(animator, reuse="combined,warmup=1,final=1")
    assert combined.reuse.plan.kinds == ("full", "trunk", "tokens+guidance", "trunk+guidance", "full", "full")
    assert 0 < np.abs(combined.latents - full.latents).max() < 10


def test_a_bundle_that_was_quantized_before_token_reuse_is_refused_with_the_way_out(
    quantized: Quantized, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    shutil.copytree(quantized("int8"), old)

    def forget(manifest: dict[str, Any]) -> None:
        for name in ("tokens_keep", "tokens_reuse"):  # as they were copied from the source, unquantized
            del manifest["quantization"]["linears"][name]

    edit(old, forget)
    animator = Animator.from_bundle(old, cache=False)
    with pytest.raises(
        BundleError, match=r"Calibrate its source again: dynamictrl calibrate.*off, quality, balanced, guidance, trunk"
    ):
        animator.start(**arguments(CASE, reuse="tokens"))
    animator.start(**arguments(CASE, reuse="trunk"))


def test_a_pose_clip_without_a_skeleton_is_told(animator: Animator) -> None:
    nothing = np.zeros_like(arguments(CASE)["pose"])
    clip = made(animator, pose=nothing, reuse="tokens,warmup=1")
    assert any("Nothing is drawn in the pose clip" in notice for notice in clip.notices)
    clip = made(animator, pose=nothing, reuse="tokens,warmup=1,token_choice=even")
    assert not any("Nothing is drawn" in notice for notice in clip.notices)


def test_the_command_line_reports_it(bundle15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = small_inputs(tmp_path)
    options = {"steps": 4, "guidance": 3, "reuse": "trunk,warmup=1,final=0", "json": True}
    assert run(animate(bundle15, inputs, tmp_path / "a.mp4", **options)) == 0
    result = json.loads(capsys.readouterr().out)["reuse"]
    assert result["policy"]["name"] == "trunk" and result["policy"]["warmup"] == 1
    assert result["steps"] == ["full", "trunk", "full", "trunk"]
    assert result["cache_bytes"] > 0 and 0.4 < result["flop_fraction"] < 0.6
    assert run(animate(bundle15, inputs, tmp_path / "b.mp4", **{**options, "reuse": "off"})) == 0
    assert json.loads(capsys.readouterr().out)["reuse"] is None
    assert run(animate(bundle15, inputs, tmp_path / "c.mp4", **{**options, "json": None})) == 0
    assert "4 steps with --reuse trunk: 2 full, 2 trunk" in capsys.readouterr().err


def test_the_help_names_every_policy() -> None:
    (option,) = (p for p in command.params if p.name == "reuse")
    assert all(name in option.help for name in ("off", *POLICIES))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("reuse", "words"),
    [
        ("fast", ("--reuse 'fast'", "off, quality, balanced, guidance, trunk")),
        ("trunk,trunk_threshold=1", ("contradict",)),
        ("tokens,token_share=2", ("token_share=2.0", "0 to 1")),
    ],
)
def test_bad_settings_are_refused_before_a_bundle_is_opened(
    reuse: str, words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = small_inputs(tmp_path)
    refused(capsys, tmp_path, animate(tmp_path / "none", inputs, tmp_path / "a.mp4", reuse=reuse), 2, *words)


def test_a_bundle_from_before_is_refused_with_the_way_out(bundle15: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(bundle15, old)
    later = ("trunk_keep", "trunk_reuse", "tokens_keep", "tokens_reuse", "tokens_take", "tokens_put")
    edit(old, lambda manifest: [manifest["graphs"].pop(name) for name in later])
    with pytest.raises(
        BundleError,
        match=r"lacks the graphs of --reuse tokens \(tokens_keep.*Export the checkpoint again, without --no-reuse",
    ):
        Animator.from_bundle(old, cache=False).start(**arguments(CASE, reuse="tokens"))


def test_caches_beyond_the_budget_are_refused_before_any_work(
    animator: Animator, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"tokens": 10**15, "trunk": 1000}
    monkeypatch.setattr(fit_module, "cache_bytes", lambda policy, *a, **k: sizes.get(policy.name, 10**14))
    with pytest.raises(DeviceError, match=r"tokens need 1000000\.00 GB.*these fit: off \(none\), trunk \(0\.00 GB\)\."):
        animator.start(**arguments(CASE, reuse="tokens"))
    animator.start(**arguments(CASE, reuse="trunk"))
    with pytest.raises(UsageError):
        animator.start(**arguments(CASE, reuse="fast"))
