"""From a policy to what every step does, fixed before the loop: nothing is read back from the device.

An adaptive policy is decided step by step with the same rules, from a number that the loop measures.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...bundle.config import TransformerConfig
from .policy import ReusePolicy

__all__ = ["Decider", "Plan", "StepPlan", "flop_fraction", "make_plan", "step_flops", "table_changes"]

Trunk = Literal["full", "tokens", "reused"]


@dataclass(frozen=True)
class StepPlan:
    """One step.

    trunk: full: all blocks for all tokens; tokens: all blocks for the active tokens; reused: no blocks.
    both: both guidance halves have a prediction; else the conditional one has, and the difference is an earlier one's.
        Without guidance there is one half, and `both` is True.
    keep: keys and values are kept for a later step.
    """

    trunk: Trunk
    both: bool
    keep: bool = False

    @property
    def full(self) -> bool:
        """Exactly what is done without reuse."""
        return self.trunk == "full" and self.both

    @property
    def kind(self) -> str:
        """full, guidance, tokens, tokens+guidance, trunk or trunk+guidance: what was reused."""
        reused = {"full": [], "tokens": ["tokens"], "reused": ["trunk"]}[self.trunk] + (
            [] if self.both else ["guidance"]
        )
        return "+".join(reused) or "full"


@dataclass(frozen=True)
class Plan:
    """What the steps do, in order."""

    policy: ReusePolicy
    steps: tuple[StepPlan, ...]

    @property
    def reused(self) -> int:
        """How many steps are not full."""
        return sum(not step.full for step in self.steps)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(step.kind for step in self.steps)

    def summary(self) -> str:
        """For people: "25 steps with --reuse trunk: 15 full, 10 trunk"."""
        counts = Counter(self.kinds)
        listed = ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts, key=lambda kind: (kind != "full", kind)))
        return f"{len(self.steps)} steps with --reuse {self.policy.name}: {listed}"


class Decider:
    """Decides one step after the other. `reset()` before another clip."""

    def __init__(self, policy: ReusePolicy, steps: int, *, guided: bool):
        self._policy, self._steps, self._guided = policy, steps, guided
        self.reset()

    def reset(self) -> None:
        self._index = 0
        self._run = 0  # steps in a row that were not full
        self._since_refresh = 0  # steps since all blocks ran for all tokens
        self._since_both = 0  # steps since both halves were computed
        self._change = 0.0
        self._both = True  # of the last step in which blocks ran

    def next(self, change: float = math.inf) -> StepPlan:
        """The next step; `change` of the first block's input since the step before, for policies with a threshold."""
        policy, index = self._policy, self._index
        self._index += 1
        self._since_refresh += 1
        self._since_both += 1
        self._change += change
        whole = index < max(1, policy.warmup) or index >= self._steps - policy.final or self._run >= policy.longest_run
        trunk: Trunk = "full" if whole else self._trunk()
        if trunk == "reused":
            both = self._both  # a residual stands for the halves that it was made of
        else:
            due = whole or self._since_both >= policy.guidance_period
            both = not self._guided or not policy.reuses_guidance or (due and trunk == "full")
            self._both, self._change = both, 0.0
            self._since_both = 0 if both else self._since_both
        step = StepPlan(trunk, both)
        self._since_refresh = 0 if trunk == "full" else self._since_refresh
        self._run = 0 if step.full else self._run + 1
        return step

    def _trunk(self) -> Trunk:
        policy = self._policy
        if policy.reuses_tokens and self._since_refresh >= policy.token_period:
            return "full"
        if policy.trunk_threshold > 0 and self._change < policy.trunk_threshold:
            return "reused"
        if policy.trunk_period > 1 and self._since_refresh % policy.trunk_period:
            return "reused"
        return "tokens" if policy.reuses_tokens else "full"


def make_plan(policy: ReusePolicy, steps: int, *, guided: bool, changes: Sequence[float] | None = None) -> Plan:
    """The plan of a loop of `steps` steps.

    `changes`: of the first block's input from step to step (`table_changes`), for policies with a threshold.

    Raises:
        ValueError: the policy is adaptive (it has no plan before the loop), or has a threshold and `changes` are missing.
    """
    if policy.adaptive:
        raise ValueError("an adaptive policy is decided during the loop")
    if changes is None:
        if policy.trunk_threshold > 0:
            raise ValueError("a policy with a threshold needs the changes from step to step")
        changes = [math.inf] * steps
    decider = Decider(policy, steps, guided=guided)
    return Plan(policy, with_keeping([decider.next(change) for change in changes]))


def with_keeping(steps: Sequence[StepPlan]) -> tuple[StepPlan, ...]:
    """The same steps; those full ones keep keys and values on which a token step stands."""
    kept: list[StepPlan] = []
    wanted = False
    for step in reversed(steps):
        if step.trunk == "full":
            kept.append(dataclasses.replace(step, keep=wanted))
            wanted = False
        else:
            wanted |= step.trunk == "tokens"
            kept.append(step)
    return tuple(reversed(kept))


def table_changes(table: np.ndarray) -> list[float]:
    """How far the first block's video norm moves from step to step: mean |now - before| over mean |before| of its scale and
    shift. `table`: modulation of all blocks, [T, layers, rows, D]. The first value is infinite."""
    rows = table[:, 0, :2].astype(np.float64)  # [T, 2, D]: scale and shift of the first norm
    moved = np.abs(np.diff(rows, axis=0)).mean((1, 2))
    size = np.abs(rows[:-1]).mean((1, 2))
    return [math.inf, *(moved / np.maximum(size, 1e-12)).tolist()]


def flop_fraction(steps: Sequence[StepPlan], config: TransformerConfig, tokens: int, active: int, halves: int) -> float:
    """Floating-point operations of these steps over those of as many full ones; linears and attention count.

    tokens: video tokens; active: those that run in a token step; halves: 2 under guidance, else 1.
    """
    done = sum(step_flops(step, config, tokens, active, halves) for step in steps)
    full = step_flops(StepPlan("full", True), config, tokens, active, halves)
    return done / (full * len(steps))


def step_flops(step: StepPlan, config: TransformerConfig, tokens: int, active: int, halves: int) -> int:
    """Floating-point operations of one step; the arguments are those of `flop_fraction`."""
    d, text = config.width, config.max_text_seq_length
    count = halves if step.both else 1
    patches = 2 * tokens * config.patch_elements * d  # stem, and head of each half
    total = patches * (1 + count)
    if step.trunk != "reused":
        queries, keys = (active if step.trunk == "tokens" else tokens) + text, tokens + text
        total += count * config.num_layers * (24 * queries * d * d + 4 * queries * keys * d)
    return total
