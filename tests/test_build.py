"""Engine sets: whole or absent whatever happens, taken up again where a build stopped, left alone when complete."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from dynamictrl_edge.bundle.errors import BundleError, DeviceError, InputError
from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.bundle.tensors import sha256_of
from dynamictrl_edge.engines import build
from dynamictrl_edge.engines.build import Built, Watcher, build_set
from dynamictrl_edge.engines.engine_set import ENGINES_NAME, EngineEntry, EngineSet, engine_key, read_engine_set
from dynamictrl_edge.engines.report import read_report
from tests.cli_samples import PROGRAM
from tests.conftest import Export
from tests.engine_samples import SMALL, edit, needs_rtx, plan_for, some_graphs

pytestmark = needs_rtx


@pytest.fixture(scope="module")
def source(exported: Export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of three graphs. Do not write into it: copy it."""
    return some_graphs(exported("cogvideox15-tiny", "fp16"), tmp_path_factory.mktemp("small") / "bundle")


@pytest.fixture
def bundle(source: Path, tmp_path: Path) -> Path:
    return some_graphs(source, tmp_path / "bundle")


def built(bundle: Path, *targets: str, **options: object) -> Built:
    keywords = {name: options.pop(name) for name in ("workers", "force", "watcher", "keep_broken") if name in options}
    return build_set(Bundle(bundle), plan_for(bundle, *targets or ("rtx4090",), **options), **keywords)  # type: ignore[arg-type]


def assert_whole(folder: Path) -> EngineSet:
    engines = read_engine_set(folder)
    assert engines.key == folder.name
    for entry in engines.engines.values():
        assert (sha256_of(folder / entry.file), (folder / entry.file).stat().st_size) == (entry.sha256, entry.bytes)
        assert sha256_of(folder / entry.report) == entry.report_sha256
    wanted = {ENGINES_NAME, *(e.file for e in engines.engines.values()), *(e.report for e in engines.engines.values())}
    assert {path.name for path in folder.iterdir()} == wanted
    return engines


class Recorder(Watcher):
    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.steps: list[tuple[int, int]] = []

    def started(self, key: str, graphs: Sequence[str]) -> None:
        self.begun += graphs

    def progress(self, graph: str, phase: str, done: int, total: int) -> None:
        self.steps.append((done, total))

    def finished(self, graph: str, entry: EngineEntry) -> None:
        self.ended.append(graph)


def test_a_set_describes_what_was_built(bundle: Path) -> None:
    seen = Recorder()
    made = built(bundle, "rtx4090", "rtx5090", workers=2, watcher=seen)
    engines = assert_whole(made.folder)
    assert made.folder.parent == bundle / "engines"
    assert set(made.fresh) == set(SMALL) == set(engines.engines) == set(seen.begun) == set(seen.ended)
    assert engines.capabilities == ((8, 9), (12, 0))
    assert engines.targets == ("rtx4090", "rtx5090")
    assert engines.precision == "fp16"
    assert all(0 <= done <= total for done, total in seen.steps)
    block = engines.engines["block"]
    report = read_report(made.folder / block.report)
    assert (block.kernels, block.fused_attention) == (len(report.kernels), 1)
    assert block.activation_bytes == report.activation_bytes > 0
    assert block.profile["video"][2] == (2, engines.axes["block.N"].most, 128)
    assert 50e6 < block.peak_rss < 6e8
    assert block.seconds > 0


