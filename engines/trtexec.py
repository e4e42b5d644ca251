"""The same builds as command lines of `trtexec`, for machines that have TensorRT without Python (many Jetson pipelines)."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from ..bundle.store import Bundle
from .engine_set import BuildOptions
from .profiles import Profile, axes_of, buildable_graphs, profile_of

__all__ = ["trtexec_script"]

_FOLDER = "engines/trtexec"


def trtexec_script(bundle: Bundle, options: BuildOptions) -> str:
    """A POSIX shell script, one command per graph: what `dynamictrl build` does with TensorRT, on the GPU that it runs on.

    (TensorRT-RTX has no need of it: its Python builder runs anywhere.)

    Engines go to `engines/trtexec/` of the bundle. Graphs with constants outside of their file are linked beside these,
    because trtexec looks for constants in the graph's own folder.
    """
    return "\n".join(_lines(bundle, options)) + "\n"


def _lines(bundle: Bundle, options: BuildOptions) -> Iterator[str]:
    manifest = bundle.manifest
    axes = axes_of(manifest, options)
    yield "set -e"
    yield f"cd {shlex.quote(str(bundle.root.resolve()))}"
    yield f"mkdir -p {_FOLDER}"
    for name in buildable_graphs(manifest):
        spec = manifest.graphs[name]
        onnx = spec.file
        if spec.weights is not None:
            onnx = f"{_FOLDER}/{Path(spec.file).name}"
            up = "../" * (len(Path(_FOLDER).parts))
            yield f"ln -sf {shlex.quote(up + spec.file)} {shlex.quote(up + spec.weights)} {_FOLDER}/"
        words = ["trtexec", f"--onnx={onnx}", f"--saveEngine={_FOLDER}/{name}.engine"]
        words += _flags(options)
        words += _shapes(profile_of(name, spec, axes))
        yield shlex.join(words)


def _flags(options: BuildOptions) -> list[str]:
    flags = ["--stronglyTyped", "--noTF32", "--profilingVerbosity=detailed", "--skipInference"]
    if options.version_compatible:
        flags += ["--versionCompatible", "--excludeLeanRuntime"]
    if options.workspace is not None:
        flags.append(f"--memPoolSize=workspace:{options.workspace / 2**20:g}")  # MiB
    if options.optimization_level is not None:
        flags.append(f"--builderOptimizationLevel={options.optimization_level}")
    return flags


def _shapes(profile: Profile) -> list[str]:
    if not profile:
        return []
    return [
        f"--{flag}Shapes=" + ",".join(f"{name}:{'x'.join(map(str, shapes[i]))}" for name, shapes in profile.items())
        for i, flag in enumerate(("min", "opt", "max"))
    ]
