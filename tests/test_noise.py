"""The numpy noise is torch's noise: same seeds, same sizes, same order of draws."""

from __future__ import annotations

import platform
import sys
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dynamictrl_edge.bundle.errors import UsageError
from dynamictrl_edge.runtime.noise import NoiseSource, _box_muller
from tests.golden import PIPELINES, case

# torch.randn of 4 values, and values 0, 7, 8, 15 of torch.randn of 16, with seed 42
KNOWN_SMALL = [0.33669036626815796, 0.12880940735340118, 0.23446236550807953, 0.23033303022384644]
KNOWN_BLOCK = [1.9269152879714966, -1.6046669483184814, -0.7521352767944336, 0.7624453902244568]


def torch_noise(seed, *shapes):
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float32).numpy() for shape in shapes]


def same_bits(a, b):
    return a.shape == b.shape and np.array_equal(a.view(np.int32), b.view(np.int32))


def torch_is_the_reference_build():
    torch = pytest.importorskip("torch")
    return (
        torch.__version__.startswith("2.13.")
        and sys.platform == "linux"
        and platform.machine() == "x86_64"
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    )


@pytest.mark.parametrize("name", PIPELINES)
def test_every_random_tensor_of_a_published_run_is_drawn_bit_for_bit(name):
    tensors, settings_ = case(name)
    source = NoiseSource(settings_["settings"]["seed"])
    draws = settings_["random_draws"]
    assert len(draws) >= 5
    for draw in draws:
        assert same_bits(source.normal(draw["shape"]), tensors[draw["tensor"]]), draw


sizes = st.one_of(st.integers(0, 15), st.integers(16, 200), st.sampled_from([2**15 - 16, 2**15, 2**15 + 1, 70_001]))


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(-(2**63), 2**64 - 1), counts=st.lists(sizes, min_size=1, max_size=6))
@example(seed=0, counts=[1, 16, 1, 17, 3, 2])  # a left-over small value outlives large draws
@example(seed=2**64 - 1, counts=[15, 31])
@example(seed=-1, counts=[16])
@example(seed=2**32, counts=[16])
def test_any_sequence_of_draws_equals_torch(seed, counts):
    source = NoiseSource(seed)
    for ours, theirs in zip([source.normal(count) for count in counts], torch_noise(seed, *counts), strict=True):
        assert ours.dtype == np.float32
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6)


def test_two_million_values_equal_torch_bit_for_bit():
    if not torch_is_the_reference_build():
        pytest.skip("this build of torch evaluates logarithm, sine and cosine by other functions")
    (theirs,) = torch_noise(7, 2_000_003)
    assert same_bits(NoiseSource(7).normal(2_000_003), theirs)


def test_a_radius_of_zero_gives_plus_zeros_as_in_torch():
    words = np.zeros(16, np.uint32)
    words[12] = 1 << 23  # half a turn: its cosine is -1
    out = np.full(16, np.nan, np.float32)
    _box_muller(words, out)
    assert same_bits(out, np.zeros(16, np.float32))


def test_the_first_values_of_seed_42_are_known_without_torch():
    source = NoiseSource(42)
    np.testing.assert_allclose(source.normal(4), KNOWN_SMALL, rtol=0, atol=1e-7)
    np.testing.assert_allclose(NoiseSource(42).normal(16)[[0, 7, 8, 15]], KNOWN_BLOCK, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 5), 7, (2, 3, 4), [1, 16, 1, 2, 2]])
def test_shapes_are_torchs(shape):
    (theirs,) = torch_noise(5, shape)
    ours = NoiseSource(5).normal(shape)
    assert ours.shape == theirs.shape
    assert ours.flags.c_contiguous
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6)


@given(count=st.integers(16, 400))
def test_the_word_count_says_how_far_the_stream_went(count):
    source = NoiseSource(1)
    assert source.consumed == 0
    source.normal(count)
    assert source.consumed == count + (16 if count % 16 else 0)


def test_small_draws_use_four_words_for_two_values():
    source = NoiseSource(1)
    counts = []
    for _ in range(4):
        source.normal(1)
        counts.append(source.consumed)
    assert counts == [4, 4, 8, 8]


def test_seeds_with_equal_low_bits_agree_and_others_differ():
    values = NoiseSource(7).normal(32)
    assert np.array_equal(values, NoiseSource(7 + 2**32).normal(32))
    assert not np.array_equal(values, NoiseSource(8).normal(32))


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_out_of_range_is_refused_by_value(seed):
    with pytest.raises(UsageError, match=f"{seed}.*2\\*\\*64 - 1"):
        NoiseSource(seed)


@pytest.mark.parametrize("seed", [1.5, "42", None])
def test_a_seed_that_is_no_whole_number_is_refused(seed):
    with pytest.raises(UsageError, match="whole number"):
        NoiseSource(seed)


def test_ten_million_values_are_quick_and_need_little_memory():
    start = time.process_time()
    values = NoiseSource(3).normal(10_000_000)
    assert time.process_time() - start < 3.0  # 0.3 s on an idle core; generous for a shared machine
    assert abs(float(values.mean())) < 2e-3
    assert abs(float(values.std()) - 1) < 2e-3

    tracemalloc.start()
    values = NoiseSource(3).normal(1_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - values.nbytes < 2_500_000


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.tuples(st.booleans(), st.integers(1, 70)), min_size=1, max_size=6))
def test_skipping_is_drawing_without_the_result(seed: int, draws: list[tuple[bool, int]]) -> None:
    drawn, skipped = NoiseSource(seed), NoiseSource(seed)
    for skip, count in draws:
        wanted = drawn.normal((count,))
        if skip:
            skipped.skip((count,))
        else:
            assert np.array_equal(skipped.normal((count,)), wanted)
        assert skipped.consumed == drawn.consumed
