"""The command lines that mend things, for the ends of messages: to be copied into a shell as they stand."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..bundle.manifest import Manifest
from .engine_set import BuildOptions, ClipSize
from .machine import OLDEST, Machine, local_target
from .profiles import default_size
from .targets import TARGETS, Flavour, Target

__all__ = ["ON_PROCESSOR", "build_command", "name_of", "pip_command", "target_here"]

ON_PROCESSOR = "dynamictrl animate --backend onnxruntime"

_USUAL = BuildOptions(sizes=(), tile=(1, 1))  # for the defaults of its other fields


def build_command(
    bundle: Path,
    manifest: Manifest,
    targets: tuple[str, ...],
    *,
    backend: Flavour | None = None,
    sizes: tuple[ClipSize, ...] = (),
    tile: tuple[int, int] | None = None,
    steps: int = _USUAL.steps,
    batch: int | None = None,
    workspace: int | None = None,
    version_compatible: bool = False,
    optimization_level: int | None = None,
    force: bool = False,
) -> str:
    """`dynamictrl build` with those options that differ from its defaults.

    `targets` and `backend` as on the command line; the other arguments are those of `BuildOptions` (`tile` in latents, rows
    and columns; `workspace` in bytes). None: by the target's memory, as without the option.
    """
    words = ["dynamictrl", "build", str(bundle)]
    for target in targets:
        words += ["--target", target]
    known = [TARGETS[target] for target in targets if target in TARGETS]
    usual = len(known) == len(targets) and all(target.flavours[0] == backend for target in known)
    if backend is not None and not usual:
        words += ["--backend", backend]
    for size in sizes if sizes != (default_size(manifest),) else ():
        words += ["--size", str(size)]
    if tile is not None:
        scale = manifest.vae.spatial_compression
        words += ["--tile", f"{tile[1] * scale}x{tile[0] * scale}"]
    if steps != _USUAL.steps:
        words += ["--steps", str(steps)]
    if batch is not None:
        words += ["--batch", str(batch)]
    if workspace is not None:
        words += ["--workspace", repr(workspace / 1e9)]
    if version_compatible and backend != "rtx":
        words.append("--version-compatible")
    if optimization_level is not None:
        words += ["--optimization-level", str(optimization_level)]
    if force:
        words.append("--force")
    return shlex.join(words)


def pip_command(package: str, version: str) -> str:
    """`pip install` of exactly this version."""
    return f"pip install {shlex.quote(f'{package}=={version}')}"


def target_here(machine: Machine) -> Target | None:
    """The target that this machine is; None if it has no GPU that engines are built for."""
    usable = machine.gpu is not None and machine.gpu.capability >= OLDEST
    return local_target(machine) if usable else None


def name_of(target: Target | None) -> str:
    """What `--target` takes."""
    return target.name if target is not None else "local"
