"""Which shapes each graph's engine must take: extents of the named axes, and from them a profile for every dynamic input.

Axes follow from the sizes of the clips that a set is built for. Every dynamic input gets a profile; one whose axis has no
extent is an error, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..bundle.config import Geometry, geometry
from ..bundle.errors import BundleError, UsageError
from ..bundle.manifest import OWN, GraphSpec, Manifest, graph_kind
from .engine_set import BuildOptions, ClipSize, Extent

__all__ = ["Profile", "Shapes", "axes_of", "buildable_graphs", "default_size", "parse_size", "profile_of"]

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # least, best, most
Profile = dict[str, Shapes]

_USUAL_STEPS = 25
_USUAL_ACTIVE = 0.4  # share of the video tokens that is active in a step with token reuse


def buildable_graphs(manifest: Manifest) -> tuple[str, ...]:
    """The bundle's graphs that become engines, in the manifest's order."""
    return tuple(name for name in manifest.graphs if not name.endswith(OWN))


def parse_size(text: str) -> ClipSize:
    """Reads "1024x576x37": pixels across, pixels down, frames. Raises `UsageError`."""
    found = re.fullmatch(r"(\d{1,6})[xX×](\d{1,6})[xX×](\d{1,6})", text.strip())
    if found is None:
        raise UsageError(f"--size {text!r} is not a size. Write WIDTHxHEIGHTxFRAMES, for example 1024x576x37.")
    width, height, frames = map(int, found.groups())
    return ClipSize(height=height, width=width, frames=frames)


def default_size(manifest: Manifest) -> ClipSize:
    """What `animate` makes when no size is given."""
    given = manifest.defaults
    return ClipSize(height=given.height, width=given.width, frames=given.frames)


def axes_of(manifest: Manifest, options: BuildOptions) -> dict[str, Extent]:
    """The extent of every named axis of every buildable graph, keyed "graph.axis".

    The least is the smallest clip that the model can make (one token); the best is the first of `options.sizes`; the most
    covers all of them. Models with a stored positional table know one size only, which is then least, best and most.

    Raises:
        UsageError: a size that the model cannot make, or options that are not positive.
    """
    _check(manifest, options)
    transformer, vae = manifest.transformer, manifest.vae
    made = [geometry(transformer, vae, size.height, size.width, size.frames) for size in options.sizes]
    pixels = vae.spatial_compression * transformer.patch_size
    stored = transformer.use_learned_positional_embeddings
    smallest = made[0] if stored else geometry(transformer, vae, pixels, pixels, 1)

    def extent(values: Iterable[int], least: int) -> Extent:
        listed = list(values)
        return Extent(min(least, *listed), listed[0], max(listed))

    frames = extent((g.latent_frames for g in made), smallest.latent_frames)
    rows = extent((g.latent_height for g in made), smallest.latent_height)
    columns = extent((g.latent_width for g in made), smallest.latent_width)
    tokens = extent((g.video_tokens for g in made), smallest.video_tokens)
    # Where a graph has latents and tokens, the largest of each must belong together.
    box = Extent(tokens.least, tokens.best, _tokens(manifest, frames.most, rows.most, columns.most))
    text = Extent(*3 * (transformer.max_text_seq_length,))
    halves = Extent(1, options.batch, options.batch)
    prompts = Extent(1, 2, 2)
    times = Extent(1, min(_USUAL_STEPS, options.steps), options.steps)
    latents = {"F": frames, "H": rows, "W": columns}
    # Any number of tokens may be active, and those that are not are kept.
    active = Extent(1, max(1, round(_USUAL_ACTIVE * tokens.best)), tokens.most)
    kept = Extent(1, max(1, tokens.best - active.best), tokens.most)
    block = {"B": halves, "N": tokens, "L": text, "S": _plus(tokens, text.most)}
    by_graph: dict[str, dict[str, Extent]] = {
        "modulation": {"T": times},
        "head_modulation": {"T": times},
        "conditioning": {"B": prompts, "L": text, "N": box, "P": _plus(box, text.most), **latents},
        "stem": {"N": box, **latents},
        "block": block,
        "head": {"B": prompts, "N": box, **latents},  # both halves at once, however the block takes them
        "text_block": {"B": prompts, "S": text},
        "head_reuse": {"N": box, **latents},
        **{name: {"N": tokens} for name in ("trunk_keep", "trunk_reuse", "trunk_probe")},
        **{name: {"N": tokens, "A": active} for name in ("tokens_take", "tokens_put")},
        **{name: {"K": kept} for name in ("cache_narrow", "cache_widen")},
        "tokens_keep": {**block, "K": kept},
        "tokens_reuse": {"B": halves, "A": active, "L": text, "Q": _plus(active, text.most), "K": kept},
    }
    by_graph.update({name: _vae_axes(manifest, name, options.tile, made) for name in manifest.graphs if "vae_" in name})
    axes: dict[str, Extent] = {}
    for name in buildable_graphs(manifest):
        known = by_graph.get(graph_kind(name))
        if known is None:
            raise BundleError(
                f"The bundle has a graph {name!r} that this version does not know. Update dynamictrl-edge."
            )
        axes.update({f"{name}.{axis}": value for axis, value in known.items()})
    return axes


def profile_of(name: str, spec: GraphSpec, axes: Mapping[str, Extent]) -> Profile:
    """Least, best and most shape of every dynamic input of graph `name`.

    Raises:
        BundleError: an axis of the graph has no extent.
    """
    profile: Profile = {}
    for port in spec.inputs:
        if all(isinstance(n, int) for n in port.shape):
            continue
        extents = [_length(name, port.name, n, axes) for n in port.shape]
        profile[port.name] = (
            tuple(e.least for e in extents),
            tuple(e.best for e in extents),
            tuple(e.most for e in extents),
        )
    return profile


def _length(graph: str, port: str, length: int | str, axes: Mapping[str, Extent]) -> Extent:
    """A number, an axis ("N") or a multiple of one ("8*latent_height")."""
    if isinstance(length, int):
        return Extent(length, length, length)
    factor, _, axis = length.rpartition("*")
    found = axes.get(f"{graph}.{axis}")
    if found is None or (factor and not factor.isdecimal()):
        raise BundleError(
            f"Graph {graph!r}: the axis {length!r} of its input {port!r} has no extent, so no engine can be built for it. "
            "Export the checkpoint again with this version."
        )
    times = int(factor or 1)
    return Extent(times * found.least, times * found.best, times * found.most)


def _plus(extent: Extent, more: int) -> Extent:
    return Extent(extent.least + more, extent.best + more, extent.most + more)


def _tokens(manifest: Manifest, frames: int, rows: int, columns: int) -> int:
    a, b, c = manifest.transformer.token_grid(frames, rows, columns)
    return a * b * c


def _vae_axes(manifest: Manifest, name: str, tile: tuple[int, int], made: list[Geometry]) -> dict[str, Extent]:
    rows = Extent(1, min(tile[0], made[0].latent_height), min(tile[0], max(g.latent_height for g in made)))
    columns = Extent(1, min(tile[1], made[0].latent_width), min(tile[1], max(g.latent_width for g in made)))
    axes = {"latent_height": rows, "latent_width": columns}
    # First chunks take what is left over when the rest goes in whole chunks, whose length later chunks state.
    if name == "vae_encoder_first":
        chunk = _chunk(manifest, "vae_encoder_next", "pixels")
        ratio = manifest.vae.temporal_compression_ratio
        counts = [_first(n, chunk) for n in range(1, max(g.pose_frames for g in made) + 1, ratio)]
        axes["frames"] = Extent(1, _first(made[0].pose_frames, chunk), max(counts))
    elif name == "vae_decoder_first":
        chunk = _chunk(manifest, "vae_decoder_next", "latents")
        counts = [_first(n, chunk) for n in range(1, max(g.latent_frames for g in made) + 1)]
        odd = [n for n in counts if n % 2]
        axes["latent_frames"] = Extent(1, max(odd), max(odd))
    return axes


def _first(count: int, chunk: int) -> int:
    return count if count < chunk else chunk + count % chunk


def _chunk(manifest: Manifest, graph: str, port: str) -> int:
    spec = manifest.graphs.get(graph)
    shape = next((p.shape for p in spec.inputs if p.name == port), ()) if spec is not None else ()
    if len(shape) != 5 or not isinstance(shape[2], int):
        raise BundleError(f"The bundle's graph {graph!r} does not say how many frames it takes. Export again.")
    return shape[2]


def _check(manifest: Manifest, options: BuildOptions) -> None:
    if not options.sizes:
        raise UsageError("No size to build for. Give at least one --size WIDTHxHEIGHTxFRAMES.")
    if min(options.tile) < 1:
        raise UsageError(f"--tile {options.tile[0]}x{options.tile[1]} is not possible: at least one latent each way.")
    for flag, value, most in (("--steps", options.steps, 1000), ("--batch", options.batch, 2)):
        if not 1 <= value <= most:
            raise UsageError(f"{flag} {value} is not possible: 1 to {most}.")
