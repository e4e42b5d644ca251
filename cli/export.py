"""`dynamictrl export`"""

from __future__ import annotations

from pathlib import Path

import click

from ..bundle.errors import DeviceError, InputError
from ..bundle.manifest import MANIFEST_NAME
from ..bundle.precision import PRECISIONS
from .console import json_option, note, print_json, verbose_option, working


@click.command("export", short_help="Turn a checkpoint into a bundle.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True, help="Format of the weights."
)
@click.option("--height", type=int, help="Default height of clips, pixels. [default: the checkpoint's]")
@click.option("--width", type=int, help="Default width of clips, pixels. [default: the checkpoint's]")
@click.option("--frames", type=int, help="Default number of frames. [default: the checkpoint's]")
@click.option(
    "--reuse/--no-reuse",
    default=True,
    show_default=True,
    help="With the graphs for `animate --reuse`; without them exports and engine builds take less time.",
)
@click.option("--force", is_flag=True, help="Replace BUNDLE if it is one already.")
@json_option
@verbose_option
def command(
    checkpoint: Path,
    bundle: Path,
    precision: str,
    height: int | None,
    width: int | None,
    frames: int | None,
    reuse: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Turn CHECKPOINT, a folder in the diffusers layout, into BUNDLE, a folder that the runtime animates from.

    Only safetensors are read. Needs the extra: pip install "dynamictrl-edge[export]"
    """
    if not force and (bundle / MANIFEST_NAME).is_file():
        raise InputError(f"{str(bundle)!r} is a bundle already. Give another name, or replace it with --force.")
    try:
        from ..export.exporter import export_checkpoint
    except ImportError as error:
        raise DeviceError(
            f'Exporting needs packages that are not installed ({error}). Install them: pip install "dynamictrl-edge[export]"'
        ) from error
    with working(as_json) as progress:
        manifest = export_checkpoint(
            checkpoint,
            bundle,
            precision=precision,  # type: ignore[arg-type]
            height=height,
            width=width,
            frames=frames,
            reuse=reuse,
            replace=force,
            progress=progress,
        )
    if as_json:
        print_json(
            {
                "bundle": str(bundle),
                "precision": manifest.precision,
                "files": len(manifest.files),
                "bytes": manifest.total_bytes,
                "graphs": list(manifest.graphs),
            }
        )
    else:
        note(
            f"Wrote {bundle}: {len(manifest.graphs)} graphs, {manifest.total_bytes / 1e6:.1f} MB, {manifest.precision}."
        )
