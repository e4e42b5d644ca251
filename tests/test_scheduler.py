"""The precomputed schedule takes the steps of the published CogVideoXDPMScheduler."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dynamictrl_edge.bundle.errors import BundleError, InputError, UsageError
from dynamictrl_edge.runtime.scheduler import (
    SchedulerConfig,
    advance,
    alphas_cumprod,
    make_schedule,
    steps_to_the_end,
    stops_short,
    trailing_timesteps,
)
from tests.golden import case, max_abs, model_dir

GOLDEN = [f"scheduler_snr{k}_steps{n}" for k in (1, 3) for n in (4, 10, 25)]
MODELS = ["cogvideox10-tiny", "cogvideox15-tiny"]


def golden_schedule(name):
    tensors, about = case(name)
    settings_ = about["settings"]
    config = SchedulerConfig.from_dict(settings_["scheduler_config"])
    return tensors, about, make_schedule(config, settings_["num_inference_steps"])


@pytest.mark.parametrize("name", GOLDEN)
def test_timesteps_and_coefficients_are_the_published_ones(name):
    tensors, about, schedule = golden_schedule(name)
    assert np.array_equal(schedule.timesteps, tensors["timesteps"])
    assert schedule.timesteps.dtype == np.int64
    np.testing.assert_allclose(alphas_cumprod(schedule.config), tensors["alphas_cumprod_f64"], rtol=0, atol=1e-14)
    assert len(schedule) == len(about["steps"])
    for ours, theirs in zip(schedule.steps, about["steps"], strict=True):
        assert ours.draws == theirs["draws"]
        got = [ours.alpha, -ours.sigma, ours.sample, ours.x0, ours.x0_old, ours.noise]
        names = ("x0_from_sample", "x0_from_v", "c_sample", "c_x0", "c_x0_old", "c_noise")
        np.testing.assert_allclose(got, [theirs[key] for key in names], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_trajectories_are_followed(name):
    tensors, _, schedule = golden_schedule(name)
    sample, x0 = tensors["initial_sample"], None
    for i, step in enumerate(schedule.steps):
        noise = tensors[f"step_{i:02}_noise_{step.draws - 1}"]
        sample, x0 = advance(step, sample, tensors["model_outputs"][i], x0, noise)
        assert sample.dtype == np.float32
        assert x0.dtype == np.float32
        assert max_abs(sample, tensors["prev_samples"][i]) < 2e-5
        assert max_abs(x0, tensors["x0_predictions"][i]) < 2e-5


def diffusers_loop(config, count, seed, shape):
    """The published loop on random model outputs: timesteps, outputs, and each step's x0 and next sample."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.CogVideoXDPMScheduler(**dataclasses.asdict(config))
    scheduler.set_timesteps(count)
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn((len(scheduler.timesteps), *shape), generator=torch.Generator().manual_seed(seed + 1))
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 2))
    record, old = [sample.numpy()], None
    for i, t in enumerate(scheduler.timesteps):
        back = scheduler.timesteps[i - 1] if i > 0 else None
        sample, old = scheduler.step(outputs[i], old, t, back, sample, generator=generator, return_dict=False)
        record.append((sample.numpy(), old.numpy()))
    return scheduler.timesteps.numpy(), outputs.numpy(), record


