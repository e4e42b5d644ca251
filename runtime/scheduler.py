"""The sampling schedule, worked out before the loop starts: timesteps, and six numbers for every step.

It is the published CogVideoXDPMScheduler (diffusers): DPM-Solver++ 2M in its stochastic form, Lu et al. 2022
(arXiv 2211.01095), on a variance-preserving schedule with shifted signal-to-noise ratio and zero terminal SNR, Lin et
al. 2023 (arXiv 2305.08891). With a the table of cumulative alphas, l = ln(a / (1 - a)) / 2, t a step's timestep and p
the one it goes to,

    h  = l[p] - l[t]            q = exp(-2 h) = a[t] (1 - a[p]) / ((1 - a[t]) a[p])
    x0 = sqrt(a[t]) x - sqrt(1 - a[t]) v
    D  = x0                                         first order
    D  = x0 + h / (2 h0) (x0 - x0_old)              second order, h0 = l[t] - l[timestep of the step before]
    x' = (1 - a[p]) / (1 - a[t]) sqrt(a[t] / a[p]) x + sqrt(a[p]) (1 - q) D + sqrt((1 - a[p]) (1 - q)) noise

Written with q, nothing is infinite where a[t] is 0 (the first step of a zero-SNR schedule) or a[p] is 1 (the last).

What the published implementation does, kept as it is because it decides the numbers:

- p is t - 1000 // n, not the next timestep of the list. Where p falls below 0, a[p] is 1 and the step ends without
  noise. For step counts whose last p is not below 0 (6, 7, 11, 13, ...: `stops_short`) the last step adds noise too, and
  is of second order: it goes to about three times x0 less twice x0_old, which shows in the clip.
- Rounding leaves one timestep more than asked for 62 of the step counts up to 1000 (61, 103, 121, ...). It is -1, and
  stands for the last entry of the table, which is the noisiest.
- A second-order step draws two noises and uses the second.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.errors import BundleError, EdgeError, UsageError

__all__ = [
    "Schedule",
    "SchedulerConfig",
    "StepCoefficients",
    "advance",
    "alphas_cumprod",
    "half_log_snr",
    "make_schedule",
    "steps_to_the_end",
    "stops_short",
]

# Keys of a diffusers configuration that change nothing for v-prediction with trailing timesteps.
WITHOUT_EFFECT = frozenset({"clip_sample", "clip_sample_range", "sample_max_value", "steps_offset"})
CLASS_NAMES = ("CogVideoXDPMScheduler", "CogVideoXDDIMScheduler")  # the published program makes the first of either
# diffusers' own defaults for these are kinds of scheduler that the models do not use, so they have to be given.
REQUIRED = ("prediction_type", "timestep_spacing", "rescale_betas_zero_snr")


@dataclass(frozen=True)
class SchedulerConfig:
    """The noise schedule of a model. Field names and meanings are those of diffusers' scheduler configuration.

    Raises:
        BundleError: a value of the wrong type or range, or a kind of schedule that the models do not use.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    set_alpha_to_one: bool = True
    prediction_type: str = "v_prediction"
    timestep_spacing: str = "trailing"
    rescale_betas_zero_snr: bool = True
    snr_shift_scale: float = 3.0

    def __post_init__(self) -> None:
        for name, only in (
            ("prediction_type", "v_prediction"),
            ("timestep_spacing", "trailing"),
            ("beta_schedule", "scaled_linear"),
        ):
            value = getattr(self, name)
            if value != only:
                raise BundleError(f"The scheduler's {name} {value!r} is not supported; only {only!r} is.")
        for name in ("set_alpha_to_one", "rescale_betas_zero_snr"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise BundleError(f"The scheduler's {name} {value!r} must be true or false.")
        steps = self.num_train_timesteps
        if isinstance(steps, bool) or not isinstance(steps, int) or not 2 <= steps <= 100_000:
            raise BundleError(f"The scheduler's num_train_timesteps {steps!r} must be a whole number from 2 to 100000.")
        for name in ("beta_start", "beta_end", "snr_shift_scale"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise BundleError(f"The scheduler's {name} {value!r} must be a finite number.")
        if not 0 < self.beta_start < self.beta_end < 1:
            raise BundleError(
                f"The scheduler's betas must rise between 0 and 1, but beta_start is {self.beta_start!r} and "
                f"beta_end is {self.beta_end!r}."
            )
        if not 1e-3 <= self.snr_shift_scale <= 1e3:
            raise BundleError(
                f"The scheduler's snr_shift_scale {self.snr_shift_scale!r} must lie between 0.001 and 1000."
            )

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, Any],
        *,
        source: str = "scheduler configuration",
        error: type[EdgeError] = BundleError,
    ) -> SchedulerConfig:
        """Reads a diffusers `scheduler_config.json` (or what `dataclasses.asdict` makes of a config), strictly.

        Keys that are not given take diffusers' defaults, except those whose default there is a kind of scheduler that
        is not supported here: they must be given.

        Args:
            values: the decoded JSON object.
            source: the file's name, for messages.
            error: the error to raise: BundleError for a bundle, InputError for a checkpoint.

        Raises:
            error: an unknown or missing key, or a value that `SchedulerConfig` refuses; the message names it.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        class_name = values.get("_class_name", CLASS_NAMES[0])
        if class_name not in CLASS_NAMES:
            raise error(f"{source}: the scheduler class {class_name!r} is not supported; {CLASS_NAMES[0]} is.")
        if values.get("trained_betas") is not None:
            raise error(f"{source}: trained_betas are not supported; the betas must come from beta_start and beta_end.")
        for name in REQUIRED:
            if name not in values:
                raise error(f"{source}: {name!r} is missing.")
        known = fields | WITHOUT_EFFECT | {"trained_betas"}
        unknown = sorted(str(key) for key in values if key not in known and not str(key).startswith("_"))
        if unknown:
            raise error(f"{source}: unknown scheduler setting {unknown[0]!r}. Known are: {', '.join(sorted(known))}.")
        try:
            return cls(**{name: values[name] for name in fields if name in values})
        except BundleError as refused:
            raise error(f"{source}: {refused}") from refused


@dataclass(frozen=True)
class StepCoefficients:
    """One step: x0 = alpha x - sigma v, then x' = sample x + x0 x0 + x0_old x0_old + noise n. All are finite."""

    alpha: float  # of the sample, in x0
    sigma: float  # of the velocity, subtracted, in x0
    sample: float
    x0: float
    x0_old: float  # 0 in first-order steps
    noise: float  # 0 in a step that ends without noise
    draws: int  # noises to draw from the generator at this step; the last of them is used

    def as_array(self) -> NDArray[np.float32]:
        """[6] float32: alpha, sigma, sample, x0, x0_old, noise."""
        return np.array([self.alpha, self.sigma, self.sample, self.x0, self.x0_old, self.noise], dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Schedule:
    """The whole loop in numbers."""

    config: SchedulerConfig
    num_inference_steps: int  # as asked; `len(schedule)` is how many steps the loop has
    timesteps: NDArray[np.int64]  # [T'] read-only, falling, as the model is given them; the last may be -1
    steps: tuple[StepCoefficients, ...]  # T' of them

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def draws(self) -> int:
        """How many noises the whole loop draws, the initial latents not counted."""
        return sum(step.draws for step in self.steps)

    def as_array(self) -> NDArray[np.float32]:
        """[T', 6] float32: the rows are `StepCoefficients.as_array`."""
        return np.stack([step.as_array() for step in self.steps])


def alphas_cumprod(config: SchedulerConfig) -> NDArray[np.float64]:
    """The table a, [num_train_timesteps] float64, falling; its last entry is 0 with `rescale_betas_zero_snr`."""
    betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_train_timesteps) ** 2
    products = np.cumprod(1.0 - betas)
    table: NDArray[np.float64] = products / (config.snr_shift_scale + (1.0 - config.snr_shift_scale) * products)
    if config.rescale_betas_zero_snr:
        root = np.sqrt(table)
        table = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return table


