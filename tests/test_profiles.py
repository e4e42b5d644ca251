"""Optimization profiles: every clip of the sizes asked for fits, every dynamic input has one, nonsense is refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamictrl_edge.bundle.config import TransformerConfig, geometry
from dynamictrl_edge.bundle.errors import BundleError, UsageError
from dynamictrl_edge.bundle.manifest import GraphSpec, Manifest, Port
from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.engines.engine_set import BuildOptions, ClipSize, Extent
from dynamictrl_edge.engines.profiles import axes_of, buildable_graphs, default_size, parse_size, profile_of
from tests.bundle_samples import TRANSFORMER, small_manifest

OPTIONS = BuildOptions(sizes=(ClipSize(64, 64, 9),), tile=(6, 8))


def manifest_with(transformer: TransformerConfig, *graphs: str) -> Manifest:
    """The named graphs, without ports except what first chunks are told by."""
    ports = {
        "vae_encoder_next": (Port("pixels", "float", (1, 3, 8, "8*latent_height", "8*latent_width")),),
        "vae_decoder_next": (Port("latents", "float", (1, 16, 2, "latent_height", "latent_width")),),
    }
    specs = {name: GraphSpec(file=f"graphs/{name}.onnx", inputs=ports.get(name, ()), outputs=()) for name in graphs}
    return msgspec.structs.replace(small_manifest({}), transformer=transformer, graphs=specs)


ALL = [
    "modulation",
    "head_modulation",
    "conditioning",
    "stem",
    "block",
    "head",
    "text_block",
    "head_reuse",
    "trunk_keep",
    "trunk_reuse",
    "trunk_probe",
    "tokens_keep",
    "tokens_reuse",
    "tokens_take",
    "tokens_put",
    "cache_narrow",
    "cache_widen",
    "vae_encoder_first",
    "vae_encoder_next",
    "vae_decoder_first",
    "vae_decoder_first_even",
    "vae_decoder_next",
]


def test_every_dynamic_input_of_an_exported_bundle_has_a_profile(bundle15: Path) -> None:
    manifest = Bundle(bundle15).manifest
    axes = axes_of(manifest, usual(manifest))
    assert "block_cpu" in manifest.graphs and "block_cpu" not in buildable_graphs(manifest)
    for name in buildable_graphs(manifest):
        spec = manifest.graphs[name]
        profile = profile_of(name, spec, axes)
        dynamic = {port.name for port in spec.inputs if any(isinstance(n, str) for n in port.shape)}
        assert set(profile) == dynamic
        for port in spec.inputs:
            if port.name in profile:
                for i, length in enumerate(port.shape):
                    least, best, most = (shape[i] for shape in profile[port.name])
                    assert 1 <= least <= best <= most
                    if isinstance(length, int):
                        assert least == most == length


def usual(manifest: Manifest) -> BuildOptions:
    return BuildOptions(sizes=(default_size(manifest),), tile=(6, 8))


clip_sizes = st.builds(
    lambda h, w, f: ClipSize(16 * h, 16 * w, 4 * f + 1), st.integers(1, 48), st.integers(1, 85), st.integers(0, 20)
)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(clip_sizes, min_size=1, max_size=4),
    time_patch=st.sampled_from([None, 2]),
    tile=st.tuples(st.integers(1, 100), st.integers(1, 100)),
    batch=st.integers(1, 2),
)
def test_every_clip_that_was_asked_for_fits(
    sizes: list[ClipSize], time_patch: int | None, tile: tuple[int, int], batch: int
) -> None:
    transformer = msgspec.structs.replace(TRANSFORMER, patch_size_t=time_patch)
    manifest = manifest_with(transformer, *ALL)
    axes = axes_of(manifest, BuildOptions(sizes=tuple(sizes), tile=tile, batch=batch))
    for extent in axes.values():
        assert 1 <= extent.least <= extent.best <= extent.most
    text = transformer.max_text_seq_length
    for size in sizes:
        made = geometry(transformer, manifest.vae, size.height, size.width, size.frames)
        for graph in ("stem", "head", "conditioning"):
            for axis, n in zip("FHW", (made.latent_frames, made.latent_height, made.latent_width), strict=True):
                assert axes[f"{graph}.{axis}"].least <= n <= axes[f"{graph}.{axis}"].most
            assert axes[f"{graph}.N"].least <= made.video_tokens <= axes[f"{graph}.N"].most
        assert axes["block.N"].least <= made.video_tokens <= axes["block.N"].most
        assert axes["block.S"].most == axes["block.N"].most + text
        # Chunks as the runtime cuts them: the first takes the remainder, photo and pose alike.
        for frames in (1, made.pose_frames):
            first = frames if frames < 8 else 8 + frames % 8
            assert first <= axes["vae_encoder_first.frames"].most
        first = made.latent_frames if made.latent_frames < 2 else 2 + made.latent_frames % 2
        if first % 2:
            assert first <= axes["vae_decoder_first.latent_frames"].most
        for graph in ALL[-5:]:
            assert min(tile[0], made.latent_height) <= axes[f"{graph}.latent_height"].most <= tile[0]
    best = geometry(transformer, manifest.vae, sizes[0].height, sizes[0].width, sizes[0].frames)
    assert axes["block.N"].best == best.video_tokens
    assert axes["block.N"].most == max(
        geometry(transformer, manifest.vae, s.height, s.width, s.frames).video_tokens for s in sizes
    )


def test_where_latents_and_tokens_meet_their_largest_belong_together() -> None:
    # Tall and wide clips: the box that holds both has more tokens than either.
    manifest = manifest_with(TRANSFORMER, "stem", "block")
    axes = axes_of(manifest, BuildOptions(sizes=(ClipSize(64, 32, 9), ClipSize(32, 64, 9)), tile=(8, 8)))
    assert (axes["stem.N"].most, axes["block.N"].most) == (3 * 4 * 4, 3 * 4 * 2)


def test_a_stored_positional_table_has_one_size() -> None:
    stored = msgspec.structs.replace(TRANSFORMER, use_learned_positional_embeddings=True)
    axes = axes_of(manifest_with(stored, "block"), BuildOptions(sizes=(ClipSize(96, 160, 9),), tile=(8, 8)))
    assert axes["block.N"] == Extent(*3 * (3 * 6 * 10,))
    axes = axes_of(manifest_with(stored, "conditioning"), BuildOptions(sizes=(ClipSize(96, 160, 9),), tile=(8, 8)))
    assert axes["conditioning.N"].least == axes["conditioning.N"].most == 3 * 6 * 10
    assert axes["conditioning.P"].best == 16 + 3 * 6 * 10  # the table's rows: text, then video


def test_an_axis_without_extent_is_refused_not_guessed() -> None:
    spec = GraphSpec(file="graphs/stem.onnx", inputs=(Port("latents", "float", (1, "Q", 16)),), outputs=())
    with pytest.raises(BundleError, match=r"'stem'.*'Q'.*'latents'.*no extent"):
        profile_of("stem", spec, axes_of(manifest_with(TRANSFORMER, "stem"), OPTIONS))


def test_a_graph_that_is_not_known_is_refused() -> None:
    with pytest.raises(BundleError, match=r"'sharpen'.*Update"):
        axes_of(manifest_with(TRANSFORMER, "sharpen"), OPTIONS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sizes": ()}, "--size"),
        ({"sizes": (ClipSize(65, 64, 9),)}, "--height 65"),
        ({"sizes": (ClipSize(64, 64, 8),)}, "--frames 8"),
        ({"tile": (0, 8)}, "--tile 0x8"),
        ({"steps": 0}, "--steps 0"),
        ({"batch": 3}, "--batch 3"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(change: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        axes_of(manifest_with(TRANSFORMER, *ALL), msgspec.structs.replace(OPTIONS, **change))


@pytest.mark.parametrize("text", ["1024x576x37", "1024X576X37", " 1024×576×37 "])
def test_a_size_is_width_height_frames(text: str) -> None:
    assert parse_size(text) == ClipSize(height=576, width=1024, frames=37)
    assert str(parse_size(text)) == "1024x576x37"


@pytest.mark.parametrize("text", ["", "1024x576", "1024x576x", "ax2x3", "-1x2x3", "1x2x3x4", "99999999x16x1"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="WIDTHxHEIGHTxFRAMES"):
        parse_size(text)
