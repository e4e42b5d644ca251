"""`dynamictrl doctor`"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .console import json_option, print_json, results, verbose_option

if TYPE_CHECKING:
    from ..engines.machine import Gpu


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `state` is ok, missing or info; `mend` is the command that installs what is missing."""

    name: str
    state: str
    found: str
    needed_for: str
    mend: str = ""


@click.command("doctor", short_help="Say what this machine has and lacks.")
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="Say also which clips of this bundle the GPU has room for."
)
@json_option
@verbose_option
def command(bundle: Path | None, as_json: bool) -> None:
    """Say what this machine has and lacks, and for each missing thing the command that installs it.

    Exit code 0 when a clip can be animated here, 5 when not.
    """
    findings = [*_machine(), *_packages(), *_builders(), *_encoders(), *_gpu()]
    if bundle is not None:
        findings += _clips(bundle)
    able = all(f.state != "missing" for f in findings if f.needed_for == "animate")
    if as_json:
        print_json({"can_animate": able, "findings": [asdict(f) for f in findings]})
    else:
        with results():
            _show(findings, able)
    if not able:
        raise click.exceptions.Exit(5)


def _machine() -> list[Finding]:
    from ..runtime.measure import cores, physical_memory

    memory = physical_memory()
    python_ok = (3, 10) <= tuple(map(int, platform.python_version_tuple()[:2])) < (3, 14)
    free = shutil.disk_usage(".").free
    return [
        Finding(
            "Python",
            "ok" if python_ok else "missing",
            platform.python_version(),
            "animate",
            "install Python 3.10 to 3.13",
        ),
        Finding("processor", "info", f"{cores()} cores, {platform.machine()}", "animate"),
        Finding("memory", "info", "unknown" if memory is None else f"{memory / 1e9:.1f} GB", "animate"),
        Finding("disk here", "info", f"{free / 1e9:.1f} GB free", "export"),
    ]


def _packages() -> list[Finding]:
    wanted = [
        ("numpy", "numpy", "animate", "pip install dynamictrl-edge"),
        ("av", "av", "animate", "pip install dynamictrl-edge"),
        ("Pillow", "PIL", "animate", "pip install dynamictrl-edge"),
        ("tokenizers", "tokenizers", "animate", "pip install dynamictrl-edge"),
        ("msgspec", "msgspec", "animate", "pip install dynamictrl-edge"),
        ("onnxruntime", "onnxruntime", "animate", "pip install onnxruntime"),
        ("torch", "torch", "export", 'pip install "dynamictrl-edge[export]"'),
        ("diffusers", "diffusers", "export", 'pip install "dynamictrl-edge[export]"'),
        ("transformers", "transformers", "export", 'pip install "dynamictrl-edge[export]"'),
        ("onnx", "onnx", "export", 'pip install "dynamictrl-edge[export]"'),
        ("onnxscript", "onnxscript", "export", 'pip install "dynamictrl-edge[export]"'),
        ("sentencepiece", "sentencepiece", "export", 'pip install "dynamictrl-edge[export]"'),
    ]
    findings = []
    for distribution, module, needed_for, mend in wanted:
        if importlib.util.find_spec(module) is None:
            findings.append(Finding(distribution, "missing", "not installed", needed_for, mend))
            continue
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            version = "installed, version unknown"
        if needed_for == "animate" and (why := _unloadable(module)):
            mend = f"pip install --force-reinstall {distribution}"
            findings.append(Finding(distribution, "missing", f"{version}, cannot be loaded: {why}", needed_for, mend))
            continue
        findings.append(Finding(distribution, "ok", version, needed_for))
    return findings


def _unloadable(module: str) -> str | None:
    """Why a package that is there does not work: a system library is missing, it was built for another processor, ..."""
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a broken package raises
        return str(error).strip() or type(error).__name__
    return None


def _builders() -> list[Finding]:
    """What `build` needs: polygraphy, and one of the two libraries."""
    from ..engines.machine import LEAN, LIBRARIES, look_at_machine

    here = look_at_machine(gpus=lambda: ([], ""))  # the GPUs have rows of their own
    findings = []
    for flavour, library in LIBRARIES.items():
        version, extra = here.flavours.get(flavour), f'pip install "dynamictrl-edge[build,{flavour}]"'
        if version is not None:
            cuda = here.cuda.get(library.package)
            findings.append(Finding(library.title, "ok", version + (f" (CUDA {cuda})" if cuda else ""), "build"))
        elif here.flavours:
            findings.append(Finding(library.title, "info", "not installed", "build", extra))
        else:
            findings.append(Finding(library.title, "missing", "not installed", "build", extra))
    if here.lean is not None:
        findings.append(Finding(LEAN.title, "ok", here.lean, "speed"))
    if importlib.util.find_spec("polygraphy") is None:
        extra = 'pip install "dynamictrl-edge[build]"'
        return [*findings, Finding("polygraphy", "missing", "not installed", "build", extra)]
    try:
        version = importlib.metadata.version("polygraphy")
    except importlib.metadata.PackageNotFoundError:
        version = "installed, version unknown"
    return [*findings, Finding("polygraphy", "ok", version, "build")]