def trailing_timesteps(num_train_timesteps: int, num_inference_steps: int) -> NDArray[np.int64]:
    """[T'] int64, falling from num_train_timesteps - 1; T' is `num_inference_steps`, or one more."""
    # arange by a fractional stride: its own rounding decides where one more timestep appears.
    stride = num_train_timesteps / num_inference_steps
    return np.round(np.arange(num_train_timesteps, 0, -stride)).astype(np.int64) - 1


def make_schedule(config: SchedulerConfig, num_inference_steps: int) -> Schedule:
    """Plans a denoising loop of `num_inference_steps` steps.

    Raises:
        UsageError: the number of steps is not a whole number from 1 to `config.num_train_timesteps`.
    """
    most = config.num_train_timesteps
    try:
        count = operator.index(num_inference_steps)
    except TypeError as error:
        raise UsageError(
            f"The number of steps {num_inference_steps!r} is not a whole number from 1 to {most}."
        ) from error
    if not 1 <= count <= most:
        raise UsageError(f"The number of steps {count} is out of range. Give a whole number from 1 to {most}.")

    table = alphas_cumprod(config)
    end = 1.0 if config.set_alpha_to_one else float(table[0])
    timesteps = trailing_timesteps(most, count)
    timesteps.flags.writeable = False
    steps = []
    for i, t in enumerate(timesteps.tolist()):
        p = t - most // count
        second_order = i > 0 and p >= 0
        steps.append(
            _coefficients(
                here=float(table[t]),
                there=float(table[p]) if p >= 0 else end,
                before=float(table[timesteps[i - 1]]) if second_order else None,
            )
        )
    return Schedule(config, count, timesteps, tuple(steps))


