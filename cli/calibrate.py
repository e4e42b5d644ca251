"""`dynamictrl calibrate`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..bundle.errors import DeviceError, UsageError
from ..bundle.manifest import SCHEMES, read_manifest
from .console import json_option, print_json, results, verbose_option, working

if TYPE_CHECKING:
    from ..calibration.calibrate import Calibration


@click.command("calibrate", short_help="Turn a bundle into a quantized bundle.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FOLDER",
    help="Calibration set: a folder with samples.json, or `pocket`: the pocket model's own.",
)
@click.option(
    "--precision",
    type=click.Choice(SCHEMES),
    default="int8",
    show_default=True,
    help="int8 and fp8 quantize weights and activations, int8-weights weights alone.",
)
@click.option("--steps", type=int, default=10, show_default=True, help="Denoising steps of the observed clips.")
@click.option("--guidance", type=float, default=3.0, show_default=True, help="Guidance of the observed clips.")
@click.option("--min-snr", type=float, metavar="DB", help="Keep linears in high precision until the denoiser has this.")
@click.option("--max-high-precision", type=int, metavar="N", help="Linears that may stay in high precision.")
@click.option(
    "--observe-with",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="Compute with this fp32 export of the same checkpoint: for a bf16 BUNDLE.",
)
@click.option("--keep-text-encoder", is_flag=True, help="Leave the text encoder's weights as they are.")
@click.option("--no-report", is_flag=True, help="Do not make calibration/report.html, which animates a sample twice.")
@click.option("--target", "targets", multiple=True, metavar="NAME", help="Refuse what this GPU lacks; may be repeated.")
@click.option("--threads", type=int, help="Processor cores to use. [default: all]")
@json_option
@verbose_option
def command(
    bundle: Path,
    out: Path,
    data: Path,
    precision: str,
    steps: int,
    guidance: float,
    min_snr: float | None,
    max_high_precision: int | None,
    observe_with: Path | None,
    keep_text_encoder: bool,
    no_report: bool,
    targets: tuple[str, ...],
    threads: int | None,
    as_json: bool,
) -> None:
    """Turn BUNDLE into the quantized bundle OUT, from what the model computes on the clips of a calibration set.

    Interrupted, the same command goes on where it was. Needs the extra: pip install "dynamictrl-edge[calibrate]"
    """
    _check_targets(precision, targets)
    try:
        from ..calibration.calibrate import Options, calibrate
        from ..calibration.decide import Settings
        from ..calibration.samples import POCKET, SAMPLES_NAME, pocket_samples, read_samples
    except ImportError as error:
        raise DeviceError(
            f"Calibrating needs packages that are not installed ({error}). "
            'Install them: pip install "dynamictrl-edge[calibrate]"'
        ) from error
    options = Options(
        settings=Settings(scheme=precision),  # type: ignore[arg-type]
        steps=steps,
        guidance=guidance,
        min_snr=min_snr,
        most_high_precision=max_high_precision,
        text=not keep_text_encoder,
        report=not no_report,
    )
    if str(data) == POCKET and not (data / SAMPLES_NAME).exists():
        samples = pocket_samples(read_manifest(bundle), str(bundle))
    else:
        samples = read_samples(data)
    with working(as_json) as progress:
        made = calibrate(bundle, out, samples, options, observe_with=observe_with, threads=threads, progress=progress)
    if as_json:
        print_json({"bundle": str(out), **made.facts()})
    else:
        with results():
            _show(out, made)


def _check_targets(precision: str, names: tuple[str, ...]) -> None:
    from ..engines.targets import TARGETS, capability_name, find_target

    wanted = "int8" if precision == "int8-weights" else precision
    for name in names:
        target = find_target(name)
        if wanted not in target.types:
            having = [other.name for other in TARGETS.values() if wanted in other.types]
            raise UsageError(
                f"{target.name} ({capability_name(target.capability)}) has no {wanted}; it has "
                f"{', '.join(sorted(target.types))}. Use another --precision; {wanted} is for {', '.join(having)}."
            )


def _show(out: Path, made: Calibration) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = made.facts()
    before, after = made.denoiser_bytes
    console.print(
        f"Wrote {out}: {facts['scheme']}, denoiser {after / 1e6:,.1f} MB ({after / before:.2f} of {before / 1e6:,.1f} MB).",
        markup=False,
        soft_wrap=True,
    )
    quality = ", ".join(
        f"{snr:.1f} dB at t={timestep}"
        for timestep, snr in zip(facts["timesteps"], facts["output_snr_db"], strict=True)
    )
    console.print(f"Denoiser's output against the source: {quality}.", markup=False, soft_wrap=True)
    graphs = Table("graph", "blocks", title="Block graphs", title_justify="left")
    for name, count in facts["graphs"].items():
        graphs.add_row(name, str(count))
    console.print(graphs)
    worst = sorted(facts["linears"], key=lambda row: min(row["alone_snr_db"]))[:8]
    table = Table(
        "block", "linear", "alone, dB", "alpha", "scale", "kept", title="Most sensitive", title_justify="left"
    )
    for row in worst:
        alpha = "-" if row["alpha"] is None else f"{row['alpha']:g}"
        kept = "high precision" if row["kept"] else ""
        table.add_row(str(row["block"]), row["linear"], f"{min(row['alone_snr_db']):.1f}", alpha, row["method"], kept)
    console.print(table)
