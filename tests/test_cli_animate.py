"""`dynamictrl animate` from the outside: what it makes, what it prints, and that it makes what the published code makes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from dynamictrl_edge.cli.main import run
from tests.cli_samples import (
    PROGRAM,
    Inputs,
    animate,
    assert_video,
    beside,
    made,
    one_thread,
    pngs,
    refused,
    small_inputs,
    write_inputs,
)
from tests.golden import PIPELINES, case, max_abs, model_dir
from tests.media_samples import noise, numbered, real_file, write_video

LATENT_LIMIT = 5e-4  # of the golden README
LEVELS = 1


def latents_of(
    capsys: pytest.CaptureFixture[str], folder: Path, bundle: Path, inputs: Inputs, **options: Any
) -> tuple[np.ndarray, Any]:
    """Final latents and JSON of the quick clip with these options."""
    out = folder / f"clip{len(list(folder.iterdir()))}"
    target = out.with_suffix(".npy")
    result = made(capsys, animate(bundle, inputs, out, save_latents=target, **options))
    return np.load(target, allow_pickle=False), result


def golden_command(name: str, folder: Path, bundle: Path) -> list[str]:
    tensors, description = case(name)
    settings = description["settings"]
    inputs = write_inputs(folder, tensors["image_u8"], tensors["control_u8"])
    return animate(
        bundle,
        inputs,
        folder / "frames",
        prompt=settings["prompt"],
        negative_prompt=settings["negative_prompt"],
        height=settings["height"],
        width=settings["width"],
        frames=settings["num_frames"],
        steps=settings["num_inference_steps"],
        guidance=settings["guidance_scale"],
        seed=settings["seed"],
        tiling="on" if settings["vae_tiling_and_slicing"] else "off",
        save_latents=folder / "latents.npy",
    )


def assert_golden(name: str, folder: Path) -> None:
    tensors, description = case(name)
    # [1, C, F, H, W], divided by the scaling factor -> [F, C, H, W]
    wanted = tensors["decoder_input"][0].transpose(1, 0, 2, 3) * np.float32(0.7)
    found = np.load(folder / "latents.npy", allow_pickle=False)
    assert found.dtype == np.float32
    assert max_abs(found, wanted) <= LATENT_LIMIT
    frames = tensors["frames_u8"][: description["settings"]["num_frames"]]
    assert max_abs(pngs(folder / "frames"), frames) <= LEVELS


@pytest.mark.parametrize("name", PIPELINES)
def test_the_golden_pipelines_come_out_of_the_command_line(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = request.getfixturevalue(name.replace("pipeline", "bundle")[:8])
    result = made(capsys, golden_command(name, tmp_path, bundle))
    assert_golden(name, tmp_path)
    assert result["tiled"] == ("tiled" in name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frames", "latents.npy", "photo.png", "pose"]


def test_a_golden_pipeline_in_a_process_of_its_own(bundle15: Path, tmp_path: Path) -> None:
    command = golden_command("pipeline15_cfg3_f9", tmp_path, bundle15)
    done = beside(*command, "--json", env=one_thread())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["frames"] == 9
    assert done.stderr.startswith("Note: The pose folder") and done.stderr.count("\n") == 1  # no bars, no warnings
    assert_golden("pipeline15_cfg3_f9", tmp_path)


@pytest.mark.parametrize(
    ("model", "seed", "height", "width", "frames", "steps", "guidance", "tiling"),
    [
        # Step counts that do not divide 1000, seeds beyond 32 bits, prompts for both halves, raised lengths, tiles.
        (10, 7, 32, 64, 5, 3, 3.0, False),
        (10, 2**40 + 5, 64, 96, 9, 2, 1.5, True),
        (15, 0, 48, 32, 9, 7, 6.0, False),
        (15, 123, 32, 48, 17, 3, 1.0, False),
    ],
)
def test_other_settings_equal_the_published_pipeline(
    model: int,
    seed: int,
    height: int,
    width: int,
    frames: int,
    steps: int,
    guidance: float,
    tiling: bool,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torch", reason="the published pipeline needs the extra 'export'")
    from benchmarks.published_pipeline import published_pipeline, raised_frames

    photo = noise(50, 70, 3, seed=model)
    pose = noise(raised_frames(frames, 2 if model == 15 else None)[1], height, width, 3, seed=model + 1)
    settings: dict[str, Any] = {
        "prompt": "a man walks on a green meadow",
        "negative_prompt": "blurry, dark",
        "seed": seed,
        "height": height,
        "width": width,
        "steps": steps,
        "guidance": guidance,
    }
    checkpoint = model_dir(f"cogvideox{model}-tiny")
    peer = published_pipeline(checkpoint, photo, pose, num_frames=frames, tiling=tiling, **settings)

    inputs = write_inputs(tmp_path, photo, pose)
    found, result = latents_of(
        capsys,
        tmp_path,
        request.getfixturevalue(f"bundle{model}"),
        inputs,
        frames=frames,
        tiling="on" if tiling else "off",
        **settings,
    )
    assert max_abs(found, peer["saved_latents"]) <= LATENT_LIMIT
    assert max_abs(pngs(Path(result["out"])), peer["frames_u8"][:frames]) <= LEVELS


def test_a_real_photo_and_a_real_video_become_an_mp4(
    bundle10: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Inputs(real_file("human1.jpg"), real_file("motion1.mp4"))
    out = tmp_path / "clip.mp4"
    options = {"height": 160, "width": 256, "frames": 17, "guidance": 3, "fit": None, "tiling": None}
    result = made(capsys, animate(bundle10, real, out, **options))
    assert_video(out, 17, 8, 256, 160)
    assert (result["frames"], result["fps"], result["width"], result["height"]) == (17, 8.0, 256, 160)
    assert "more than the 17 frames" in result["notices"][0]


def test_a_turned_jpeg_and_a_drawn_mp4_become_an_mp4(
    bundle15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # held sideways
    Image.fromarray(noise(200, 120, 3)).save(tmp_path / "photo.jpg", exif=turned)
    write_video(tmp_path / "pose.mp4", numbered(40, 120, 96), rate=30)
    out = tmp_path / "clip.mp4"
    options = {"height": 160, "width": 256, "frames": 17, "fps": 24, "guidance": 1, "fit": None, "tiling": None}
    result = made(capsys, animate(bundle15, Inputs(tmp_path / "photo.jpg", tmp_path / "pose.mp4"), out, **options))
    assert_video(out, 17, 24, 256, 160)
    assert result["fps"] == 24.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "photo.jpg", "pose.mp4"]


def test_a_turned_jpeg_means_the_upright_picture(
    bundle10: Path, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(noise(40, 30, 3)).save(tmp_path / "turned.jpg", exif=turned)
    with Image.open(tmp_path / "turned.jpg") as stored:
        stored.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    found, wanted = (
        latents_of(capsys, tmp_path, bundle10, Inputs(tmp_path / name, inputs.pose), fit="cover")[0]
        for name in ("turned.jpg", "upright.png")
    )
    np.testing.assert_array_equal(found, wanted)


def test_webm_is_written_by_its_name(
    bundle10: Path, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(capsys, animate(bundle10, inputs, tmp_path / "clip.webm", fps=12))
    with av.open(str(tmp_path / "clip.webm")) as container:
        assert container.streams.video[0].codec_context.name == "vp9"
        assert len(list(container.decode(video=0))) == 5


def test_several_seeds_make_the_clips_of_single_runs(
    bundle10: Path, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several = tmp_path / "several"
    single = tmp_path / "single"
    several.mkdir()
    single.mkdir()
    options = {"save_latents": several / "latents.npy", "seed": "3,11"}
    results = made(capsys, animate(bundle10, inputs, f"{several}/clip.v2/", **options))
    assert [result["seed"] for result in results] == [3, 11]
    assert sorted(p.name for p in several.iterdir()) == [
        "clip.v2-seed11",
        "clip.v2-seed3",
        "latents-seed11.npy",
        "latents-seed3.npy",
    ]
    for result in results:
        seed = result["seed"]
        latents, alone = latents_of(capsys, single, bundle10, inputs, seed=seed)
        np.testing.assert_array_equal(latents, np.load(several / f"latents-seed{seed}.npy"))
        np.testing.assert_array_equal(pngs(Path(alone["out"])), pngs(Path(result["out"])))
    made(capsys, animate(bundle10, inputs, several / "clip.mp4", seed="3,11"))
    assert {"clip-seed3.mp4", "clip-seed11.mp4"} <= {p.name for p in several.iterdir()}
    assert not (several / "clip.mp4").exists()


def test_the_same_seed_makes_the_same_clip_and_another_seed_another(
    bundle10: Path, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again, other = (latents_of(capsys, tmp_path, bundle10, inputs, seed=seed)[0] for seed in (5, 5, 2**64 - 1))
    np.testing.assert_array_equal(first, again)
    assert max_abs(first, other) > 0.1


def test_a_prefix_is_dropped_from_the_result(
    bundle10: Path, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, result = latents_of(capsys, tmp_path, bundle10, inputs)
    frames = pngs(Path(result["out"]))
    for count in (1, 4):
        latents, result = latents_of(capsys, tmp_path, bundle10, inputs, drop_prefix=count)
        assert result["frames"] == 5 - count
        np.testing.assert_array_equal(latents, whole)
        np.testing.assert_array_equal(pngs(Path(result["out"])), frames[count:])


def test_pose_frames_are_skipped_and_resampled(
    bundle10: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A clip numbered 0, 1, 2, ... at 24 frames/s: skipping and --fps mean the folder of the frames that are shown."""
    frames = numbered(40)
    write_video(tmp_path / "pose.mkv", frames, rate=24, codec="ffv1", pixels="bgr0")  # lossless
    inputs = write_inputs(tmp_path, noise(32, 48, 3), frames[6:26:4])
    video = Inputs(inputs.image, tmp_path / "pose.mkv")
    wanted, _ = latents_of(capsys, tmp_path, bundle10, inputs, fps=6)
    skipped, result = latents_of(capsys, tmp_path, bundle10, video, fps=6, skip_frames=1)
    assert max_abs(wanted, skipped) > 1e-3  # frame 4 comes first, not frame 6
    (tmp_path / "second").mkdir()
    other = write_inputs(tmp_path / "second", noise(32, 48, 3), frames[4:24:4])
    np.testing.assert_array_equal(skipped, latents_of(capsys, tmp_path, bundle10, other, fps=6)[0])
    assert result["fps"] == 6.0


