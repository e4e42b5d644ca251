"""What a machine is: GPUs as nvidia-smi and Jetson's device tree tell of them, installed libraries, the local target."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dynamictrl_edge.bundle.errors import DeviceError
from dynamictrl_edge.engines import machine as subject
from dynamictrl_edge.engines.machine import (
    Gpu,
    Machine,
    NoAnswer,
    ask_nvidia_smi,
    local_target,
    look_at_gpus,
    look_at_machine,
    needed_driver,
    platform_name,
    release,
)
from dynamictrl_edge.engines.targets import TARGETS

GIB = 1 << 30
RTX4090 = Gpu("NVIDIA GeForce RTX 4090", (8, 9), "560.35.03", 24564 << 20)
T4 = Gpu("Tesla T4", (7, 5), "560.35.03", 15360 << 20)
NOWHERE = Path("/nonexistent")

# --- GPUs ---


def gpus_of(answer: str, tree: Path = NOWHERE, memory: int | None = 64 * GIB) -> tuple[list[Gpu], str]:
    return look_at_gpus(ask=lambda: answer, device_tree=tree, memory=lambda: memory)


def silent() -> str:
    raise NoAnswer("no nvidia-smi, so no NVIDIA driver")


def device_tree(folder: Path, model: str, compatible: str = "") -> Path:
    (folder / "model").write_bytes(model.encode() + b"\0")
    if compatible:
        (folder / "compatible").write_bytes(compatible.encode() + b"\0")
    return folder


def test_each_line_is_a_gpu() -> None:
    answer = "NVIDIA GeForce RTX 4090, 8.9, 560.35.03, 24564\nTesla T4, 7.5, 560.35.03, 15360\n"
    assert gpus_of(answer) == ([RTX4090, T4], "")


def test_a_gpu_without_memory_of_its_own_has_the_machines() -> None:
    (gpu,), _ = gpus_of("NVIDIA GB10, 12.1, 580.95.05, [N/A]\n", memory=119 * GIB)
    assert gpu == Gpu("NVIDIA GB10", (12, 1), "580.95.05", 119 * GIB, unified=True)
    assert not gpu.is_jetson


def test_jetsons_gaps_are_filled_from_the_device_tree(tmp_path: Path) -> None:
    tree = device_tree(tmp_path, "NVIDIA Jetson AGX Orin Developer Kit")
    expected = Gpu("NVIDIA Jetson AGX Orin Developer Kit", (8, 7), "540.4.0", 61 * GIB, unified=True)
    for capability in ("8.7", "[N/A]"):
        (gpu,), why = gpus_of(f"Orin (nvgpu), {capability}, 540.4.0, [N/A]\n", tree, 61 * GIB)
        assert (gpu, why) == (expected, "")
        assert gpu.is_jetson


def test_a_jetson_without_nvidia_smi_is_found_by_its_device_tree(tmp_path: Path) -> None:
    tree = device_tree(tmp_path, "NVIDIA Jetson AGX Thor Developer Kit")
    (gpu,), why = look_at_gpus(ask=silent, device_tree=tree, memory=lambda: 122 * GIB)
    assert gpu == Gpu("NVIDIA Jetson AGX Thor Developer Kit", (11, 0), None, 122 * GIB, unified=True)
    assert why == ""


def test_a_board_of_another_maker_is_known_by_its_chip(tmp_path: Path) -> None:
    tree = device_tree(tmp_path, "reComputer J4012", "acme,j4012\0nvidia,tegra234")
    (gpu,), _ = look_at_gpus(ask=silent, device_tree=tree, memory=lambda: None)
    assert (gpu.capability, gpu.memory_bytes) == ((8, 7), None)
    assert "reComputer J4012" in gpu.name and "Orin" in gpu.name


def test_in_a_container_that_hides_the_device_tree_the_gpus_name_decides() -> None:
    (gpu,), _ = gpus_of("Orin (nvgpu), [N/A], [N/A], [N/A]\n")
    assert (gpu.capability, gpu.driver, gpu.unified) == ((8, 7), None, True)


def test_a_card_in_a_machine_whose_board_is_another_keeps_its_own_name(tmp_path: Path) -> None:
    tree = device_tree(tmp_path, "NVIDIA Jetson AGX Orin Developer Kit")
    (gpu,), _ = gpus_of("NVIDIA RTX A6000, 8.6, 560.35.03, 49140\n", tree)
    assert (gpu.name, gpu.capability, gpu.unified) == ("NVIDIA RTX A6000", (8, 6), False)


def test_a_board_that_is_no_jetson_counts_for_nothing(tmp_path: Path) -> None:
    tree = device_tree(tmp_path, "Raspberry Pi 5 Model B", "brcm,bcm2712")
    assert look_at_gpus(ask=silent, device_tree=tree) == ([], "no nvidia-smi, so no NVIDIA driver")


def test_an_answer_without_capability_says_so() -> None:
    found, why = gpus_of("Mystery, [N/A], 390.1, 4096\n")
    assert found == [] and "Mystery" in why and "driver" in why
    assert gpus_of("\n") == ([], "nvidia-smi lists no GPU")


@given(st.text(max_size=200))
@example("No devices were found")
@example("a, b, c, d, e\n, , , \n")
@example("x, 8.9, 560, ٣٤\n")
def test_no_answer_breaks_it(text: str) -> None:
    found, why = gpus_of(text)
    assert bool(found) != bool(why)


NAMES = st.text(st.characters(codec="ascii", exclude_characters="\n\r\x0b\x0c\x1c\x1d\x1e,"), min_size=1).map(str.strip)
PARTS = st.lists(NAMES.filter(bool), min_size=1, max_size=3)


@given(PARTS, st.tuples(st.integers(5, 20), st.integers(0, 9)), st.integers(300, 999), st.integers(1, 10**6))
def test_what_nvidia_smi_tells_is_what_is_read(
    parts: list[str], capability: tuple[int, int], driver: int, mebibytes: int
) -> None:
    name = ", ".join(parts)  # a comma in a name shifts nothing
    line = f"{name}, {capability[0]}.{capability[1]}, {driver}.10, {mebibytes}\n"
    assert gpus_of(line) == ([Gpu(name, capability, f"{driver}.10", mebibytes << 20)], "")


def test_nvidia_smi_is_asked_once_for_all_it_must_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="an answer", stderr="")

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", run)
    assert ask_nvidia_smi() == "an answer"
    (command,) = asked
    assert command[0] == "/usr/bin/nvidia-smi"
    assert "--query-gpu=name,compute_cap,driver_version,memory.total" in command


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (subprocess.TimeoutExpired("nvidia-smi", 20), "timed out"),
        (subprocess.CalledProcessError(9, "nvidia-smi", "Driver/library version mismatch\n"), "version mismatch"),
        (subprocess.CalledProcessError(9, "nvidia-smi"), "exit status 9"),
        (OSError("no such device"), "no such device"),
    ],
)
def test_a_driver_that_does_not_answer_is_quoted(
    failure: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", run)
    found, why = look_at_gpus(device_tree=NOWHERE)
    assert found == [] and why.startswith("nvidia-smi failed") and told in why


def test_without_nvidia_smi_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert look_at_gpus(device_tree=NOWHERE) == ([], "no nvidia-smi, so no NVIDIA driver")


# --- the machine ---


def machine_with(
    packages: Mapping[str, str] | None = None,
    modules: Mapping[str, Path] | None = None,
    gpus: list[Gpu] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Machine:
    packages, modules, found = packages or {}, modules or {}, gpus if gpus is not None else [RTX4090, T4]

    def version(name: str) -> str:
        if name not in packages:
            raise importlib.metadata.PackageNotFoundError(name)
        return packages[name]

    return look_at_machine(
        gpus=lambda: (found, "" if found else "none there"),
        environ=environ or {},
        version=version,
        find_module=modules.get,
        platform="linux-x86_64",
    )


@pytest.mark.parametrize(
    ("devices", "gpu", "why"),
    [
        (None, RTX4090, ""),
        ("0,1", RTX4090, ""),
        (" 1 ,0", T4, ""),
        ("GPU-3f1c, 1", RTX4090, ""),
        ("", None, "hides"),
        ("-1", None, "hides"),
        ("2", None, "of 2"),
    ],
)
def test_cuda_visible_devices_chooses(devices: str | None, gpu: Gpu | None, why: str) -> None:
    seen = machine_with(environ={} if devices is None else {"CUDA_VISIBLE_DEVICES": devices})
    assert seen.gpu == gpu and why in seen.no_gpu
    assert (seen.gpu is None) == bool(seen.no_gpu)


def test_why_there_is_no_gpu_is_kept() -> None:
    for environ in ({}, {"CUDA_VISIBLE_DEVICES": "0"}):
        assert machine_with(gpus=[], environ=environ).no_gpu == "none there"


HERE = Path("module.py")
ALL = {"tensorrt_rtx": HERE, "tensorrt": HERE, "tensorrt_lean": HERE}


@pytest.mark.parametrize(
    ("packages", "flavours", "lean", "cuda"),
    [
        ({}, {}, None, {}),
        ({"tensorrt_rtx": "1.7.1.116", "tensorrt_rtx_cu13": "1.7.1.116"}, {"rtx": "1.7.1.116"}, None, {"tensorrt-rtx": 13}),
        ({"tensorrt_rtx": "1.2.0.54"}, {"rtx": "1.2.0.54"}, None, {}),
        ({"tensorrt_cu12": "10.16.1.11"}, {"tensorrt": "10.16.1.11"}, None, {"tensorrt": 12}),
        ({"tensorrt": "10.3.0"}, {"tensorrt": "10.3.0"}, None, {"tensorrt": 12}),
        ({"tensorrt": "10.13.1.45"}, {"tensorrt": "10.13.1.45"}, None, {"tensorrt": 12}),
        ({"tensorrt": "10.13.3.9"}, {"tensorrt": "10.13.3.9"}, None, {}),  # there are two of it
        ({"tensorrt": "11.4.0.106"}, {"tensorrt": "11.4.0.106"}, None, {"tensorrt": 13}),
        # The package that the other depends on decides, not one that was left over.
        (
            {"tensorrt": "10.16.1", "tensorrt_cu12": "10.16.1", "tensorrt_cu13": "10.14.1"},
            {"tensorrt": "10.16.1"}, None, {"tensorrt": 12},
        ),
        ({"tensorrt_lean_cu13": "11.4.0.106"}, {}, "11.4.0.106", {"tensorrt-lean": 13}),
    ],
)  # fmt: skip
def test_installed_libraries_are_told_by_their_packages(
    packages: dict[str, str], flavours: dict[str, str], lean: str | None, cuda: dict[str, int]
) -> None:
    seen = machine_with(packages, ALL)
    assert (seen.flavours, seen.lean, seen.cuda) == (flavours, lean, cuda)


def test_a_package_whose_module_is_gone_is_not_installed() -> None:
    seen = machine_with({"tensorrt": "10.3.0", "tensorrt_rtx_cu13": "1.7.1"}, {"tensorrt_rtx": HERE})
    assert seen.flavours == {"rtx": "1.7.1"}


def test_a_module_without_its_package_states_its_version_itself(tmp_path: Path) -> None:
    file = tmp_path / "__init__.py"
    file.write_text('import os\n__version__ = "10.3.0"\nraise RuntimeError("not to be run")\n')
    assert machine_with({}, {"tensorrt": file}).flavours == {"tensorrt": "10.3.0"}
    file.write_text("from tensorrt_bindings import *\n")
    assert machine_with({}, {"tensorrt": file}).flavours == {}


def test_looking_imports_no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(sys.modules)
    seen = look_at_machine(gpus=lambda: ([], "none"))
    new = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert not new & {"tensorrt", "tensorrt_rtx", "tensorrt_lean", "tensorrt_bindings", "tensorrt_rtx_bindings", "cuda"}
    assert seen.platform == platform_name()
    try:
        assert seen.flavours.get("rtx") == importlib.metadata.version("tensorrt_rtx")
    except importlib.metadata.PackageNotFoundError:
        assert "rtx" not in seen.flavours


def test_a_module_that_was_put_in_place_by_hand_counts_as_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_lean", types.ModuleType("tensorrt_lean"))
    seen = look_at_machine(
        gpus=lambda: ([], "none"), version=lambda name: "11.4.0" if "lean" in name else missing(name)
    )
    assert seen.lean == "11.4.0"


def missing(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("system", "processor", "name"),
    [("linux", "x86_64", "linux-x86_64"), ("linux", "aarch64", "linux-aarch64"), ("win32", "AMD64", "windows-amd64")],
)
def test_platforms_have_names(system: str, processor: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(subject.platform, "machine", lambda: processor)
    assert platform_name() == name


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("10.13.3.9", (10, 13, 3, 9)), ("8.6.1.post1", (8, 6, 1)), ("10.0.0b6", (10, 0, 0)), ("", ()), ("unknown", ())],
)
def test_versions_are_compared_by_their_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert release(text) == numbers


def test_drivers_that_cuda_needs() -> None:
    assert [needed_driver(cuda, "linux-x86_64") for cuda in (11, 12, 13, 99)] == [450, 525, 580, None]
    assert [needed_driver(cuda, "windows-amd64") for cuda in (12, 13)] == [528, 580]


# --- the local target ---


def local(name: str, capability: tuple[int, int], memory: float | None, unified: bool = False) -> str:
    size = None if memory is None else int(memory * (1 << 20))
    return local_target(Machine(Gpu(name, capability, "580.1", size, unified))).name


@pytest.mark.parametrize(
    ("name", "capability", "mebibytes", "target"),
    [
        ("NVIDIA GeForce RTX 2080 Ti", (7, 5), 11264, "rtx2080ti"),
        ("NVIDIA GeForce RTX 2070", (7, 5), 8192, "rtx20"),
        ("NVIDIA GeForce RTX 3060", (8, 6), 12288, "rtx3060"),
        ("NVIDIA GeForce RTX 3070", (8, 6), 8192, "rtx30"),
        ("NVIDIA RTX A6000", (8, 6), 49140, "rtxa6000"),
        ("NVIDIA GeForce RTX 4070 SUPER", (8, 9), 12282, "rtx4070"),
        ("NVIDIA GeForce RTX 4090", (8, 9), 24564, "rtx4090"),
        ("NVIDIA RTX 6000 Ada Generation", (8, 9), 49140, "rtx6000ada"),
        ("NVIDIA GeForce RTX 5090", (12, 0), 32607, "rtx5090"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", (12, 0), 97887, "rtxpro6000"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), 81920, "a100"),
        ("NVIDIA H100 80GB HBM3", (9, 0), 81559, "h100"),
        ("NVIDIA H200", (9, 0), 143771, "h200"),
        # Known capability, but not this card: its memory, or its name, is another.
        ("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), 16376, "local"),
        ("NVIDIA GH200 480GB", (9, 0), 97871, "local"),
        ("NVIDIA GH200 144G HBM3e", (9, 0), 143771, "local"),
        ("NVIDIA L40S", (8, 9), 46068, "local"),
        ("NVIDIA A100-SXM4-40GB", (8, 0), 40960, "local"),
        ("NVIDIA B200", (10, 0), 183359, "local"),
    ],
)
def test_a_known_card_is_its_target(name: str, capability: tuple[int, int], mebibytes: int, target: str) -> None:
    assert local(name, capability, mebibytes) == target


@pytest.mark.parametrize(
    ("name", "capability", "gibibytes", "target"),
    [
        ("NVIDIA GB10", (12, 1), 119.7, "dgx-spark"),
        ("NVIDIA Jetson AGX Orin Developer Kit", (8, 7), 61.4, "jetson-orin"),
        ("Orin (nvgpu)", (8, 7), 61.4, "jetson-orin"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", (8, 7), 15.3, "jetson-orin-nx"),
        ("NVIDIA Jetson Orin Nano Developer Kit", (8, 7), 7.4, "jetson-orin-nano"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", (8, 7), 7.4, "local"),
        ("NVIDIA Jetson AGX Thor Developer Kit", (11, 0), 122.8, "jetson-thor"),
    ],
)
def test_a_known_system_is_its_target(name: str, capability: tuple[int, int], gibibytes: float, target: str) -> None:
    assert local(name, capability, gibibytes * 1024, unified=True) == target


def test_every_known_target_is_found_on_its_own_card() -> None:
    boards = {
        "dgx-spark": "NVIDIA GB10",
        "jetson-orin": "NVIDIA Jetson AGX Orin",
        "rtx20": "Quadro RTX 2099",
        "rtx30": "RTX 3099",
        "rtx40": "RTX 4099",
        "rtx50": "RTX 5099",
    }
    for name, target in TARGETS.items():
        gpu = Gpu(boards.get(name, name.replace("-", " ")), target.capability, None, int(target.memory_gb * 1e9))
        assert local_target(Machine(gpu)) == target, name


def test_a_target_made_for_an_unknown_card_says_what_it_is() -> None:
    made = local_target(Machine(Gpu("NVIDIA L4", (8, 9), "580", 23034 << 20)))
    assert (made.name, made.capability, made.flavours) == ("local", (8, 9), ("rtx", "tensorrt"))
    assert made.note == "NVIDIA L4" and made.memory_gb == pytest.approx(24.15, abs=0.01)
    assert local_target(Machine(Gpu("NVIDIA B200", (10, 0), "580", None))).flavours == ("tensorrt",)


def test_without_a_gpu_the_local_target_is_refused_with_names_to_give() -> None:
    with pytest.raises(DeviceError, match=r"no nvidia-smi.*--target rtx4090.*--list-targets") as caught:
        local_target(Machine(None, no_gpu="no nvidia-smi, so no NVIDIA driver"))
    assert caught.value.exit_code == 5


def test_a_gpu_that_is_too_old_is_refused() -> None:
    with pytest.raises(DeviceError, match=r"GTX 1080 is SM61; engines need SM75.*--backend onnxruntime"):
        local_target(Machine(Gpu("NVIDIA GeForce GTX 1080", (6, 1), "560", 8 * GIB)))
