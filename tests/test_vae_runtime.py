"""Time chunks, states, tiles and blending of the streamed VAE, over small stand-ins for its graphs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamictrl_edge.bundle.errors import Interrupted
from dynamictrl_edge.runtime.tiling import Tiling, stitch
from dynamictrl_edge.runtime.vae import (
    DECODER_CHUNK,
    ENCODER_CHUNK,
    VAEDecoder,
    VAEEncoder,
    decoded_frames,
    latent_frames,
    sample_posterior,
    time_chunks,
)
from tests.golden import ROOT, case, max_abs

SCALE = 4  # pixels per latent of the stand-ins


class Graphs:
    """Stand-ins with the interface of the real graphs, that depend on where a tile begins and on every earlier frame.

    The state is a running sum; it is an object that the runtime cannot look into.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def __call__(self, name: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        encodes = "encoder" in name
        source, result = ("pixels", "moments") if encodes else ("latents", "pixels")

        def run(feeds: Mapping[str, Any]) -> dict[str, Any]:
            x = feeds[source]
            assert x.dtype == np.float32
            assert x.flags.c_contiguous
            assert set(feeds) == ({source, "state_in.a.b"} if name.endswith("next") else {source})
            self.calls.append((name, x.shape[2]))
            past = feeds["state_in.a.b"].value if name.endswith("next") else 0
            sums = past + np.cumsum(x, axis=2)
            # A tile's numbers depend on its own extent, as norm statistics do.
            y = sums + x.mean(axis=(3, 4), keepdims=True) + np.arange(x.shape[4]) / 10
            if encodes:
                y = y[:, :, -latent_frames(x.shape[2], 4) :, ::SCALE, ::SCALE]
            else:
                y = y.repeat(SCALE, axis=3).repeat(SCALE, axis=4).repeat(4, axis=2)
                y = y[:, :, 3:] if name == "vae_decoder_first" else y
            return {result: y.astype(np.float32), "state_out.a.b": _Opaque(sums[:, :, -1:])}

        return run


class _Opaque:
    def __init__(self, value: np.ndarray) -> None:
        self.value = value


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


# Time.


@given(st.integers(1, 200), st.sampled_from([DECODER_CHUNK, ENCODER_CHUNK]))
def test_time_chunks_follow_the_published_loop(count: int, size: int) -> None:
    chunks = []
    for k in range(max(count // size, 1)):  # the loop of AutoencoderKLCogVideoX
        rest = count % size
        start, end = size * k + (0 if k == 0 else rest), size * (k + 1) + rest
        chunks.append(len(range(count)[start:end]))
    assert time_chunks(count, size) == chunks


@pytest.mark.parametrize("name", ["vae10_encode_video17", "vae15_encode_video13", "vae10_decode5", "vae15_decode4"])
def test_time_chunks_are_the_golden_ones(name: str) -> None:
    facts = json.loads((ROOT / "cases" / f"{name}.json").read_text())
    spans = facts.get("frame_chunks") or facts["latent_frame_chunks"]
    size = ENCODER_CHUNK if "frame_chunks" in facts else DECODER_CHUNK
    assert time_chunks(spans[-1][1], size) == [end - start for start, end in spans]
    if "decoded_frames" in facts:
        assert decoded_frames(spans[-1][1], 4) == facts["decoded_frames"]


def test_an_empty_clip_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        VAEEncoder(Graphs(), temporal_compression=4).encode(np.zeros((1, 3, 0, 8, 8), np.float32))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 10])
def test_streamed_frames_are_those_of_the_whole(count: int) -> None:
    latents = _normal(1, 2, count, 3, 5)
    graphs = Graphs()
    chunks = list(VAEDecoder(graphs).decode_stream(latents))
    first = "vae_decoder_first" if count % 2 else "vae_decoder_first_even"
    assert graphs.calls[0][0] == first
    assert {name for name, _ in graphs.calls[1:]} <= {"vae_decoder_next"}
    assert sum(chunk.shape[2] for chunk in chunks) == decoded_frames(count, 4)
    np.testing.assert_array_equal(np.concatenate(chunks, axis=2), VAEDecoder(Graphs()).decode(latents))
    # The state went from chunk to chunk: the last frame has the sum of all.
    expected = latents.sum(axis=2) + latents[:, :, -2 if count > 1 else -1 :].mean(axis=(3, 4))[:, :, -1:, None]
    expected += np.arange(5) / 10
    np.testing.assert_allclose(chunks[-1][0, :, -1, ::SCALE, ::SCALE], expected[0], atol=1e-5)


def test_frames_leave_before_later_chunks_are_decoded() -> None:
    graphs = Graphs()
    stream = VAEDecoder(graphs, tiling=Tiling(2, 2, 1, 1, SCALE)).decode_stream(_normal(1, 2, 5, 3, 3))
    assert graphs.calls == []
    assert next(stream).shape == (1, 2, 9, 12, 12)
    assert {count for _, count in graphs.calls} == {3}


def test_a_clip_can_be_encoded_as_it_arrives() -> None:
    pixels = _normal(1, 3, 21, 8, 12)
    seen = []

    def arriving() -> Any:
        start = 0
        for length in time_chunks(21, ENCODER_CHUNK):
            seen.append(length)
            yield pixels[:, :, start : start + length]
            start += length

    parts = []
    for moments in VAEEncoder(Graphs(), temporal_compression=4).encode_stream(arriving()):
        parts.append(moments)
        assert len(seen) == len(parts)  # nothing is read ahead
    np.testing.assert_array_equal(
        np.concatenate(parts, axis=2), VAEEncoder(Graphs(), temporal_compression=4).encode(pixels)
    )


@pytest.mark.parametrize(("lengths", "message"), [((8,), "begin a clip"), ((11,), "begin"), ((9, 4), "not 8")])
def test_chunks_of_a_wrong_length_are_refused(lengths: tuple[int, ...], message: str) -> None:
    encoder = VAEEncoder(Graphs(), temporal_compression=4)
    with pytest.raises(ValueError, match=message):
        list(encoder.encode_stream(np.zeros((1, 3, n, 8, 8), np.float32) for n in lengths))


def test_one_clip_at_a_time() -> None:
    with pytest.raises(ValueError, match=r"one clip \[1, C, F, H, W\]"):
        VAEDecoder(Graphs()).decode(np.zeros((2, 2, 1, 3, 3), np.float32))


@pytest.mark.parametrize("order", ["time", "tiles"])
def test_a_run_can_be_cancelled_between_tiles(order: Any) -> None:
    graphs = Graphs()

    def check() -> None:
        if len(graphs.calls) == 3:
            raise Interrupted("stopped")

    decoder = VAEDecoder(graphs, tiling=Tiling(2, 2, 1, 1, SCALE), order=order, check=check)
    with pytest.raises(Interrupted):
        decoder.decode(_normal(1, 2, 4, 3, 3))
    assert len(graphs.calls) == 3


# Tiles.


@pytest.mark.parametrize("name", ["vae10_encode_tiled", "vae10_decode_tiled"])
def test_the_published_geometry_is_the_golden_one(name: str) -> None:
    facts = case(name)[1]["tiling"]
    tiling = Tiling.published(96, 160, 8)
    assert (tiling.pixel_rows, tiling.pixel_columns) == (
        facts["tile_sample_min_height"],
        facts["tile_sample_min_width"],
    )
    assert (tiling.rows, tiling.columns) == (facts["tile_latent_min_height"], facts["tile_latent_min_width"])
    overlap = (tiling.overlap_rows, tiling.overlap_columns)
    assert list(overlap) == facts["encode_blend_latent_hw"]
    assert [8 * n for n in overlap] == facts["decode_blend_pixels_hw"]
    strides = [tiling.rows - tiling.overlap_rows, tiling.columns - tiling.overlap_columns]
    assert strides == facts["decode_stride_latent_hw"]
    assert [8 * n for n in strides] == facts["encode_stride_pixels_hw"]


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([4, 8, 16]))
def test_the_published_formulas_hold_for_every_sample_size_they_fit(a: int, b: int, compression: int) -> None:
    height, width = 2 * 6 * compression * a, 2 * 5 * compression * b  # tiles of 6a x 5b latents
    tiling = Tiling.published(height, width, compression)
    assert (tiling.pixel_rows, tiling.pixel_columns) == (height // 2, width // 2)
    assert tiling.rows - tiling.overlap_rows == int(tiling.rows * (1 - 1 / 6))
    assert tiling.columns - tiling.overlap_columns == int(tiling.columns * (1 - 1 / 5))
    assert compression * (tiling.rows - tiling.overlap_rows) == int(height // 2 * (1 - 1 / 6))
    assert compression * (tiling.columns - tiling.overlap_columns) == int(width // 2 * (1 - 1 / 5))
    assert compression * tiling.overlap_rows == int(height // 2 * (1 / 6))
    assert compression * tiling.overlap_columns == int(width // 2 * (1 / 5))


@given(st.integers(1, 2000), st.integers(1, 2000), st.sampled_from([1, 4, 8]))
def test_every_sample_size_gives_a_tiling(height: int, width: int, compression: int) -> None:
    tiling = Tiling.published(height, width, compression)
    assert 0 <= tiling.overlap_rows < tiling.rows
    assert 0 <= tiling.overlap_columns < tiling.columns


@pytest.mark.parametrize("sizes", [(0, 4, 0, 1), (4, 4, 4, 1), (4, 4, -1, 1), (4, 4, 1, 9)])
def test_impossible_tiles_are_refused(sizes: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="cannot overlap"):
        Tiling(*sizes, SCALE)
    with pytest.raises(ValueError, match="compression must be positive"):
        Tiling(4, 4, 1, 1, 0)


@st.composite
def _tilings(draw: st.DrawFn) -> Tiling:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    return Tiling(rows, columns, draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1)), SCALE)


@given(_tilings(), st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, SCALE]))
def test_tiles_cover_a_frame_and_identical_tiles_blend_to_it(
    tiling: Tiling, rows: int, columns: int, scale: int
) -> None:
    frame = _normal(1, 2, 1, rows * scale, columns * scale)
    grid = tiling.grid(rows * scale, columns * scale, scale)
    tiles = [[frame[..., y, x].copy() for y, x in row] for row in grid]
    np.testing.assert_allclose(stitch(tiles, tiling, scale), frame, atol=1e-6)


@given(_tilings(), st.integers(1, 11), st.integers(1, 11))
def test_blending_is_the_published_one(tiling: Tiling, rows: int, columns: int) -> None:
    """Line by line, in float32, as AutoencoderKLCogVideoX.blend_v and blend_h do it."""
    grid = tiling.grid(rows, columns)
    tiles = [
        [_normal(1, 1, 2, y.stop - y.start, x.stop - x.start) + np.float32(i - j) for j, (y, x) in enumerate(row)]
        for i, row in enumerate(grid)
    ]
    wanted = [[tile.copy() for tile in row] for row in tiles]
    bands = []
    for i, row in enumerate(wanted):
        for j, tile in enumerate(row):
            if i > 0:
                above = wanted[i - 1][j]
                extent = min(above.shape[3], tile.shape[3], tiling.overlap_rows)
                for y in range(extent):
                    tile[..., y, :] = above[..., y - extent, :] * np.float32(1 - y / extent) + tile[
                        ..., y, :
                    ] * np.float32(y / extent)
            if j > 0:
                left = row[j - 1]
                extent = min(left.shape[4], tile.shape[4], tiling.overlap_columns)
                for x in range(extent):
                    tile[..., x] = left[..., x - extent] * np.float32(1 - x / extent) + tile[..., x] * np.float32(
                        x / extent
                    )
        keep = (tiling.rows - tiling.overlap_rows, tiling.columns - tiling.overlap_columns)
        bands.append(np.concatenate([tile[..., : keep[0], : keep[1]] for tile in row], axis=4))
    np.testing.assert_array_equal(stitch(tiles, tiling, 1), np.concatenate(bands, axis=3))


@settings(deadline=None, max_examples=40)
@given(_tilings(), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
def test_the_order_of_the_loops_does_not_change_a_number(tiling: Tiling, rows: int, columns: int, count: int) -> None:
    latents = _normal(1, 2, count, rows, columns)
    by_time, by_tile = Graphs(), Graphs()
    one = VAEDecoder(by_time, tiling=tiling, order="time").decode(latents)
    other = VAEDecoder(by_tile, tiling=tiling, order="tiles").decode(latents)
    np.testing.assert_array_equal(one, other)
    assert one.shape == (1, 2, decoded_frames(count, 4), rows * SCALE, columns * SCALE)
    assert sorted(by_time.calls) == sorted(by_tile.calls)
    pixels = _normal(1, 3, 4 * count + 1, rows * SCALE, columns * SCALE)
    moments = [
        VAEEncoder(Graphs(), temporal_compression=4, tiling=tiling, order=order).encode(pixels)
        for order in ("time", "tiles")
    ]
    np.testing.assert_array_equal(*moments)
    assert moments[0].shape == (1, 3, count + 1, rows, columns)


def test_a_frame_that_fits_into_a_tile_is_not_tiled() -> None:
    latents = _normal(1, 2, 1, 4, 6)
    graphs = Graphs()
    frames = VAEDecoder(graphs, tiling=Tiling(4, 6, 1, 1, SCALE)).decode(latents)
    assert len(graphs.calls) == 1
    np.testing.assert_array_equal(frames, VAEDecoder(Graphs()).decode(latents))
    VAEDecoder(graphs, tiling=Tiling(4, 5, 1, 1, SCALE)).decode(latents)
    assert len(graphs.calls) > 2


def test_frames_that_cannot_be_cut_into_tiles_are_refused() -> None:
    encoder = VAEEncoder(Graphs(), temporal_compression=4, tiling=Tiling(2, 2, 1, 1, SCALE))
    with pytest.raises(ValueError, match="both sides must divide by 4"):
        encoder.encode(np.zeros((1, 3, 1, 18, 16), np.float32))


# The posterior.


@pytest.mark.parametrize("name", ["vae10_encode_image", "vae15_encode_video13"])
def test_the_posterior_is_sampled_as_published(name: str) -> None:
    tensors, _ = case(name)
    assert max_abs(sample_posterior(tensors["moments"], tensors["sample_noise"]), tensors["sample"]) <= 1e-6
    mode = sample_posterior(tensors["moments"], np.zeros_like(tensors["sample_noise"]))
    np.testing.assert_array_equal(mode, tensors["mode"])


def test_extreme_variances_are_clamped() -> None:
    moments = np.array([[0.0, 0.0, 1e6, -1e6]], np.float32).reshape(1, 4, 1, 1, 1)
    drawn = sample_posterior(moments, np.ones((1, 2, 1, 1, 1), np.float32)).ravel()
    np.testing.assert_allclose(drawn, [np.exp(10), np.exp(-15)], rtol=1e-6)
    assert drawn.dtype == np.float32


def test_noise_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        sample_posterior(np.zeros((1, 4, 1, 2, 2), np.float32), np.zeros((1, 2, 1, 2, 1), np.float32))
