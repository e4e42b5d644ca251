"""`dynamictrl bench`"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ..bundle.errors import InputError, UsageError
from .console import Bars, json_option, note, print_json, results, verbose_option, working


@click.command("bench", short_help="Measure how long a clip's stages, steps and blocks take here.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--size", metavar="WxHxF", help="Clip to make: pixels and frames, as 1024x576x37. [default: the bundle's]"
)
@click.option("--steps", default=25, show_default=True, help="Denoising steps.")
@click.option("--guidance", default=3.0, show_default=True, help="Guidance scale; 1 turns guidance off.")
@click.option("--rounds", default=3, show_default=True, help="Clips that are measured.")
@click.option("--warmup", default=1, show_default=True, help="Clips that are made before.")
@click.option("--backend", type=click.Choice(["auto", "onnxruntime", "tensorrt"]), default="auto", show_default=True)
@click.option(
    "--memory",
    type=float,
    help="Budget in GB, of main memory or the GPU's. [default: no limit; on a GPU, what is free]",
)
@click.option(
    "--cuda-graphs", is_flag=True, help="On a GPU, launch each step as one CUDA graph, where all weights stay."
)
@click.option("--threads", type=int, help="Processor cores to use. [default: all]")
@click.option("--reuse", default="off", show_default=True, help="What steps reuse, as for animate.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Also write the JSON into this file.")
@json_option
@verbose_option
def command(
    bundle: Path,
    size: str | None,
    steps: int,
    guidance: float,
    rounds: int,
    warmup: int,
    backend: str,
    memory: float | None,
    cuda_graphs: bool,
    threads: int | None,
    reuse: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure a clip on this machine: every stage, step and block, memory, and the share of what the machine can compute.

    Photo and pose clip are drawn; nothing else is needed. Every round is made as for a new prompt and schedule.
    """
    from ..bundle.atomic import atomic_file
    from ..engines.profiles import parse_size
    from ..runtime import Animator
    from ..runtime.bench import BenchSettings, bench
    from ..runtime.reuse import parse_policy

    parse_policy(reuse)  # before a bundle is opened
    clip = None if size is None else parse_size(size)
    settings = BenchSettings(
        size=None if clip is None else (clip.width, clip.height, clip.frames),
        steps=steps,
        guidance=guidance,
        rounds=rounds,
        warmup=warmup,
        reuse=reuse,
        threads=threads,
    )
    if out is not None:
        _check_out(out, bundle)
    opened = Animator.from_bundle(
        bundle, backend=backend, memory=memory, threads=threads, cache=False, cuda_graphs=cuda_graphs
    )
    with contextlib.closing(opened) as animator, working(as_json) as progress:
        found = bench(animator, settings, Bars(progress))
    if out is not None:
        with atomic_file(out) as temporary:
            temporary.write_text(json.dumps(found, indent=2) + "\n")
    for text in found["notices"]:
        note(f"Note: {text}")
    if as_json:
        print_json(found)
    else:
        with results():
            _show(found)


def _check_out(out: Path, bundle: Path) -> None:
    """Refuses a file that cannot be written or that would damage the bundle, before any work is done."""
    from ..bundle.atomic import check_output_place

    check_output_place(out)
    if out.is_dir():
        raise InputError(f"--out {str(out)!r} is an existing folder; give a file name like bench.json.")
    if Path(os.path.realpath(bundle)) in Path(os.path.realpath(out)).parents:
        raise UsageError(f"--out {str(out)!r} lies in the bundle. Give another name.")


def _show(found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console, settings, figures = Console(), found["settings"], found["figures"]
    loop = figures["loop_seconds"]

    def say(text: str) -> None:
        console.print(escape(text), soft_wrap=True, highlight=False)

    threads = f", {settings['threads']} threads" if figures["memory"]["device_peak_bytes"] is None else ""
    reuse = "" if settings["reuse"] == "off" else f", --reuse {settings['reuse']}"
    say(
        f"{settings['bundle']}, {settings['precision']}: {settings['size']}, {settings['steps']} steps, guidance "
        f"{settings['guidance']:g}{reuse}, {settings['backend']}{threads}. Median of {settings['rounds']} (min to max)."
    )
    table = Table("stage", "seconds", "", "share")
    whole = figures["stage_seconds"]["whole"]["median"]
    for stage, spread in figures["stage_seconds"].items():
        table.add_row(stage, f"{spread['median']:.3f}", _range(spread, 1, 3), f"{spread['median'] / whole:.0%}")
    console.print(table)
    table = Table("in the loop", "ms", "")
    for name in ("step", "stem", "block", "head"):
        table.add_row(f"a {name}", f"{1e3 * loop[name]['median']:.2f}", _range(loop[name], 1e3, 2))
    for number, spread in enumerate(loop["blocks"]):
        table.add_row(f"block {number}", f"{1e3 * spread['median']:.2f}", _range(spread, 1e3, 2))
    for number, spread in enumerate(loop["steps"]):
        kind = "" if spread["kind"] == "full" else f", {spread['kind']}"
        table.add_row(f"step {number + 1}{kind}", f"{1e3 * spread['median']:.2f}", _range(spread, 1e3, 2))
    console.print(table)
    for text in _sentences(figures):
        say(text)


def _range(spread: Mapping[str, float], factor: float, digits: int) -> str:
    return f"{factor * spread['min']:.{digits}f} to {factor * spread['max']:.{digits}f}"


HALVES = {
    "one": "A block's figure is one call; there is one guidance half.",
    "together": "A block's figure is one call, for both guidance halves together.",
    "in turn": "A block's figure is one call, for one guidance half; the other follows.",
    "side by side": "A block's figure is one call, for one guidance half on its share of the cores; the other runs beside it.",
}


def _sentences(figures: Mapping[str, Any]) -> list[str]:
    memory, copies = figures["memory"], figures["copies"]
    texts = [HALVES[figures["halves"]]]
    if figures["warmup_seconds"]:
        texts.append(f"The first clip, which loads everything, took {figures['warmup_seconds'][0]:.3f} s.")
    peak = f"Memory: {memory['process_peak_bytes'] / 1e6:,.0f} MB at most in this process"
    if memory["device_peak_bytes"] is not None:
        peak += f", {memory['device_peak_bytes'] / 1e6:,.1f} MB of the GPU's arena"
    texts.append(f"{peak}; planned were {memory['planned_peak_bytes'] / 1e6:,.0f} MB.")
    if copies is not None:
        texts.append(_of_copies(copies))
    speed = f"Denoising computes {figures['gflops']:,.1f} GFLOP/s"
    if figures["ceiling"] is None:
        texts.append(f"{speed}; its share of what the machine can is {figures['ceiling_note']}.")
    else:
        texts.append(
            f"{speed}, {figures['share_of_ceiling']:.0%} of {figures['ceiling']['gflops']:,.1f}: the {figures['ceiling_note']}."
        )
    if figures["reuse"] is not None:
        texts.append(figures["reuse"]["summary"])
    return texts


def _of_copies(copies: Mapping[str, Any]) -> str:
    if copies["hidden_share"] is None:
        return "No weights were copied: all blocks were in the GPU's memory from the clip before."
    return (
        f"{copies['count']:g} copies of weights, {copies['bytes'] / 1e6:,.1f} MB at "
        f"{copies['bytes_per_second'] / 1e9:,.1f} GB/s, took {copies['seconds']:.3f} s, of which "
        f"{copies['hidden_share']:.0%} while blocks computed."
    )
