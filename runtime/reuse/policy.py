"""Reuse policies as data: what may be reused and how often. `POLICIES` names those that `--reuse` knows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...bundle.errors import UsageError

__all__ = ["CACHES", "CHANGES", "CHOICES", "OFF", "POLICIES", "ReusePolicy", "parse_policy"]

OFF = "off"
CHOICES = ("pose", "even", "random")
CHANGES = ("table", "stem")
CACHES = ("compute", "int8")


@dataclass(frozen=True)
class ReusePolicy:
    """What is reused between steps, and how often. A period of 1 reuses nothing; so does a threshold of 0.

    warmup, final: this many steps at the start and at the end are computed in full.
    longest_run: at most this many steps in a row are not full.
    guidance_period: both guidance halves are computed in every such step only; between, the difference between the halves
        is kept, times `guidance_decay` per step. Where tokens are reused, only the conditional half is computed.
    trunk_period: all blocks run in every such step only; between, what they added to the stem's tokens is added again.
    trunk_order: 0: as it was; 1: extrapolated on a line through the last two, in half the logarithm of the
        signal-to-noise ratio.
    trunk_threshold: instead of a period: the blocks run once the input of the first has changed by this much since
        (the changes of the steps added up, each relative to the step before).
    trunk_change: where that change is read: in the modulation "table" (known before the loop), or in the "stem"'s tokens
        of the clip at hand (one number is read back in every step).
    token_period: all tokens go through the blocks in every such step only; between, the active ones do, and attend to the
        keys and values that the others had.
    token_share: the share of the video tokens that is active.
    token_choice: "pose": those nearest to the drawn skeleton; "even": spread evenly; "random": by lot. The last two are
        for comparison.
    token_changed: this share of the active tokens are, instead, those of the others whose prediction changed most between the
        last two steps in which all tokens ran. They are chosen anew in every step that keeps keys and values, for which the
        conditional prediction is read back after every step in which all tokens ran.
    token_cache: how keys and values are kept: "compute": in the format of the matrix products; "int8": rounded, with a scale
        per head and block.

    Raises:
        UsageError: a value that is not possible, or two that contradict each other; the text names the accepted ones.
    """

    name: str = "custom"
    warmup: int = 3
    final: int = 1
    longest_run: int = 4
    guidance_period: int = 1
    guidance_decay: float = 1.0
    trunk_period: int = 1
    trunk_order: int = 0
    trunk_threshold: float = 0.0
    trunk_change: str = "table"
    token_period: int = 1
    token_share: float = 0.5
    token_choice: str = "pose"
    token_changed: float = 0.0
    token_cache: str = "compute"

    def __post_init__(self) -> None:
        for name in ("warmup", "final"):
            self._whole(name, 0, 1000)
        for name in ("longest_run", "guidance_period", "trunk_period", "token_period"):
            self._whole(name, 1, 1000)
        self._whole("trunk_order", 0, 1)
        self._number("guidance_decay", 0.0, 1.0)
        self._number("trunk_threshold", 0.0, 100.0)
        self._number("token_share", 0.0, 1.0)
        self._number("token_changed", 0.0, 1.0)
        self._one_of("trunk_change", CHANGES)
        self._one_of("token_choice", CHOICES)
        self._one_of("token_cache", CACHES)
        if self.token_share == 0:
            raise self._refusal("token_share", "a number above 0, up to 1")
        self._check_together()

    def _check_together(self) -> None:
        for name in ("guidance_period", "trunk_period", "token_period"):
            period = getattr(self, name)
            if period - 1 > self.longest_run:
                raise UsageError(
                    f"--reuse: {name}={period} leaves {period - 1} steps in a row that are not full, more than "
                    f"longest_run={self.longest_run} allows. Give longest_run={period - 1}, or a shorter period."
                )
        if self.trunk_period > 1 and self.trunk_threshold > 0:
            raise UsageError(
                f"--reuse: trunk_period={self.trunk_period} and trunk_threshold={self.trunk_threshold:g} contradict each "
                "other: the blocks run either at fixed steps or after enough change. Give one of them."
            )
        if self.reuses_tokens and self.trunk_period >= self.token_period:
            raise UsageError(
                f"--reuse: trunk_period={self.trunk_period} leaves no step for token_period={self.token_period}: the second "
                "must be larger, for example "
                f"trunk_period={self.trunk_period},token_period={2 * self.trunk_period}."
            )
        if self.reuses_tokens and self.adaptive:
            raise UsageError(
                "--reuse: trunk_change=stem and token_period contradict each other: whether keys and values must be kept is "
                "decided before the loop. Use trunk_change=table, or token_period=1."
            )

    @property
    def reuses_guidance(self) -> bool:
        return self.guidance_period > 1

    @property
    def reuses_trunk(self) -> bool:
        return self.trunk_period > 1 or self.trunk_threshold > 0

    @property
    def reuses_tokens(self) -> bool:
        return self.token_period > 1

    @property
    def follows_changes(self) -> bool:
        """Whether active tokens are chosen during the loop."""
        return self.reuses_tokens and self.token_changed > 0

    @property
    def adaptive(self) -> bool:
        """Whether steps are decided during the loop."""
        return self.trunk_threshold > 0 and self.trunk_change == "stem"

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def _refusal(self, name: str, accepted: str) -> UsageError:
        return UsageError(f"--reuse: {name}={getattr(self, name)!r} is not possible: give {accepted}.")

    def _whole(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._refusal(name, f"a whole number from {least} to {most}")

    def _number(self, name: str, least: float, most: float) -> None:
        value = getattr(self, name)
        real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not real or not least <= value <= most:
            raise self._refusal(name, f"a number from {least:g} to {most:g}")

    def _one_of(self, name: str, values: tuple[str, ...]) -> None:
        if getattr(self, name) not in values:
            raise self._refusal(name, f"one of {', '.join(values)}")


# The first two are presets, picked by the rule of benchmarks/reuse.py (a test holds them to its receipt); the others are
# named after what they do.
POLICIES: Mapping[str, ReusePolicy] = {
    policy.name: policy
    for policy in (
        ReusePolicy("quality", trunk_period=2, trunk_order=1, warmup=2),
        ReusePolicy("balanced", trunk_period=3, trunk_order=1),
        ReusePolicy("guidance", guidance_period=2),
        ReusePolicy("trunk", trunk_period=2),
        ReusePolicy("trunk-linear", trunk_period=2, trunk_order=1),
        ReusePolicy("table", trunk_threshold=0.1),
        ReusePolicy("adaptive", trunk_threshold=0.2, trunk_change="stem"),
        ReusePolicy("tokens", token_period=4, token_share=0.4),
        ReusePolicy("combined", guidance_period=4, trunk_period=2, token_period=4, token_share=0.4),
    )
}


def parse_policy(text: str) -> ReusePolicy | None:
    """Reads `off`, a policy's name, or a name with changes: "trunk,trunk_period=3,warmup=2". None: off.

    Raises:
        UsageError: no such policy or setting (the text lists them), or a value that `ReusePolicy` refuses.
    """
    name, *changes = (part.strip() for part in text.split(","))
    if name == OFF:
        if changes:
            raise UsageError(f"--reuse {text!r}: 'off' has no settings. Start with one of {', '.join(POLICIES)}.")
        return None
    if name not in POLICIES:
        raise UsageError(f"--reuse {name!r} is not known; use one of {', '.join((OFF, *POLICIES))}.")
    values: dict[str, Any] = {}
    base = POLICIES[name]
    kinds = {key: type(default) for key, default in base.as_json().items() if key != "name"}
    for change in changes:
        key, equals, value = change.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or key not in kinds:
            raise UsageError(f"--reuse: {change!r} is no setting; write key=value, with one of {', '.join(kinds)}.")
        if key in values:
            raise UsageError(f"--reuse: {key} was given twice.")
        try:
            values[key] = kinds[key](value.strip())
        except ValueError:
            what = "a whole number" if kinds[key] is int else "a number"
            raise UsageError(f"--reuse: {key}={value.strip()!r} is not possible: give {what}.") from None
    return dataclasses.replace(base, **values)
