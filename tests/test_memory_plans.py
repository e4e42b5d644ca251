"""What a clip needs on a GPU, on the command line: `inspect --memory` and `doctor --bundle`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynamictrl_edge.cli.main import run
from dynamictrl_edge.engines import machine
from dynamictrl_edge.engines.machine import Gpu, Machine
from tests.bundle_samples import edit_manifest, small_bundle

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    root = small_bundle(tmp_path / "bundle")
    scheduler = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    edit_manifest(root, scheduler=scheduler)
    return root


def test_inspect_plans_the_default_clip_and_the_presets(bundle: Path, capsys: Capture) -> None:
    assert run(["inspect", str(bundle), "--memory", "24", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["memory_plans"]
    assert [made["size"] for made in plans] == [
        "160x96x9",
        "512x288x17",
        "1024x576x37",
        "1360x768x37",
        "1360x768x81",
    ]
    for made in plans:
        assert made["peak"] == max(sum(stage.values()) for stage in made["stages"].values())
        assert made["fits"] == (made["peak"] <= 24e9)


def test_inspect_plans_the_sizes_asked_for_and_says_what_to_change(bundle: Path, capsys: Capture) -> None:
    assert run(["inspect", str(bundle), "--memory", "0.7", "--size", "1360x768x81"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "1360x768 with 81 frames" in out and "does not fit into 0.70 GB" in out and "Give at least" in out
    assert "512x288" not in out


def test_inspect_plans_reuse_between_steps(bundle15: Path, capsys: Capture) -> None:
    options = ["inspect", str(bundle15), "--no-verify", "--memory", "500", "--size", "1024x576x37"]

    def planned(*more: str) -> dict[str, Any]:
        assert run([*options, *more, "--json"]) == 0
        (made,) = json.loads(capsys.readouterr().out)["memory_plans"]
        return made

    off, combined = planned(), planned("--reuse", "combined,token_share=0.3")
    assert (off["reuse"], off["caches"]) == (None, 0) and planned("--reuse", "off") == off
    assert combined["reuse"] == "combined"
    assert combined["stages"]["denoise"]["caches of reuse"] == combined["caches"] > 0
    assert run([*options, "--reuse", "tokens"]) == 0
    assert "with --reuse tokens needs" in " ".join(capsys.readouterr().out.split())
    trunk, tokens = planned("--reuse", "trunk"), planned("--reuse", "tokens")
    assert trunk["smallest_budget"] < tokens["smallest_budget"]
    least = f"{trunk['smallest_budget'] / 1e9:.9f}"
    assert run([*options[:4], least, *options[5:], "--reuse", "tokens"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "does not fit" in text and "with --reuse, these fit: off, guidance, trunk" in text


def test_a_bundle_without_the_graphs_has_no_plan_for_reuse(bundle: Path, capsys: Capture) -> None:
    assert run(["inspect", str(bundle), "--memory", "8", "--reuse", "trunk"]) == 4
    assert "lacks the graphs of --reuse trunk" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--reuse", "trunk"], "--memory GB"),
        (["--memory", "8", "--reuse", "fast"], "--reuse 'fast'"),
        (["--memory", "0"], "--memory 0"),
        (["--memory", "8", "--size", "1x2"], "WIDTHxHEIGHTxFRAMES"),
        (["--memory", "8", "--size", "100x96x9"], "--width 100"),
    ],
)
def test_wrong_usage(options: list[str], words: str, bundle: Path, capsys: Capture) -> None:
    assert run(["inspect", str(bundle), *options]) == 2
    assert words in capsys.readouterr().err


def test_doctor_says_which_clips_the_gpu_has_room_for(
    bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Gpu("Tiny", (8, 6), "580.65", 900_000_000)
    monkeypatch.setattr(machine, "look_at_machine", lambda **_: Machine(gpu=small))
    run(["doctor", "--bundle", str(bundle), "--json"])
    rows = {f["name"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    assert rows["clip 160x96x9"]["state"] == "ok"
    assert rows["clip 1360x768x81"]["state"] == "info"
    assert "does not fit" in rows["clip 1360x768x81"]["found"]


def test_doctor_without_a_gpu_has_no_room_to_speak_of(
    bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "look_at_machine", lambda **_: Machine(gpu=None))
    run(["doctor", "--bundle", str(bundle), "--json"])
    rows = {f["name"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    assert "not known" in rows["clips on the GPU"]["found"]
