"""What this machine is: its GPU, driver and installed TensorRT libraries. Nothing of CUDA or TensorRT is imported for it.

The GPU is asked for through `nvidia-smi`, which comes with every driver. On Jetson that tool leaves out most of the answer
(JetPack 6) or does not exist (before), so the board's device tree is read there. Versions of libraries are those that their
packages state.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..bundle.errors import DeviceError
from .targets import FLAVOURS, TARGETS, Capability, Flavour, Target, capability_name

__all__ = [
    "LEAN",
    "LIBRARIES",
    "OLDEST",
    "Gpu",
    "Library",
    "Machine",
    "NoAnswer",
    "ask_nvidia_smi",
    "local_target",
    "look_at_gpus",
    "look_at_machine",
    "needed_driver",
    "platform_name",
    "release",
]

OLDEST: Capability = (7, 5)  # what every supported version builds for


class NoAnswer(Exception):
    """`nvidia-smi` is missing or failed; the text is half a sentence that says why."""


@dataclass(frozen=True)
class Library:
    """A TensorRT library: what people call it, the package that holds it, the Python module that must be there."""

    title: str
    package: str
    module: str


LIBRARIES: Mapping[Flavour, Library] = {
    "rtx": Library("TensorRT-RTX", "tensorrt-rtx", "tensorrt_rtx"),
    "tensorrt": Library("TensorRT", "tensorrt", "tensorrt"),
}
LEAN = Library("TensorRT's lean runtime", "tensorrt-lean", "tensorrt_lean")


@dataclass(frozen=True)
class Gpu:
    """A GPU. `driver` is the driver's version as text, `memory_bytes` what it has in all; None: not told.

    `unified`: its memory is the processor's, as on Jetson and DGX Spark.
    """

    name: str
    capability: Capability
    driver: str | None
    memory_bytes: int | None
    unified: bool = False

    @property
    def is_jetson(self) -> bool:
        """Whether its driver comes with JetPack and has a numbering of its own."""
        return self.capability in _TEGRA.values()


@dataclass(frozen=True)
class Machine:
    """What counts when engines are built or chosen.

    `flavours`: version of the installed library by flavour; `lean`: of TensorRT's lean runtime. `cuda`: CUDA major that an
    installed package was made for, by package ("tensorrt-rtx"), as far as it is known. `no_gpu`: why `gpu` is None.
    """

    gpu: Gpu | None
    flavours: Mapping[Flavour, str] = field(default_factory=dict)
    lean: str | None = None
    platform: str = ""
    cuda: Mapping[str, int] = field(default_factory=dict)
    no_gpu: str = ""


def ask_nvidia_smi() -> str:
    """One line per GPU: name, compute capability, driver version, memory in MiB; "[N/A]" for what it does not tell.

    Raises:
        NoAnswer: it is not installed or failed.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        raise NoAnswer("no nvidia-smi, so no NVIDIA driver")
    query = [tool, "--query-gpu=name,compute_cap,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except subprocess.CalledProcessError as error:  # it explains itself on stdout: no driver, no device, unknown field
        told = (error.stdout or error.stderr or "").strip().splitlines()
        raise NoAnswer(f"nvidia-smi failed: {told[0] if told else error}") from error
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError) as error:
        raise NoAnswer(f"nvidia-smi failed: {error}") from error


def physical_memory() -> int | None:
    """Bytes of main memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def platform_name() -> str:
    """System and processor: "linux-x86_64", "linux-aarch64" (Jetson, DGX Spark), "windows-amd64"."""
    system = "windows" if sys.platform == "win32" else sys.platform
    return f"{system}-{platform.machine().lower()}"


def look_at_gpus(
    *,
    ask: Callable[[], str] = ask_nvidia_smi,
    device_tree: Path = Path("/proc/device-tree"),
    memory: Callable[[], int | None] = physical_memory,
) -> tuple[list[Gpu], str]:
    """All GPUs in `nvidia-smi`'s order, and why there is none, as half a sentence ("" if there are)."""
    board = _board(device_tree)
    try:
        lines = ask().splitlines()
    except NoAnswer as error:
        return ([replace(board, memory_bytes=memory())], "") if board is not None else ([], str(error))
    gpus, why = [], "nvidia-smi lists no GPU"
    for line in filter(str.strip, lines):
        gpu = _parse(line, board)
        if gpu is None:
            why = f"nvidia-smi's answer {line.strip()!r} gives no compute capability; the driver may be too old"
        else:
            gpus.append(replace(gpu, memory_bytes=memory()) if gpu.unified else gpu)
    return gpus, "" if gpus else why


