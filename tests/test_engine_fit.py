"""Whether an engine set fits: every kind of mismatch by changing one thing of a pair that fits, and what the refusals say."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamictrl_edge.bundle.errors import BundleError, UsageError
from dynamictrl_edge.bundle.manifest import GraphSpec, Manifest, Port
from dynamictrl_edge.engines import fit as subject
from dynamictrl_edge.engines.engine_set import (
    ENGINES_FOLDER,
    ENGINES_NAME,
    SET_FORMAT,
    SET_VERSION,
    BuildOptions,
    ClipSize,
    EngineEntry,
    EngineSet,
    Extent,
    engine_key,
    graph_digest,
    write_engine_set,
)
from dynamictrl_edge.engines.fit import Fit, Mismatch, Request, check_fit, find_fitting, same_version
from dynamictrl_edge.engines.machine import Gpu, Machine
from dynamictrl_edge.engines.mend import build_command
from dynamictrl_edge.engines.profiles import axes_of, buildable_graphs, parse_size, profile_of
from tests.bundle_samples import entry_of, small_manifest

RTX, TENSORRT = "1.7.1.116", "10.13.3.9"
SHORT = ClipSize(height=96, width=160, frames=9)  # 3 x 6 x 10 = 180 tokens; the sample bundle's default
LONG = ClipSize(height=32, width=32, frames=33)  # 9 x 2 x 2 = 36 tokens
OPTIONS = BuildOptions(sizes=(SHORT, LONG), tile=(8, 10), steps=50)
MACHINE = Machine(
    gpu=Gpu("NVIDIA GeForce RTX 4090", (8, 9), "580.65.06", 24564 << 20),
    flavours={"rtx": RTX, "tensorrt": TENSORRT},
    platform="linux-x86_64",
    cuda={"tensorrt-rtx": 13, "tensorrt": 13},
)
GRAPHS = {
    "stem": (("latents", (1, "F", 16, "H", "W")), ("image_tokens", (1, "N", 128))),
    "block": (
        ("video", ("B", "N", 128)),
        ("text", ("B", "L", 128)),
        ("rope_cos", ("S", 32)),
        ("qkv_weight", (128, 384)),
    ),
    "head": (("video", ("B", "N", 128)), ("latents", (1, "F", 16, "H", "W"))),
    "block_cpu": (("video", ("B", "N", 128)),),
    "modulation": (("time_sinusoid", ("T", 128)),),
    "vae_decoder_next": (("state_in.a", (1, 16, 2, "2*latent_height", "2*latent_width")),),
}


def bundle_manifest() -> Manifest:
    files = {f"graphs/{name}.onnx": entry_of(name.encode()) for name in GRAPHS}
    files["weights/vae.safetensors"] = entry_of(b"weights")
    graphs = {
        name: GraphSpec(
            file=f"graphs/{name}.onnx",
            inputs=tuple(Port(port, "float16", shape) for port, shape in ports),
            outputs=(),
            weights="weights/vae.safetensors" if name.startswith("vae_") else None,
        )
        for name, ports in GRAPHS.items()
    }
    return msgspec.structs.replace(small_manifest(files), precision="fp16", graphs=graphs)


@dataclass(frozen=True)
class Pair:
    """A set and what it is held against."""

    engines: EngineSet
    folder: Path
    manifest: Manifest
    machine: Machine
    request: Request

    @property
    def gpu(self) -> Gpu:
        assert self.machine.gpu is not None
        return self.machine.gpu

    def fit(self) -> Fit:
        return check_fit(self.engines, self.folder, self.manifest, self.machine, self.request)

    # Copies with one thing changed.
    def of_set(self, **changes: Any) -> Pair:
        return replace(self, engines=msgspec.structs.replace(self.engines, **changes))

    def of_entry(self, graph: str, **changes: Any) -> Pair:
        entries = self.engines.engines
        return self.of_set(engines={**entries, graph: msgspec.structs.replace(entries[graph], **changes)})

    def of_machine(self, **changes: Any) -> Pair:
        return replace(self, machine=replace(self.machine, **changes))

    def of_gpu(self, **changes: Any) -> Pair:
        return self.of_machine(gpu=replace(self.gpu, **changes))

    def of_request(self, **changes: Any) -> Pair:
        return replace(self, request=replace(self.request, **changes))

    def of_manifest(self, **changes: Any) -> Pair:
        return replace(self, manifest=msgspec.structs.replace(self.manifest, **changes))

    def sized(self, height: int, width: int, frames: int) -> Pair:
        return self.of_request(size=ClipSize(height=height, width=width, frames=frames))


def made(
    root: Path,
    options: BuildOptions = OPTIONS,
    *,
    manifest: Manifest | None = None,
    least: Mapping[str, int] | None = None,
    **changes: Any,
) -> Pair:
    """A set under the bundle folder `root`, as the builder makes it but with engines of a few bytes, that fits."""
    manifest = manifest or bundle_manifest()
    graphs = buildable_graphs(manifest)
    facts: dict[str, Any] = {
        "flavour": "rtx",
        "library_version": RTX,
        "platform": "any" if changes.get("flavour", "rtx") == "rtx" else "linux-x86_64",
        "capabilities": ((8, 6), (8, 9)),
        **changes,
    }
    axes = axes_of(manifest, options)
    for name, value in (least or {}).items():
        axes[name] = Extent(value, max(value, axes[name].best), max(value, axes[name].most))
    key = engine_key(manifest, graphs, options=options, **facts)
    folder = root / ENGINES_FOLDER / key
    folder.mkdir(parents=True)
    entries = {}
    for graph in graphs:
        engine, report = f"engine of {graph}".encode(), f"report of {graph}".encode()
        (folder / f"{graph}.engine").write_bytes(engine)
        (folder / f"{graph}.report.json").write_bytes(report)
        entries[graph] = EngineEntry(
            file=f"{graph}.engine",
            sha256=hashlib.sha256(engine).hexdigest(),
            bytes=len(engine),
            report=f"{graph}.report.json",
            report_sha256=hashlib.sha256(report).hexdigest(),
            graph_digest=graph_digest(manifest, graph),
            profile=profile_of(graph, manifest.graphs[graph], axes),
            activation_bytes=2_000_000_000 if graph == "block" else 1_000,
            weights_bytes=500_000_000 if graph == "block" else 0,
            kernels=1,
            fused_attention=0,
            seconds=0.1,
            peak_rss=1,
        )
    engines = EngineSet(
        format=SET_FORMAT,
        version=SET_VERSION,
        key=key,
        precision=manifest.precision,
        targets=("rtx30", "rtx4090"),
        options=options,
        axes=axes,
        engines=entries,
        provenance={},
        **facts,
    )
    write_engine_set(folder, engines)
    return Pair(engines, folder, manifest, MACHINE, Request(size=SHORT))


@pytest.fixture(scope="module")
def fitting(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Do not write into its folder."""
    return made(tmp_path_factory.mktemp("fitting") / "bundle")


