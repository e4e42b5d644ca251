"""Plans a GPU's memory for one clip: what lies where in which stage, the peak, and what to change if it does not fit.

The stages of a clip take turns in one arena: text encoder, VAE encoder, the schedule's modulation table, denoising, VAE
decoder. What one hands to the next is small and waits in host memory. In each stage the engines run one after the other in
the same activation memory, so that the largest counts.

Three things are chosen, in favour of quality and speed as far as the budget goes:

* the VAE's tile: the whole frame, else the published tile, else a smaller one (`tiles_of`);
* how many of the denoiser's blocks stay in memory between steps; the others stream through a ring of slots, the next ones
  being copied while one computes;
* whether the guidance halves go through a block together. One after the other they need half of the activations, and a
  streamed block serves both, so they go together only once every block is resident.

Nothing here was measured on a GPU: activations are the compiler's reports or estimates of them (`activations`), weights and
buffers are counted, and `CONTEXT` is an allowance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import msgspec

from ..bundle.config import Geometry, geometry
from ..bundle.errors import DeviceError
from ..bundle.manifest import Manifest
from .activations import estimate_activation
from .engine_set import ClipSize, EngineSet
from .model_facts import FLOAT, ModelFacts, facts_of, model_facts
from .targets import Capability

__all__ = [
    "CONTEXT",
    "PRESETS",
    "Item",
    "MemoryPlan",
    "ModelFacts",
    "Stage",
    "Tile",
    "facts_of",
    "model_facts",
    "pick_batch",
    "pick_tile",
    "plan",
    "plan_with_engines",
    "tiles_of",
]

GB = 1e9
CONTEXT = 600_000_000  # CUDA context, TensorRT's library and compiled kernels: an allowance, not measured
AMPERE: Capability = (8, 0)  # has bfloat16
PROCESS = 400_000_000  # the program on the host, which counts where memory is unified
RING = 3  # slots for streamed blocks: one computes, two are on their way
LEAST_RING = 2
TEXT_RING = 2
MODULATION_ROWS = 15
ENCODER_CHUNK = 8  # frames per call of the VAE, as in the published implementation
DECODER_CHUNK = 2  # latent frames
LEAST_TILE = 16  # latents; below that, overlaps and seams grow out of proportion
FRACTIONS = (1.0, 5 / 6, 2 / 3, 1 / 2)  # of the published tile
COLOURS = 3

PRESETS = (
    ClipSize(height=288, width=512, frames=17),
    ClipSize(height=576, width=1024, frames=37),
    ClipSize(height=768, width=1360, frames=37),
    ClipSize(height=768, width=1360, frames=81),
)


class Item(NamedTuple):
    """Something that lies in memory during a stage."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Stage:
    """What lies in memory at once: `text`, `encode`, `schedule`, `denoise` or `decode`."""

    name: str
    items: tuple[Item, ...]

    @property
    def total(self) -> int:
        return sum(item.bytes for item in self.items)


class Tile(NamedTuple):
    """Size of a VAE tile in latents. `whole`: it covers the frame, which is then not tiled."""

    rows: int
    columns: int
    whole: bool

    @property
    def overlap(self) -> tuple[int, int]:
        """Rows and columns that it shares with its neighbours: the published sixth and fifth, rounded up."""
        rows, columns = self.rows, self.columns
        return min(rows - 1, rows - int(rows * (1 - 1 / 6))), min(columns - 1, columns - int(columns * (1 - 1 / 5)))


