"""Whether a bundle and a machine's memory allow a policy; what does is named where one does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ...bundle.config import Geometry
from ...bundle.errors import BundleError, DeviceError
from ...bundle.manifest import Manifest, graph_form
from ..memory import FLOAT, MemoryPlan, block_activations
from .caches import cache_bytes
from .policy import OFF, POLICIES, ReusePolicy

__all__ = ["alternatives", "check_graphs", "needed_graphs", "plan_with_caches"]


def needed_graphs(policy: ReusePolicy, *, guided: bool) -> tuple[str, ...]:
    """The graphs that a loop with this policy runs beside those of one without reuse."""
    names: list[str] = []
    if policy.reuses_guidance and guided:
        names.append("head_reuse")
    if policy.reuses_trunk:
        names += ["trunk_keep", "trunk_reuse"]
    if policy.adaptive:
        names.append("trunk_probe")
    if policy.reuses_tokens:
        names += ["tokens_keep", "tokens_reuse", "tokens_take", "tokens_put"]
        if policy.token_cache == "int8":
            names += ["cache_narrow", "cache_widen"]
    return tuple(names)


def check_graphs(manifest: Manifest, root: str, policy: ReusePolicy, *, guided: bool) -> None:
    """Refuses (`BundleError`) a policy whose graphs the bundle at `root` lacks, or cannot run with its weights."""
    lacking = [name for name in needed_graphs(policy, guided=guided) if name not in manifest.graphs]
    if lacking:
        raise BundleError(
            f"The bundle {root!r} lacks the graphs of --reuse {policy.name} ({', '.join(lacking)}): it was exported without "
            f"them, or before they existed. Export the checkpoint again, without --no-reuse, or use --reuse {OFF}."
        )
    if policy.reuses_tokens and not _share_weights(manifest):
        others = [name for name, other in POLICIES.items() if not other.reuses_tokens]
        raise BundleError(
            f"The bundle {root!r} was quantized by a version that did not quantize the graphs of --reuse {policy.name}. "
            f"Calibrate its source again: dynamictrl calibrate BUNDLE OUT --data FOLDER; or use one of "
            f"{', '.join((OFF, *others))}."
        )


def _share_weights(manifest: Manifest) -> bool:
    """Whether token steps take every block's weights in the form in which full steps take them."""
    if (found := manifest.quantization) is None:
        return True
    return all(
        (form := graph_form(kind, name)) in manifest.graphs and found.linears.get(form) == found.linears.get(name)
        for kind in ("tokens_keep", "tokens_reuse")
        for name in found.blocks
    )


def alternatives(policy: ReusePolicy, manifest: Manifest) -> tuple[ReusePolicy, ...]:
    """What may fit where `policy` does not: those with a name, and itself with narrower caches."""
    if not policy.reuses_tokens or policy.token_cache == "int8" or "cache_narrow" not in manifest.graphs:
        return tuple(POLICIES.values())
    same = dataclasses.replace(policy, name="the same with token_cache=int8", token_cache="int8")
    return (*POLICIES.values(), same)


def plan_with_caches(
    plan: Callable[[int], MemoryPlan], policy: ReusePolicy | None, manifest: Manifest, size: Geometry, *, guided: bool
) -> MemoryPlan:
    """`plan(bytes)` plans a clip's memory with so many bytes for reuse, or raises `DeviceError`.

    Raises:
        DeviceError: the clip does not fit with the policy's caches; the text gives their bytes and the policies that fit.
    """
    if policy is None:
        return plan(0)

    def need(other: ReusePolicy) -> int:
        return cache_bytes(other, manifest.transformer, size, guided=guided, precision=manifest.precision)

    def whole(other: ReusePolicy) -> int:
        activations = block_activations(manifest.transformer, size, "block_cpu" in manifest.graphs)
        blocks = _more_sessions(other, guided=guided) * len(set(manifest.block_graphs)) * activations
        # Of either half, one session narrows and one widens; each has keys, or values, twice in float32.
        maps = 4 * _lanes(other, guided=guided) if other.token_cache == "int8" and other.reuses_tokens else 0
        return need(other) + blocks + maps * FLOAT * size.video_tokens * manifest.transformer.width

    try:
        return plan(whole(policy))
    except DeviceError as refused:
        plan(0)  # if this does not fit either, its own refusal tells more
        fitting = [f"{OFF} (none)"]
        for other in alternatives(policy, manifest):
            try:
                plan(whole(other))
            except DeviceError:
                continue
            fitting.append(f"{other.name} ({need(other) / 1e9:.2f} GB)")
        raise DeviceError(
            f"The caches of --reuse {policy.name} need {need(policy) / 1e9:.2f} GB beside the clip. {refused} "
            f"With --reuse, these fit: {', '.join(fitting)}."
        ) from None


def _more_sessions(policy: ReusePolicy, *, guided: bool) -> int:
    """At most so many sessions of a block's graphs run beside those of a loop without reuse, for every mixture of quantized
    linears; each keeps its activations."""
    alone = policy.reuses_guidance and guided
    return int(alone) + (2 * _lanes(policy, guided=guided) if policy.reuses_tokens else 0)


def _lanes(policy: ReusePolicy, *, guided: bool) -> int:
    """Guidance halves that token steps compute."""
    return 2 if guided and not policy.reuses_guidance else 1