@pytest.fixture(scope="module")
def compatible(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A version-compatible set of TensorRT. Do not write into its folder."""
    return compatible_in(tmp_path_factory.mktemp("compatible"))


def compatible_in(folder: Path) -> Pair:
    options = msgspec.structs.replace(OPTIONS, version_compatible=True)
    return made(folder / "bundle", options, flavour="tensorrt", library_version=TENSORRT)


def test_a_pair_that_fits(fitting: Pair) -> None:
    fit = fitting.fit()
    ok, reason = fit
    assert (ok, reason, fit.mismatch) == (True, "", None)
    assert fit and fit == (True, "")
    assert fitting.of_request(verify=True, backend="rtx", steps=50, tile=(8, 10)).fit()
    assert fitting.of_request(size=LONG).fit()


# --- every kind ---

Change = Callable[[Pair, Path], Pair]


@dataclass(frozen=True)
class Case:
    """A change to a fitting pair that makes it fail in one way. `values`: what the reason must name; `mend`: how it ends."""

    kind: Mismatch
    change: Change
    values: tuple[str, ...]
    mend: str


def in_files(change: Callable[[Path], None], verify: bool = False) -> Change:
    """A change to the files of a set of its own."""

    def apply(_: Pair, tmp: Path) -> Pair:
        pair = made(tmp / "bundle")
        change(pair.folder)
        return pair.of_request(verify=verify)

    return apply


def of_tensorrt(change: Callable[[Pair], Pair], **options: Any) -> Change:
    def apply(_: Pair, tmp: Path) -> Pair:
        built = msgspec.structs.replace(OPTIONS, **options)
        return change(made(tmp / "bundle", built, flavour="tensorrt", library_version=TENSORRT))

    return apply


def without(names: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in names.items() if key != name}


def other_graph(pair: Pair, _: Path) -> Pair:
    files = {**pair.manifest.files, "graphs/block.onnx": entry_of(b"another block")}
    return pair.of_manifest(files=files)


def longer_text(pair: Pair, _: Path) -> Pair:
    return pair.of_manifest(transformer=msgspec.structs.replace(pair.manifest.transformer, max_text_seq_length=32))


GPU = "NVIDIA GeForce RTX 4090"
HERE, DAMAGED = "--target rtx4090", "--target rtx30 --target rtx4090 .*--force"
CASES = [
    Case(Mismatch.FORMAT, lambda p, _: p.of_set(version=7), ("version 7", "version 1"), "dynamictrl build"),
    Case(Mismatch.EMPTY, lambda p, _: p.of_set(engines={}), ("no engines", "5 graphs"), "dynamictrl build"),
    Case(
        Mismatch.BACKEND,
        lambda p, _: p.of_request(backend="tensorrt"),
        ("for TensorRT-RTX", "TensorRT was asked"),
        f"dynamictrl build .* {HERE} --backend tensorrt",
    ),
    Case(
        Mismatch.NO_GPU,
        lambda p, _: p.of_machine(gpu=None, no_gpu="no nvidia-smi, so no NVIDIA driver"),
        ("SM86, SM89", "no nvidia-smi"),
        "dynamictrl animate --backend onnxruntime",
    ),
    Case(
        Mismatch.GPU_TOO_OLD,
        lambda p, _: p.of_gpu(name="NVIDIA GeForce GTX 1080", capability=(6, 1)),
        ("GTX 1080 is SM61", "SM75"),
        "dynamictrl animate --backend onnxruntime",
    ),
    Case(
        Mismatch.GPU_PRECISION,
        lambda p, _: p.of_manifest(precision="bf16").of_gpu(name="Tesla T4", capability=(7, 5)),
        ("bf16", "Tesla T4 is SM75", "has fp16"),
        "dynamictrl export CHECKPOINT BUNDLE --precision fp16",
    ),
    Case(
        Mismatch.PLATFORM,
        of_tensorrt(lambda p: p.of_machine(platform="windows-amd64")),
        ("linux-x86_64", "windows-amd64"),
        f"dynamictrl build .* {HERE}",
    ),
    Case(
        Mismatch.CAPABILITY,
        lambda p, _: p.of_gpu(name="NVIDIA GeForce RTX 5090", capability=(12, 0), memory_bytes=32607 << 20),
        ("SM86, SM89", "RTX 5090 is SM120"),
        "dynamictrl build .* --target rtx5090",
    ),
    Case(
        Mismatch.NOT_INSTALLED,
        lambda p, _: p.of_machine(flavours={"tensorrt": TENSORRT}),
        (f"TensorRT-RTX {RTX}", "not installed", f"TensorRT {TENSORRT} is"),
        f"pip install tensorrt-rtx=={RTX}$",
    ),
    Case(
        Mismatch.LEAN_ONLY,
        of_tensorrt(lambda p: p.of_machine(flavours={}, lean="11.4.0")),
        (f"TensorRT {TENSORRT}", "lean runtime 11.4.0", "version-compatible"),
        f"pip install tensorrt=={TENSORRT}, .* dynamictrl build .* --version-compatible",
    ),
    Case(
        Mismatch.VERSION,
        lambda p, _: p.of_machine(flavours={"rtx": "1.8.0.2"}),
        (RTX, "1.8.0.2"),
        f"dynamictrl build .* {HERE}.* pip install tensorrt-rtx=={RTX}$",
    ),
    Case(
        Mismatch.VERSION_MAJOR,
        of_tensorrt(lambda p: p.of_machine(flavours={"tensorrt": "11.4.0.106"}), version_compatible=True),
        (TENSORRT, "11.4.0.106", "major"),
        f"dynamictrl build .* --backend tensorrt .*--version-compatible, .* pip install tensorrt=={TENSORRT}$",
    ),
    Case(
        Mismatch.VERSION_OLDER,
        of_tensorrt(lambda p: p.of_machine(flavours={}, lean="10.3.0"), version_compatible=True),
        (TENSORRT, "10.3.0", "older"),
        f"pip install tensorrt-lean=={TENSORRT}$",
    ),
    Case(
        Mismatch.DRIVER,
        lambda p, _: p.of_gpu(driver="575.57.08"),
        ("CUDA 13", "driver 580", "575.57.08"),
        "Update the driver: https://www.nvidia.com/drivers",
    ),
    Case(
        Mismatch.PRECISION,
        lambda p, _: p.of_manifest(precision="bf16"),
        ("fp16", "bf16"),
        "dynamictrl build .* --target rtx30 --target rtx4090",
    ),
    Case(
        Mismatch.GRAPH_MISSING,
        lambda p, _: p.of_set(engines=without(p.engines.engines, "modulation")),
        ("'modulation'", "stem, block, head, vae_decoder_next"),
        "dynamictrl build",
    ),
    Case(
        Mismatch.GRAPH_UNKNOWN,
        lambda p, _: p.of_manifest(graphs=without(p.manifest.graphs, "modulation")),
        ("'modulation'", "stem, block, head, vae_decoder_next"),
        "dynamictrl build",
    ),
    Case(
        Mismatch.GRAPH_CHANGED,
        other_graph,
        (
            "'block'",
            hashlib.sha256(b"graphs/block.onnx:" + entry_of(b"block").sha256.encode() + b"\n").hexdigest()[:12],
        ),
        "dynamictrl build",
    ),
    Case(Mismatch.KEY, lambda p, _: p.of_set(capabilities=((8, 9),)), ("sm86-sm89", "-sm89-fp16"), DAMAGED),
    Case(
        Mismatch.AXES,
        lambda p, _: p.of_set(axes={**p.engines.axes, "block.N": Extent(1, 180, 9000)}),
        ("9000", "180", "'block'", "'video'"),
        DAMAGED,
    ),
    Case(
        Mismatch.FILE_OUTSIDE,
        lambda p, _: p.of_entry("block", file="../../block.engine"),
        ("'../../block.engine'", "outside"),
        DAMAGED,
    ),
    Case(
        Mismatch.ENGINE_MISSING,
        in_files(lambda folder: (folder / "block.engine").unlink()),
        ("'block'", "not there", "15 bytes"),
        DAMAGED,
    ),
    Case(
        Mismatch.ENGINE_SIZE,
        in_files(lambda folder: truncate(folder / "block.engine", 3)),
        ("'block'", "3 bytes", "with 15"),
        DAMAGED,
    ),
    Case(
        Mismatch.REPORT_MISSING,
        in_files(lambda folder: (folder / "stem.report.json").unlink()),
        ("stem.report.json", hashlib.sha256(b"report of stem").hexdigest()[:12]),
        DAMAGED,
    ),
    Case(
        Mismatch.HEIGHT,
        lambda p, _: p.sized(112, 160, 9),
        ("96 pixels", "112"),
        f"--height 96 or less, .* dynamictrl build .* {HERE} --size 160x112x9",
    ),
    Case(
        Mismatch.WIDTH,
        lambda p, _: p.sized(96, 176, 9),
        ("160 pixels", "176"),
        f"--width 160 or less, .* dynamictrl build .* {HERE} --size 176x96x9",
    ),
    Case(
        Mismatch.FRAMES,
        lambda p, _: p.sized(96, 160, 37),
        ("33 frames", "37"),
        f"--frames 33 or less, .* dynamictrl build .* {HERE} --size 160x96x37",
    ),
    Case(
        Mismatch.TOKENS,
        lambda p, _: p.sized(96, 160, 33),
        ("180 video tokens", "540"),
        f"smaller --height, --width or --frames, .* dynamictrl build .* {HERE} --size 160x96x33",
    ),
    Case(Mismatch.TEXT, longer_text, ("16 tokens", "32"), "dynamictrl build"),
    Case(
        Mismatch.BATCH, lambda p, _: p.of_request(batch=3), ("2 guidance halves", "3"), f"build .* {HERE} .*--batch 3"
    ),
    Case(
        Mismatch.STEPS,
        lambda p, _: p.of_request(steps=60),
        ("50 steps", "60"),
        f"--steps 50 or less, .* dynamictrl build .* {HERE} .*--steps 60",
    ),
    Case(
        Mismatch.TILE,
        lambda p, _: p.of_request(tile=(9, 10)),
        ("64 pixels", "72"),
        f"dynamictrl build .* {HERE} .*--tile 80x72",
    ),
    Case(
        Mismatch.TOO_SMALL,
        lambda p, tmp: made(tmp / "bundle", least={"stem.H": 6}).sized(32, 160, 9),
        ("48 pixels", "32"),
        f"dynamictrl build .* {HERE} --size 160x32x9",
    ),
    Case(
        Mismatch.MEMORY,
        lambda p, _: p.of_gpu(memory_bytes=2_400_000_000),
        ("2.50 GB", "2.40 GB", "'block'", GPU),
        "dynamictrl build .* --size WxHxF --tile WxH",
    ),
    Case(
        Mismatch.ENGINE_CHANGED,
        in_files(lambda folder: truncate(folder / "block.engine", 15, b"X"), verify=True),
        (hashlib.sha256(b"engine of block").hexdigest()[:12], hashlib.sha256(b"X" * 15).hexdigest()[:12]),
        DAMAGED,
    ),
    Case(
        Mismatch.REPORT_CHANGED,
        in_files(lambda folder: truncate(folder / "block.report.json", 2, b"X"), verify=True),
        (hashlib.sha256(b"report of block").hexdigest()[:12], hashlib.sha256(b"XX").hexdigest()[:12]),
        DAMAGED,
    ),
]
APART = {Mismatch.UNREADABLE, Mismatch.FILE_UNREADABLE}  # tested below: they need more than a changed pair


def truncate(path: Path, length: int, content: bytes = b"") -> None:
    path.write_bytes(content * length or path.read_bytes()[:length])


def test_every_kind_has_its_case() -> None:
    kinds = [case.kind for case in CASES]
    assert len(kinds) == len(set(kinds)) >= 24
    assert set(kinds) | APART == set(Mismatch) and not set(kinds) & APART
    assert len({kind.value for kind in Mismatch}) == len(Mismatch)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind.value)
def test_a_mismatch_is_refused_with_both_values_and_the_command_that_mends_it(
    case: Case, fitting: Pair, tmp_path: Path
) -> None:
    changed = case.change(fitting, tmp_path)
    fit = changed.fit()
    ok, reason = fit
    assert (ok, bool(fit), fit.mismatch) == (False, False, case.kind), reason
    for value in case.values:
        assert value in reason
    assert re.search(case.mend, reason), reason
    assert "\n" not in reason
    if "dynamictrl build" in reason:
        assert f"dynamictrl build {changed.folder.parent.parent} " in reason  # can be copied as it stands


def test_a_later_kind_is_nearer() -> None:
    """`find_fitting` names the nearest set's reason; that a set is for another GPU matters more than the clip's size."""
    order = list(Mismatch)
    for earlier, later in zip(
        (Mismatch.UNREADABLE, Mismatch.NO_GPU, Mismatch.CAPABILITY, Mismatch.VERSION, Mismatch.KEY, Mismatch.HEIGHT),
        (
            Mismatch.BACKEND,
            Mismatch.CAPABILITY,
            Mismatch.VERSION,
            Mismatch.GRAPH_CHANGED,
            Mismatch.HEIGHT,
            Mismatch.MEMORY,
        ),
        strict=True,
    ):
        assert order.index(earlier) < order.index(later)


# --- the machine's side in detail ---


@pytest.mark.parametrize("driver", ["580.65.06", "600.1", None])
def test_a_driver_that_is_new_enough_or_unknown_is_no_reason(driver: str | None, fitting: Pair) -> None:
    assert fitting.of_gpu(driver=driver).fit()


@given(cuda=st.sampled_from([11, 12, 13, 14]), driver=st.integers(400, 700), windows=st.booleans())
def test_drivers_are_held_against_the_cuda_of_the_library(cuda: int, driver: int, windows: bool, fitting: Pair) -> None:
    platform = "windows-amd64" if windows else "linux-x86_64"
    pair = fitting.of_machine(cuda={"tensorrt-rtx": cuda, "tensorrt": 99}, platform=platform)
    pair = pair.of_gpu(driver=f"{driver}.99")
    needed = {11: (450, 452), 12: (525, 528), 13: (580, 580), 14: (0, 0)}[cuda][windows]
    assert pair.fit().ok == (driver >= needed)


def rekeyed(pair: Pair) -> Pair:
    """As its builder would name it."""
    engines = pair.engines
    key = engine_key(
        pair.manifest,
        tuple(engines.engines),
        engines.flavour,
        engines.library_version,
        engines.platform,
        engines.capabilities,
        engines.options,
    )
    return pair.of_set(key=key)


@pytest.mark.parametrize("platform", ["linux-x86_64", "linux-aarch64", "windows-amd64"])
def test_engines_of_tensorrt_rtx_run_on_any_system(platform: str, fitting: Pair) -> None:
    assert fitting.of_machine(platform=platform).fit()


def test_jetsons_drivers_have_numbers_of_their_own(tmp_path: Path) -> None:
    pair = made(
        tmp_path / "bundle",
        flavour="tensorrt",
        library_version="10.3.0",
        platform="linux-aarch64",
        capabilities=((8, 7),),
    )
    orin = Gpu("NVIDIA Jetson AGX Orin Developer Kit", (8, 7), "540.4.0", 64 << 30, unified=True)
    machine = Machine(orin, {"tensorrt": "10.3.0"}, platform="linux-aarch64", cuda={"tensorrt": 13})
    assert replace(pair, machine=machine).fit()
    absent = replace(pair, machine=replace(machine, flavours={})).fit()
    assert absent.mismatch is Mismatch.NOT_INSTALLED and "apt install python3-libnvinfer" in absent.reason


@given(
    capabilities=st.sets(st.sampled_from([(7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1)]), min_size=1),
    here=st.sampled_from([(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (12, 0), (12, 1)]),
)
def test_engines_run_on_the_capabilities_they_were_built_for(
    capabilities: set[tuple[int, int]], here: tuple[int, int], fitting: Pair
) -> None:
    pair = rekeyed(fitting.of_set(capabilities=tuple(sorted(capabilities)))).of_gpu(capability=here)
    assert pair.fit().ok == (here in capabilities)


def test_float32_products_on_sm75_are_tensorrts_only(tmp_path: Path) -> None:
    manifest = msgspec.structs.replace(bundle_manifest(), precision="fp32")
    for flavour, fits in (("tensorrt", True), ("rtx", False)):
        pair = made(tmp_path / flavour, manifest=manifest, flavour=flavour, capabilities=((7, 5),))
        here = pair.of_gpu(capability=(7, 5)).of_machine(flavours={flavour: RTX})
        assert here.fit().ok == fits


def test_a_set_for_rtx_on_a_gpu_that_rtx_does_not_know_is_built_again_for_what_it_knows(fitting: Pair) -> None:
    reason = fitting.of_gpu(name="NVIDIA H200", capability=(9, 0), memory_bytes=143771 << 20).fit().reason
    assert "--target h200" in reason and "--backend" not in reason


VERSIONS = st.tuples(st.integers(9, 12), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


@given(built=VERSIONS, here=VERSIONS, lean=st.booleans())
def test_version_compatible_engines_run_with_later_versions_of_the_same_major(
    built: tuple[int, ...], here: tuple[int, ...], lean: bool, compatible: Pair
) -> None:
    pair = rekeyed(compatible.of_set(library_version=dotted(built)))
    installed: dict[str, Any] = {"lean": dotted(here)} if lean else {"flavours": {"tensorrt": dotted(here)}}
    fit = replace(pair, machine=Machine(pair.gpu, platform="linux-x86_64", **installed)).fit()
    assert fit.ok == (here[0] == built[0] and here >= built)
    if not fit:
        assert dotted(built) in fit.reason and dotted(here) in fit.reason


@given(built=VERSIONS, here=VERSIONS)
def test_other_engines_run_with_the_version_that_built_them(
    built: tuple[int, ...], here: tuple[int, ...], fitting: Pair
) -> None:
    pair = rekeyed(fitting.of_set(library_version=dotted(built))).of_machine(flavours={"rtx": dotted(here)})
    assert pair.fit().ok == (built == here)


def test_the_lean_runtime_serves_where_the_whole_library_does_not(compatible: Pair) -> None:
    both = compatible.of_machine(flavours={"tensorrt": "10.3.0"}, lean="10.16.1.11", cuda={"tensorrt-lean": 13})
    assert both.fit()
    old = both.of_gpu(driver="575.1").fit()
    assert old.mismatch is Mismatch.DRIVER and "tensorrt-lean" in old.reason


def test_the_lean_runtime_does_not_serve_what_is_not_version_compatible(tmp_path: Path) -> None:
    pair = made(tmp_path / "bundle", flavour="tensorrt", library_version=TENSORRT)
    assert pair.of_machine(flavours={"tensorrt": "10.3.0"}, lean=TENSORRT).fit().mismatch is Mismatch.VERSION


def test_engines_of_tensorrt_rtx_are_never_version_compatible(tmp_path: Path) -> None:
    pair = made(tmp_path / "bundle", msgspec.structs.replace(OPTIONS, version_compatible=True))
    assert pair.of_machine(flavours={"rtx": "1.8.0.2"}).fit().mismatch is Mismatch.VERSION
    assert pair.of_machine(flavours={}, lean=RTX).fit().mismatch is Mismatch.NOT_INSTALLED


@given(VERSIONS, st.integers(1, 4), VERSIONS)
def test_a_version_without_its_build_number_is_the_same_release(
    one: tuple[int, ...], known: int, other: tuple[int, ...]
) -> None:
    assert same_version(dotted(one), dotted(one[:known])) == (known >= 3)
    assert same_version(dotted(one), dotted(other)) == (one == other) == same_version(dotted(other), dotted(one))


# --- the clip's side in detail ---


@given(
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=3),
    asked=st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 6)),
)
def test_a_clip_fits_within_every_side_and_the_tokens_of_one_size(
    sizes: list[tuple[int, int, int]], asked: tuple[int, int, int], fitting: Pair
) -> None:
    """Sizes in tokens; a set takes what is within the largest height, width and length, and has no more tokens than one of
    the sizes that it was built for."""
    options = msgspec.structs.replace(OPTIONS, sizes=tuple(clip(*size) for size in sizes))
    axes = axes_of(fitting.manifest, options)
    entries = {
        graph: msgspec.structs.replace(entry, profile=profile_of(graph, fitting.manifest.graphs[graph], axes))
        for graph, entry in fitting.engines.engines.items()
    }
    pair = rekeyed(fitting.of_set(options=options, axes=axes, engines=entries)).of_request(size=clip(*asked))
    within = all(want <= max(side) for want, side in zip(asked, zip(*sizes, strict=True), strict=True))
    tokens = max(a * b * c for a, b, c in sizes)
    assert pair.fit().ok == (within and asked[0] * asked[1] * asked[2] <= tokens)


def clip(rows: int, columns: int, frames: int) -> ClipSize:
    return ClipSize(height=16 * rows, width=16 * columns, frames=4 * (frames - 1) + 1)


def test_a_frame_smaller_than_the_tile_is_one_tile(fitting: Pair) -> None:
    assert fitting.sized(64, 80, 9).of_request(tile=(100, 100)).fit()
    assert fitting.sized(64, 96, 9).of_request(tile=(100, 100)).fit().mismatch is Mismatch.TILE


def test_a_clip_that_the_model_cannot_make_is_a_wrong_use(fitting: Pair) -> None:
    with pytest.raises(UsageError, match="--height 100"):
        fitting.sized(100, 160, 9).fit()


def test_the_memory_of_a_gpu_may_be_unknown_or_just_enough(fitting: Pair) -> None:
    assert fitting.of_gpu(memory_bytes=None).fit()
    assert fitting.of_gpu(memory_bytes=2_500_000_000).fit()


# --- files ---


@pytest.mark.parametrize("name", ["/etc/passwd", "..", ".", "a/../../b", "a\\b", ""])
def test_names_that_leave_the_folder_are_refused(name: str, fitting: Pair) -> None:
    for field in ("file", "report"):
        assert fitting.of_entry("stem", **{field: name}).fit().mismatch is Mismatch.FILE_OUTSIDE


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    pair = made(tmp_path / "bundle")
    engine = pair.folder / "block.engine"
    shutil.move(engine, tmp_path / "elsewhere")
    engine.symlink_to(tmp_path / "elsewhere")
    assert pair.fit().mismatch is Mismatch.FILE_OUTSIDE


def test_a_folder_is_no_engine(tmp_path: Path) -> None:
    pair = made(tmp_path / "bundle")
    (pair.folder / "block.engine").unlink()
    (pair.folder / "block.engine").mkdir()
    assert pair.fit().mismatch is Mismatch.ENGINE_MISSING


def test_contents_are_hashed_only_when_asked_for(tmp_path: Path) -> None:
    pair = made(tmp_path / "bundle")
    truncate(pair.folder / "stem.engine", len("engine of stem"), b"?")
    assert pair.fit()
    assert pair.of_request(verify=True).fit().mismatch is Mismatch.ENGINE_CHANGED


def test_a_file_that_cannot_be_read_is_told(fitting: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(subject, "sha256_of", fail)
    fit = fitting.of_request(verify=True).fit()
    assert fit.mismatch is Mismatch.FILE_UNREADABLE
    assert "Input/output error" in fit.reason and "--force" in fit.reason
    assert hashlib.sha256(b"engine of stem").hexdigest()[:12] in fit.reason


def test_a_set_that_lacks_an_axis_is_refused(fitting: Pair) -> None:
    fit = fitting.of_set(axes=without(fitting.engines.axes, "block.S")).fit()
    assert fit.mismatch is Mismatch.AXES and "'S'" in fit.reason


# --- finding one ---


def find(pair: Pair, **changes: Any) -> tuple[Path, EngineSet]:
    changed = replace(pair, **changes)
    return find_fitting(changed.folder.parent.parent, changed.manifest, changed.machine, changed.request)


def test_the_set_that_fits_is_found_among_others(tmp_path: Path) -> None:
    pair = made(tmp_path / "bundle")
    made(tmp_path / "bundle", capabilities=((12, 0),))
    made(tmp_path / "bundle", library_version="1.6.0.1")
    (tmp_path / "bundle/engines/notes.txt").write_text("no folder")
    assert find(pair) == (pair.folder, pair.engines)


def test_the_set_made_for_the_clip_is_preferred(tmp_path: Path) -> None:
    first = made(tmp_path / "bundle")
    second = made(tmp_path / "bundle", msgspec.structs.replace(OPTIONS, sizes=(LONG, SHORT)))
    for size, wanted in ((SHORT, first), (LONG, second)):
        assert find(first.of_request(size=size))[0] == wanted.folder


def test_a_set_that_needs_no_lean_runtime_is_preferred(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"flavour": "tensorrt", "library_version": TENSORRT}
    plain = made(tmp_path / "bundle", msgspec.structs.replace(OPTIONS, sizes=(LONG, SHORT)), **facts)
    made(tmp_path / "bundle", msgspec.structs.replace(OPTIONS, version_compatible=True), **facts)
    pair = plain.of_machine(flavours={"tensorrt": TENSORRT}, cuda={"tensorrt": 13})
    assert find(pair.of_request(size=SHORT))[0] == plain.folder


def test_without_engines_the_command_that_builds_them_is_told(tmp_path: Path) -> None:
    pair = made(tmp_path / "bundle")
    shutil.move(pair.folder, pair.folder.with_name(f".{pair.folder.name}.part"))  # a build that is not done
    with pytest.raises(BundleError, match=f"has no engines. .*dynamictrl build {tmp_path}/bundle {HERE}$") as caught:
        find(pair)
    assert caught.value.exit_code == 4
    shutil.rmtree(tmp_path / "bundle/engines")
    with pytest.raises(BundleError, match=f"has no engines. .* {HERE} --backend tensorrt --size 32x32x33$"):
        find(pair.of_request(size=LONG, backend="tensorrt"))
    with pytest.raises(BundleError, match=r"no engines, and .* no NVIDIA GPU .*hidden.* --backend onnxruntime$"):
        find(pair.of_machine(gpu=None, no_gpu="hidden"))


def test_the_reason_of_the_nearest_set_is_told(tmp_path: Path) -> None:
    pair = made(tmp_path / "bundle").sized(96, 160, 37)
    with pytest.raises(BundleError, match=f"The engine set '{pair.engines.key}' does not fit. The engines take clips"):
        find(pair)
    made(tmp_path / "bundle", capabilities=((12, 0),))
    made(tmp_path / "bundle", library_version="1.6.0.1")
    with pytest.raises(BundleError, match=f"None of 3 .* '{pair.engines.key}'. The engines take clips of at most 33"):
        find(pair)


def test_a_damaged_set_is_unreadable(tmp_path: Path) -> None:
    pair = made(tmp_path / "bundle")
    (pair.folder / ENGINES_NAME).write_text('{"format": "dynamic')
    with pytest.raises(BundleError, match=f"is damaged .*dynamictrl build {tmp_path}/bundle {HERE} --force$"):
        find(pair)
    (pair.folder / ENGINES_NAME).unlink()
    with pytest.raises(BundleError, match=f"no {ENGINES_NAME}.*--force$"):
        find(pair)


def edit(pair: Pair, **changes: Any) -> None:
    path = pair.folder / ENGINES_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_set_of_a_newer_program_is_unreadable(tmp_path: Path) -> None:
    pair = made(tmp_path / "bundle")
    edit(pair, version=2, news="unknown")
    with pytest.raises(BundleError, match=r"version 2; this program reads version 1.*dynamictrl build"):
        find(pair)


def test_an_edited_description_does_not_pass_for_another_machines(tmp_path: Path) -> None:
    pair = made(tmp_path / "bundle", capabilities=((12, 0),), library_version="1.6.0.1")
    edit(pair, capabilities=[[8, 9]], library_version=RTX)
    with pytest.raises(BundleError, match=r"engines\.json was edited"):
        find(pair)


def test_an_impossible_clip_is_told_before_missing_engines(tmp_path: Path) -> None:
    pair = made(tmp_path / "bundle")
    shutil.rmtree(tmp_path / "bundle/engines")
    with pytest.raises(UsageError, match="--frames 10"):
        find(pair.sized(96, 160, 10))


# --- the commands ---


@given(
    sizes=st.lists(st.builds(clip, *[st.integers(1, 9)] * 3), max_size=3),
    tile=st.none() | st.tuples(st.integers(1, 99), st.integers(1, 99)),
    steps=st.integers(1, 1000),
    batch=st.sampled_from([None, 1, 2]),
    workspace=st.none() | st.integers(1, 64).map(lambda gigabytes: gigabytes * 10**9),
    level=st.none() | st.integers(0, 5),
    force=st.booleans(),
)
def test_a_build_command_says_what_it_was_asked_to(
    sizes: list[ClipSize],
    tile: tuple[int, int] | None,
    steps: int,
    batch: int | None,
    workspace: int | None,
    level: int | None,
    force: bool,
) -> None:
    from dynamictrl_edge.cli.build import command
    from dynamictrl_edge.cli.main import cli

    line = build_command(
        Path("my bundle"),
        bundle_manifest(),
        ("rtx4090", "rtx30"),
        backend="tensorrt",
        sizes=tuple(sizes),
        tile=tile,
        steps=steps,
        batch=batch,
        workspace=workspace,
        version_compatible=True,
        optimization_level=level,
        force=force,
    )
    program, verb, *words = shlex.split(line)
    assert (program, verb) == ("dynamictrl", "build")
    parent = click.Context(cli, **cli.context_settings)
    with command.make_context(verb, words, parent=parent) as context:
        told = context.params
    assert told["bundle"] == Path("my bundle") and told["targets"] == ("rtx4090", "rtx30")
    assert (told["backend"], told["version_compatible"], told["force"]) == ("tensorrt", True, force)
    assert [parse_size(size) for size in told["sizes"]] in (sizes, [] if sizes == [SHORT] else sizes)
    assert (told["steps"], told["batch"], told["optimization_level"]) == (steps, batch, level)
    assert told["tile"] == (None if tile is None else f"{8 * tile[1]}x{8 * tile[0]}")
    assert told["workspace"] == (None if workspace is None else workspace / 1e9)


def test_options_that_are_the_usual_ones_are_left_out() -> None:
    assert build_command(Path("b"), bundle_manifest(), ("rtx4090",), backend="rtx", sizes=(SHORT,)) == (
        "dynamictrl build b --target rtx4090"
    )
