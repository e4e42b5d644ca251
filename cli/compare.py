"""`dynamictrl compare`"""

from __future__ import annotations

from pathlib import Path

import click

from .console import json_option, note, print_json, results, verbose_option


@click.command("compare", short_help="Measure the difference between two clips.")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--sheet", type=click.Path(path_type=Path), help="Write a contact sheet (PNG) here.")
@json_option
@verbose_option
def command(a: Path, b: Path, sheet: Path | None, as_json: bool) -> None:
    """PSNR, SSIM and gradient magnitude similarity deviation (a perceptual distance, 0 = same) of clips A and B, frame by
    frame. A clip is a video or a folder of frames."""
    from ..bundle.atomic import atomic_file, check_output_place
    from ..runtime.media import read_clip
    from ..runtime.metrics import compare_clips, contact_sheet

    if sheet is not None:
        check_output_place(sheet)
    first, second = read_clip(a)[0], read_clip(b)[0]
    metrics = compare_clips(first, second)
    if sheet is not None:
        from PIL import Image

        picture = contact_sheet([(a.name, first), (b.name, second)])
        with atomic_file(sheet) as temporary:
            Image.fromarray(picture).save(temporary, "PNG")
    if as_json:
        print_json({"a": str(a), "b": str(b), "sheet": None if sheet is None else str(sheet), **metrics.as_json()})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("frame", "PSNR dB", "SSIM", "GMSD")
    for i, (p, s, g) in enumerate(zip(metrics.psnr, metrics.ssim, metrics.gmsd, strict=True)):
        table.add_row(str(i), f"{p:.2f}", f"{s:.4f}", f"{g:.4f}")
    table.add_row("mean", f"{metrics.psnr.mean():.2f}", f"{metrics.ssim.mean():.4f}", f"{metrics.gmsd.mean():.4f}")
    with results():
        Console().print(table)
    if sheet is not None:
        note(f"Wrote {sheet}.")
