"""Ctrl-C, a stop from outside and a cancellation, at every stage: exit code 130, a short message, nothing half-written."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamictrl_edge.bundle import atomic
from dynamictrl_edge.bundle.errors import Interrupted
from dynamictrl_edge.cli import animate as animate_verb
from dynamictrl_edge.cli import main as command_line
from dynamictrl_edge.cli.console import Progress
from dynamictrl_edge.cli.main import run
from dynamictrl_edge.runtime import Animator
from tests.cli_samples import PROGRAM, PROMPT, Inputs, animate, listing, one_thread, without_graphs
from tests.golden import model_dir
from tests.media_samples import noise

Capture = pytest.CaptureFixture[str]

SAID = "dynamictrl: Interrupted. No half-written output was left."
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _signals_arrive() -> Iterator[None]:
    """Test runners that are started in the background have them ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "clip.mp4").write_bytes(b"an older clip")
    return folder


def assert_interrupted(capsys: Capture, folder: Path, arguments: list[str]) -> None:
    before = listing(folder)
    handlers = [signal.getsignal(number) for number in SIGNALS]
    capsys.readouterr()
    assert run(arguments) == 130
    stdout, err = capsys.readouterr()
    assert (stdout, err.strip()) == ("", SAID)
    assert listing(folder) == before
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize(
    "stage", [("verify", 1), ("text", 0), ("encode", 0), ("denoise", 0), ("denoise", 1), ("decode", 0), ("decode", 5)]
)
def test_a_signal_in_any_stage_of_an_animation(
    stage: tuple[str, int],
    number: signal.Signals,
    bundle10: Path,
    inputs: Inputs,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    def progress(bars: object, name: str, done: int, total: int) -> None:
        if (name, done) == stage:
            signal.raise_signal(number)

    monkeypatch.setattr(animate_verb.Bars, "__call__", progress)
    target = out / {signal.SIGINT: "clip.mp4", signal.SIGTERM: "frames"}.get(number, "new.webm")
    assert_interrupted(capsys, out, animate(bundle10, inputs, target, save_latents=out / "latents.npy"))


def test_a_signal_while_the_files_are_moved_into_place(
    bundle10: Path, inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def replace(source: object, target: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(atomic.os, "replace", replace)
    for name in ("clip.mp4", "clip.webm", "frames"):
        arguments = animate(bundle10, inputs, out / name, save_latents=out / "latents.npy", no_cache=True)
        assert_interrupted(capsys, out, arguments)


def test_a_signal_in_a_later_seed_keeps_the_clips_before_it(
    bundle10: Path, inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, decoded = animate_verb.Bars.__call__, []

    def progress(bars: Any, name: str, done: int, total: int) -> None:
        real(bars, name, done, total)
        if (name, done) == ("decode", 0):
            decoded.append(name)
            if len(decoded) == 2:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(animate_verb.Bars, "__call__", progress)
    assert run(animate(bundle10, inputs, out / "new.mp4", seed="1,2,3")) == 130
    assert list(listing(out)) == ["clip.mp4", "new-seed1.mp4"]


def test_pressing_it_twice_does_not_break_off_the_cleaning_up(
    bundle10: Path, inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def progress(bars: object, name: str, done: int, total: int) -> None:
        if (name, done) == ("denoise", 1):
            signal.raise_signal(signal.SIGINT)

    real, cleaned = atomic._remove, []

    def remove(path: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        real(path)
        cleaned.append(path)

    monkeypatch.setattr(animate_verb.Bars, "__call__", progress)
    monkeypatch.setattr(atomic, "_remove", remove)
    arguments = animate(bundle10, inputs, out / "frames", save_latents=out / "latents.npy", no_cache=True)
    assert_interrupted(capsys, out, arguments)
    assert len(cleaned) == 2


def test_a_later_signal_is_a_new_one(
    bundle10: Path, inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Where the first was swallowed by a library, the user must still get out."""
    seen: list[str] = []

    def progress(bars: object, name: str, done: int, total: int) -> None:
        with contextlib.suppress(KeyboardInterrupt if not seen else ValueError):
            if name == "denoise":
                signal.raise_signal(signal.SIGINT)
        seen.append(name)

    monkeypatch.setattr(animate_verb.Bars, "__call__", progress)
    monkeypatch.setattr(command_line, "PATIENCE", 0.0)
    assert_interrupted(capsys, out, animate(bundle10, inputs, out / "clip.mp4"))


def test_signals_that_the_shell_ignores_stay_ignored(
    bundle10: Path, inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under nohup and for background jobs of a script."""

    def progress(bars: object, name: str, done: int, total: int) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(animate_verb.Bars, "__call__", progress)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run(animate(bundle10, inputs, out / "new.mp4")) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert (out / "new.mp4").exists()


def test_the_command_line_works_beside_the_main_thread(bundle10: Path, inputs: Inputs, out: Path) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run(animate(bundle10, inputs, out / "new.mp4"))))
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.parametrize("step", ["add_bytes", "add_weights", "add_graph"])
def test_a_signal_in_an_export(step: str, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    pytest.importorskip("torch", reason="exporting needs the extra 'export'")
    from dynamictrl_edge.export.workspace import Workspace

    real = getattr(Workspace, step)

    def interrupted(workspace: Workspace, *arguments: Any, **keywords: Any) -> None:
        real(workspace, *arguments, **keywords)
        signal.raise_signal(signal.SIGTERM if step == "add_weights" else signal.SIGINT)

    monkeypatch.setattr(Workspace, step, interrupted)
    assert_interrupted(capsys, out, ["export", str(model_dir("cogvideox10-tiny")), str(out / "bundle")])


def test_a_signal_while_a_bundle_is_replaced_keeps_the_old_one(
    bundle10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    pytest.importorskip("torch", reason="exporting needs the extra 'export'")
    without_graphs(monkeypatch)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "bundle.json").write_text("{}")
    real, moves = os.replace, []

    def replace(source: Any, target: Any) -> None:
        moves.append(target)
        if len(moves) == 2:  # the old one is aside, the new one not yet in its place
            signal.raise_signal(signal.SIGINT)
        real(source, target)

    monkeypatch.setattr(atomic.os, "replace", replace)
    arguments = ["export", str(model_dir("cogvideox10-tiny")), str(tmp_path / "bundle"), "--force"]
    assert_interrupted(capsys, tmp_path, arguments)
    assert len(moves) == 3  # the third brought it back


def test_a_signal_in_the_demo_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    pytest.importorskip("torch", reason="the demo exports, which needs the extra 'export'")
    from dynamictrl_edge.export import exporter

    def interrupted(checkpoint: Path, *_: object, **__: object) -> None:
        assert (checkpoint / "model_index.json").exists()
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(exporter, "export_checkpoint", interrupted)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert_interrupted(capsys, tmp_path, ["demo", "--out", str(tmp_path / "new" / "folder" / "demo.mp4")])


# --- real processes, stopped from outside


class Stopped:
    """A command line in a process of its own that gets a signal some time after a sign of its work appears."""

    def __init__(
        self,
        arguments: list[str],
        sign: Callable[[], bool],
        delay: float,
        number: signal.Signals,
        times: int = 1,
        cache: Path | None = None,
    ) -> None:
        self._sign, self._delay, self._number, self._times = sign, delay, number, times
        self._due: float | None = None
        self._sent = 0
        environment = one_thread() if cache is None else {**one_thread(), "DYNAMICTRL_CACHE": str(cache)}
        self._process = subprocess.Popen(
            [*PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    def step(self) -> bool:
        """Sends the signal when it is time; whether that is done, or the process ended."""
        if self._process.poll() is not None:
            return True
        if self._due is None and self._sign():
            self._due = time.monotonic() + self._delay
        if self._due is None or time.monotonic() < self._due:
            return False
        self._process.send_signal(self._number)
        self._sent += 1
        return self._sent == self._times

    def end(self) -> tuple[int, str, str]:
        out, err = self._process.communicate(timeout=60)
        return self._process.returncode, out, err.strip()

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


@contextlib.contextmanager
def stopped(*processes: Stopped) -> Iterator[None]:
    """Waits until all have got their signal; none outlives the test."""
    try:
        end = time.monotonic() + 120
        waiting = list(processes)
        while waiting:
            assert time.monotonic() < end, "no sign of work"
            waiting = [process for process in waiting if not process.step()]
            time.sleep(0.02)
        yield
    finally:
        for process in processes:
            process.kill()


def _holds(folder: Path, pattern: str) -> Callable[[], bool]:
    return lambda: any(folder.glob(pattern))


def test_animations_that_are_stopped_from_outside(bundle10: Path, inputs: Inputs, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abcd"]
    for folder in folders:
        folder.mkdir()
        (folder / "old.mp4").write_bytes(b"an older clip")
    long = {"steps": 1000, "guidance": 3, "height": 64, "width": 64}
    ladder = [(0.0, signal.SIGINT, 1), (0.2, signal.SIGTERM, 1), (0.5, signal.SIGINT, 5), (1.0, signal.SIGHUP, 1)]
    processes = []
    for folder, (delay, number, times) in zip(folders, ladder, strict=True):
        target = folder / ("old.mp4" if number is signal.SIGINT else "frames")
        arguments = animate(bundle10, inputs, target, save_latents=folder / "latents.npy", **long)
        # A video's temporary file appears with its first frame; the prompt is kept before the denoising.
        cache = tmp_path / f"cache-{folder.name}"
        processes.append(Stopped(arguments, _holds(cache, "prompts/*.npy"), delay, number, times, cache))
    with stopped(*processes):
        for process, folder in zip(processes, folders, strict=True):
            assert process.end() == (130, "", SAID)
            assert listing(folder) == {"old.mp4": b"an older clip"}


def test_exports_that_are_stopped_from_outside(tmp_path: Path) -> None:
    """One while weights are written, one while graphs are traced."""
    pytest.importorskip("torch", reason="exporting needs the extra 'export'")
    signs = [(".bundle.*", 0.0, signal.SIGTERM), (".bundle.*/graphs/*.onnx", 0.3, signal.SIGINT)]
    folders = [tmp_path / name for name in "ab"]
    processes = []
    for folder, (sign, delay, number) in zip(folders, signs, strict=True):
        folder.mkdir()
        arguments = ["export", str(model_dir("cogvideox15-tiny")), str(folder / "bundle")]
        processes.append(Stopped(arguments, _holds(folder, sign), delay, number))
    with stopped(*processes):
        for process, folder in zip(processes, folders, strict=True):
            assert process.end() == (130, "", SAID)
            assert listing(folder) == {}


# --- applications that use the runtime


def request(**more: Any) -> dict[str, Any]:
    return {
        "image": noise(32, 48, 3),
        "pose": noise(5, 32, 48, 3),
        "prompt": PROMPT,
        "height": 32,
        "width": 48,
        "num_frames": 5,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        **more,
    }


def test_cancel_from_another_thread_ends_a_long_clip_soon_and_the_next_one_is_the_same(bundle10: Path) -> None:
    animator = Animator.from_bundle(bundle10, cache=False)
    wanted = animator(**request())
    timer = threading.Timer(0.3, animator.cancel)
    timer.start()
    start = time.monotonic()
    with pytest.raises(Interrupted, match="cancelled"):
        animator(**request(num_inference_steps=1000, guidance_scale=3.0))
    assert time.monotonic() - start < 5
    timer.join()
    again = animator(**request())
    np.testing.assert_array_equal(again.latents, wanted.latents)
    np.testing.assert_array_equal(again.frames, wanted.frames)


def test_a_cancelled_clip_ends_the_command_line_with_130(
    bundle10: Path, inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    animators: list[Animator] = []
    real = Animator.start

    def start(animator: Animator, **arguments: Any) -> Any:
        animators.append(animator)
        return real(animator, **arguments)

    def progress(bars: object, name: str, done: int, total: int) -> None:
        if (name, done) == ("denoise", 1):
            animators[0].cancel()

    monkeypatch.setattr(Animator, "start", start)
    monkeypatch.setattr(animate_verb.Bars, "__call__", progress)
    before = listing(out)
    assert run(animate(bundle10, inputs, out / "clip.mp4", save_latents=out / "latents.npy")) == 130
    assert "The clip was cancelled." in capsys.readouterr().err
    assert listing(out) == before


@pytest.mark.parametrize("failure", [ValueError("not today"), KeyboardInterrupt(), OSError(28, "full")])
def test_what_a_callback_raises_comes_out_and_no_output_is_left(
    failure: BaseException, bundle10: Path, out: Path
) -> None:
    animator = Animator.from_bundle(bundle10, cache=False)
    steps = []

    def callback(animator: Animator, step: int, timestep: int, tensors: dict[str, Any]) -> None:
        steps.append(step)
        if step == 1:
            raise failure

    before = listing(out)
    arguments = request(num_inference_steps=4, callback_on_step_end=callback)
    with pytest.raises(type(failure)) as raised:
        animator(**arguments)
    assert raised.value is failure
    for video, latents in ((out / "clip.mp4", None), (out / "frames", None)):
        with pytest.raises(type(failure)) as raised:
            animate_verb.make(animator, str(video), latents, Progress(None), **arguments)
        assert raised.value is failure
    assert steps == [0, 1] * 3
    assert listing(out) == before
    assert animator(**request()).frames.shape == (5, 32, 48, 3)


def test_a_stream_that_is_given_up_does_not_disturb_the_next_clip(bundle10: Path) -> None:
    animator = Animator.from_bundle(bundle10, cache=False)
    stream = animator.stream(**request(num_frames=17, pose=noise(17, 32, 48, 3)))
    assert next(stream).shape == (9, 32, 48, 3)
    wanted = animator(**request()).latents  # while the other is suspended
    del stream
    np.testing.assert_array_equal(animator(**request()).latents, wanted)