@dataclass(frozen=True)
class MemoryPlan:
    """The plan for one clip; if it does not fit, the one that needs least.

    `budget`: bytes; None: no limit. `batch`: guidance halves that go through a block together. `ring`: slots for the blocks that
    are not resident. `smallest_budget`: the least with which some plan fits. `advice`: if it does not fit, what else could be
    changed, each a clause for a person.
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
    advice: tuple[str, ...] = field(default=())

    @property
    def largest_stage(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def peak(self) -> int:
        """Bytes in use at the worst moment."""
        return self.largest_stage.total

    @property
    def fits(self) -> bool:
        return self.budget is None or self.peak <= self.budget

    @property
    def reason(self) -> str:
        """One paragraph: why it does not fit and what to do, or how it fits."""
        clip = f"{self.size.width}x{self.size.height} with {self.size.frames} frames in {self.precision}"
        if self.budget is not None and not self.fits:
            also = f", or {', or '.join(self.advice)}" if self.advice else ""
            return (
                f"{clip} does not fit into {self.budget / GB:.2f} GB of GPU memory: the {self.largest_stage.name} stage needs "
                f"{self.peak / GB:.2f} GB. Give at least {_gigabytes(self.smallest_budget)} GB{also}."
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
        return f"{clip} needs {self.peak / GB:.2f} GB ({self.largest_stage.name}): {blocks}{halves}; {tile}."

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

    Raises:
        UsageError: a size that the model cannot make.
    """
    case = _Case(
        facts, size, 2 if guidance else 1, steps, measured or {}, batch, tile, cached_prompt, capability, unified
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
        advice=() if budget is None or least <= budget else tuple(_advice(case, budget)),
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
) -> MemoryPlan:
    """Plans a clip with engines that exist: their own activation bytes, batch and tile."""
    return plan(
        facts_of(manifest),
        size,
        guidance=guidance,
        budget=budget,
        measured={name: entry.activation_bytes for name, entry in engines.engines.items()},
        steps=steps,
        batch=engines.options.batch,
        tile=engines.options.tile,
        cached_prompt=cached_prompt,
        capability=min(engines.capabilities),
        unified=unified,
    )


