"""`dynamictrl inspect`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..bundle.manifest import MANIFEST_NAME, Manifest
from .console import json_option, print_json, results, verbose_option, working


@click.command("inspect", short_help="Show what is in a bundle.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--no-verify", is_flag=True, help="Do not check the files against their SHA-256.")
@click.option("--engine", metavar="NAME", help="Show what the compiler made of this graph, kernel by kernel.")
@click.option("--memory", type=float, metavar="GB", help="Show what clips need on a GPU with that much memory.")
@click.option("--size", "sizes", multiple=True, metavar="WxHxF", help="With --memory: the clip; may be repeated.")
@click.option("--reuse", default="off", metavar="NAME", help="With --memory: what steps reuse, as for animate.")
@json_option
@verbose_option
def command(
    bundle: Path,
    no_verify: bool,
    engine: str | None,
    memory: float | None,
    sizes: tuple[str, ...],
    reuse: str,
    as_json: bool,
) -> None:
    """Show model, graphs, weights, engines and provenance of BUNDLE, after checking every file."""
    from ..bundle.errors import UsageError
    from ..bundle.store import Bundle
    from ..runtime.reuse import parse_policy
    from ..runtime.reuse.fit import check_graphs
    from .engine_tables import engine_facts, engine_sets, show_kernels, show_sets
    from .memory_plans import memory_plans, plan_facts, show_plans

    policy = parse_policy(reuse)
    if policy is not None and memory is None:
        raise UsageError(f"--reuse {reuse} goes with --memory GB: it plans the memory of clips.")
    opened = Bundle(bundle)
    manifest = opened.manifest
    if policy is not None:
        check_graphs(manifest, str(bundle), policy, guided=True)
    plans = [] if memory is None else memory_plans(manifest, memory, sizes, policy=policy)
    if not no_verify:
        with working(as_json) as progress:
            progress.stage("Checking files", len(manifest.files))
            opened.verify(lambda name: progress.advance())
    sets = engine_sets(bundle, manifest)
    if engine is not None:
        with results():
            show_kernels(sets, engine, as_json)
        return
    facts = _facts(bundle, manifest)
    facts["verified"] = not no_verify
    facts["engine_sets"] = [engine_facts(one) for one in sets]
    if memory is not None:
        facts["memory_plans"] = [plan_facts(one) for one in plans]
    if as_json:
        print_json(facts)
    else:
        with results():
            _show(bundle, manifest, facts)
            show_sets(sets)
            if plans:
                show_plans(plans)


def _facts(bundle: Path, manifest: Manifest) -> dict[str, Any]:
    from ..runtime.scheduler import SchedulerConfig

    config = manifest.transformer
    groups: dict[str, int] = {}
    for name, entry in manifest.files.items():
        group = _group(name)
        groups[group] = groups.get(group, 0) + entry.bytes
    scheduler = SchedulerConfig.from_dict(manifest.scheduler, source=str(bundle / MANIFEST_NAME))
    return {
        "precision": manifest.label,
        "family": "CogVideoX 1.5 style" if config.patch_size_t else "CogVideoX 1.0 style",
        "width": config.width,
        "blocks": config.num_layers,
        "heads": config.num_attention_heads,
        "text_tokens": config.max_text_seq_length,
        "spatial_compression": manifest.vae.spatial_compression,
        "temporal_compression": manifest.vae.temporal_compression_ratio,
        "snr_shift_scale": scheduler.snr_shift_scale,
        "defaults": {
            "height": manifest.defaults.height,
            "width": manifest.defaults.width,
            "frames": manifest.defaults.frames,
            "fps": manifest.defaults.fps,
        },
        "bytes": groups,
        "total_bytes": manifest.total_bytes,
        "graphs": {
            name: {
                "file": graph.file,
                "bytes": manifest.files[graph.file].bytes,
                "inputs": {port.name: [port.dtype, list(port.shape)] for port in graph.inputs},
                "outputs": {port.name: [port.dtype, list(port.shape)] for port in graph.outputs},
                "weights": graph.weights,
            }
            for name, graph in manifest.graphs.items()
        },
        "block_graphs": {name: manifest.block_graphs.count(name) for name in dict.fromkeys(manifest.block_graphs)},
        "provenance": manifest.provenance,
    }


def _group(name: str) -> str:
    stem = Path(name).stem
    for prefix, group in (
        ("block_", "denoiser blocks"),
        ("modulation_", "modulation"),
        ("text_block_", "text encoder"),
        ("text_encoder", "text encoder"),
        ("vae_", "VAE"),
        ("denoiser", "denoiser, shared"),
    ):
        if name.startswith("weights/") and stem.startswith(prefix):
            return group
    return "graphs" if name.startswith("graphs/") else "other"


def _show(bundle: Path, manifest: Manifest, facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    defaults = facts["defaults"]
    console.print(
        f"[bold]{escape(str(bundle))}[/bold]: {facts['family']}, {facts['precision']}, "
        f"{facts['blocks']} blocks of width {facts['width']}, "
        f"{facts['total_bytes'] / 1e6:,.1f} MB{', every file verified' if facts['verified'] else ''}",
        soft_wrap=True,
    )
    console.print(
        f"Default clip: {defaults['width']}x{defaults['height']}, {defaults['frames']} frames at {defaults['fps']} per second"
    )
    if manifest.quantization is not None:
        mixtures = ", ".join(f"{count} by {name}" for name, count in facts["block_graphs"].items())
        console.print(
            f"Quantized to {manifest.label}, all else {manifest.precision}; blocks run {mixtures}.", soft_wrap=True
        )
    table = Table("part", "MB", title="Bytes", title_justify="left")
    for group, count in sorted(facts["bytes"].items(), key=lambda item: -item[1]):
        table.add_row(group, f"{count / 1e6:,.2f}")
    console.print(table)
    graphs = Table("graph", "KB", "inputs", "outputs", title="Graphs", title_justify="left")
    for name, graph in manifest.graphs.items():
        graphs.add_row(
            escape(name),
            f"{manifest.files[graph.file].bytes / 1e3:.1f}",
            escape(_ports(graph.inputs)),
            escape(_ports(graph.outputs)),
        )
    console.print(graphs)


def _ports(ports: Any) -> str:
    shown = [f"{port.name}[{','.join(map(str, port.shape))}]" for port in ports[:4]]
    return ", ".join(shown) + (f", … {len(ports) - 4} more" if len(ports) > 4 else "")
