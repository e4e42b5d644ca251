"""What the planner of a GPU's memory asks about policies."""

from __future__ import annotations

from ...bundle.config import TransformerConfig
from ...bundle.manifest import Manifest
from ...engines.stages import ReuseMemory
from .caches import cache_bytes
from .fit import alternatives, needed_graphs
from .policy import ReusePolicy

__all__ = ["memories", "memory_of"]


def memory_of(policy: ReusePolicy, config: TransformerConfig) -> ReuseMemory:
    """A policy's memory on a GPU."""
    return ReuseMemory(
        policy.name,
        lambda size, guided, precision: cache_bytes(
            policy, config, size, guided=guided, precision=precision, device=True
        ),
        lambda guided: needed_graphs(policy, guided=guided),
    )


def memories(policy: ReusePolicy | None, manifest: Manifest) -> tuple[ReuseMemory | None, tuple[ReuseMemory, ...]]:
    """The arguments `reuse` and `policies` of `engines.planner.plan`: this policy, and what may fit where it does not."""
    if policy is None:
        return None, ()
    config = manifest.transformer
    return memory_of(policy, config), tuple(memory_of(other, config) for other in alternatives(policy, manifest))
