"""What a loop with reuse did, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .plan import Plan

__all__ = ["ReuseReport"]


@dataclass(frozen=True)
class ReuseReport:
    """plan: what every step did. cache_bytes: buffers beside those of a loop without reuse. flop_fraction: operations done
    over those of all steps in full. active_tokens of `tokens` video tokens ran in token steps."""

    plan: Plan
    cache_bytes: int
    flop_fraction: float
    active_tokens: int
    tokens: int

    def as_json(self) -> dict[str, Any]:
        return {
            "policy": self.plan.policy.as_json(),
            "steps": list(self.plan.kinds),
            "cache_bytes": self.cache_bytes,
            "flop_fraction": round(self.flop_fraction, 4),
            "active_tokens": self.active_tokens,
            "tokens": self.tokens,
            "summary": self.summary(),
        }

    def summary(self) -> str:
        """One sentence."""
        return (
            f"{self.plan.summary()}; {self.flop_fraction:.0%} of the operations, "
            f"{self.cache_bytes / 1e6:,.1f} MB of caches."
        )

    def notices(self) -> Iterator[str]:
        """What the person who asked should know: that nothing was reused, and why."""
        if self.plan.reused:
            return
        policy, steps = self.plan.policy, len(self.plan.steps)
        always = min(steps, max(1, policy.warmup) + policy.final)
        if always < steps:
            yield f"--reuse {policy.name} reused nothing: none of its settings applied to this clip."
        else:
            yield (
                f"--reuse {policy.name} reused nothing: of {steps} steps, the first {max(1, policy.warmup)} and the last "
                f"{policy.final} are always full. Take more --steps, or fewer of these: "
                f"--reuse {policy.name},warmup=1,final=0."
            )
