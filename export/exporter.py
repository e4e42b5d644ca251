"""`export_checkpoint`: the whole way from a checkpoint folder to a bundle."""

from __future__ import annotations

import hashlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Protocol

from ..bundle.atomic import atomic_folder
from ..bundle.config import SizeDefaults, TextConfig, TransformerConfig, VaeConfig, geometry
from ..bundle.errors import InputError, UsageError
from ..bundle.manifest import FORMAT_NAME, FORMAT_VERSION, MANIFEST_NAME, Manifest, write_manifest
from ..bundle.precision import Precision
from ..runtime.scheduler import SchedulerConfig
from . import components
from .checkpoint import Checkpoint
from .convert import Converter
from .text_encoder import check_text_config
from .tokenizer import convert_tokenizer
from .workspace import Workspace

__all__ = ["Progress", "export_checkpoint"]

LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript")


class Progress(Protocol):
    """Told what is being done; bytes written advance the stage."""

    def stage(self, name: str, total: float | None = None) -> None: ...

    def rename(self, name: str) -> None: ...

    def advance(self, amount: float = 1) -> None: ...


class _Silent:
    def stage(self, name: str, total: float | None = None) -> None: ...

    def rename(self, name: str) -> None: ...

    def advance(self, amount: float = 1) -> None: ...


def export_checkpoint(
    checkpoint: Path | str,
    bundle: Path | str,
    *,
    precision: Precision = "fp32",
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    fps: int | None = None,
    reuse: bool = True,
    replace: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Exports a checkpoint folder (diffusers layout, safetensors) into the new folder `bundle`; returns its manifest.

    `height`, `width` (pixels), `frames` and `fps` set what `animate` makes by default; the graphs take every size. Without
    `reuse` the graphs of reuse between steps are left out: less to trace and to build, and every step runs whole.
    Memory is bounded by the largest tensor and the trace of one block, not by the model. The bundle appears when it is
    complete; on an error or an interruption nothing remains.

    Raises:
        InputError: the checkpoint is incomplete, damaged, a pickle or no DynamiCtrl; the output cannot be written; or
            `replace` would remove something else than a bundle.
        UsageError: a default size that the model cannot make.
    """
    progress = progress or _Silent()
    source = Checkpoint(checkpoint)
    if replace:
        _check_replaceable(Path(bundle), source.root)
    transformer = source.config("transformer", TransformerConfig)
    transformer.check()
    vae = source.config("vae", VaeConfig)
    text = check_text_config(source.json("text_encoder"), str(source.folder("text_encoder") / "config.json"))
    scheduler = _scheduler(source)
    _check_fit(source, transformer, vae, text)
    defaults = _defaults(transformer, vae, height, width, frames, fps)
    tokenizer = convert_tokenizer(source.folder("tokenizer"))

    def converter(component: str) -> Converter:
        return Converter(source.tensors(component), precision, progress.advance)

    parts = [
        components.denoiser(transformer, converter("transformer"), reuse),
        components.text_encoder(text, converter("text_encoder")),
        components.vae(source.json("vae"), converter("vae")),
    ]
    for part in parts:
        part.check()

    with atomic_folder(bundle, replace=replace) as folder:
        workspace = Workspace(folder)
        workspace.add_bytes("tokenizer.json", tokenizer.encode())
        progress.stage("weights", sum(part.nbytes for part in parts))
        for part in parts:
            part.write_weights(workspace, progress.rename)
        graphs = {name: add for part in parts for name, add in part.graphs.items()}
        progress.stage("graphs", len(graphs))
        for name, add in graphs.items():
            progress.rename(f"graph {name}")
            add(workspace)
            progress.advance()
        manifest = Manifest(
            format=FORMAT_NAME,
            version=FORMAT_VERSION,
            precision=precision,
            transformer=transformer,
            text=text,
            vae=vae,
            scheduler=scheduler,
            defaults=defaults,
            graphs=workspace.graphs,
            files=workspace.files,
            provenance=_provenance(source),
        )
        write_manifest(folder, manifest)
    return manifest


def _check_replaceable(bundle: Path, checkpoint: Path) -> None:
    """Replacing removes a folder with all that is in it: only a bundle is, and none that holds the checkpoint."""
    old, source = Path(os.path.realpath(bundle)), Path(os.path.realpath(checkpoint))
    if old == source or old in source.parents:
        raise InputError(
            f"The output {str(bundle)!r} holds the checkpoint {str(checkpoint)!r}; it is not replaced. Give another name."
        )
    if bundle.is_dir() and any(bundle.iterdir()) and not (bundle / MANIFEST_NAME).is_file():
        raise InputError(
            f"The output folder {str(bundle)!r} holds something that is not a bundle; it is not replaced. "
            "Give another name."
        )


def _scheduler(source: Checkpoint) -> dict[str, object]:
    values = source.json("scheduler", "scheduler_config.json")
    # The published program builds its scheduler from this file with the spacing replaced.
    values["timestep_spacing"] = "trailing"
    where = str(source.folder("scheduler") / "scheduler_config.json")
    SchedulerConfig.from_dict(values, source=where, error=InputError)
    return values


def _check_fit(source: Checkpoint, transformer: TransformerConfig, vae: VaeConfig, text: TextConfig) -> None:
    """Components that do not belong together are found by their configs, before the first byte is written."""
    pairs = (
        ("transformer in_channels / 2", transformer.latent_channels, "vae latent_channels", vae.latent_channels),
        ("transformer text_embed_dim", transformer.text_embed_dim, "text_encoder d_model", text.d_model),
        (
            "transformer temporal_compression_ratio",
            transformer.temporal_compression_ratio,
            "vae temporal_compression_ratio",
            vae.temporal_compression_ratio,
        ),
        ("vae in_channels", vae.in_channels, "the number of colours", 3),
        ("vae out_channels", vae.out_channels, "the number of colours", 3),
    )
    for one, a, other, b in pairs:
        if a != b:
            raise InputError(f"The components of {str(source.root)!r} do not fit: {one} is {a}, {other} is {b}.")


def _defaults(
    transformer: TransformerConfig,
    vae: VaeConfig,
    height: int | None,
    width: int | None,
    frames: int | None,
    fps: int | None,
) -> SizeDefaults:
    """The wanted default size, else the checkpoint's own (rounded down to what the model makes)."""
    step = vae.spatial_compression * transformer.patch_size
    ratio = vae.temporal_compression_ratio
    scale = vae.spatial_compression
    wanted = SizeDefaults(
        height=max(step, transformer.sample_height * scale // step * step) if height is None else height,
        width=max(step, transformer.sample_width * scale // step * step) if width is None else width,
        frames=max(1, (transformer.sample_frames - 1) // ratio * ratio + 1) if frames is None else frames,
        fps=(16 if transformer.patch_size_t else 8) if fps is None else fps,
    )
    if wanted.fps < 1:
        raise UsageError(f"{wanted.fps} frames per second are not possible; give 1 or more.")
    geometry(transformer, vae, wanted.height, wanted.width, wanted.frames)
    return wanted


def _provenance(source: Checkpoint) -> dict[str, str]:
    """Versions of what made the bundle and hashes of the checkpoint's configs; no names of the machine or of people."""
    from .. import __version__

    found = {"dynamictrl-edge": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        found[name] = metadata.version(name)
    for file in ("model_index.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json"):
        found[f"sha256 {file}"] = hashlib.sha256((source.root / file).read_bytes()).hexdigest()
    return found
