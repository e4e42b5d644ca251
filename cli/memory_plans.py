"""What a clip needs on a GPU, as `dynamictrl inspect --memory` and `dynamictrl doctor --bundle` show it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..bundle.errors import UsageError
from ..bundle.manifest import Manifest
from ..engines.engine_set import ClipSize
from ..engines.model_facts import facts_of
from ..engines.planner import PRESETS, MemoryPlan, plan
from ..engines.profiles import default_size, parse_size
from ..engines.targets import Capability
from ..runtime.reuse.device import memories
from ..runtime.reuse.policy import ReusePolicy

__all__ = ["memory_plans", "plan_facts", "show_plans"]


def memory_plans(
    manifest: Manifest,
    budget: float,
    sizes: Sequence[str] = (),
    *,
    capability: Capability | None = None,
    unified: bool = False,
    policy: ReusePolicy | None = None,
) -> list[MemoryPlan]:
    """One plan per size for `budget` GB (1e9 bytes); without sizes, for the bundle's own and the presets it can make.
    `policy`: what is reused between denoising steps.

    Raises:
        UsageError: the budget is not positive, or a size that was asked for is not possible.
    """
    if not budget > 0:
        raise UsageError(f"--memory {budget:g} is not possible: give gigabytes, more than 0.")
    facts = facts_of(manifest)
    wanted: list[ClipSize] = [parse_size(size) for size in sizes]
    reuse, policies = memories(policy, manifest)
    made = []
    for size in wanted or dict.fromkeys((default_size(manifest), *PRESETS)):
        try:
            made.append(
                plan(
                    facts,
                    size,
                    budget=round(1e9 * budget),
                    capability=capability,
                    unified=unified,
                    reuse=reuse,
                    policies=policies,
                )
            )
        except UsageError:
            if wanted:
                raise  # a preset that the model cannot make is left out
    return made


def plan_facts(made: MemoryPlan) -> dict[str, Any]:
    """For `--json`; sizes in bytes."""
    return {
        "size": str(made.size),
        "precision": made.precision,
        "budget": made.budget,
        "fits": made.fits,
        "peak": made.peak,
        "smallest_budget": made.smallest_budget,
        "reuse": made.reuse,
        "caches": made.caches,
        "batch": made.batch,
        "resident_blocks": made.resident_blocks,
        "tile": [made.tile.rows, made.tile.columns],
        "reason": made.reason,
        "stages": {stage.name: {item.name: item.bytes for item in stage.items} for stage in made.stages},
    }


def show_plans(plans: Sequence[MemoryPlan]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for made in plans:
        console.print()
        console.print(made.reason, highlight=False)
        table = Table("stage", "MB", "what takes most")
        for stage in made.stages:
            largest = sorted(stage.items, key=lambda item: -item.bytes)[:3]
            what = ", ".join(f"{item.name} {item.bytes / 1e6:,.0f}" for item in largest)
            table.add_row(stage.name, f"{stage.total / 1e6:,.0f}", what)
        console.print(table)
    console.print("Estimates; no GPU has run this yet.")