def stops_short(config: SchedulerConfig, num_inference_steps: int) -> bool:
    """Whether the last step of a loop of that many falls short of the end, and so extrapolates; see the module."""
    most = config.num_train_timesteps
    return int(trailing_timesteps(most, num_inference_steps)[-1]) >= most // num_inference_steps


def steps_to_the_end(config: SchedulerConfig, num_inference_steps: int) -> tuple[int, int]:
    """The nearest smaller and larger step counts that do not stop short; those of one step and of all never do."""

    def nearest(way: int) -> int:
        count = num_inference_steps + way
        while stops_short(config, count):
            count += way
        return count

    return nearest(-1), nearest(+1)


def half_log_snr(a: float) -> float:
    """l = ln(a / (1 - a)) / 2 of a cumulative alpha; -infinity where it is 0."""
    return -math.inf if a == 0.0 else 0.5 * (math.log(a) - math.log1p(-a))


def _coefficients(here: float, there: float, before: float | None) -> StepCoefficients:
    """The step from cumulative alpha `here` to `there` (> 0), second order if the one `before` is given."""
    q = here * (1.0 - there) / ((1.0 - here) * there)
    fresh = 1.0 - q  # at least 0: q is exactly 1 where the step goes nowhere, as products commute
    x0, x0_old = math.sqrt(there) * fresh, 0.0
    if before is not None:  # if it is 0, h0 is infinite and the old prediction gets no weight
        here_l = half_log_snr(here)
        ratio = (half_log_snr(there) - here_l) / (2.0 * (here_l - half_log_snr(before)))
        x0, x0_old = x0 * (1.0 + ratio), -x0 * ratio
    return StepCoefficients(
        alpha=math.sqrt(here),
        sigma=math.sqrt(1.0 - here),
        sample=(1.0 - there) / (1.0 - here) * math.sqrt(here / there),
        x0=x0,
        x0_old=x0_old,
        noise=math.sqrt((1.0 - there) * fresh),
        draws=1 if before is None else 2,
    )


def advance(
    step: StepCoefficients,
    sample: NDArray[np.float32],
    velocity: NDArray[np.float32],
    x0_old: NDArray[np.float32] | None,
    noise: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """One update in float32, the same as in the `head` graph: (next sample, x0). All arrays have one shape.

    Args:
        x0_old: the x0 of the step before; None at the first step, whose coefficient for it is 0.
        noise: the last of the step's `draws`.

    Raises:
        ValueError: `x0_old` is None in a second-order step that needs it.
    """
    alpha, sigma, c_sample, c_x0, c_x0_old, c_noise = step.as_array()
    x0 = alpha * sample - sigma * velocity
    following = c_sample * sample + c_x0 * x0 + c_noise * noise
    if c_x0_old != 0:
        if x0_old is None:
            raise ValueError("a second-order step needs the x0 of the step before")
        following += c_x0_old * x0_old
    return following, x0
