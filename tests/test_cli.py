"""The command line from the outside: every verb but `animate`, help, usage, and where output cannot go."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dynamictrl_edge.cli.main import VERBS, run
from tests.cli_samples import (
    PROGRAM,
    Inputs,
    animate,
    assert_video,
    flags,
    listing,
    made,
    small_inputs,
    without_graphs,
    write_inputs,
)
from tests.golden import model_dir
from tests.media_samples import noise, numbered, write_video


def test_inspect_shows_the_bundle(bundle15: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = made(capsys, ["inspect", str(bundle15)])
    assert facts["family"] == "CogVideoX 1.5 style"
    assert (facts["precision"], facts["blocks"], facts["width"], facts["verified"]) == ("fp32", 3, 128, True)
    assert sum(facts["bytes"].values()) == facts["total_bytes"]
    on_disk = sum(path.stat().st_size for path in bundle15.rglob("*") if path.is_file())
    assert facts["total_bytes"] == on_disk - (bundle15 / "bundle.json").stat().st_size
    assert facts["graphs"]["block"]["inputs"]["modulation"] == ["float", [15, 128]]
    assert "torch" in facts["provenance"]

    assert run(["inspect", str(bundle15)]) == 0
    out, err = capsys.readouterr()
    for word in ("CogVideoX 1.5 style", "every file verified", "denoiser blocks", "vae_encoder_first", "Default clip"):
        assert word in out
    assert err == ""


def test_inspect_shows_names_with_brackets_as_they_are(
    bundle10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("[bold]x").symlink_to(bundle10)
    Path("[").mkdir()
    Path("[/b]").symlink_to(bundle10)
    for name in ("[bold]x", "[/b]"):
        assert run(["inspect", name, "--no-verify"]) == 0
        assert capsys.readouterr().out.startswith(f"{name}: CogVideoX 1.0 style")


def test_compare_finds_identical_clips_identical(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = small_inputs(tmp_path, frames=4)
    sheet = tmp_path / "sheet.png"
    arguments = ["compare", str(inputs.pose), str(inputs.pose), "--sheet", str(sheet)]
    result = made(capsys, arguments)
    assert (result["frames"], result["psnr"]["mean"], result["psnr"]["per_frame"]) == (4, None, [None] * 4)
    assert (result["ssim"]["worst"], result["gmsd"]["worst"]) == (1.0, 0.0)
    with Image.open(sheet) as picture:
        assert picture.format == "PNG" and picture.width > 4 * 48

    assert run(arguments) == 0
    out, err = capsys.readouterr()
    assert "inf" in out and "1.0000" in out and "mean" in out
    assert err == f"Wrote {sheet}.\n"


def test_compare_measures_a_difference_between_a_folder_and_a_video(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = write_inputs(tmp_path, noise(16, 16, 3), numbered(3))
    write_video(tmp_path / "same.mkv", numbered(3), codec="ffv1", pixels="bgr0")
    write_video(tmp_path / "lossy.mp4", numbered(3), options={"crf": "40"})
    assert made(capsys, ["compare", str(inputs.pose), str(tmp_path / "same.mkv")])["psnr"]["worst"] is None
    lossy = made(capsys, ["compare", str(inputs.pose), str(tmp_path / "lossy.mp4")])
    assert 20 < lossy["psnr"]["worst"] < 60


def test_the_demo_runs_from_end_to_end(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, bundle = demo / "new" / "folder" / "clip.mp4", demo / "bundle"
    result = json.loads((demo / "result.json").read_text())
    assert_video(out, 17, 8, 64, 96)
    assert result["frames"] == 17
    assert result["psnr"] > 22  # noise has 6 to 8
    with Image.open(result["sheet"]) as picture:
        assert picture.height > 4 * 192
    assert sorted(p.name for p in out.parent.iterdir()) == ["clip-sheet.png", "clip.mp4"]
    assert made(capsys, ["inspect", str(bundle)])["precision"] == "fp32"


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_names_every_option_of_every_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "-h"):
        assert run([verb, flag] if verb else [flag]) == 0
        out, err = capsys.readouterr()
        assert out.startswith("Usage: dynamictrl") and err == ""
        assert "--json" in out or not verb
    if not verb:
        for name in (*VERBS, "Exit codes", "--version"):
            assert name in out
    if verb == "animate":
        for option in flags(dict.fromkeys(
            ("image", "pose", "prompt", "out", "negative_prompt", "steps", "guidance", "seed", "height", "width",
             "frames", "fps", "fit", "tiling", "reuse", "memory", "backend", "save_latents", "json"), True,
        )):  # fmt: skip
            assert option in out


def test_help_of_every_verb_loads_no_heavy_library() -> None:
    """One process for all verbs: nothing that one of them loads may be heavy."""
    script = (
        "import sys, time; start = time.perf_counter();"
        "from dynamictrl_edge.cli.main import VERBS, run;"
        "codes = [run([verb, '--help']) for verb in VERBS];"
        "heavy = [m for m in ('torch', 'transformers', 'diffusers', 'onnx', 'onnxruntime', 'av', 'tensorrt',"
        " 'tensorrt_rtx', 'polygraphy') if m in sys.modules];"
        "print('RESULT', codes, heavy, time.perf_counter() - start, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    codes, heavy, seconds = done.stderr.removeprefix("RESULT ").rsplit("] ", 2)
    assert codes == str([0] * len(VERBS))[:-1]
    assert heavy == "["
    assert float(seconds) < 2


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    from dynamictrl_edge import __version__

    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"dynamictrl-edge {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["anmate"], ("No such command", "anmate")),
        (["inspect", "x", "--colour"], ("No such option", "--colour")),
        (["animate", "x"], ("Missing option", "--image")),
        (["inspect"], ("Missing argument", "BUNDLE")),
        ([], ("animate", "export")),
    ],
)
def test_wrong_usage_ends_with_code_2(
    arguments: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    for word in words:
        assert word in err


def test_a_reader_that_goes_away_is_no_error(bundle10: Path) -> None:
    command = [*PROGRAM, "inspect", str(bundle10), "--json", "--no-verify"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # as `| true` does
        err = process.stderr.read()
    assert process.returncode in (0, 1)
    assert b"Traceback" not in err and b"Internal" not in err


@pytest.mark.parametrize("verb", ["inspect", "doctor", "compare"])
@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_result_that_cannot_be_printed_is_an_error_to_read(
    verb: str, more: tuple[str, ...], bundle10: Path, inputs: Inputs
) -> None:
    arguments = {"inspect": [bundle10, "--no-verify"], "doctor": [], "compare": [inputs.pose, inputs.pose]}[verb]
    command = [*PROGRAM, verb, *map(str, arguments), *more]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert done.stderr == (
        "dynamictrl: Cannot write to 'standard output': the disk is full; free some space or choose another place.\n"
    )


def test_closed_outputs_do_not_spoil_the_work(bundle10: Path, inputs: Inputs, tmp_path: Path) -> None:
    command = [*PROGRAM, *animate(bundle10, inputs, tmp_path / "clip.mp4"), "--json"]
    done = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *command], timeout=60, check=False)
    assert done.returncode == 0
    assert (tmp_path / "clip.mp4").exists()


def test_export_passes_its_options_on_and_replaces_a_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command, not the export, which other tests look at."""
    pytest.importorskip("torch", reason="exporting needs the extra 'export'")
    without_graphs(monkeypatch)
    bundle = tmp_path / "bundle"
    command = ["export", str(model_dir("cogvideox15-tiny")), str(bundle)]
    size = ["--height", "48", "--width", "64", "--frames", "13", "--precision", "bf16"]
    result = made(capsys, [*command, *size])
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert (result["bundle"], result["precision"]) == (str(bundle), "bf16")
    assert (result["files"], result["graphs"]) == (len(manifest["files"]), [])
    assert result["bytes"] == sum(entry["bytes"] for entry in manifest["files"].values())
    assert manifest["defaults"] == {
        "height": 48, "width": 64, "frames": 13, "fps": 16,
    }  # fmt: skip
    (bundle / "of the old one").touch()
    assert run([*command, "--force"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"Wrote {bundle}: ") and "fp32" in err
    assert sorted(path.name for path in bundle.iterdir()) == ["bundle.json", "graphs", "tokenizer.json", "weights"]
    assert list(tmp_path.iterdir()) == [bundle]

    from dynamictrl_edge.export import components

    asked: list[str] = []
    monkeypatch.setattr(components, "reuse_modules", lambda *_: asked.append("reuse") or {})
    assert run([*command, "--force", "--no-reuse"]) == 0 and asked == []
    assert run([*command, "--force"]) == 0 and asked == ["reuse"]


def test_a_relative_output_name_is_written_where_the_caller_is(
    bundle10: Path, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made(capsys, animate(bundle10, inputs, "a b%d:.mp4"))
    assert list(listing(tmp_path)) == ["a b%d:.mp4"]
