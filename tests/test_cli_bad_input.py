"""Bad input at the command line: the exit code, a message that names it and says what to do, and nothing left behind."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dynamictrl_edge.bundle import atomic
from dynamictrl_edge.cli.main import run
from tests.cli_samples import Inputs, animate, listing, refused, small_inputs
from tests.golden import model_dir
from tests.media_samples import cut, noise, numbered, remove_time, write_png_header, write_sound, write_video

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output folder that already holds something."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "clip.mp4").write_bytes(b"an older clip")
    (folder / "latents.npy").write_bytes(b"older latents")
    return folder


# --- photos


def _half_a_picture(path: Path) -> None:
    Image.fromarray(noise(64, 64, 3)).save(path)
    cut(path, 0.5)


PHOTOS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing": (lambda path: None, ("does not exist",)),
    "folder": (lambda path: path.mkdir(), ("is a folder",)),
    "empty": (lambda path: path.touch(), ("empty file",)),
    "text": (lambda path: path.write_text("no picture"), ("not a picture", "JPEG, PNG or WebP")),
    "truncated": (_half_a_picture, ("damaged or incomplete",)),
    "one-pixel": (lambda path: Image.fromarray(noise(1, 1, 3)).save(path), ("1x1", "at least 16")),
    "huge": (lambda path: write_png_header(path, 20_000, 20_000), ("too large", "100 megapixels", "smaller")),
    "video": (lambda path: write_video(path.with_suffix(".mp4"), numbered(2)).rename(path), ("not a picture",)),
}


@pytest.mark.parametrize("kind", PHOTOS)
def test_a_bad_photo(kind: str, bundle10: Path, inputs: Inputs, out: Path, tmp_path: Path, capsys: Capture) -> None:
    photo = tmp_path / "portrait.png"
    spoil, words = PHOTOS[kind]
    spoil(photo)
    arguments = animate(bundle10, Inputs(photo, inputs.pose), out / "clip.mp4", save_latents=out / "latents.npy")
    refused(capsys, out, arguments, 3, str(photo), *words)


# --- pose clips


def _mixed(path: Path) -> None:
    path.mkdir()
    Image.fromarray(noise(32, 48, 3)).save(path / "0.png")
    Image.fromarray(noise(48, 32, 3)).save(path / "1.png")


def _spoiled_frame(path: Path) -> None:
    path.mkdir()
    Image.fromarray(noise(32, 48, 3)).save(path / "0.png")
    (path / "1.png").write_bytes(b"no picture")


def _without_frames(path: Path) -> None:
    write_video(path, numbered(3), container_options={"movflags": "faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"mdat") + 4])  # an index, and nothing that it points to


def _without_end(path: Path) -> None:
    cut(write_video(path, noise(20, 64, 64, 3)), 0.7)  # the index stands at the end


def _without_time(path: Path) -> None:
    remove_time(write_video(path, numbered(3), options={"bf": "0"}))


POSES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing": (lambda path: None, ("does not exist",)),
    "empty-file": (lambda path: path.touch(), ("empty file",)),
    "text": (lambda path: path.write_text("no video"), ("not a video", "MP4")),
    "photo": (
        lambda path: Image.fromarray(noise(32, 48, 3)).save(path, "PNG"),
        ("not a video", "folder of image frames"),
    ),
    "without-frames": (_without_frames, ("no frames that can be decoded",)),
    "audio-only": (write_sound, ("only sound",)),
    "truncated": (_without_end, ("damaged",)),
    "zero-duration": (_without_time, ("zero duration",)),
    "tiny": (lambda path: write_video(path, numbered(3, 8, 8)), ("8x8", "at least 16")),
    "empty-folder": (lambda path: path.mkdir(), ("is empty",)),
    "mixed-sizes": (_mixed, ("differ in size", "48x32", "32x48", "'1.png'")),
    "spoiled-frame": (_spoiled_frame, ("1.png", "not a picture")),
}


@pytest.mark.parametrize("kind", POSES)
def test_a_bad_pose_clip(kind: str, bundle10: Path, inputs: Inputs, out: Path, tmp_path: Path, capsys: Capture) -> None:
    pose = tmp_path / "dance.mp4"
    spoil, words = POSES[kind]
    spoil(pose)
    arguments = animate(bundle10, Inputs(inputs.image, pose), out / "clip.mp4", save_latents=out / "latents.npy")
    refused(capsys, out, arguments, 3, str(pose), *words)


def test_a_pose_clip_that_was_cut_off_is_used_as_far_as_it_goes(
    bundle10: Path, inputs: Inputs, tmp_path: Path, capsys: Capture
) -> None:
    """With the index in front the frames before the end are good: a clip and a notice, not a refusal."""
    pose = write_video(
        tmp_path / "dance.mp4", noise(40, 64, 64, 3), rate=8, container_options={"movflags": "+faststart"},
        options={"g": "4", "bf": "0"},
    )  # fmt: skip
    cut(pose, 0.3)
    assert run(animate(bundle10, Inputs(inputs.image, pose), tmp_path / "clip.mp4", frames=17)) == 0
    err = capsys.readouterr().err
    assert "dance.mp4" in err and ("damaged" in err or "cut off" in err) and "repeated" in err


def test_skipping_more_pose_frames_than_there_are(bundle10: Path, inputs: Inputs, out: Path, capsys: Capture) -> None:
    arguments = animate(bundle10, inputs, out / "clip.mp4", skip_frames=5)
    refused(capsys, out, arguments, 3, "has 5 frames", "Skip fewer")


# --- values

WRONG: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
    "height": ({"height": 100}, 2, ("--height 100", "multiple of 16", "96 and 112")),
    "width": ({"width": 7}, 2, ("--width 7", "multiple of 16", "nearest is 16")),
    "width-0": ({"width": 0}, 2, ("--width 0",)),
    "frames": ({"frames": 12}, 2, ("--frames 12", "4 * n + 1", "9 and 13")),
    "frames-0": ({"frames": 0}, 2, ("--frames 0",)),
    "prompt": ({"prompt": ""}, 3, ("--prompt is empty", "for example")),
    "prompt-blank": ({"prompt": " \n"}, 3, ("--prompt is empty",)),
    "prompt-binary": ({"prompt": "\udcff"}, 3, ("--prompt", "Unicode")),
    "steps-0": ({"steps": 0}, 2, ("--steps 0", "1 to 1000")),
    "steps-1001": ({"steps": 1001}, 2, ("--steps 1001", "1 to 1000")),
    "steps-2.5": ({"steps": 2.5}, 2, ("--steps", "2.5")),
    "guidance-nan": ({"guidance": "nan"}, 2, ("--guidance nan", "0 or more")),
    "guidance-inf": ({"guidance": "inf"}, 2, ("--guidance inf", "0 or more")),
    "guidance-negative": ({"guidance": -1}, 2, ("--guidance -1", "0 or more")),
    "fps-0": ({"fps": 0}, 2, ("--fps 0", "above 0")),
    "fps-nan": ({"fps": "nan"}, 2, ("--fps nan", "above 0")),
    "fps-inf": ({"fps": "inf"}, 2, ("--fps inf", "above 0")),
    "fps-tiny": ({"fps": 1e-9}, 2, ("1e-09", "above 0")),
    "seed-negative": ({"seed": -1}, 2, ("--seed", "-1", str(2**64 - 1))),
    "seed-large": ({"seed": 2**64}, 2, ("--seed", str(2**64))),
    "seeds-text": ({"seed": "1,x"}, 2, ("--seed", "'1,x'", "1,2,3")),
    "seeds-twice": ({"seed": "1,1"}, 2, ("--seed", "'1,1'", "twice")),
    "seeds-later": ({"seed": "1,-2"}, 2, ("--seed", "-2")),
    "drop-prefix": ({"drop_prefix": 5}, 2, ("--drop-prefix 5", "5 frames", "at most 4")),
    "drop-prefix-negative": ({"drop_prefix": -1}, 2, ("--drop-prefix -1",)),
    "skip-frames": ({"skip_frames": -1}, 2, ("--skip-frames -1",)),
    "fit": ({"fit": "crop"}, 2, ("--fit", "'crop'", "cover")),
    "tiling": ({"tiling": "yes"}, 2, ("--tiling", "'yes'", "auto")),
    "reuse": ({"reuse": "fast"}, 2, ("--reuse 'fast'", "off")),
    "backend": ({"backend": "tensorrt"}, 5, ("NVIDIA", "--backend onnxruntime")),
    "backend-unknown": ({"backend": "cuda"}, 2, ("--backend", "'cuda'")),
    "threads": ({"threads": 0}, 2, ("--threads 0", "1 to 1024")),
    "threads-many": ({"threads": 10**6}, 2, ("--threads 1000000", "1 to 1024")),
    "memory-0": ({"memory": 0}, 2, ("--memory 0", "above 0")),
    "memory-nan": ({"memory": "nan"}, 2, ("--memory nan", "above 0")),
    "memory-inf": ({"memory": "inf"}, 2, ("--memory inf", "above 0")),
    "memory-small": ({"memory": 0.001}, 5, ("--memory 0.001", "Give at least --memory")),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value(name: str, bundle10: Path, inputs: Inputs, out: Path, capsys: Capture) -> None:
    options, code, words = WRONG[name]
    arguments = animate(bundle10, inputs, out / "clip.mp4", save_latents=out / "latents.npy", **options)
    refused(capsys, out, arguments, code, *words)


def test_a_prompt_of_ten_thousand_words_works_with_a_notice(
    bundle10: Path, inputs: Inputs, tmp_path: Path, capsys: Capture
) -> None:
    prompt = "a woman dances on the beach " * 1667
    assert run(animate(bundle10, inputs, tmp_path / "clip.mp4", prompt=prompt)) == 0
    err = capsys.readouterr().err
    assert "--prompt is too long" in err and "dropped" in err
    assert (tmp_path / "clip.mp4").exists()


# --- bundles


@pytest.fixture
def bundle(bundle10: Path, tmp_path: Path) -> Path:
    """A bundle that may be spoiled."""
    return shutil.copytree(bundle10, tmp_path / "bundle")


def _manifest(bundle: Path, **changes: Any) -> None:
    path = bundle / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _renamed(bundle: Path, old: str, new: str) -> None:
    path = bundle / "bundle.json"
    path.write_text(path.read_text().replace(old, new))


def _changed(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _linked(bundle: Path) -> None:
    file = bundle / "graphs" / "stem.onnx"
    file.rename(bundle.parent / "elsewhere.onnx")
    file.symlink_to(bundle.parent / "elsewhere.onnx")


def _without_files(bundle: Path, part: str) -> None:
    path = bundle / "bundle.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if part not in name}
    path.write_text(json.dumps(manifest))


BUNDLES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing": (shutil.rmtree, ("no bundle at", "dynamictrl export")),
    "changed-block": (
        lambda b: _changed(b / "weights" / "block_01.safetensors"),
        ("block_01.safetensors", "changed", "Copy the bundle again"),
    ),
    "changed-decoder": (lambda b: _changed(b / "weights" / "vae_decoder.safetensors"), ("vae_decoder", "changed")),
    "changed-graph": (lambda b: _changed(b / "graphs" / "head.onnx", 100), ("head.onnx", "changed")),
    "changed-tokenizer": (lambda b: _changed(b / "tokenizer.json", 100), ("tokenizer.json", "changed")),
    "shorter-file": (lambda b: cut(b / "weights" / "denoiser.safetensors", 0.9), ("denoiser.safetensors", "changed")),
    "missing-file": (
        lambda b: (b / "weights" / "vae_decoder.safetensors").unlink(),
        ("vae_decoder.safetensors", "is missing", "Copy the bundle again"),
    ),
    "missing-graph": (lambda b: (b / "graphs" / "block.onnx").unlink(), ("block.onnx", "is missing")),
    "unlisted-file": (lambda b: _without_files(b, "block_00.safetensors"), ("block_00",)),
    "leaving": (lambda b: _renamed(b, "graphs/stem.onnx", "../stem.onnx"), ("../stem.onnx", "outside its folder")),
    "absolute": (lambda b: _renamed(b, "graphs/stem.onnx", "/etc/stem.onnx"), ("/etc/stem.onnx", "outside")),
    "linked": (_linked, ("graphs/stem.onnx", "link that leaves")),
    "version": (lambda b: _manifest(b, version=99), ("format version 99", "reads version 1", "Export")),
    "format": (lambda b: _manifest(b, format="zip"), ("not the manifest",)),
    "precision": (lambda b: _manifest(b, precision="int3"), ("'int3'", "fp32")),
    "no-manifest": (lambda b: (b / "bundle.json").unlink(), ("not a bundle", "bundle.json", "dynamictrl export")),
    "damaged-manifest": (lambda b: cut(b / "bundle.json", 0.5), ("bundle.json", "damaged", "Copy the bundle again")),
    "binary-manifest": (lambda b: (b / "bundle.json").write_bytes(b"\xff\xfe\0"), ("bundle.json", "damaged")),
    "scheduler": (lambda b: _manifest(b, scheduler={"_class_name": "Euler"}), ("Euler", "not supported")),
}


@pytest.mark.parametrize("kind", BUNDLES)
def test_a_bad_bundle(kind: str, bundle: Path, inputs: Inputs, out: Path, capsys: Capture) -> None:
    spoil, words = BUNDLES[kind]
    spoil(bundle)
    arguments = animate(bundle, inputs, out / "clip.mp4", save_latents=out / "latents.npy")
    refused(capsys, out, arguments, 4, str(bundle), *words)


@pytest.mark.parametrize("kind", ["missing", "changed-block", "missing-graph", "leaving", "version", "scheduler"])
def test_inspect_refuses_a_bad_bundle(kind: str, bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    spoil, words = BUNDLES[kind]
    spoil(bundle)
    for more in ([], ["--json"]):
        refused(capsys, tmp_path, ["inspect", str(bundle), *more], 4, *words[:1])


def test_a_damaged_decoder_is_found_before_the_denoising(
    bundle: Path, inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from dynamictrl_edge.runtime import animator

    def never(*_: object) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(animator, "Denoiser", never)
    _changed(bundle / "graphs" / "vae_decoder_next.onnx")
    refused(capsys, out, animate(bundle, inputs, out / "clip.mp4"), 4, "vae_decoder_next.onnx")


def test_a_checkpoint_given_as_a_bundle(inputs: Inputs, out: Path, capsys: Capture) -> None:
    checkpoint = model_dir("cogvideox10-tiny")
    refused(
        capsys, out, animate(checkpoint, inputs, out / "clip.mp4"), 4,
        str(checkpoint), "looks like a checkpoint", f"dynamictrl export {checkpoint}",
    )  # fmt: skip


def test_a_bf16_bundle_on_a_cpu(bundle: Path, inputs: Inputs, out: Path, capsys: Capture) -> None:
    _manifest(bundle, precision="bf16")
    refused(capsys, out, animate(bundle, inputs, out / "clip.mp4"), 5, "bf16", "--precision fp32")


# --- outputs


def test_output_places_that_cannot_be_used(
    bundle10: Path, inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (out / "full").mkdir()
    (out / "full" / "00000.png").write_bytes(b"an older frame")
    (out / "empty").mkdir()
    (out / "empty.mp4").mkdir()
    (out / "link").symlink_to(out / "loop")
    (out / "loop").symlink_to(out / "link")
    monkeypatch.chdir(out / "empty")
    clip = out / "new.mp4"
    cases: list[tuple[object, object, int, tuple[str, ...]]] = [
        (out / "no" / "clip.mp4", None, 3, ("does not exist", "mkdir -p")),
        (out / "clip.mp4" / "clip.mp4", None, 3, ("is a file, not a folder",)),
        (out / "clip.avi", None, 2, ("'.avi'", ".mp4 or .webm", "slash")),
        (out / "clip.gif", None, 2, ("'.gif'", ".mp4 or .webm")),
        (out / "empty.mp4", None, 3, ("existing folder", "file name")),
        (f"{out}/clip.mp4/", None, 3, ("existing file",)),
        (out / "full", None, 3, ("not empty", "another name")),
        (f"{out}/full/", None, 3, ("not empty",)),
        (".", None, 3, ("not a name of its own",)),
        ("..", None, 3, ("not a name of its own",)),
        ("", None, 3, ("not a name of its own",)),
        ("/", None, 3, ("not a name of its own",)),
        (out / ("x" * 300), None, 3, ("too long",)),
        (clip, out / "no" / "latents.npy", 3, ("does not exist", "mkdir -p")),
        (clip, out / "empty", 3, ("--save-latents", "existing folder")),
        (clip, clip, 2, ("--save-latents", "--out", "two names")),
        (out / "empty", out / "empty" / "latents.npy", 2, ("--save-latents", "lies in the output")),
        (clip, inputs.image, 2, ("--save-latents", "overwrite an input")),
        (out / "link" / "clip.mp4", None, 3, ("link",)),
    ]
    for target, latents, code, words in cases:
        refused(capsys, out, animate(bundle10, inputs, str(target), save_latents=latents), code, *words)
    (out / "clip-seed2.mp4").mkdir()  # in the way of the second clip only
    refused(capsys, out, animate(bundle10, inputs, out / "clip.mp4", seed="1,2"), 3, "clip-seed2.mp4")


def test_an_output_that_would_overwrite_an_input(
    bundle10: Path, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    write_video(tmp_path / "dance.mp4", numbered(6))
    (tmp_path / "link.mp4").symlink_to(tmp_path / "dance.mp4")
    monkeypatch.chdir(tmp_path)
    video = Inputs(inputs.image, tmp_path / "dance.mp4")
    for name in ("dance.mp4", "./dance.mp4", "link.mp4"):
        refused(capsys, tmp_path, animate(bundle10, video, name), 2, f"--out '{Path(name)}'", "overwrite an input")


@contextlib.contextmanager
def read_only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """Nothing can be created in `folder`: as root the real thing cannot be had without mounting."""
    real = os.open

    def refusing(path: Any, flags: int, *more: Any, **keywords: Any) -> int:
        if flags & os.O_CREAT and Path(path).parent == folder:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *more, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refusing)
        yield


def test_a_read_only_output_folder(
    bundle10: Path, inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    commands = [
        animate(bundle10, inputs, out / "clip.mp4"),
        animate(bundle10, inputs, out / "frames"),
        animate(bundle10, inputs, inputs.image.parent / "clip.mp4", save_latents=out / "latents.npy"),
        ["export", str(model_dir("cogvideox10-tiny")), str(out / "bundle")],
        ["compare", str(inputs.pose), str(inputs.pose), "--sheet", str(out / "sheet.png")],
        ["demo", "--out", str(out / "demo.mp4")],
    ]
    with read_only(monkeypatch, out):
        for arguments in commands:
            refused(capsys, out, arguments, 3, str(out), "read-only", "choose another place")


def test_a_full_disk(
    bundle10: Path, inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Temporary files are links to /dev/full, which takes no byte."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    real = atomic._temporary_name

    def full(path: Path) -> Path:
        name = real(path)
        if path.parent == out and path.suffix in suffixes:
            name.symlink_to("/dev/full")
        return name

    monkeypatch.setattr(atomic, "_temporary_name", full)
    for suffixes in ((".mp4",), (".webm",), (".npy",), (".mp4", ".npy")):
        target = out / ("clip.webm" if ".webm" in suffixes else "clip.mp4")
        arguments = animate(bundle10, inputs, target, save_latents=out / "latents.npy")
        refused(capsys, out, arguments, 3, str(out), "disk is full", "free some space")
    suffixes = (".png",)
    sheet = ["compare", str(inputs.pose), str(inputs.pose), "--sheet", str(out / "sheet.png")]
    refused(capsys, out, sheet, 3, "sheet.png", "disk is full")


def test_a_disk_that_becomes_full_while_frames_are_written(
    bundle10: Path, inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    real, saved = Image.Image.save, []

    def save(image: Image.Image, path: Any, *arguments: Any, **keywords: Any) -> None:
        real(image, path, *arguments, **keywords)
        saved.append(path)
        if len(saved) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Image.Image, "save", save)
    arguments = animate(bundle10, inputs, out / "frames", save_latents=out / "latents.npy")
    refused(capsys, out, arguments, 3, str(out / "frames"), "disk is full")
    assert len(saved) == 3


def test_a_quota_that_is_used_up_by_the_latents(
    bundle10: Path, inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def write_bytes(path: Path, data: bytes) -> int:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    arguments = animate(bundle10, inputs, out / "clip.mp4", save_latents=out / "latents.npy", no_cache=True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_bytes)
        refused(capsys, out, arguments, 3, "latents.npy", "quota")


def test_the_older_clip_stays_when_the_last_move_fails(
    bundle10: Path, inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target) == out / "clip.mp4":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(source), None, str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    arguments = animate(bundle10, inputs, out / "clip.mp4", save_latents=out / "latents.npy")
    refused(capsys, out, arguments, 3, "clip.mp4", "permission denied")


def test_a_failure_in_a_later_seed_keeps_the_clips_before_it(
    bundle10: Path, inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from dynamictrl_edge.bundle.errors import DeviceError
    from dynamictrl_edge.runtime.animator import Animator

    real = Animator._decoded

    def decoded(animator: Animator, made: Any, *arguments: Any) -> Any:
        yield from real(animator, made, *arguments)
        if made.request.seed == 2:
            raise DeviceError("The device went away.")

    monkeypatch.setattr(Animator, "_decoded", decoded)
    assert run(animate(bundle10, inputs, out / "clip.mp4", seed="1,2,3")) == 5
    assert "The device went away." in capsys.readouterr().err
    assert list(listing(out)) == ["clip-seed1.mp4", "clip.mp4", "latents.npy"]


# --- other verbs


def test_export_refuses_what_is_no_checkpoint(inputs: Inputs, out: Path, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("torch", reason="exporting needs the extra 'export'")
    checkpoint = model_dir("cogvideox10-tiny")
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    (broken / "vae" / "config.json").unlink()
    cases: list[tuple[object, tuple[str, ...], int, tuple[str, ...]]] = [
        (tmp_path / "none", (), 3, ("none",)),
        (inputs.image, (), 3, ("photo.png",)),
        (broken, (), 3, ("vae", "config.json")),
        (checkpoint, ("--frames", "8"), 2, ("--frames 8", "5 and 9")),
        (checkpoint, ("--height", "0"), 2, ("--height 0", "16")),
        (checkpoint, ("--width", "-16"), 2, ("--width -16", "16")),
        (checkpoint, ("--precision", "int8"), 2, ("--precision", "int8", "fp32")),
    ]
    for source, options, code, words in cases:
        refused(capsys, out, ["export", str(source), str(out / "bundle"), *options], code, *words)


def test_export_replaces_nothing_but_a_bundle(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("torch", reason="exporting needs the extra 'export'")
    checkpoint = shutil.copytree(model_dir("cogvideox10-tiny"), tmp_path / "models" / "checkpoint")
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "bundle.json").write_text("{}")
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "beach.jpg").write_bytes(b"a picture")
    for target, words in (
        ("bundle", ("a bundle already", "--force")),
        ("holiday", ("not empty",)),
        ("models/checkpoint", ("not empty",)),
        ("no/bundle", ("does not exist", "mkdir -p")),
    ):
        refused(capsys, tmp_path, ["export", str(checkpoint), str(tmp_path / target)], 3, *words)
    for target, words in (
        ("holiday", ("not a bundle", "not replaced")),
        ("models/checkpoint", ("holds the checkpoint",)),
        ("models", ("holds the checkpoint",)),
    ):
        refused(capsys, tmp_path, ["export", str(checkpoint), str(tmp_path / target), "--force"], 3, target, *words)


def test_compare_refuses_clips_that_cannot_be_compared(tmp_path: Path, capsys: Capture) -> None:
    inputs = small_inputs(tmp_path)
    (tmp_path / "other").mkdir()
    other = small_inputs(tmp_path / "other", frames=3)
    (tmp_path / "large").mkdir()
    large = small_inputs(tmp_path / "large", height=48)
    clip = str(inputs.pose)
    for arguments, words in (
        ([clip, str(other.pose)], ("5 and 3 frames",)),
        ([clip, str(large.pose)], ("48x32", "48x48")),
        ([clip, str(tmp_path / "none.mp4")], ("none.mp4", "does not exist")),
        ([clip, str(inputs.image)], ("photo.png", "not a video")),
        ([clip, clip, "--sheet", str(tmp_path / "no" / "sheet.png")], ("does not exist",)),
        ([clip, clip, "--sheet", str(tmp_path / "pose")], ("existing folder",)),
    ):
        refused(capsys, tmp_path, ["compare", *arguments], 3, *words)


def test_the_demo_refuses_an_output_before_it_works(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("torch", reason="the demo exports, which needs the extra 'export'")
    (tmp_path / "file").touch()
    for target, code, words in (
        (tmp_path / "new" / "folder" / "clip.gif", 2, ("'.gif'",)),
        (tmp_path / "file" / "clip.mp4", 3, ("file",)),
    ):
        refused(capsys, tmp_path, ["demo", "--out", str(target)], code, *words)


# --- what must never be shown


def test_a_missing_package_is_named(
    bundle10: Path, inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    real = importlib.import_module

    def importing(name: str, package: str | None = None) -> Any:
        if name.endswith(".animate"):
            raise ModuleNotFoundError("No module named 'av'", name="av")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", importing)
    refused(capsys, out, animate(bundle10, inputs, out / "clip.mp4"), 5, "'av' is not installed", "dynamictrl doctor")


@pytest.mark.parametrize(
    "arguments", [["export", "checkpoint", "{out}/bundle"], ["demo", "--out", "{out}/new/demo.mp4"]]
)
def test_exporting_without_its_packages_names_the_command_that_installs_them(
    arguments: list[str], out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "dynamictrl_edge.export.exporter", None)  # importing it fails
    arguments = [argument.format(out=out) for argument in arguments]
    refused(capsys, out, arguments, 5, "not installed", 'pip install "dynamictrl-edge[export]"')


def test_an_unexpected_error_is_one_paragraph_with_a_trace_on_demand(
    bundle10: Path, inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from dynamictrl_edge.runtime.animator import Animator

    def broken(*_: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(Animator, "_latents", broken)
    before = listing(out)
    arguments = animate(bundle10, inputs, out / "clip.mp4", save_latents=out / "latents.npy")
    assert run(arguments) == 1
    err = capsys.readouterr().err
    assert "Internal error: ZeroDivisionError: by zero" in err and "--verbose" in err and "Traceback" not in err
    assert run([*arguments, "--verbose"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert listing(out) == before


def test_running_out_of_memory_says_what_helps(
    bundle10: Path, inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from dynamictrl_edge.runtime.animator import Animator

    def hungry(*_: object) -> None:
        np.empty(1 << 60, np.uint8)

    monkeypatch.setattr(Animator, "_latents", hungry)
    refused(capsys, out, animate(bundle10, inputs, out / "clip.mp4"), 5, "Out of memory", "--memory")


def test_verbose_adds_the_trace_to_a_refusal(inputs: Inputs, out: Path, capsys: Capture) -> None:
    assert run([*animate(out / "none", inputs, out / "clip.mp4"), "--verbose"]) == 4
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("dynamictrl: There is no bundle")
