"""Rotary tables and the timestep sinusoid against the published numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamictrl_edge.bundle.errors import BundleError
from dynamictrl_edge.runtime.embeddings import timestep_sinusoid
from dynamictrl_edge.runtime.rope import axis_table, crop_region, rope_table, split_halves, with_text_prefix
from tests.golden import case, max_abs

LIMIT = 1e-6  # asked for: 1e-5; met: 6e-8
STYLES = {"rope10": "linspace", "rope15": "slice"}


def tables_of(name, kind):
    return [(name, table) for table in case(name)[1][kind]]


@pytest.mark.parametrize(("name", "table"), tables_of("rope10", "tables") + tables_of("rope15", "tables"))
def test_full_tables_are_the_published_ones(name, table):
    tensors, _ = case(name)
    base = tuple(table["base_grid_hw"]) if "base_grid_hw" in table else None
    cos, sin = rope_table(tuple(table["grid"]), STYLES[name], base=base)
    assert cos.dtype == sin.dtype == np.float32
    assert max_abs(cos, tensors[f"{table['key']}_cos"]) < LIMIT
    assert max_abs(sin, tensors[f"{table['key']}_sin"]) < LIMIT


@pytest.mark.parametrize(
    ("name", "table"), tables_of("rope10", "production_tables") + tables_of("rope15", "production_tables")
)
def test_every_axis_at_production_sizes_is_the_published_one(name, table):
    tensors, _ = case(name)
    grid = tuple(table["grid"])
    base = (table["sample_height"] // 2, table["sample_width"] // 2)
    got = [part.reshape(*grid, 64) for part in rope_table(grid, STYLES[name], base=base)]
    for function, part in zip(("cos", "sin"), got, strict=True):
        assert max_abs(part[:, 0, 0, :16], tensors[f"{table['key']}_t_{function}"]) < LIMIT
        assert max_abs(part[0, :, 0, 16:40], tensors[f"{table['key']}_h_{function}"]) < LIMIT
        assert max_abs(part[0, 0, :, 40:], tensors[f"{table['key']}_w_{function}"]) < LIMIT
        # and nothing else: each axis's share of the channels depends on that axis only
        assert np.array_equal(part[..., :16], np.broadcast_to(part[:, :1, :1, :16], (*grid, 16)))
        assert np.array_equal(part[..., 16:40], np.broadcast_to(part[:1, :, :1, 16:40], (*grid, 24)))
        assert np.array_equal(part[..., 40:], np.broadcast_to(part[:1, :1, :, 40:], (*grid, 24)))


@pytest.mark.parametrize(
    "row", case("rope10")[1]["crop_region_table"], ids=lambda row: f"{row['base_hw']}{row['grid_hw']}"
)
def test_crop_boxes_are_the_published_ones(row):
    assert crop_region(tuple(row["grid_hw"]), tuple(row["base_hw"])) == (tuple(row["start"]), tuple(row["stop"]))


@pytest.mark.parametrize("table", case("rope10")[1]["tables"], ids=lambda table: table["key"])
def test_crop_boxes_of_the_small_model_are_the_published_ones(table):
    start, stop = crop_region(tuple(table["grid"][1:]), tuple(table["base_grid_hw"]))
    assert [list(start), list(stop)] == table["crop_start_stop"]


@given(grid=st.tuples(*[st.integers(1, 200)] * 2), base=st.tuples(*[st.integers(1, 200)] * 2))
def test_a_crop_box_always_lies_within_the_base(grid, base):
    (top, left), (bottom, right) = crop_region(grid, base)
    assert 0 <= top <= bottom <= base[0]
    assert 0 <= left <= right <= base[1]


@pytest.mark.parametrize(("base", "grid"), [((6, 10), (1, 9)), ((5, 10), (4, 4)), ((10, 5), (4, 4)), ((7, 4), (2, 2))])
def test_half_roundings_go_to_the_even_number(base, grid):
    (top, left), (bottom, right) = crop_region(grid, base)
    rows, columns = grid
    fit = min(base[0] / rows, base[1] / columns)
    height, width = round(fit * rows), round(fit * columns)
    assert (bottom - top, right - left) == (height, width)
    assert (top, left) == (int(np.rint((base[0] - height) / 2)), int(np.rint((base[1] - width) / 2)))


def test_heads_of_other_sizes_share_their_channels_out_alike():
    cos, sin = rope_table((2, 3, 4), "slice", head_dim=128)
    assert cos.shape == sin.shape == (24, 128)
    for part, function in ((cos, 0), (sin, 1)):
        grid = part.reshape(2, 3, 4, 128)
        assert np.array_equal(grid[:, 0, 0, :32], axis_table([0, 1], 32)[function])
        assert np.array_equal(grid[0, :, 0, 32:80], axis_table([0, 1, 2], 48)[function])
        assert np.array_equal(grid[0, 0, :, 80:], axis_table([0, 1, 2, 3], 48)[function])


def test_every_frequency_stands_twice_in_a_row_and_halves_repeat_after_the_split():
    for part in rope_table((2, 3, 4), "slice"):
        assert np.array_equal(part[:, 0::2], part[:, 1::2])
        split = split_halves(part)
        assert np.array_equal(split[:, :32], part[:, 0::2])
        assert np.array_equal(split[:, 32:], part[:, 1::2])


def test_rotating_permuted_halves_equals_rotating_adjacent_pairs():
    cos, sin = rope_table((2, 3, 4), "slice")
    x = np.random.default_rng(0).standard_normal(cos.shape).astype(np.float32)
    turned = np.empty_like(x)
    turned[:, 0::2], turned[:, 1::2] = -x[:, 1::2], x[:, 0::2]
    expected = x * cos + turned * sin
    half = split_halves(x)
    turned_half = np.concatenate([-half[:, 32:], half[:, :32]], axis=1)
    got = half * split_halves(cos) + turned_half * split_halves(sin)
    assert np.array_equal(got, split_halves(expected))


def test_text_tokens_are_not_rotated():
    cos, sin = rope_table((1, 2, 2), "slice")
    longer_cos, longer_sin = with_text_prefix(cos, sin, 5)
    assert longer_cos.dtype == longer_sin.dtype == np.float32
    assert (longer_cos[:5] == 1).all()
    assert (longer_sin[:5] == 0).all()
    assert np.array_equal(longer_cos[5:], cos)
    assert np.array_equal(longer_sin[5:], sin)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (1, 2, 2), "style": "slice", "head_dim": 40}, "40"),
        ({"grid": (1, 0, 2), "style": "slice"}, "empty"),
        ({"grid": (1, 2, 2), "style": "linspace"}, "sample size"),
        ({"grid": (1, 2, 2), "style": "spiral"}, "'spiral'"),
    ],
)
def test_what_no_model_has_is_refused(arguments, message):
    with pytest.raises(BundleError, match=message):
        rope_table(**arguments)


@pytest.mark.parametrize("name", ["10_a", "10_b", "10_learnedpos", "15_a", "15_b"])
def test_timestep_sinusoids_are_the_published_ones(name):
    tensors, _ = case(f"transformer{name}")
    expected = tensors["time_sinusoid"]
    assert max_abs(timestep_sinusoid(tensors["timestep"], expected.shape[1]), expected) < 5e-6


@pytest.mark.parametrize("width", [128, 3072])
def test_sinusoids_of_all_timesteps_stay_within_one_rounding_of_the_angle(width):
    torch = pytest.importorskip("torch")
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    timesteps = np.arange(-1, 1000)
    theirs = embeddings.get_timestep_embedding(torch.from_numpy(timesteps), width, True, 0).numpy()
    ours = timestep_sinusoid(timesteps, width)
    assert ours.dtype == np.float32
    assert max_abs(ours, theirs) < 6.2e-5  # one unit in the last place of an angle of 999
    assert np.mean(ours == theirs) > 0.9  # float64 throughout: 0.2


def test_sinusoids_have_cosines_first_and_take_fractions():
    values = timestep_sinusoid([0.0, 2.5], 8)
    assert np.array_equal(values[0], [1, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_allclose(values[1, [0, 4]], [np.cos(2.5), np.sin(2.5)], rtol=0, atol=1e-7)


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="even"):
        timestep_sinusoid([1], 7)
