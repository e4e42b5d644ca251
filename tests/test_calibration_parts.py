"""The parts of calibration, each by itself: statistics, grids, pairs, compensation, decisions, the choice of linears."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from benchmarks.checkpoints import SPECS, transformer_config, vae_config
from dynamictrl_edge.bundle.config import TransformerConfig, VaeConfig, geometry
from dynamictrl_edge.bundle.errors import InputError
from dynamictrl_edge.bundle.manifest import FileEntry
from dynamictrl_edge.bundle.precision import widen
from dynamictrl_edge.calibration.block_graph import LINEARS
from dynamictrl_edge.calibration.blocks import row_scale
from dynamictrl_edge.calibration.choose import MOST_GRAPHS, Kept, choose, graph_name, merged, ranking
from dynamictrl_edge.calibration.compensate import compensated, second_moments
from dynamictrl_edge.calibration.decide import Settings, decide, decide_weights, snr
from dynamictrl_edge.calibration.grids import FP8, INT8, as_stored, raised, representable
from dynamictrl_edge.calibration.observe import STATISTICS_BUDGET, Plan, channels_of, observing_bytes, plan_rows
from dynamictrl_edge.calibration.pairs import PAIR_LIMIT, fits, pair_sums, room
from dynamictrl_edge.calibration.statistics import BINS, TensorStatistics, percentile, statistics_bytes
from dynamictrl_edge.runtime.scheduler import SchedulerConfig, make_schedule
from tests.bundle_samples import TRANSFORMER, small_manifest

SIZES = st.integers(1, 30)
FLOATS = st.floats(-1e6, 1e6, width=32)


def seen(rows: np.ndarray, text: int = 2, step: int = 0, half: int = 0, kept: int = 64) -> TensorStatistics:
    made = TensorStatistics.empty(rows.shape[1], 3, kept)
    made.add(rows, min(text, len(rows)), step, half, np.arange(min(kept, len(rows))))
    return made


# Statistics


@given(arrays(np.float32, st.tuples(SIZES, st.just(5)), elements=FLOATS), arrays(np.float32, (7, 5), elements=FLOATS))
@settings(max_examples=40)
def test_merging_is_seeing_both(first: np.ndarray, second: np.ndarray) -> None:
    together = seen(first)
    together.add(second, 2, 1, 1, np.arange(3))
    other = TensorStatistics.empty(5, 3, 64)
    other.add(second, 2, 1, 1, np.arange(3))
    merged_ones = seen(first)
    merged_ones.merge(other)
    for name, value in together.arrays("").items():
        np.testing.assert_array_equal(merged_ones.arrays("")[name], value)
    np.testing.assert_array_equal(together.absmax, np.abs(np.concatenate([first, second])).max(axis=0))


def test_stored_statistics_come_back() -> None:
    made = seen(np.random.default_rng(0).standard_normal((20, 5)).astype(np.float32))
    back = TensorStatistics.of(made.arrays("x."), "x.")
    for name, value in made.arrays("").items():
        np.testing.assert_array_equal(back.arrays("")[name], value)
    assert isinstance(back.filled, int)


def test_ranges_are_kept_by_timestep_half_and_kind_of_token() -> None:
    rows = np.array([[1, -2], [3, 4], [-5, 6]], np.float32)
    made = seen(rows, text=1, step=2, half=1)
    assert made.ranges[2, 1].tolist() == [[-2, 1], [-5, 6]]
    assert np.isinf(made.ranges[0]).all()


def test_percentiles_are_within_a_bin() -> None:
    rows = np.random.default_rng(0).standard_normal((4000, 16)).astype(np.float32)
    made = seen(rows)
    assert made.histogram.shape == (BINS,) and made.histogram.sum() == 1000 * 16
    assert percentile(made.histogram, 0.99) == pytest.approx(np.quantile(np.abs(rows), 0.99), rel=0.05)
    assert percentile(seen(np.zeros((8, 4), np.float32)).histogram, 0.5) < 1e-6


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    rows = np.ones((4, 3), np.float32)
    rows[2, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        seen(rows)


def test_constants_and_nothing_are_named() -> None:
    with pytest.raises(InputError, match=r"The input of qkv was 2 everywhere"):
        seen(np.full((6, 3), 2, np.float32)).check("The input of qkv")
    with pytest.raises(InputError, match="Nothing was seen of it"):
        TensorStatistics.empty(3, 1, 4).check("it")


def test_statistics_of_the_full_model_are_bounded() -> None:
    config = msgspec.structs.replace(TRANSFORMER, num_attention_heads=48, num_layers=42)
    rows = plan_rows(config, 25)
    one = sum(statistics_bytes(channels, 25, rows) for channels in channels_of(config).values())
    assert rows >= 256 and 42 * one <= STATISTICS_BUDGET < 2e9
    made = TensorStatistics.empty(64, 25, 10)
    assert sum(np.asarray(value).nbytes for value in made.arrays("").values()) <= statistics_bytes(64, 25, 10) + 8


def test_the_full_model_is_observed_within_8_gb() -> None:
    config = msgspec.convert(transformer_config(SPECS["full"]), TransformerConfig)
    block = 4 * (12 * config.width**2 + 9 * config.width + 4 * config.attention_head_dim)
    names = [f"weights/block_{i:02d}.safetensors" for i in range(config.num_layers)]
    manifest = small_manifest({name: FileEntry("", block) for name in names})
    graphs = {**manifest.graphs, "block_cpu": manifest.graphs["block"]}
    manifest = msgspec.structs.replace(manifest, transformer=config, graphs=graphs)
    plan = Plan(4, make_schedule(SchedulerConfig(), 25), 3.0, plan_rows(config, 25))
    size = geometry(config, msgspec.convert(vae_config(SPECS["full"]), VaeConfig), 576, 1024, 37)
    assert size.video_tokens == 11520 and config.num_layers == 42
    assert observing_bytes(manifest, size, plan) < 8e9


@given(st.integers(1, 9), st.integers(1, 12), st.booleans(), st.integers(1, 3000))
@settings(max_examples=60)
def test_rows_are_drawn_evenly_over_all_calls(samples: int, steps: int, guided: bool, rows: int) -> None:
    plan = Plan(samples, make_schedule(SchedulerConfig(), steps), 3.0 if guided else 1.0, rows)
    taken = [plan.taken(call) for call in range(plan.calls)]
    assert sum(taken) == rows and max(taken) - min(taken) <= 1


# Grids


def test_fp8_saturates_and_int8_rounds_to_even() -> None:
    x = np.array([-1e9, -448, -0.5, 0.5, 1.5, 2.5, 460, np.inf], np.float32)
    assert FP8.rounded(x).tolist() == [-448, -448, -0.5, 0.5, 1.5, 2.5, 448, 448]
    assert INT8.rounded(x).tolist() == [-128, -128, 0, 0, 2, 2, 127, 127]
    assert FP8.encode(FP8.rounded(x)).dtype == np.uint8


@given(arrays(np.float32, 20, elements=st.floats(-(2.0**99), 2.0**99, width=32)))
@settings(max_examples=60)
def test_bfloat16_is_rounded_to_nearest_even(x: np.ndarray) -> None:
    np.testing.assert_array_equal(widen(as_stored(x, "bf16")), x.astype(ml_dtypes.bfloat16).astype(np.float32))


@given(arrays(np.float32, 20, elements=st.floats(2.0**-12, 1e4, width=32)), st.sampled_from(["fp32", "fp16", "bf16"]))
@settings(max_examples=60)
def test_raised_values_are_not_smaller(x: np.ndarray, precision: str) -> None:
    made = raised(x, precision)  # type: ignore[arg-type]
    assert (made >= x).all() and (made <= x * 1.02).all()
    np.testing.assert_array_equal(representable(made, precision), made)  # type: ignore[arg-type]


# Pairs


@given(arrays(np.int8, (6, 4), elements=st.integers(-127, 127)))
@settings(max_examples=80)
def test_a_pair_fits_where_no_unsigned_activations_overflow_16_bits(values: np.ndarray) -> None:
    wide = values.astype(np.int64).reshape(3, 2, 4)
    worst = max(
        abs(int((np.array(a)[:, None] * wide).sum(axis=1)[pair, column]))
        for a in ((255, 255), (255, 0), (0, 255))
        for pair in range(3)
        for column in range(4)
    )
    assert fits(values) == (worst <= 255 * PAIR_LIMIT)
    assert 255 * PAIR_LIMIT <= 32767


@given(arrays(np.int8, 8, elements=st.integers(-127, 127)))
def test_room_is_what_the_partner_leaves(partner: np.ndarray) -> None:
    least, most = room(partner.astype(np.float32), 127)
    for edge in (least, most):
        assert fits(np.stack([partner, edge.astype(np.int8)]))
        assert np.abs(edge).max() <= 127


# Compensation and decisions


def correlated(rows: int, channels: int, seed: int = 0) -> np.ndarray:
    """Rows of few degrees of freedom, with channels of very different sizes, as after a modulated norm."""
    random = np.random.default_rng(seed)
    made = random.standard_normal((rows, channels // 4)) @ random.standard_normal((channels // 4, channels))
    made += 0.1 * random.standard_normal((rows, channels))
    return (made * np.exp(random.normal(0, 1, channels))).astype(np.float32)


def weights(channels: int, outputs: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((channels, outputs)).astype(np.float32)


@pytest.mark.parametrize("paired", [False, True])
def test_compensation_beats_rounding(paired: bool) -> None:
    rows, weight = correlated(400, 64), weights(64, 24)
    steps = np.abs(weight).max(axis=0) / 40  # coarse, so that rounding matters
    rounded = INT8.rounded(weight / steps) * steps
    made = compensated(weight, steps, second_moments(rows), INT8, paired=paired)
    exact = rows @ weight
    assert snr(exact, rows @ (made * steps)) > snr(exact, rows @ rounded) + 3
    assert np.abs(made).max() <= 127


def test_compensation_of_uncorrelated_inputs_is_rounding() -> None:
    weight = weights(32, 8)
    steps = np.abs(weight).max(axis=0) / 127
    made = compensated(weight, steps, np.eye(32), INT8)
    np.testing.assert_array_equal(made, np.clip(INT8.rounded(weight / steps), -127, 127))


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("stored", [False, True])
def test_a_decision_is_better_than_plain_rounding_and_is_what_it_says(
    scheme: str, precision: str, stored: bool
) -> None:
    rows, weight = correlated(512, 64), weights(64, 40)
    decision, made = decide(
        seen(rows, kept=512),
        weight,
        Settings(scheme=scheme),  # type: ignore[arg-type]
        precision,  # type: ignore[arg-type]
        stored=stored,
    )
    assert decision.snr >= decision.plain_snr
    if scheme == "int8":
        assert decision.snr > decision.plain_snr + 2
        assert fits(made.weight)
        values = made.weight.astype(np.float64)
    else:
        values = made.weight.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    grid = INT8 if scheme == "int8" else FP8
    assert made.in_scale is not None
    np.testing.assert_array_equal(representable(made.out_scale, precision), made.out_scale)  # type: ignore[arg-type]
    if stored:
        np.testing.assert_array_equal(representable(made.in_scale, precision), made.in_scale)  # type: ignore[arg-type]
    # What the graph computes, in float64, on rows that the decision did not see.
    held = rows[3::4]
    product = grid.rounded(held * made.in_scale / np.float32(grid.unit)).astype(np.float64) @ values
    found = product * grid.unit**2 * made.out_scale
    assert snr(held @ weight, found) == pytest.approx(decision.snr, abs=0.2)


def test_weights_alone() -> None:
    rows, weight = correlated(512, 64), weights(64, 40)
    decision, made = decide_weights(rows, weight, Settings(scheme="int8-weights"), "fp32")
    assert made.in_scale is None and made.weight.dtype == np.int8
    assert decision.snr > 40 and decision.compensated
    held = rows[3::4]
    found = held @ (made.weight.astype(np.float32) * np.float32(INT8.unit)) * made.out_scale
    assert snr(held @ weight, found) == pytest.approx(decision.snr, abs=0.2)


def test_a_channel_that_is_always_zero_does_no_harm() -> None:
    rows, weight = correlated(256, 64), weights(64, 16)
    rows[:, 5] = 0
    weight[:, 3] = 0
    decision, made = decide(seen(rows, kept=256), weight, Settings(), "fp32", stored=True)
    assert np.isfinite(made.out_scale).all() and (made.out_scale > 0).all()
    assert made.in_scale is not None and np.isfinite(made.in_scale).all()
    assert decision.snr > 25


@given(arrays(np.float32, 8, elements=st.floats(2.0**-6, 64, width=32)))
@settings(max_examples=30)
def test_the_pose_stream_is_unchanged_by_the_factors(scale: np.ndarray) -> None:
    rows = row_scale({"qkv": scale})
    np.testing.assert_allclose(rows[6] * rows[8], 1, rtol=1e-6)  # scale of the pose norm, gate
    np.testing.assert_array_equal(rows[7], rows[6])
    assert (rows[[2, 5, 9, 10, 11, 12, 13, 14]] == 1).all()


# The choice of linears


def noise_of(order: list[tuple[int, str]], blocks: int) -> Callable[[Kept], np.ndarray]:
    """A model of quality: every quantized linear adds noise, the first of `order` most."""
    parts = {linear: 2.0**-place for place, linear in enumerate(order)}

    def measure(kept: Kept) -> np.ndarray:
        noise = sum(part for (block, name), part in parts.items() if name not in kept[block])
        return np.array([40.0, -10 * np.log10(noise + 1e-9)])

    return measure


def an_order(blocks: int, seed: int = 0) -> list[tuple[int, str]]:
    order = [(block, name) for block in range(blocks) for name in LINEARS]
    np.random.default_rng(seed).shuffle(order)
    return [(int(block), str(name)) for block, name in order]


def test_the_most_sensitive_linears_come_first() -> None:
    snrs = np.full((3, 4, 2), 50.0)
    snrs[1, 3] = 20
    snrs[2, 0] = 30
    assert ranking(snrs)[:2] == [(1, "ff_out"), (2, "qkv")]


@pytest.mark.parametrize("wanted", [1.0, 3.0, 6.0, 12.0])
def test_as_few_stay_as_the_quality_needs(wanted: float) -> None:
    order = an_order(1)
    choice = choose(order, 1, noise_of(order, 1), min_snr=wanted)
    assert choice.snr.min() >= wanted
    fewer = frozenset(name for _, name in order[: choice.count - 1])
    assert choice.count == 0 or noise_of(order, 1)((fewer,)).min() < wanted


def test_all_are_quantized_unless_asked() -> None:
    order = an_order(3)
    assert choose(order, 3, noise_of(order, 3)).count == 0


def test_a_number_of_linears_may_stay() -> None:
    order = an_order(3)
    choice = choose(order, 3, noise_of(order, 3), most=2)
    assert choice.count == 2 and all(name in choice.kept[block] for block, name in order[:2])
    assert choose(order, 3, noise_of(order, 3), most=100).count == 12


def test_a_quality_out_of_reach_is_refused() -> None:
    order = an_order(3)
    with pytest.raises(InputError, match=r"--min-snr 60 cannot be had with 2 linears.*Raise --max-high-precision"):
        choose(order, 3, noise_of(order, 3), min_snr=60, most=2)


@given(st.lists(st.frozensets(st.sampled_from(LINEARS)), min_size=1, max_size=20), st.integers(1, 5))
@settings(max_examples=60)
def test_merged_mixtures_are_few_and_keep_what_was_asked(kept: list[frozenset[str]], most: int) -> None:
    made = merged(kept, most)
    assert len(set(made)) <= most
    assert all(before <= after for before, after in zip(kept, made, strict=True))
    assert merged(made, most) == made


def test_mixtures_do_not_go_beyond_the_limit() -> None:
    order = an_order(12, seed=3)
    choice = choose(order, 12, noise_of(order, 12), most=9)
    assert choice.count <= 9 and len(set(choice.kept)) <= MOST_GRAPHS


def test_graphs_are_named_after_what_stays() -> None:
    assert graph_name([]) == "block"
    assert graph_name({"ff_out", "qkv"}) == "block_keeps_qkv_ff_out"
    assert graph_name(LINEARS) == "block_keeps_all"


def test_pair_sums() -> None:
    weight = np.array([[1, -2], [3, 5], [-4, -1], [-4, 2]], np.float32)
    assert pair_sums(weight).tolist() == [[4, 5], [8, 2]]
