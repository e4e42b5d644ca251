"""Engine sets as `dynamictrl inspect` shows them: what was built, whether it fits this machine, what the compiler did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..bundle.errors import BundleError, UsageError
from ..bundle.manifest import Manifest
from ..engines.engine_set import ENGINES_FOLDER, EngineSet, read_engine_set
from ..engines.fit import check_fit
from ..engines.machine import look_at_machine
from ..engines.mismatch import Request
from ..engines.profiles import default_size
from ..engines.report import LayerReport, describe, read_report

__all__ = ["FoundSet", "engine_facts", "engine_sets", "show_kernels", "show_sets"]


@dataclass(frozen=True)
class FoundSet:
    """A folder under `engines/`: its description (None: unreadable) and whether it fits this machine and the default clip."""

    folder: Path
    engines: EngineSet | None
    fits: bool
    reason: str


def engine_sets(bundle: Path, manifest: Manifest) -> list[FoundSet]:
    """All sets of a bundle, by name."""
    root = bundle / ENGINES_FOLDER
    folders = sorted(path for path in root.glob("[!.]*") if (path / "engines.json").is_file()) if root.is_dir() else []
    if not folders:
        return []
    machine = look_at_machine()
    found = []
    for folder in folders:
        try:
            engines = read_engine_set(folder)
        except BundleError as error:
            found.append(FoundSet(folder, None, False, str(error)))
            continue
        size = engines.options.sizes[0] if engines.options.sizes else default_size(manifest)
        fit = check_fit(engines, folder, manifest, machine, Request(size=size, batch=engines.options.batch, steps=1))
        found.append(FoundSet(folder, engines, fit.ok, fit.reason))
    return found


def engine_facts(found: FoundSet) -> dict[str, Any]:
    """For `--json`: the set's description, and whether it fits."""
    import msgspec

    described: dict[str, Any] = {} if found.engines is None else msgspec.to_builtins(found.engines)
    return {**described, "folder": str(found.folder), "fits": found.fits, "reason": found.reason}


def show_sets(sets: list[FoundSet]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for found in sets:
        engines = found.engines
        console.print()
        console.print(f"[bold]Engines {escape(found.folder.name)}[/bold]", soft_wrap=True)
        if engines is not None:
            sizes = ", ".join(map(str, engines.options.sizes))
            console.print(f"for {', '.join(engines.targets)}; clips up to {sizes}; {engines.library_version}")
        console.print("fits this machine" if found.fits else escape(f"does not run here: {found.reason}"))
        if engines is None:
            continue
        table = Table("", "MB", "kernels", "products", "fused", "work MB", caption="work: memory of one call")
        table.columns[0].no_wrap = True
        for name, entry in engines.engines.items():
            table.add_row(
                escape(name),
                f"{entry.bytes / 1e6:.1f}",
                str(entry.kernels),
                escape(_products(found.folder / entry.report)),
                "attention" if entry.fused_attention else "",
                f"{entry.activation_bytes / 1e6:,.1f}",
            )
        console.print(table)
        for name, entry in engines.engines.items():
            for reason in entry.broken:
                console.print(escape(f"{name}: {reason}"), highlight=False)


def _products(path: Path) -> str:
    """What is multiplied in which type; what is wrong with the report if it cannot be read."""
    try:
        return describe(read_report(path))[1].partition(": ")[2]
    except BundleError as error:
        return str(error)


def show_kernels(sets: list[FoundSet], graph: str, as_json: bool) -> None:
    """The layer report of one graph in every set that has it. `UsageError` if none has."""
    reports = [
        (found, read_report(found.folder / found.engines.engines[graph].report))
        for found in sets
        if found.engines is not None and graph in found.engines.engines
    ]
    if not reports:
        known = sorted({name for found in sets if found.engines is not None for name in found.engines.engines})
        listed = (
            f"There are {', '.join(known)}." if known else "The bundle has none: dynamictrl build BUNDLE --target NAME"
        )
        raise UsageError(f"There is no engine {graph!r}. {listed}")
    if as_json:
        import msgspec

        from .console import print_json

        print_json({found.folder.name: msgspec.to_builtins(report) for found, report in reports})
        return
    for found, report in reports:
        click.echo(found.folder.name)
        for line in describe(report):
            click.echo(f"  {line}")
        _show_table(report)


def _show_table(report: LayerReport) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("kernel", "kind", "inputs", "outputs", "graph nodes")
    for kernel in report.kernels:
        table.add_row(
            escape(kernel.name[:60]),
            kernel.kind,
            escape(" ".join(dict.fromkeys(operand.dtype for operand in kernel.inputs))),
            escape(" ".join(dict.fromkeys(operand.dtype for operand in kernel.outputs))),
            escape(", ".join(kernel.onnx[:4]) + (f" and {len(kernel.onnx) - 4} more" if len(kernel.onnx) > 4 else "")),
        )
    Console().print(table)
