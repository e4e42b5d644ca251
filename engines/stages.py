"""What lies in GPU memory in each stage of a clip, in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ..bundle.config import Geometry, geometry
from ..bundle.manifest import graph_kind
from .activations import DECODER_CHUNK, ENCODER_CHUNK, estimate_activation
from .engine_set import ClipSize
from .model_facts import FLOAT, ModelFacts
from .targets import Capability
from .vae_tiles import Tile, clipped, tiles_of

__all__ = [
    "ACTIVATIONS",
    "CONTEXT",
    "PROCESS",
    "Case",
    "Item",
    "ReuseMemory",
    "Stage",
    "decode",
    "denoise",
    "encode",
    "schedule",
    "text",
]

CONTEXT = 600_000_000  # CUDA context, TensorRT's library and compiled kernels: an allowance, not measured
PROCESS = 400_000_000  # the program on the host, which counts where memory is unified: an allowance too
MODULATION_ROWS = 15
ACTIVATIONS = "activations"  # name of the item that all engines of a stage share
COLOURS = 3


class Item(NamedTuple):
    """Something that lies in memory during a stage. `ours`: in the runtime's arena; else it is CUDA's, TensorRT's or the
    host's."""

    name: str
    bytes: int
    ours: bool = True


@dataclass(frozen=True)
class Stage:
    """What lies in memory at once: `text`, `encode`, `schedule`, `denoise` or `decode`."""

    name: str
    items: tuple[Item, ...]

    @property
    def total(self) -> int:
        return sum(item.bytes for item in self.items)

    @property
    def arena(self) -> int:
        """Bytes that the runtime gives out itself."""
        return sum(item.bytes for item in self.items if item.ours)


@dataclass(frozen=True)
class ReuseMemory:
    """A policy of reuse between steps, as far as memory goes.

    caches: bytes of its buffers, for a size, whether there is guidance, and the precision of what is not quantized.
    graphs: those that run beside the exact loop's, for whether there is guidance.
    """

    name: str
    caches: Callable[[Geometry, bool, str], int]
    graphs: Callable[[bool], tuple[str, ...]]


@dataclass(frozen=True)
class Case:
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
    reuse: ReuseMemory | None = None
    policies: tuple[ReuseMemory, ...] = ()

    @cached_property
    def size(self) -> Geometry:
        clip = self.clip
        return geometry(self.facts.transformer, self.facts.vae, clip.height, clip.width, clip.frames)

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """Best first, which is also largest first."""
        if self.given_tile is not None:
            return (clipped(self.facts, self.clip, self.given_tile),)
        return tiles_of(self.facts, self.clip)

    @property
    def caches(self) -> int:
        """Bytes that reuse between steps keeps."""
        return 0 if self.reuse is None else self.reuse.caches(self.size, self.halves == 2, self.facts.base)

    def activation(self, graph: str, **axes: int) -> int:
        if known := [size for name, size in self.measured.items() if graph_kind(name) == graph]:
            return max(known)  # a quantized bundle has several mixtures of a block's graphs
        return estimate_activation(graph, self.facts, axes, capability=self.capability)


def _stage(case: Case, name: str, *items: Item) -> Stage:
    base = [Item("CUDA context and libraries", CONTEXT, ours=False)]
    if case.unified:
        base.append(Item("the program", PROCESS, ours=False))
    return Stage(name, (*base, *(item for item in items if item.bytes)))


def text(case: Case) -> Stage | None:
    """Block after block, both prompts at a time. Embedding rows are gathered on the host."""
    config = case.facts.text
    if config is None or case.cached_prompt:
        return None
    length = case.facts.transformer.max_text_seq_length
    hidden = 2 * case.halves * length * config.d_model
    bias = config.num_heads * length * length
    return _stage(
        case,
        "text",
        Item("one text block", case.facts.text_block),
        Item(ACTIVATIONS, case.activation("text_block", B=case.halves, S=length)),
        Item("text stream and position bias", FLOAT * (hidden + bias)),
    )


def encode(case: Case, tile: Tile) -> Stage:
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
        Item("pose clip on the host", _host_clip(case) if case.unified else 0, ours=False),
    )