def test_a_short_pose_clip_is_filled_up_with_a_notice(
    bundle10: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = small_inputs(tmp_path, frames=3)
    assert run(animate(bundle10, inputs, tmp_path / "clip.mp4")) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "the last one is repeated twice" in err or "the last one is repeated 2 times" in err
    assert f"Wrote {tmp_path / 'clip.mp4'}: 5 frames of 48x32" in err


def test_reinitialised_noise_changes_the_clip_and_is_deterministic(
    bundle15: Path, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, first, again = (
        latents_of(capsys, tmp_path, bundle15, inputs, re_init_noise=flag)[0] for flag in (None, True, True)
    )
    np.testing.assert_array_equal(first, again)
    assert max_abs(plain, first) > 1e-2


def test_guidance_of_one_or_less_ignores_the_negative_prompt(
    bundle10: Path, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, zero, other, guided = (
        latents_of(capsys, tmp_path, bundle10, inputs, **options)[0]
        for options in (
            {"guidance": 1},
            {"guidance": 0},
            {"guidance": 1, "negative_prompt": "blurry"},
            {"guidance": 1.5},
        )
    )
    np.testing.assert_array_equal(one, zero)
    np.testing.assert_array_equal(one, other)
    assert max_abs(one, guided) > 1e-3


def test_fit_decides_how_a_picture_of_another_shape_is_used(
    bundle10: Path, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(noise(60, 40, 3)).save(tmp_path / "tall.png")
    tall = Inputs(tmp_path / "tall.png", inputs.pose)
    cover, contain, stretch, default = (
        latents_of(capsys, tmp_path, bundle10, tall, fit=fit)[0] for fit in ("cover", "contain", "stretch", None)
    )
    np.testing.assert_array_equal(cover, default)
    assert min(max_abs(cover, contain), max_abs(cover, stretch), max_abs(contain, stretch)) > 1e-3


def test_the_smallest_budget_that_a_refusal_names_works_and_gives_the_same_clip(
    bundle10: Path, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    free, unlimited = latents_of(capsys, tmp_path, bundle10, inputs, guidance=3)
    message = refused(
        capsys,
        tmp_path,
        animate(bundle10, inputs, tmp_path / "no.mp4", guidance=3, memory=0.01),
        5,
        "--memory 0.01",
        "48x32",
        "5 frames",
        "Give at least --memory ",
    )
    least = float(message.split("Give at least --memory ")[1].split(",")[0])
    refused(capsys, tmp_path, animate(bundle10, inputs, tmp_path / "no.mp4", guidance=3, memory=least - 0.02), 5)
    tight, result = latents_of(capsys, tmp_path, bundle10, inputs, guidance=3, memory=least)
    assert unlimited["resident_blocks"] == 3
    assert result["planned_peak_gb"] <= least
    generous, result = latents_of(capsys, tmp_path, bundle10, inputs, guidance=3, memory=50)
    assert result["resident_blocks"] == 3
    # Other shares of the cores round otherwise; nothing else may change.
    np.testing.assert_allclose(tight, free, rtol=0, atol=1e-4)
    np.testing.assert_allclose(generous, free, rtol=0, atol=1e-4)


def test_blocks_that_are_streamed_change_nothing(
    bundle10: Path, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Small budgets are too coarse to make a plan stream blocks of this size, so the plan is made to."""
    from dynamictrl_edge.runtime import animator, memory

    wanted, _ = latents_of(capsys, tmp_path, bundle10, inputs)

    def streaming(*arguments: Any, **keywords: Any) -> memory.MemoryPlan:
        return dataclasses.replace(memory.plan_memory(*arguments, **keywords), resident_blocks=1)

    monkeypatch.setattr(animator, "plan_memory", streaming)
    found, result = latents_of(capsys, tmp_path, bundle10, inputs, memory=50)
    assert result["resident_blocks"] == 1
    np.testing.assert_array_equal(found, wanted)


def test_tiles_that_only_a_budget_asks_for_are_told(
    bundle10: Path, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = {"height": 320, "width": 320, "frames": 1, "steps": 1, "tiling": "auto"}
    message = refused(capsys, tmp_path, animate(bundle10, inputs, tmp_path / "no.mp4", **{**large, "memory": 0.01}), 5)
    least = float(message.split("Give at least --memory ")[1].split(",")[0])
    _, result = latents_of(capsys, tmp_path, bundle10, inputs, **large, memory=least)
    assert result["tiled"]
    assert any("tiles" in text and "memory" in text for text in result["notices"])
    _, result = latents_of(capsys, tmp_path, bundle10, inputs, **large)
    assert not result["tiled"]
    assert not any("tiles" in text for text in result["notices"])


def test_threads_and_the_cache_do_not_change_the_clip(
    bundle10: Path,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("DYNAMICTRL_CACHE", str(cache))
    out = tmp_path / "out"
    out.mkdir()
    uncached, _ = latents_of(capsys, out, bundle10, inputs, no_cache=True, threads=1)
    assert not (cache / "prompts").exists()
    first, _ = latents_of(capsys, out, bundle10, inputs, threads=2)
    assert len(list((cache / "prompts").glob("*.npy"))) == 1
    again, _ = latents_of(capsys, out, bundle10, inputs, threads=1)
    np.testing.assert_array_equal(uncached, again)
    assert max_abs(uncached, first) <= 1e-5  # other thread counts may sum in another order


def test_a_bundle_moves_with_its_folder_and_needs_no_text_weights_for_a_cached_prompt(
    bundle10: Path, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    out = tmp_path / "out"
    out.mkdir()
    wanted, _ = latents_of(capsys, out, bundle10, inputs)
    moved = shutil.copytree(bundle10, tmp_path / "another name, with [brackets]")
    for path in moved.glob("weights/text*"):
        path.unlink()
    found, _ = latents_of(capsys, out, moved, inputs)
    np.testing.assert_array_equal(wanted, found)


def test_animate_prints_json_alone_on_stdout(
    bundle10: Path, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = animate(bundle10, inputs, tmp_path / "clip.mp4", prompt="dress " * 200, seed=9)
    result = made(capsys, arguments)
    assert list(result) == [
        "out", "seed", "frames", "width", "height", "fps", "steps", "guidance", "backend", "latents", "seconds",
        "planned_peak_gb", "resident_blocks", "tiled", "reuse", "notices",
    ]  # fmt: skip
    assert result["latents"] is None and result["reuse"] is None
    assert (result["out"], result["seed"], result["steps"], result["backend"]) == (
        str(tmp_path / "clip.mp4"), 9, 2, "onnxruntime",
    )  # fmt: skip
    assert {"text", "encode", "denoise", "decode"} <= set(result["seconds"])
    assert "--prompt is too long" in result["notices"][0]


def test_nothing_is_printed_on_stdout_and_no_progress_without_a_terminal(
    bundle10: Path, inputs: Inputs, tmp_path: Path
) -> None:
    done = beside(*animate(bundle10, inputs, tmp_path / "clip.mp4"), env=one_thread())
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("Wrote ") and done.stderr.count("\n") == 1
    assert "\x1b" not in done.stderr and "\r" not in done.stderr


def test_progress_is_shown_on_a_terminal(bundle10: Path, inputs: Inputs, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty", reason="needs a terminal")
    ours, theirs = pty.openpty()
    command = [*PROGRAM, *animate(bundle10, inputs, tmp_path / "clip.mp4")]
    environment = {**one_thread(), "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # the other end was closed
            pass
        stdout, _ = process.communicate(timeout=60)
    os.close(ours)
    assert (process.returncode, stdout) == (0, b"")
    for stage in (b"Encoding photo and pose", b"Denoising", b"Decoding", b"100%"):
        assert stage in shown