def _encoders() -> list[Finding]:
    try:
        import av
    except Exception:  # already among the packages
        return []
    findings = []
    for codec, name, file in (("libx264", "H.264 encoder", "MP4 output"), ("libvpx-vp9", "VP9 encoder", "WebM output")):
        try:
            av.Codec(codec, "w")
            findings.append(Finding(name, "ok", codec, file))
        except ValueError:
            findings.append(Finding(name, "missing", "not in this PyAV", file, "pip install --force-reinstall av"))
    return findings


def _gpu() -> list[Finding]:
    from ..engines.machine import look_at_gpus

    gpus, why = look_at_gpus()
    if not gpus:
        return [Finding("NVIDIA GPU", "info", f"none found ({why}); clips are made on the processor", "speed")]
    return [*(Finding("NVIDIA GPU", "ok", _described(gpu), "speed") for gpu in gpus), _pycuda(gpus[0])]


def _pycuda(gpu: Gpu) -> Finding:
    """What runs engines on the GPU, beside TensorRT. It is compiled where it is installed (docs/gpu.md)."""
    mend = "CUDA_ROOT=/usr/local/cuda pip install pycuda"
    if gpu.is_jetson:
        mend = f"sudo apt install nvidia-jetpack python3-dev, then {mend}"
    if importlib.util.find_spec("pycuda") is None:
        return Finding("pycuda", "missing", "not installed", "speed", mend)
    if why := _unloadable("pycuda.driver"):
        again = mend.replace("pip install", "pip install --no-cache-dir --force-reinstall")
        return Finding("pycuda", "missing", f"installed, cannot be loaded: {why}", "speed", again)
    return Finding("pycuda", "ok", importlib.metadata.version("pycuda"), "speed")


def _described(gpu: Gpu) -> str:
    """The GPU, and what `--target` and `--precision` it takes."""
    from ..bundle.errors import DeviceError
    from ..engines.machine import Machine, local_target
    from ..engines.targets import capability_name

    facts = [gpu.name, capability_name(gpu.capability)]
    if gpu.memory_bytes is not None:
        facts.append(f"{gpu.memory_bytes / 1e9:.1f} GB{' shared with the processor' if gpu.unified else ''}")
    if gpu.driver is not None:
        facts.append(f"driver {gpu.driver}")
    try:
        target = local_target(Machine(gpu))
        facts.append(f"target {target.name}: {', '.join(sorted(target.types))}")
    except DeviceError:
        facts.append("too old for engines")
    return ", ".join(facts)


def _clips(bundle: Path) -> list[Finding]:
    """A row per clip size that the bundle's model can make: does the GPU's memory suffice?"""
    from ..bundle.manifest import read_manifest
    from ..engines.machine import look_at_machine
    from .memory_plans import memory_plans

    manifest = read_manifest(bundle)
    gpu = look_at_machine().gpu
    if gpu is None or gpu.memory_bytes is None:
        return [Finding("clips on the GPU", "info", "the GPU's memory is not known here", "speed")]
    plans = memory_plans(manifest, gpu.memory_bytes / 1e9, capability=gpu.capability, unified=gpu.unified)
    return [
        Finding(f"clip {made.size}", "ok" if made.fits else "info", f"{made.reason} (an estimate)", "speed")
        for made in plans
    ]


def _show(findings: list[Finding], able: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "what", "found", "needed for", "how to get it")
    marks = {"ok": "[green]ok[/green]", "missing": "[red]missing[/red]", "info": ""}
    for f in findings:
        # Escaped: rich would take the brackets of "dynamictrl-edge[export]" for a style.
        row = (f.name, f.found, f.needed_for, f.mend if f.state == "missing" else "")
        table.add_row(marks[f.state], *map(escape, row))
    console = Console()
    console.print(table)
    console.print(
        "This machine can animate a bundle." if able else "This machine cannot animate yet; see 'missing' above."
    )