@settings(max_examples=25, deadline=None)
@given(
    count=st.one_of(st.integers(1, 40), st.sampled_from([61, 103, 127])),
    shift=st.floats(0.2, 8.0),
    zero_snr=st.booleans(),
    alpha_one=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(count=1, shift=3.0, zero_snr=True, alpha_one=True, seed=0)
@example(count=2, shift=1.0, zero_snr=True, alpha_one=True, seed=0)
@example(count=3, shift=3.0, zero_snr=True, alpha_one=True, seed=0)
@example(count=7, shift=1.0, zero_snr=True, alpha_one=True, seed=0)
@example(count=61, shift=1.0, zero_snr=True, alpha_one=True, seed=0)
@example(count=61, shift=3.0, zero_snr=True, alpha_one=False, seed=0)
@example(count=501, shift=1.0, zero_snr=True, alpha_one=False, seed=0)
def test_any_loop_equals_the_diffusers_scheduler(count, shift, zero_snr, alpha_one, seed):
    torch = pytest.importorskip("torch")
    config = SchedulerConfig(snr_shift_scale=shift, rescale_betas_zero_snr=zero_snr, set_alpha_to_one=alpha_one)
    shape = (2, 24)
    timesteps, outputs, record = diffusers_loop(config, count, seed, shape)
    schedule = make_schedule(config, count)
    assert np.array_equal(schedule.timesteps, timesteps)
    generator = torch.Generator().manual_seed(seed)  # the same noises, drawn as often as the plan says
    sample, x0 = record[0], None
    for step, output, (next_sample, next_x0) in zip(schedule.steps, outputs, record[1:], strict=True):
        noise = [torch.randn(shape, generator=generator).numpy() for _ in range(step.draws)][-1]
        sample, x0 = advance(step, sample, output, x0, noise)
        assert max_abs(sample, next_sample) < 2e-5
        assert max_abs(x0, next_x0) < 2e-5


@pytest.mark.parametrize("zero_snr", [True, False])
@pytest.mark.parametrize("alpha_one", [True, False])
def test_no_step_count_gives_a_number_that_is_not_finite(zero_snr, alpha_one):
    config = SchedulerConfig(rescale_betas_zero_snr=zero_snr, set_alpha_to_one=alpha_one)
    for count in [*range(1, 130), *range(130, 1001, 29), 998, 999, 1000]:
        schedule = make_schedule(config, count)
        coefficients = schedule.as_array()
        assert coefficients.shape == (len(schedule), 6)
        assert coefficients.dtype == np.float32
        assert np.isfinite(coefficients).all(), count
        one_more = schedule.timesteps[-1] < 0
        assert len(schedule) == len(schedule.timesteps) == count + one_more
        assert (np.diff(schedule.timesteps) < 0).all()
        assert schedule.timesteps[0] == 999
        assert schedule.draws == sum(step.draws for step in schedule.steps)


def test_timesteps_of_every_step_count_are_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.CogVideoXDPMScheduler(timestep_spacing="trailing")
    for count in range(1, 1001):
        scheduler.set_timesteps(count)
        assert np.array_equal(trailing_timesteps(1000, count), scheduler.timesteps.numpy()), count


def test_sixty_two_step_counts_get_one_timestep_more():
    more = [count for count in range(1, 1001) if len(trailing_timesteps(1000, count)) != count]
    assert len(more) == 62
    assert more[:3] == [61, 103, 121]
    assert all(trailing_timesteps(1000, count)[-1] == -1 for count in more)


def test_sixty_one_steps_give_sixty_two_timesteps_and_the_last_is_minus_one():
    schedule = make_schedule(SchedulerConfig(snr_shift_scale=1.0), 61)
    assert len(schedule) == 62
    assert schedule.timesteps[-1] == -1
    last = schedule.steps[-1]
    assert (last.alpha, last.sigma, last.sample, last.x0, last.noise, last.draws) == (0.0, 1.0, 0.0, 1.0, 0.0, 1)


def test_the_first_step_is_the_exact_limit_and_the_second_forgets_the_first_x0():
    first, second, third = make_schedule(SchedulerConfig(), 25).steps[:3]
    assert (first.alpha, first.sigma, first.sample, first.x0_old, first.draws) == (0.0, 1.0, 0.0, 0.0, 1)
    assert (second.x0_old, second.draws) == (0.0, 2)
    assert third.x0_old < 0


@pytest.mark.parametrize(("count", "noisy"), [(4, False), (25, False), (50, False), (7, True), (13, True)])
def test_the_last_step_adds_noise_only_where_the_stride_does_not_reach_the_end(count, noisy):
    last = make_schedule(SchedulerConfig(), count).steps[-1]
    assert (last.noise > 0) == noisy
    assert last.draws == (2 if noisy else 1)


def test_loops_that_stop_short_are_those_whose_last_step_extrapolates():
    config = SchedulerConfig(snr_shift_scale=1.0)
    short = [count for count in range(1, 80) if stops_short(config, count)]
    assert short == [count for count in range(1, 80) if make_schedule(config, count).steps[-1].x0_old != 0]
    assert {6, 7, 11, 13, 15, 24, 28, 35} <= set(short)
    for count in short:
        last = make_schedule(config, count).steps[-1]
        assert last.x0 > 2.5 and last.x0_old < -1.5 and last.noise > 0


@given(count=st.integers(2, 999))
def test_a_step_count_that_does_not_stop_short_is_near(count):
    config = SchedulerConfig()
    fewer, more = steps_to_the_end(config, count)
    assert 1 <= fewer < count < more <= 1000
    assert not stops_short(config, fewer) and not stops_short(config, more)


def test_a_second_order_step_without_an_old_x0_is_an_error():
    step = make_schedule(SchedulerConfig(), 10).steps[4]
    zero = np.zeros((2, 2), np.float32)
    with pytest.raises(ValueError, match="step before"):
        advance(step, zero, zero, None, zero)


def test_the_plan_cannot_be_changed():
    schedule = make_schedule(SchedulerConfig(), 4)
    with pytest.raises(ValueError, match="read-only"):
        schedule.timesteps[0] = 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.steps[0].noise = 0.0


@pytest.mark.parametrize("count", [0, -1, 1001, 10**9])
def test_a_step_count_out_of_range_is_refused_with_the_range(count):
    with pytest.raises(UsageError, match=f"{count} .*from 1 to 1000"):
        make_schedule(SchedulerConfig(), count)


@pytest.mark.parametrize("count", [2.5, "25", None])
def test_a_step_count_that_is_no_whole_number_is_refused(count):
    with pytest.raises(UsageError, match="whole number from 1 to 1000"):
        make_schedule(SchedulerConfig(), count)


@pytest.mark.parametrize(("name", "shift"), list(zip(MODELS, (3.0, 1.0), strict=True)))
def test_the_models_configurations_are_read(name, shift):
    values = json.loads((model_dir(name) / "scheduler" / "scheduler_config.json").read_text())
    config = SchedulerConfig.from_dict(values)
    assert config == SchedulerConfig(snr_shift_scale=shift)
    assert SchedulerConfig.from_dict(dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "epsilon"}, "prediction_type 'epsilon'"),
        ({"timestep_spacing": "leading"}, "timestep_spacing 'leading'"),
        ({"beta_schedule": "linear"}, "beta_schedule 'linear'"),
        ({"_class_name": "EulerDiscreteScheduler"}, "EulerDiscreteScheduler"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"surprise": 1}, "unknown scheduler setting 'surprise'"),
        ({"beta_start": "0.1"}, "beta_start '0.1'"),
        ({"beta_start": float("nan")}, "beta_start nan"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start is 0.5"),
        ({"beta_end": 1.5}, "beta_end is 1.5"),
        ({"snr_shift_scale": 0}, "snr_shift_scale 0"),
        ({"snr_shift_scale": True}, "snr_shift_scale True"),
        ({"num_train_timesteps": 1}, "num_train_timesteps 1"),
        ({"num_train_timesteps": 1000.0}, "num_train_timesteps 1000.0"),
        ({"set_alpha_to_one": 1}, "set_alpha_to_one 1"),
    ],
)
def test_a_configuration_that_cannot_be_followed_is_refused_by_value(change, message):
    values = {**dataclasses.asdict(SchedulerConfig()), **change}
    with pytest.raises(BundleError, match=message) as caught:
        SchedulerConfig.from_dict(values, source="bundle.json")
    assert str(caught.value).startswith("bundle.json: ")
    with pytest.raises(InputError):
        SchedulerConfig.from_dict(values, error=InputError)


@pytest.mark.parametrize("missing", ["prediction_type", "timestep_spacing", "rescale_betas_zero_snr"])
def test_settings_whose_library_default_is_another_scheduler_must_be_given(missing):
    values = dataclasses.asdict(SchedulerConfig())
    del values[missing]
    with pytest.raises(BundleError, match=f"'{missing}' is missing"):
        SchedulerConfig.from_dict(values)