def decode(case: Case, tile: Tile) -> Stage:
    """Latents without the padding frame, tile by tile, each tile through all of its time chunks."""
    facts, latents = case.facts, case.size.latent_frames - case.size.padding_frames
    first, more = _chunks(latents, DECODER_CHUNK)
    area = {"latent_height": tile.rows, "latent_width": tile.columns}
    if first % 2:
        needs = [case.activation("vae_decoder_first", latent_frames=first, **area)]
    else:
        needs = [case.activation("vae_decoder_first_even", **area)]
    if more:
        needs.append(case.activation("vae_decoder_next", **area))
    longest, ratio = max(first, DECODER_CHUNK if more else 0), facts.vae.temporal_compression_ratio
    # With an odd count, the first latent frame stands for one frame.
    frames = max(ratio * first - (ratio - 1) * (first % 2), ratio * DECODER_CHUNK if more else 0)
    pixels = COLOURS * facts.vae.spatial_compression**2 * frames
    chunk = pixels + facts.vae.latent_channels * longest
    waiting = _host_clip(case) * (1 if tile.whole else 2)  # tiles, and the frames that they are blended into
    return _stage(
        case,
        "decode",
        *_vae_items(tile, more, facts.decoder, max(needs), facts.decoder_state, chunk),
        Item("decoded clip on the host", waiting if case.unified else 0, ours=False),
    )


def _vae_items(tile: Tile, more: bool, weights: int, activations: int, state: int, chunk: int) -> Iterator[Item]:
    """`state` in bytes and `chunk` in float32 numbers per latent of the tile. Engines for first and later chunks each hold all
    of the weights; the state of one chunk is read while that of the next is written."""
    area = tile.rows * tile.columns
    yield Item("engines with weights", (2 if more else 1) * weights, ours=False)
    yield Item(ACTIVATIONS, activations)
    yield Item("convolution states", (2 if more else 1) * state * area)
    yield Item("chunk in and out", FLOAT * chunk * area)


def _host_clip(case: Case) -> int:
    return FLOAT * COLOURS * case.size.pose_frames * case.size.height * case.size.width


def schedule(case: Case) -> Stage:
    """The modulation of every block for all timesteps, block after block."""
    facts = case.facts
    needs = [case.activation(graph, T=case.steps) for graph in ("modulation", "head_modulation")]
    return _stage(
        case,
        "schedule",
        Item("one block's modulation weights", facts.modulation),
        Item("other weights", facts.shared),
        Item(ACTIVATIONS, max(needs)),
        Item("one block's modulation", FLOAT * case.steps * MODULATION_ROWS * facts.transformer.width),
    )


def _table(case: Case) -> int:
    """Of all steps, and the rows of the one at hand."""
    config = case.facts.transformer
    return FLOAT * (case.steps + 1) * (MODULATION_ROWS * config.num_layers + 2) * config.width


def denoise(case: Case, batch: int, resident: int, ring: int) -> Stage:
    """Conditioning, then the loop: stem, blocks, head, with guidance and the scheduler's update in the head."""
    facts, config, size, halves = case.facts, case.facts.transformer, case.size, case.halves
    n, length = size.video_tokens, config.max_text_seq_length
    latent = {"F": size.latent_frames, "H": size.latent_height, "W": size.latent_width, "N": n}
    # Engines take any number of active and of kept tokens, whatever the policy.
    some = {"A": n, "Q": n + length, "K": n, "B": batch, "L": length, "S": n + length, **latent}
    reused = () if case.reuse is None else case.reuse.graphs(halves == 2)
    needs = [
        *(case.activation(graph, **some) for graph in reused),
        case.activation("conditioning", B=halves, L=length, **latent),
        case.activation("stem", **latent),
        case.activation("block", B=batch, N=n, L=length, S=n + length),
        case.activation("head", B=halves, **latent),
    ]
    # A block reads one buffer and writes another: of each half's video and text, and of the pose, which both halves share.
    video, text = 2 * halves * n, 3 * halves * length  # the projected prompts stay, for the next step
    poses, stem_video, photo = 3 * n, n, n  # so do the first pose tokens
    numbers = config.latent_channels * size.latent_frames * size.latent_height * size.latent_width
    # Latents and the last prediction before and after a step, noise; the predictions of the halves. What conditioning takes
    # (prompts, photo, pose) is gone before these come.
    latents = (5 + halves) * numbers
    rope = (n + length) * config.attention_head_dim
    return _stage(
        case,
        "denoise",
        Item("resident blocks", resident * facts.block),
        Item("slots for streamed blocks", ring * facts.block),
        Item("other weights", facts.shared),
        Item(ACTIVATIONS, max(needs)),
        Item("video and text streams", facts.stream * config.width * (video + text)),
        Item("photo and pose tokens", facts.stream * config.width * (poses + stem_video + photo)),
        Item("latents, noise and guidance", FLOAT * latents),
        Item("rotary tables", FLOAT * rope),
        Item("modulation table", _table(case)),
        Item("caches of reuse", case.caches),
    )


def _chunks(count: int, size: int) -> tuple[int, bool]:
    """Length of the first time chunk of `count` frames, and whether there are later ones (of `size` frames)."""
    return (count, False) if count < size else (size + count % size, count >= 2 * size)