def look_at_machine(
    *,
    gpus: Callable[[], tuple[list[Gpu], str]] = look_at_gpus,
    environ: Mapping[str, str] | None = None,
    version: Callable[[str], str] | None = None,
    find_module: Callable[[str], Path | None] | None = None,
    platform: str | None = None,
) -> Machine:
    """Looks at the machine once.

    The GPU is the first one, or the first that CUDA_VISIBLE_DEVICES names by its number; where different GPUs sit in one
    machine, CUDA counts as nvidia-smi does only under CUDA_DEVICE_ORDER=PCI_BUS_ID.

    Args:
        gpus, environ, version, find_module, platform: where the facts come from; None: from this machine. `version` gives
            a package's version or raises `PackageNotFoundError`; `find_module` the file of a module that could be
            imported, or None.
    """
    environ = os.environ if environ is None else environ
    version, find_module = version or importlib.metadata.version, find_module or _find_module
    gpu, why = _visible(*gpus(), environ.get("CUDA_VISIBLE_DEVICES"))
    cuda: dict[str, int] = {}
    found: dict[str, str] = {}
    for library in (*LIBRARIES.values(), LEAN):
        installed = _installed(library, version, find_module)
        if installed is not None:
            found[library.package], major = installed
            if major is not None:
                cuda[library.package] = major
    return Machine(
        gpu=gpu,
        flavours={name: found[LIBRARIES[name].package] for name in FLAVOURS if LIBRARIES[name].package in found},
        lean=found.get(LEAN.package),
        platform=platform or platform_name(),
        cuda=cuda,
        no_gpu=why,
    )


def local_target(machine: Machine) -> Target:
    """The target that this machine's GPU is: a known one of its capability, name and memory, else one made for it, "local".

    Raises:
        DeviceError: there is no GPU, or it is too old.
    """
    gpu = machine.gpu
    if gpu is None:
        raise DeviceError(
            f"This machine has no NVIDIA GPU that can be asked ({machine.no_gpu or 'none found'}). Say which GPU to build "
            "for: --target rtx4090, rtx5090, jetson-orin, ... All names: dynamictrl build --list-targets"
        )
    if gpu.capability < OLDEST:
        raise DeviceError(
            f"{gpu.name} is {capability_name(gpu.capability)}; engines need {capability_name(OLDEST)} (GeForce RTX 20) or "
            "later. Without engines: dynamictrl animate --backend onnxruntime"
        )
    alike = [target for target in TARGETS.values() if target.capability == gpu.capability]
    named = [target for target in alike if _is_called(gpu.name, target) and _has_memory(gpu, target)]
    if named:
        return max(named, key=lambda target: len(target.name))  # "rtx3060" rather than "rtx30"
    return Target(
        name="local",
        capability=gpu.capability,
        flavours=alike[0].flavours if alike else ("tensorrt",),
        memory_gb=(gpu.memory_bytes or min((target.memory_gb for target in alike), default=8) * 1e9) / 1e9,
        note=gpu.name,
        unified=gpu.unified,
    )


def needed_driver(cuda: int, platform: str) -> int | None:
    """Oldest driver branch for libraries made for a CUDA major ("minor version compatibility" in NVIDIA's CUDA manual);
    None where nothing is known. NVIDIA recommends 535 (Windows: 537) for TensorRT on CUDA 12."""
    windows = platform.startswith("windows")
    return {11: 452 if windows else 450, 12: 528 if windows else 525, 13: 580}.get(cuda)


def release(version: str) -> tuple[int, ...]:
    """(10, 13, 3, 9) of "10.13.3.9" and of "10.13.3.9.post1"; () of what does not begin with a number."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()


# --- GPUs ---

_TEGRA: Mapping[str, Capability] = {"orin": (8, 7), "thor": (11, 0), "xavier": (7, 2)}  # by a word of the board's name
_CHIPS = {"tegra234": "Orin", "tegra264": "Thor", "tegra194": "Xavier"}  # for boards of other makers


def _board(device_tree: Path) -> Gpu | None:
    """The Jetson that the kernel's device tree describes, its memory and driver unknown; None: this is no Jetson."""
    model = _read(device_tree / "model")
    chip = next((name for chip, name in _CHIPS.items() if chip in _read(device_tree / "compatible")), None)
    named = _tegra(model)
    if named is not None:
        return Gpu(model, named, None, None, unified=True)
    if chip is not None:
        return Gpu(f"NVIDIA Jetson {chip} ({model})", _TEGRA[chip.lower()], None, None, unified=True)
    return None


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace").replace("\0", " ").strip()
    except OSError:
        return ""


def _tegra(name: str) -> Capability | None:
    words = re.findall(r"[a-z0-9]+", name.lower())
    return next((capability for word, capability in _TEGRA.items() if word in words), None)


