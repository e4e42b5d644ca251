"""How long the axes of the engines must be for a clip, and how to say so to a person."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..bundle.config import Geometry
from ..bundle.manifest import Manifest
from .engine_set import Extent
from .mismatch import Mismatch, Request

__all__ = ["Length", "lengths_of"]


@dataclass(frozen=True, kw_only=True)
class Length:
    """A length that a clip needs of some axes: `needed` in their unit, of which n stand for n * `factor` + `offset` `unit`.

    `axes` are names of axes in any graph ("N"), or in one ("block.N"). `instead`: what else a person can ask for, {most} being
    what the engines take.
    """

    kind: Mismatch
    what: str
    unit: str
    needed: int
    axes: tuple[str, ...]
    factor: int = 1
    offset: int = 0
    instead: str = ""

    def show(self, value: int) -> int:
        """`value` in the unit that people count in."""
        return value * self.factor + self.offset

    def extents(self, axes: Mapping[str, Extent]) -> list[Extent]:
        """Those of an engine set's `axes` that it is about."""
        return [extent for name, extent in axes.items() if name in self.axes or name.partition(".")[2] in self.axes]


def lengths_of(manifest: Manifest, wanted: Geometry, request: Request) -> Iterator[Length]:
    """Every length that `request` needs; `wanted` is its clip's geometry."""
    scale, ratio = manifest.vae.spatial_compression, manifest.vae.temporal_compression_ratio
    text = manifest.transformer.max_text_seq_length
    for kind, side, needed, axis in (
        (Mismatch.HEIGHT, "height", wanted.latent_height, "H"),
        (Mismatch.WIDTH, "width", wanted.latent_width, "W"),
    ):
        instead = f"--{side} {{most}} or less"
        yield Length(
            kind=kind, what=f"a {side}", unit="pixels", needed=needed, axes=(axis,), factor=scale, instead=instead
        )
    yield Length(
        kind=Mismatch.FRAMES,
        what="clips",
        unit="frames",
        needed=wanted.latent_frames,
        axes=("F",),
        factor=ratio,
        offset=1 - ratio,  # the first latent frame stands for one frame
        instead="--frames {most} or less",
    )
    yield Length(kind=Mismatch.TEXT, what="prompts", unit="tokens", needed=text, axes=("L", "text_block.S"))
    # A set for a long and for a large clip does not take one that is both.
    for needed, axis, unit in (
        (wanted.video_tokens, "N", "video tokens"),
        (wanted.video_tokens + text, "block.S", "tokens with the text's"),
    ):
        smaller = "a smaller --height, --width or --frames"
        yield Length(kind=Mismatch.TOKENS, what="clips", unit=unit, needed=needed, axes=(axis,), instead=smaller)
    yield Length(
        kind=Mismatch.BATCH, what="batches", unit="guidance halves", needed=request.batch, axes=("block.B", "head.B")
    )
    yield Length(
        kind=Mismatch.STEPS,
        what="schedules",
        unit="steps",
        needed=request.steps,
        axes=("T",),
        instead="--steps {most} or less",
    )
    if request.tile is not None:
        rows, columns = request.tile
        for unit, needed, axis in (
            ("pixels in height", min(rows, wanted.latent_height), "latent_height"),  # a smaller frame is one tile
            ("pixels in width", min(columns, wanted.latent_width), "latent_width"),
        ):
            yield Length(kind=Mismatch.TILE, what="VAE tiles", unit=unit, needed=needed, axes=(axis,), factor=scale)