def test_the_memory_of_a_compiler_is_its_own(bundle: Path) -> None:
    """A process starts as a copy of its parent, whose memory must not count."""
    ballast = bytearray(700_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    made = built(bundle)
    del ballast
    assert all(entry.peak_rss < 6e8 for entry in made.engines.engines.values())


def test_a_complete_set_is_left_alone(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = built(bundle)
    before = {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    monkeypatch.setattr(build.subprocess, "Popen", lambda *a, **k: pytest.fail("a compiler was started"))
    second = built(bundle)
    assert (second.folder, second.fresh, second.engines) == (first.folder, (), first.engines)
    assert {path.name: path.stat().st_mtime_ns for path in second.folder.iterdir()} == before


def test_force_builds_it_again(bundle: Path) -> None:
    first = built(bundle)
    (first.folder / "block.engine").write_bytes(b"spoilt, but its size will differ too")
    made = built(bundle, force=True)
    assert set(made.fresh) == set(SMALL)
    assert_whole(made.folder)
    assert [path.name for path in (bundle / "engines").iterdir() if not path.name.startswith(".")] == [made.folder.name]


def test_cards_of_the_same_capability_share_a_set(bundle: Path) -> None:
    first = built(bundle, "rtx4090")
    second = built(bundle, "rtx4060")
    assert (second.folder, second.fresh) == (first.folder, ())
    assert assert_whole(second.folder).targets == ("rtx4060", "rtx4090")


def test_a_set_with_a_missing_or_shortened_engine_is_mended(bundle: Path) -> None:
    made = built(bundle)
    os.truncate(made.folder / "stem.engine", 100)
    (made.folder / "head.report.json").unlink()
    assert set(built(bundle).fresh) == set(SMALL)
    assert_whole(made.folder)


def test_a_stopped_build_goes_on_where_it_stopped(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Watcher):
        def finished(self, graph: str, entry: EngineEntry) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        built(bundle, watcher=Stop())
    assert not [path for path in (bundle / "engines").iterdir() if not path.name.startswith(".")]
    again = built(bundle)
    assert len(again.fresh) == len(SMALL) - 1
    assert_whole(again.folder)


def test_a_finished_engine_that_changed_meanwhile_is_built_again(bundle: Path) -> None:
    class Stop(Watcher):
        def finished(self, graph: str, entry: EngineEntry) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        built(bundle, watcher=Stop())
    (engine,) = (bundle / "engines").glob(".*.part/*.engine")
    data = bytearray(engine.read_bytes())
    data[len(data) // 2] ^= 1
    engine.write_bytes(data)
    assert set(built(bundle).fresh) == set(SMALL)


def test_the_key_follows_everything_that_engines_depend_on(source: Path, tmp_path: Path) -> None:
    manifest, plan = Bundle(source).manifest, plan_for(source, "rtx4090")

    def key(
        manifest=manifest, flavour="rtx", version="1.7", platform="any", caps=((8, 9),), options=plan.options
    ) -> str:
        return engine_key(manifest, SMALL, flavour, version, platform, caps, options)

    block = manifest.graphs["block"].file
    changed = msgspec.structs.replace(
        manifest, files={**manifest.files, block: msgspec.structs.replace(manifest.files[block], sha256="0" * 64)}
    )
    keys = [
        key(),
        key(manifest=changed),
        key(manifest=msgspec.structs.replace(manifest, precision="bf16")),
        key(flavour="tensorrt"),
        key(version="1.8"),
        key(platform="linux-aarch64"),
        key(caps=((8, 9), (12, 0))),
        key(options=msgspec.structs.replace(plan.options, steps=50)),
        key(options=msgspec.structs.replace(plan.options, tile=(3, 4))),
        key(options=msgspec.structs.replace(plan.options, workspace=10**9)),
    ]
    assert len(set(keys)) == len(keys)
    # The order of capabilities says nothing.
    assert key(caps=((12, 0), (8, 9))) == key(caps=((8, 9), (12, 0)))


def test_two_builders_of_one_set_do_not_meet(bundle: Path) -> None:
    class Second(Watcher):
        def started(self, key: str, graphs: Sequence[str]) -> None:
            with pytest.raises(DeviceError, match=r"Another process is building this engine set"):
                built(bundle)

    made = built(bundle, watcher=Second())
    assert_whole(made.folder)


def test_an_engine_that_breaks_a_rule_is_refused_with_the_reason(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"(?s)not as it must be.*activation.*--keep-broken"):
        built(bundle, activation_budget=1000)
    assert not [path for path in (bundle / "engines").iterdir() if not path.name.startswith(".")]
    made = built(bundle, activation_budget=1000, keep_broken=True)
    engines = assert_whole(made.folder)
    assert all("activation" in entry.broken[0] for entry in engines.engines.values())
    # What was kept once is not taken for good later.
    assert built(bundle, activation_budget=1000, keep_broken=True).fresh == ()
    assert set(built(bundle).fresh) == set(SMALL)


def test_a_compiler_that_crashes_is_a_message(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dies = tmp_path / "python"
    dies.write_text("#!/bin/sh\necho 'something native went wrong' >&2\nkill -SEGV $$\n")
    dies.chmod(0o755)
    monkeypatch.setattr(build.sys, "executable", str(dies))
    with pytest.raises(DeviceError, match=r"was killed by signal 11.*something native went wrong"):
        built(bundle)
    assert list((bundle / "engines").glob("[!.]*")) == []


@pytest.mark.parametrize(("data", "words"), [(b"", "holds nothing"), (b"just text", "holds nothing|cannot be read")])
def test_a_graph_that_holds_nothing(bundle: Path, data: bytes, words: str) -> None:
    """TensorRT's parser takes both for an empty network."""
    _replace_graph(bundle, data)
    with pytest.raises(BundleError, match=rf"'stem'.*({words})"):
        built(bundle)


def test_a_truncated_graph(bundle: Path) -> None:
    _replace_graph(bundle, (bundle / "graphs" / "stem.onnx").read_bytes()[:-200])
    with pytest.raises(BundleError, match=r"'stem'.*(cannot be read|holds nothing|different inputs)"):
        built(bundle)


def _replace_graph(bundle: Path, data: bytes) -> None:
    """Another graph in place of `stem`, listed with its right hash: as if the exporter had written it."""
    path = bundle / "graphs" / "stem.onnx"
    path.write_bytes(data)
    entry = {"sha256": sha256_of(path), "bytes": len(data)}
    edit(bundle, lambda manifest: manifest["files"].update({"graphs/stem.onnx": entry}))


def test_a_graph_that_changed_after_the_export_is_not_even_read(bundle: Path) -> None:
    with open(bundle / "graphs" / "stem.onnx", "ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleError, match=r"stem\.onnx.*was changed"):
        built(bundle)


def test_a_folder_that_cannot_be_written_to(bundle: Path) -> None:
    (bundle / "engines").write_text("a file where the folder should be")
    with pytest.raises(InputError, match="engines"):
        built(bundle)


BUILD = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.engines.build import build_set
from tests.engine_samples import plan_for
bundle = Path({bundle!r})
build_set(Bundle(bundle), plan_for(bundle, "rtx4090"), workers=2, force="force" in sys.argv)
"""


def test_killed_at_any_moment_a_set_is_absent_or_whole(bundle: Path) -> None:
    program = BUILD.format(root=str(Path(__file__).parents[1]), bundle=str(bundle))
    moments = random.Random(7)
    finished = 0
    for round_ in range(30):
        force = ["force"] if round_ % 3 == 0 else []
        process = subprocess.Popen([sys.executable, "-c", program, *force], stderr=subprocess.DEVNULL)
        try:
            finished += process.wait(moments.uniform(0.2, 2.5)) == 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        for folder in (bundle / "engines").glob("[!.]*"):
            read_engine_set(folder)
            assert_nearly_whole(folder)
    made = built(bundle)
    assert_whole(made.folder)
    assert finished < 30  # otherwise nothing was killed


def test_what_killed_compilers_left_is_no_part_of_the_set(bundle: Path) -> None:
    folder = built(bundle).folder
    part = folder.with_name(f".{folder.name}.part")
    folder.rename(part)
    for name in (".head.report.0a1b2c3d.part.json", "head.engine.tmp", "head.built.json.tmp"):
        (part / name).write_text("half")
    assert_whole(built(bundle).folder)
    assert not part.exists()


def assert_nearly_whole(folder: Path) -> None:
    """Like `assert_whole`, but records of a builder that was killed right after publishing may still lie there."""
    engines = read_engine_set(folder)
    for entry in engines.engines.values():
        assert sha256_of(folder / entry.file) == entry.sha256
        assert sha256_of(folder / entry.report) == entry.report_sha256


def test_compilers_end_with_a_builder_that_is_killed(bundle: Path) -> None:
    program = BUILD.format(root=str(Path(__file__).parents[1]), bundle=str(bundle))
    process = subprocess.Popen([sys.executable, "-c", program])
    limit = time.monotonic() + 30
    while not (workers := _workers_of(process.pid)) and time.monotonic() < limit:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert workers
    limit = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def _workers_of(parent: int) -> list[int]:
    if not Path("/proc").is_dir():
        pytest.skip("needs /proc")
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if f"PPid:\t{parent}\n" in status.read_text():
                found.append(int(status.parent.name))
        except OSError:
            continue
    return found


def test_ctrl_c_stops_compilers_and_leaves_no_set(bundle: Path) -> None:
    command = [*PROGRAM, "build", str(bundle), "--target", "rtx4090", "--tile", "64x48", "--workers", "2"]
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # test runners in the background have it ignored
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    limit = time.monotonic() + 30
    while not (workers := _workers_of(process.pid)) and time.monotonic() < limit:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "Interrupted" in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert list((bundle / "engines").glob("[!.]*")) == []