def _parse(line: str, board: Gpu | None) -> Gpu | None:
    """One line of `ask_nvidia_smi`; None if it does not tell what kind of GPU this is. `board` fills in the gaps."""
    fields = [part.strip() for part in line.split(",")]
    if len(fields) < 4:
        return None
    name, (told, driver, mebibytes) = ", ".join(fields[:-3]), fields[-3:]
    number = re.fullmatch(r"(\d{1,3})\.(\d{1,2})", told)
    capability = (int(number[1]), int(number[2])) if number else _tegra(name)
    if board is not None and capability in (None, board.capability):
        name, capability = board.name, board.capability  # "Orin (nvgpu)" says less than the board's name
    if capability is None:
        return None
    memory = int(mebibytes) << 20 if re.fullmatch(r"\d{1,12}", mebibytes) else None
    # A GPU that has memory of its own says how much.
    return Gpu(name, capability, driver if release(driver) else None, memory, unified=memory is None)


def _visible(gpus: list[Gpu], why: str, devices: str | None) -> tuple[Gpu | None, str]:
    """The GPU that CUDA calls its first, or why there is none."""
    if not gpus or devices is None:
        return (gpus[0] if gpus else None), why
    first = devices.split(",")[0].strip()
    if not first or first.startswith("-"):
        return None, f"CUDA_VISIBLE_DEVICES={devices!r} hides it"
    if not (first.isascii() and first.isdecimal()):  # a UUID
        return gpus[0], ""
    if int(first) >= len(gpus):
        return None, f"CUDA_VISIBLE_DEVICES={devices!r} names GPU {first}, of {len(gpus)} that are numbered from 0"
    return gpus[int(first)], ""


# Boards and systems whose GPU's name is not the target's.
_ALIASES = {
    "dgx-spark": r"gb10|dgx spark",
    "jetson-orin": r"agx orin|orin \(nvgpu\)",
    "jetson-orin-nx": r"orin nx|orin \(nvgpu\)",
    "jetson-orin-nano": r"orin nano|orin \(nvgpu\)",
    "jetson-thor": r"thor",
}


def _is_called(name: str, target: Target) -> bool:
    """Whether `name` ("NVIDIA GeForce RTX 4070 Ti") has the words of the target's ("rtx4070") in it.

    Targets of a whole series ("rtx40") also take any number of it.
    """
    pattern = _ALIASES.get(target.name)
    if pattern is None:
        words = re.findall(r"rtx|[a-z]+|\d+", target.name)
        series = r"\d\d" if re.fullmatch(r"rtx\d\d", target.name) else ""
        pattern = r"[\s-]*".join(words) + series
    return re.search(rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])", name.lower()) is not None


def _has_memory(gpu: Gpu, target: Target) -> bool:
    """Cards are sold by powers of two ("24 GB" are 25.8e9 bytes), and a system keeps a little of unified memory."""
    return gpu.memory_bytes is None or abs(gpu.memory_bytes / (target.memory_gb * 1e9) - 1) < 0.12


# --- libraries ---

_CUDA_MAJORS = (11, 12, 13, 14)


def _installed(
    library: Library, version: Callable[[str], str], find_module: Callable[[str], Path | None]
) -> tuple[str, int | None] | None:
    """Version and CUDA major of a library; None if its module is not there.

    The module `tensorrt` comes from the package `tensorrt_cu12` or `tensorrt_cu13`, with or without the package `tensorrt`
    that only depends on one of them; JetPack's comes from a system package that is called `tensorrt`, too.
    """
    file = find_module(library.module)
    if file is None:
        return None
    versions: dict[int | None, str] = {}
    for major in (None, *_CUDA_MAJORS):
        name = library.module if major is None else f"{library.module}_cu{major}"
        try:
            versions[major] = version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    plain = versions.pop(None, None)
    majors = [major for major, found in versions.items() if plain in (None, found)]
    if majors:
        return versions[majors[-1]], majors[-1]
    plain = plain or _stated(file)
    return None if plain is None else (plain, _usual_cuda(library, plain))


def _find_module(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module that was put into sys.modules by hand
        return Path(name)
    return Path(spec.origin or name) if spec is not None else None


def _stated(file: Path) -> str | None:
    """The version that a module's file states, for a folder that was linked into a virtual environment without its package."""
    try:
        found = re.search(r"""^__version__\s*=\s*["']([^"']+)["']""", file.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return found.group(1) if found else None


def _usual_cuda(library: Library, version: str) -> int | None:
    """CUDA major of a library whose package does not state it, from NVIDIA's release notes: TensorRT 10 was made for 12 until
    10.13.2 brought a second one for 13; what 11 has beside the Python packages is for 13. TensorRT-RTX came for both."""
    number = release(version)
    if library is LIBRARIES["rtx"] or not number:
        return None
    if (10,) <= number < (10, 13, 2):
        return 12
    return 13 if number >= (11,) else None
