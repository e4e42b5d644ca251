"""`dynamictrl build`"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import Progress, json_option, note, print_json, results, verbose_option, working

if TYPE_CHECKING:
    from ..bundle.manifest import Manifest
    from ..engines.build import Built
    from ..engines.engine_set import BuildOptions, EngineEntry
    from ..engines.machine import Machine
    from ..engines.targets import Target

LOCAL = "local"
_UNKNOWN_MEMORY = 8_000_000_000  # bytes; for trtexec commands without a target


def _list_targets(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from rich.console import Console
    from rich.table import Table

    from ..engines.targets import TARGETS, capability_name

    table = Table("target", "GPU", "precisions", "GB", "backends", "note")
    for column in table.columns[:2]:
        column.no_wrap = True
    for target in TARGETS.values():
        table.add_row(
            target.name,
            capability_name(target.capability),
            " ".join(sorted(target.types)),
            f"{target.memory_gb:g}",
            " ".join(target.flavours),
            target.note,
        )
    with results():
        Console().print(table)
    ctx.exit()


@click.command("build", short_help="Build TensorRT engines of a bundle.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", "targets", multiple=True, metavar="NAME", help="GPU to build for; may be repeated.  [local]")
@click.option("--backend", type=click.Choice(["rtx", "tensorrt"]), help="TensorRT-RTX or TensorRT.  [by target]")
@click.option(
    "--size", "sizes", multiple=True, metavar="WxHxF", help="Clip size to take; may be repeated.  [default clip]"
)
@click.option("--tile", metavar="WxH", help="Largest VAE tile in pixels.  [by the target's memory]")
@click.option("--steps", type=int, default=100, show_default=True, help="Most steps of a schedule.")
@click.option("--batch", type=click.IntRange(1, 2), help="Guidance halves in one call.  [by the target's memory]")
@click.option("--workspace", type=float, metavar="GB", help="Scratch memory that the compiler may plan with.")
@click.option("--version-compatible", is_flag=True, help="TensorRT: engines for the lean runtime of later versions.")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="TensorRT's builder effort.")
@click.option("--workers", type=click.IntRange(1, 64), help="Compilers at work at once.  [by processor and backend]")
@click.option("--force", is_flag=True, help="Build again what is there.")
@click.option("--keep-broken", is_flag=True, help="Keep engines that break a rule (attention not fused, ...).")
@click.option("--print-trtexec", is_flag=True, help="Print a shell script of trtexec commands instead of building.")
@click.option(
    "--list-targets", is_flag=True, is_eager=True, expose_value=False, callback=_list_targets, help="List GPUs."
)
@json_option
@verbose_option
def command(
    bundle: Path,
    targets: tuple[str, ...],
    backend: str | None,
    sizes: tuple[str, ...],
    tile: str | None,
    steps: int,
    batch: int | None,
    workspace: float | None,
    version_compatible: bool,
    optimization_level: int | None,
    workers: int | None,
    force: bool,
    keep_broken: bool,
    print_trtexec: bool,
    as_json: bool,
) -> None:
    """Build engines of BUNDLE for one or more GPUs, into BUNDLE/engines.

    TensorRT-RTX builds for every RTX card on any machine, also one without a GPU, and one set serves all targets of the
    call. TensorRT builds on the GPU itself (Jetson, servers). A set that is there already is left alone.
    """
    from ..bundle.errors import UsageError
    from ..bundle.store import Bundle
    from ..engines.build import build_set, plan_builds
    from ..engines.machine import look_at_machine
    from ..engines.trtexec import trtexec_script

    opened = Bundle(bundle)
    machine = look_at_machine()
    chosen = _targets(targets, machine, print_trtexec)
    if version_compatible and backend == "rtx":
        raise UsageError("--version-compatible is TensorRT's; engines of TensorRT-RTX are for one version.")
    options = _options(
        opened.manifest, sizes, tile, chosen, steps, batch, workspace, version_compatible, optimization_level
    )
    if print_trtexec:
        with results():
            click.echo(trtexec_script(opened, options), nl=False)
        return
    flavour: Any = backend
    plans = plan_builds(opened, chosen, flavour, options, machine)
    built = []
    with working(as_json) as progress:
        for plan in plans:
            count = workers or _workers(plan.flavour)
            watcher = _watcher(progress)
            built.append(build_set(opened, plan, workers=count, force=force, keep_broken=keep_broken, watcher=watcher))
    if as_json:
        print_json({"sets": [_facts(one) for one in built]})
    else:
        with results():
            for one in built:
                _show(one)


def _targets(names: Sequence[str], machine: Machine, anywhere: bool) -> list[Target]:
    from ..engines.machine import local_target
    from ..engines.targets import find_target

    if not names and anywhere:
        return []
    listed = list(dict.fromkeys(names)) or [LOCAL]
    return [local_target(machine) if name == LOCAL else find_target(name, known=(LOCAL,)) for name in listed]


def _options(
    manifest: Manifest,
    sizes: Sequence[str],
    tile: str | None,
    targets: Sequence[Target],
    steps: int,
    batch: int | None,
    workspace: float | None,
    version_compatible: bool,
    optimization_level: int | None,
) -> BuildOptions:
    from ..bundle.errors import UsageError
    from ..engines.engine_set import BuildOptions
    from ..engines.model_facts import facts_of
    from ..engines.planner import pick_batch, pick_tile
    from ..engines.profiles import default_size, parse_size

    wanted = tuple(parse_size(size) for size in sizes) or (default_size(manifest),)
    if workspace is not None and not workspace > 0:
        raise UsageError(f"--workspace {workspace:g} is not possible: give gigabytes, more than 0.")
    facts = facts_of(manifest)
    gpus: list[dict[str, Any]] = [
        {"budget": round(1e9 * target.memory_gb), "capability": target.capability, "unified": target.unified}
        for target in targets
    ] or [{"budget": _UNKNOWN_MEMORY}]
    if tile is not None:
        latents = _tile(tile, manifest.vae.spatial_compression)
    else:  # one set serves all targets
        latents = min((pick_tile(facts, wanted, **gpu) for gpu in gpus), key=lambda tile: tile[0] * tile[1])
    return BuildOptions(
        sizes=wanted,
        tile=latents,
        steps=steps,
        batch=batch or min(pick_batch(facts, wanted, **gpu) for gpu in gpus),
        workspace=None if workspace is None else round(1e9 * workspace),
        version_compatible=version_compatible,
        optimization_level=optimization_level,
    )


def _tile(text: str, compression: int) -> tuple[int, int]:
    from ..bundle.errors import UsageError

    found = re.fullmatch(r"(\d{1,6})[xX×](\d{1,6})", text.strip())
    if found is None:
        raise UsageError(f"--tile {text!r} is not a size. Write WIDTHxHEIGHT in pixels, for example 256x256.")
    width, height = map(int, found.groups())
    if min(width, height) < compression or width % compression or height % compression:
        raise UsageError(f"--tile {text} is not possible: both must be multiples of {compression}.")
    return height // compression, width // compression


def _workers(flavour: str) -> int:
    """TensorRT times kernels on the GPU, which two builds at once would disturb; each build may need 3 GB."""
    from ..runtime.measure import cores

    return 1 if flavour == "tensorrt" else max(1, min(4, cores()))


def _watcher(progress: Progress) -> Any:
    from ..engines.build import Watcher

    class Bars(Watcher):
        def started(self, key: str, graphs: Sequence[str]) -> None:
            if graphs:
                progress.stage(f"Building {len(graphs)} engines", len(graphs))

        def progress(self, graph: str, phase: str, done: int, total: int) -> None:
            share = f" {100 * done // total}%" if total else ""
            progress.rename(f"{graph}: {phase[:40]}{share}")

        def finished(self, graph: str, entry: EngineEntry) -> None:
            progress.advance()

    return Bars()


def _facts(built: Built) -> dict[str, Any]:
    import msgspec

    facts: dict[str, Any] = msgspec.to_builtins(built.engines)
    return {**facts, "folder": str(built.folder), "built": list(built.fresh), "seconds": round(built.seconds, 3)}


def _show(built: Built) -> None:
    from rich.console import Console
    from rich.table import Table

    engines = built.engines
    if not built.fresh:
        note(f"Nothing to do: {built.folder} is complete ({len(engines.engines)} engines). --force builds it again.")
        return
    table = Table("", "MB", "kernels", "fused", "work MB", "seconds", caption="work: memory of one call")
    table.columns[0].no_wrap = True
    for name, entry in engines.engines.items():
        table.add_row(
            name,
            f"{entry.bytes / 1e6:.1f}",
            str(entry.kernels),
            "attention" if entry.fused_attention else "",
            f"{entry.activation_bytes / 1e6:,.1f}",
            f"{entry.seconds:.1f}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"{len(built.fresh)} engines in {built.seconds:.1f} s: {built.folder}", highlight=False, soft_wrap=True
    )