def tiles_of(facts: ModelFacts, size: ClipSize) -> tuple[Tile, ...]:
    """VAE tiles for a clip, best first: the whole frame, the published tile (half of the VAE's sample size each way), and
    smaller shares of that down to 16 latents a side. None is larger than the frame.

    The overlaps keep their published shares whatever the tile (`Tile.overlap`).
    """
    vae = facts.vae
    scale = vae.spatial_compression
    published = max(1, vae.sample_height // 2 // scale), max(1, vae.sample_width // 2 // scale)
    tiles = [_clipped(facts, size, (size.height, size.width))]
    for fraction in FRACTIONS:
        rows, columns = (max(min(side, LEAST_TILE), int(side * fraction)) for side in published)
        tile = _clipped(facts, size, (rows, columns))
        if tile not in tiles:
            tiles.append(tile)
    return tuple(tiles)


def _clipped(facts: ModelFacts, size: ClipSize, tile: tuple[int, int]) -> Tile:
    scale = facts.vae.spatial_compression
    frame = size.height // scale, size.width // scale
    rows, columns = min(tile[0], frame[0]), min(tile[1], frame[1])
    return Tile(rows, columns, (rows, columns) == frame)


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


@dataclass(frozen=True)
class _Case:
    """What a plan is made for; the fields are `plan`'s arguments."""

    facts: ModelFacts
    clip: ClipSize
    halves: int
    steps: int
    measured: Mapping[str, int]
    most: int
    given_tile: tuple[int, int] | None
    cached_prompt: bool
    capability: Capability | None
    unified: bool

    @cached_property
    def size(self) -> Geometry:
        clip = self.clip
        return geometry(self.facts.transformer, self.facts.vae, clip.height, clip.width, clip.frames)

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """Best first, which is also largest first."""
        if self.given_tile is not None:
            return (_clipped(self.facts, self.clip, self.given_tile),)
        return tiles_of(self.facts, self.clip)

    def activation(self, graph: str, **axes: int) -> int:
        if graph in self.measured:
            return self.measured[graph]
        return estimate_activation(graph, self.facts, axes, capability=self.capability)


class _Choice(NamedTuple):
    batch: int
    resident: int
    ring: int
    tile: Tile


def _choose(case: _Case, budget: int | None) -> _Choice:
    """The best choice within the budget; if there is none, one that needs no more than the smallest budget."""
    layers = case.facts.transformer.num_layers
    together = min(case.halves, case.most)
    if budget is None:
        return _Choice(together, layers, 0, case.tiles[0])
    tile = next((tile for tile in case.tiles if _vae_peak(case, tile) <= budget), case.tiles[-1])
    if _room(case, together, budget) >= layers:
        return _Choice(together, layers, 0, tile)
    room = max(_room(case, 1, budget), LEAST_RING)
    if room >= layers:
        return _Choice(1, layers, 0, tile)
    ring = min(RING, room)
    return _Choice(1, room - ring, ring, tile)


def _least(case: _Case) -> int:
    """The smallest budget: what the plan for no budget at all needs."""
    return max(stage.total for stage in _stages(case, _choose(case, 0)))


def _room(case: _Case, batch: int, budget: int) -> int:
    """For how many blocks there is room beside everything else in the denoising stage."""
    return (budget - _denoise(case, batch, 0, 0).total) // case.facts.block


def _vae_peak(case: _Case, tile: Tile) -> int:
    return max(_encode(case, tile).total, _decode(case, tile).total)


# Counting


def _stages(case: _Case, choice: _Choice) -> tuple[Stage, ...]:
    stages = [
        _encode(case, choice.tile),
        _schedule(case),
        _denoise(case, choice.batch, choice.resident, choice.ring),
        _decode(case, choice.tile),
    ]
    text = _text(case)
    return (text, *stages) if text is not None else tuple(stages)


def _stage(case: _Case, name: str, *items: Item) -> Stage:
    base = [Item("CUDA context and libraries", CONTEXT)]
    if case.unified:
        base.append(Item("the program", PROCESS))
    return Stage(name, (*base, *(item for item in items if item.bytes)))


def _text(case: _Case) -> Stage | None:
    """Blocks pass through a ring once, both prompts at a time. Embedding rows are gathered on the host."""
    config = case.facts.text
    if config is None or case.cached_prompt:
        return None
    length = case.facts.transformer.max_text_seq_length
    hidden = 2 * case.halves * length * config.d_model
    bias = config.num_heads * length * length
    return _stage(
        case,
        "text",
        Item("streamed text blocks", min(TEXT_RING, config.num_layers) * case.facts.text_block),
        Item("activations", case.activation("text_block", B=case.halves, S=length)),
        Item("text stream and position bias", FLOAT * (hidden + bias)),
    )


def _encode(case: _Case, tile: Tile) -> Stage:
    """Photo and pose clip, tile by tile, each tile through all of its time chunks."""
    facts, frames = case.facts, case.size.pose_frames
    first, more = _chunks(frames, ENCODER_CHUNK)
    area = {"latent_height": tile.rows, "latent_width": tile.columns}
    needs = [case.activation("vae_encoder_first", frames=first, **area)]
    if more:
        needs.append(case.activation("vae_encoder_next", **area))
    pixels = COLOURS * facts.vae.spatial_compression**2 * max(first, ENCODER_CHUNK if more else 0)
    moments = 2 * facts.vae.latent_channels * -(-first // facts.vae.temporal_compression_ratio)
    return _stage(
        case,
        "encode",
        *_vae_items(tile, more, facts.encoder, max(needs), facts.encoder_state, pixels + moments),
        Item("pose clip on the host", _host_clip(case) if case.unified else 0),
    )


def _decode(case: _Case, tile: Tile) -> Stage:
    facts, latents = case.facts, case.size.latent_frames - case.size.padding_frames
    first, more = _chunks(latents, DECODER_CHUNK)
    area = {"latent_height": tile.rows, "latent_width": tile.columns}
    if first % 2:
        needs = [case.activation("vae_decoder_first", latent_frames=first, **area)]
    else:
        needs = [case.activation("vae_decoder_first_even", **area)]
    if more:
        needs.append(case.activation("vae_decoder_next", **area))
    longest = max(first, DECODER_CHUNK if more else 0)
    pixels = COLOURS * facts.vae.spatial_compression**2 * facts.vae.temporal_compression_ratio * longest
    chunk = pixels + facts.vae.latent_channels * longest
    waiting = _host_clip(case) * (1 if tile.whole else 2)  # tiles, and the frames that they are blended into
    return _stage(
        case,
        "decode",
        *_vae_items(tile, more, facts.decoder, max(needs), facts.decoder_state, chunk),
        Item("decoded clip on the host", waiting if case.unified else 0),
    )


def _vae_items(tile: Tile, more: bool, weights: int, activations: int, state: int, chunk: int) -> Iterator[Item]:
    """`state` in bytes and `chunk` in float32 numbers per latent of the tile. Engines for first and later chunks each hold all
    of the weights; the state of one chunk is read while that of the next is written."""
    area = tile.rows * tile.columns
    yield Item("engines with weights", (2 if more else 1) * weights)
    yield Item("activations", activations)
    yield Item("convolution states", (2 if more else 1) * state * area)
    yield Item("chunk in and out", FLOAT * chunk * area)


def _host_clip(case: _Case) -> int:
    return FLOAT * COLOURS * case.size.pose_frames * case.size.height * case.size.width


def _schedule(case: _Case) -> Stage:
    """The modulation of every block for all timesteps, block after block."""
    facts = case.facts
    needs = [case.activation(graph, T=case.steps) for graph in ("modulation", "head_modulation")]
    return _stage(
        case,
        "schedule",
        Item("streamed modulation weights", min(LEAST_RING, facts.transformer.num_layers) * facts.modulation),
        Item("other weights", facts.shared),
        Item("activations", max(needs)),
        Item("modulation table", _table(case)),
    )


def _table(case: _Case) -> int:
    config = case.facts.transformer
    return FLOAT * case.steps * (MODULATION_ROWS * config.num_layers + 2) * config.width


def _denoise(case: _Case, batch: int, resident: int, ring: int) -> Stage:
    """Conditioning, then the loop: stem, blocks, head, with guidance and the scheduler's update in the head."""
    facts, config, size, halves = case.facts, case.facts.transformer, case.size, case.halves
    n, length = size.video_tokens, config.max_text_seq_length
    latent = {"F": size.latent_frames, "H": size.latent_height, "W": size.latent_width, "N": n}
    needs = [
        case.activation("conditioning", B=halves, L=length, **latent),
        case.activation("stem", **latent),
        case.activation("block", B=batch, N=n, L=length, S=n + length),
        case.activation("head", B=halves, **latent),
    ]
    # Each half's video is read from one buffer and written to another; so is the pose, which both halves share. The stem's
    # video, the photo's tokens and the first pose tokens stay.
    video, text = 2 * halves * n, 3 * halves * length
    constant = (2 + 1 + 1 + 1) * n
    numbers = config.latent_channels * size.latent_frames * size.latent_height * size.latent_width
    # Latents and the last prediction before and after a step, noise, photo, pose; the predictions of the halves.
    latents = (7 + halves) * numbers
    prompts = halves * length * config.text_embed_dim
    rope = (n + length) * config.attention_head_dim
    return _stage(
        case,
        "denoise",
        Item("resident blocks", resident * facts.block),
        Item("slots for streamed blocks", ring * facts.block),
        Item("other weights", facts.shared),
        Item("activations", max(needs)),
        Item("video and text streams", facts.stream * config.width * (video + text)),
        Item("photo and pose tokens", facts.stream * config.width * constant),
        Item("latents, noise and guidance", FLOAT * latents),
        Item("prompts and rotary tables", FLOAT * (prompts + rope)),
        Item("modulation table", _table(case)),
    )


def _chunks(count: int, size: int) -> tuple[int, bool]:
    """Length of the first time chunk of `count` frames, and whether there are later ones (of `size` frames)."""
    return (count, False) if count < size else (size + count % size, count >= 2 * size)


# Advice


def _advice(case: _Case, budget: int) -> Iterator[str]:
    """Single changes with which the clip, or one like it, fits. What engines reported holds for what they were built for, so
    changes are judged by estimates."""

    def fits(**changes: Any) -> bool:
        return _least(replace(case, **{"measured": {}, **changes})) <= budget

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


def _shorter(case: _Case) -> Iterator[int]:
    ratio = case.facts.vae.temporal_compression_ratio
    return iter(range(case.clip.frames - ratio, 0, -ratio))


def _smaller(case: _Case) -> Iterator[ClipSize]:
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
