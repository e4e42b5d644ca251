"""Plans a GPU's memory for one clip: what lies where in which stage, the peak, and what to change if it does not fit.

The stages of a clip take turns in one arena: text encoder, VAE encoder, the schedule's modulation table, denoising, VAE
decoder. What one hands to the next is small and waits in host memory. In each stage the engines run one after the other in
the same activation memory, so that the largest counts.

Three things are chosen, in favour of quality and speed as far as the budget goes:

* the VAE's tile: the whole frame, else the published tile, else a smaller one (`vae_tiles`);
* how many of the denoiser's blocks stay in memory between steps; the others stream through a ring of slots, the next ones
  being copied while one computes;
* whether the guidance halves go through a block together. One after the other they need half of the activations, and a
  streamed block serves both, so they go together only once every block is resident; and never where steps reuse earlier
  ones, since such a step may leave a half out.

Nothing here was measured on a GPU: activations are the compiler's reports or estimates of them (`activations`), weights and
buffers are counted (`model_facts`, `stages`), and `stages.CONTEXT` is an allowance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import msgspec

from ..bundle.errors import DeviceError
from ..bundle.manifest import Manifest
from .engine_set import ClipSize, EngineSet
from .model_facts import ModelFacts, facts_of, model_facts
from .stages import ACTIVATIONS, Case, Item, ReuseMemory, Stage, decode, denoise, encode, schedule, text
from .targets import Capability
from .vae_tiles import Tile

__all__ = [
    "PRESETS",
    "RING",
    "MemoryPlan",
    "ModelFacts",
    "ReuseMemory",
    "facts_of",
    "model_facts",
    "pick_batch",
    "pick_tile",
    "plan",
    "plan_with_engines",
]

GB = 1e9
AMPERE: Capability = (8, 0)  # has bfloat16
SLOW_LINK = 12.5e9  # bytes per second that PCIe 4 with 8 lanes really moves, of 15.75e9
RING = 3  # slots for streamed blocks: one computes, two are on their way
LEAST_RING = 2

PRESETS = (
    ClipSize(height=288, width=512, frames=17),
    ClipSize(height=576, width=1024, frames=37),
    ClipSize(height=768, width=1360, frames=37),
    ClipSize(height=768, width=1360, frames=81),
)


@dataclass(frozen=True)
class MemoryPlan:
    """The plan for one clip; if it does not fit, the one that needs least.

    `budget`: bytes; None: no limit. `batch`: guidance halves that go through a block together. `ring`: slots for the blocks that
    are not resident. `smallest_budget`: the least with which some plan fits. `block_bytes`, `block_flop`: what has to be copied for
    one streamed block, and computed meanwhile. `advice`: if it does not fit, what else could be changed, each a clause for a
    person. `reuse`: name of the policy of reuse between steps; `caches`: its bytes, in the denoising stage. `kept`: bytes of
    blocks that lie in memory in every stage (`keeping_blocks`).
    """

    size: ClipSize
    precision: str
    guidance: bool
    budget: int | None
    batch: int
    layers: int
    resident_blocks: int
    ring: int
    tile: Tile
    stages: tuple[Stage, ...]
    smallest_budget: int
    block_bytes: int
    block_flop: int
    advice: tuple[str, ...] = field(default=())
    reuse: str | None = None
    caches: int = 0
    kept: int = 0

    @property
    def largest_stage(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def peak(self) -> int:
        """Bytes in use at the worst moment."""
        return self.largest_stage.total

    @property
    def arena(self) -> int:
        """Bytes that the runtime gives out itself beside what is `kept`, at the worst moment; alignment is not counted."""
        return max(stage.arena for stage in self.stages) - self.kept

    def keeping_blocks(self) -> MemoryPlan:
        """This plan with all blocks in memory in every stage, so that the next clip finds them there; this one if the budget does
        not allow it, or if blocks stream."""
        blocks = Item("resident blocks", self.layers * self.block_bytes)
        stages = tuple(
            stage if stage.name == "denoise" else replace(stage, items=(*stage.items, blocks)) for stage in self.stages
        )
        made = replace(self, stages=stages, kept=blocks.bytes)
        return made if self.ring == 0 and made.fits else self

    def activations(self, stage: str) -> int:
        """Bytes that the engines of a stage share."""
        return sum(
            item.bytes for made in self.stages if made.name == stage for item in made.items if item.name == ACTIVATIONS
        )

    @property
    def tiled(self) -> bool:
        """Whether the VAE works in tiles."""
        return not self.tile.whole

    @property
    def fits(self) -> bool:
        return self.budget is None or self.peak <= self.budget

    @property
    def reason(self) -> str:
        """One paragraph: why it does not fit and what to do, or how it fits."""
        clip = f"{self.size.width}x{self.size.height} with {self.size.frames} frames in {self.precision}"
        clip += f" with --reuse {self.reuse}" if self.reuse is not None else ""
        if self.budget is not None and not self.fits:
            also = f", or {', or '.join(self.advice)}" if self.advice else ""
            caches = (
                f" ({self.caches / GB:.2f} GB of it caches)"
                if self.largest_stage.name == "denoise" and self.caches
                else ""
            )
            return (
                f"{clip} does not fit into {self.budget / GB:.2f} GB of GPU memory: the {self.largest_stage.name} stage needs "
                f"{self.peak / GB:.2f} GB{caches}. Give at least {_gigabytes(self.smallest_budget)} GB{also}."
            )
        blocks = (
            "all blocks stay in memory" if self.ring == 0 else f"{self.resident_blocks} of {self.layers} blocks stay"
        )
        halves = "" if not self.guidance else ", guidance halves together" if self.batch == 2 else ", halves in turn"
        tile = (
            "the VAE takes whole frames"
            if self.tile.whole
            else f"VAE tiles of {self.tile.rows}x{self.tile.columns} latents"
        )
        caches = f"; {self.caches / GB:.2f} GB of caches" if self.caches else ""
        needs = f"{self.peak / GB:.2f} GB ({self.largest_stage.name})"
        return f"{clip} needs {needs}: {blocks}{halves}; {tile}{caches}.{self._streaming}"

    @property
    def hidden_up_to(self) -> float:
        """FLOP/s up to which a GPU computes a streamed block for longer than `SLOW_LINK` needs to bring the next."""
        return self.block_flop / (self.block_bytes / SLOW_LINK)

    @property
    def _streaming(self) -> str:
        """A sentence, where blocks stream."""
        if self.ring == 0:
            return ""
        return (
            f" Copying the others costs no time{'' if self.reuse is None else ' in full steps'} on a GPU that computes up to "
            f"{self.hidden_up_to / 1e12:.0f} TFLOP/s (over PCIe 4 x8)."
        )

    def check(self) -> None:
        """Raises `DeviceError` with `reason` if the clip does not fit."""
        if not self.fits:
            raise DeviceError(self.reason)


def plan(
    facts: ModelFacts,
    size: ClipSize,
    *,
    guidance: bool = True,
    budget: int | None = None,
    measured: Mapping[str, int] | None = None,
    steps: int = 25,
    batch: int = 2,
    tile: tuple[int, int] | None = None,
    cached_prompt: bool = False,
    capability: Capability | None = None,
    unified: bool = False,
    reuse: ReuseMemory | None = None,
    policies: tuple[ReuseMemory, ...] = (),
) -> MemoryPlan:
    """Plans a clip.

    Args:
        budget: bytes that may be used; None: no limit.
        measured: activation bytes of graphs whose engines exist, from their reports; the others are estimated.
        batch: most guidance halves that the block's engine takes at once, 1 or 2.
        tile: VAE tile in latents (rows, columns) that the engines were made for; None: choose.
        cached_prompt: the prompt's embeddings are on disk, so the text encoder does not run.
        capability: of the oldest GPU that the engines are for; None: SM80 or later.
        unified: host and GPU share their memory, so that the program and the clip's frames count as well.
        reuse: what denoising steps use again of earlier ones. policies: others, to be named where this one does not fit.

    Raises:
        UsageError: a size that the model cannot make.
    """
    case = Case(
        facts=facts,
        clip=size,
        halves=2 if guidance else 1,
        steps=steps,
        measured=measured or {},
        most=batch,
        given_tile=tile,
        cached_prompt=cached_prompt,
        capability=capability,
        unified=unified,
        reuse=reuse,
        policies=policies,
    )
    choice = _choose(case, budget)
    least = _least(case)
    return MemoryPlan(
        size=size,
        precision=facts.precision,
        guidance=guidance,
        budget=budget,
        batch=choice.batch,
        layers=facts.transformer.num_layers,
        resident_blocks=choice.resident,
        ring=choice.ring,
        tile=choice.tile,
        stages=_stages(case, choice),
        smallest_budget=least,
        block_bytes=facts.block,
        block_flop=_block_flop(case),
        advice=() if budget is None or least <= budget else tuple(_advice(case, budget)),
        reuse=None if reuse is None else reuse.name,
        caches=case.caches,
    )


def plan_with_engines(
    manifest: Manifest,
    engines: EngineSet,
    size: ClipSize,
    *,
    guidance: bool = True,
    budget: int | None = None,
    steps: int = 25,
    cached_prompt: bool = False,
    unified: bool = False,
    batch: int | None = None,
    tile: tuple[int, int] | None = None,
    reuse: ReuseMemory | None = None,
    policies: tuple[ReuseMemory, ...] = (),
) -> MemoryPlan:
    """Plans a clip with engines that exist: their own activation bytes, and their batch and tile where none is given (which must
    not be larger)."""
    return plan(
        facts_of(manifest),
        size,
        guidance=guidance,
        budget=budget,
        measured={name: entry.activation_bytes for name, entry in engines.engines.items()},
        steps=steps,
        batch=batch or engines.options.batch,
        tile=tile or engines.options.tile,
        cached_prompt=cached_prompt,
        capability=min(engines.capabilities),
        unified=unified,
        reuse=reuse,
        policies=policies,
    )


def pick_tile(
    facts: ModelFacts,
    sizes: Sequence[ClipSize],
    *,
    budget: int | None,
    capability: Capability | None = None,
    unified: bool = False,
) -> tuple[int, int]:
    """The largest VAE tile (latents: rows, columns) to build engines for, on a GPU that has `budget` bytes: the best with which
    every one of `sizes` can be coded, else the smallest there is.

    Raises:
        UsageError: a size that the model cannot make.
    """
    # Engines take every tile up to the largest height and width, so that these count together.
    height, width = max(size.height for size in sizes), max(size.width for size in sizes)
    plans = (
        plan(facts, ClipSize(height, width, size.frames), budget=budget, capability=capability, unified=unified)
        for size in sizes
    )
    rows, columns, _ = min((made.tile for made in plans), key=lambda tile: tile.rows * tile.columns)
    return rows, columns


def pick_batch(
    facts: ModelFacts,
    sizes: Sequence[ClipSize],
    *,
    budget: int | None,
    capability: Capability | None = None,
    unified: bool = False,
) -> int:
    """For how many guidance halves at once to build the block's engine, on a GPU that has `budget` bytes. An engine for two
    plans with the memory of two also where one goes through.

    Raises:
        UsageError: a size that the model cannot make.
    """
    return min(plan(facts, size, budget=budget, capability=capability, unified=unified).batch for size in sizes)


# Choosing


class _Choice(NamedTuple):
    batch: int
    resident: int
    ring: int
    tile: Tile


def _choose(case: Case, budget: int | None) -> _Choice:
    """The best choice within the budget; if there is none, one that needs no more than the smallest budget."""
    layers = case.facts.transformer.num_layers
    together = min(case.halves, case.most) if case.reuse is None else 1
    if budget is None:
        return _Choice(together, layers, 0, case.tiles[0])
    # A smaller tile can need more, since its neighbours' overlaps count too.
    frugal = min(case.tiles, key=lambda tile: _vae_peak(case, tile))
    tile = next((tile for tile in case.tiles if _vae_peak(case, tile) <= budget), frugal)
    if _room(case, together, budget) >= layers:
        return _Choice(together, layers, 0, tile)
    room = max(_room(case, 1, budget), LEAST_RING)
    if room >= layers:
        return _Choice(1, layers, 0, tile)
    ring = min(RING, room)
    return _Choice(1, room - ring, ring, tile)


def _least(case: Case) -> int:
    """The smallest budget: what the plan for no budget at all needs."""
    return max(stage.total for stage in _stages(case, _choose(case, 0)))


def _stages(case: Case, choice: _Choice) -> tuple[Stage, ...]:
    stages = (
        text(case),
        encode(case, choice.tile),
        schedule(case),
        denoise(case, choice.batch, choice.resident, choice.ring),
        decode(case, choice.tile),
    )
    return tuple(stage for stage in stages if stage is not None)


def _room(case: Case, batch: int, budget: int) -> int:
    """For how many blocks there is room beside everything else in the denoising stage."""
    return (budget - denoise(case, batch, 0, 0).total) // case.facts.block


def _block_flop(case: Case) -> int:
    """Linears and attention of one block, for both guidance halves."""
    tokens = case.size.video_tokens + case.facts.transformer.max_text_seq_length
    d = case.facts.transformer.width
    return case.halves * (24 * tokens * d * d + 4 * tokens * tokens * d)


def _vae_peak(case: Case, tile: Tile) -> int:
    return max(encode(case, tile).total, decode(case, tile).total)


# Advice


def _advice(case: Case, budget: int) -> Iterator[str]:
    """Single changes with which the clip, or one like it, fits. What engines reported holds for what they were built for, so
    changes are judged by estimates, but for those that build nothing anew."""

    def fits(**changes: Any) -> bool:
        return _least(replace(case, **{"measured": {}, **changes})) <= budget

    if case.reuse is not None:
        same = case.measured  # the same engines run
        less = [other.name for other in case.policies if fits(reuse=other, measured=same)]
        if fits(reuse=None, measured=same):
            less.insert(0, "off")
        if less:
            yield f"reuse less (with --reuse, these fit: {', '.join(less)})"
    if case.measured and case.halves == case.most == 2 and fits(most=1, given_tile=case.given_tile):
        yield "build with --batch 1"
    if case.given_tile is not None and fits(given_tile=None):
        yield "build with smaller VAE tiles (--tile)"
    if not case.cached_prompt and fits(cached_prompt=True):
        yield "use a prompt whose embeddings are kept on disk, so that the text encoder does not run"
    facts = case.facts
    turing = case.capability is not None and case.capability < AMPERE
    if facts.precision == "fp16" and not turing and fits(facts=facts.convert("bf16")):
        yield "export the checkpoint in bf16 (--precision bf16)"
    if not facts.quantized and fits(facts=facts.convert("int8")):
        yield "quantize the bundle to int8"
    if case.halves == 2 and fits(halves=1):
        yield "go without guidance (--guidance 1)"
    if facts.transformer.use_learned_positional_embeddings:
        return  # makes clips of one size only
    if (frames := next((n for n in _shorter(case) if fits(clip=_resized(case.clip, frames=n))), None)) is not None:
        yield f"make fewer frames (--frames {frames})"
    if (smaller := next((clip for clip in _smaller(case) if fits(clip=clip)), None)) is not None:
        yield f"make a smaller clip (--width {smaller.width} --height {smaller.height})"


def _shorter(case: Case) -> Iterator[int]:
    ratio = case.facts.vae.temporal_compression_ratio
    return iter(range(case.clip.frames - ratio, 0, -ratio))


def _smaller(case: Case) -> Iterator[ClipSize]:
    """Clips of nearly the same shape, in steps that the model can make."""
    step = case.facts.vae.spatial_compression * case.facts.transformer.patch_size
    clip = case.clip
    for width in range(clip.width - step, 0, -step):
        height = max(step, round(clip.height * width / clip.width / step) * step)
        yield _resized(clip, width=width, height=height)


def _resized(clip: ClipSize, **changes: int) -> ClipSize:
    resized: ClipSize = msgspec.structs.replace(clip, **changes)
    return resized


def _gigabytes(size: int) -> str:
    """Rounded up, so that it is enough."""
    return f"{-(-size // 10_000_000) / 100:.2f}"
