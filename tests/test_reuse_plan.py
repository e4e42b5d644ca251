"""Reuse policies and their plans: what is refused, and what holds for every plan whatever the policy."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamictrl_edge.bundle.errors import UsageError
from dynamictrl_edge.runtime.request import Request
from dynamictrl_edge.runtime.reuse.guidance import KeptDifference
from dynamictrl_edge.runtime.reuse.plan import Decider, flop_fraction, make_plan, table_changes
from dynamictrl_edge.runtime.reuse.policy import POLICIES, ReusePolicy, parse_policy
from dynamictrl_edge.runtime.reuse.report import ReuseReport
from dynamictrl_edge.runtime.reuse.trunk import TrunkState, step_times
from dynamictrl_edge.runtime.scheduler import SchedulerConfig, make_schedule
from tests.bundle_samples import TRANSFORMER


def kinds(policy: ReusePolicy, steps: int, guided: bool = True) -> str:
    """A letter per step: Full, guidance reused: c (conditional), tokens: k, trunk: r; capital with the difference reused."""
    letters = {"full": "F", "guidance": "c", "tokens": "k", "tokens+guidance": "K", "trunk": "r", "trunk+guidance": "R"}
    return "".join(letters[kind] for kind in make_plan(policy, steps, guided=guided).kinds)


def test_plans_of_the_named_policies_are_what_their_names_say() -> None:
    assert kinds(POLICIES["guidance"], 12) == "FFFcFcFcFcFF"
    assert kinds(POLICIES["guidance"], 12, guided=False) == "F" * 12
    assert kinds(POLICIES["trunk"], 12) == kinds(POLICIES["trunk-linear"], 12) == "FFFrFrFrFrFF"
    assert kinds(POLICIES["tokens"], 13) == "FFFkkkFkkkFkF"
    assert kinds(POLICIES["combined"], 13) == "FFFrKRFrKRFrF"
    assert kinds(POLICIES["combined"], 13, guided=False) == "FFFrkrFrkrFrF"


policies = st.builds(
    dict,
    warmup=st.integers(0, 5),
    final=st.integers(0, 3),
    longest_run=st.integers(1, 6),
    guidance_period=st.integers(1, 5),
    guidance_decay=st.floats(0, 1),
    trunk_period=st.integers(1, 5),
    trunk_order=st.integers(0, 1),
    trunk_threshold=st.sampled_from([0.0, 0.3, 2.0]),
    trunk_change=st.sampled_from(["table", "stem"]),
    token_period=st.integers(1, 6),
)


@settings(max_examples=300)
@given(
    values=policies,
    steps=st.integers(1, 30),
    guided=st.booleans(),
    changes=st.lists(st.floats(0, 1), min_size=30, max_size=30),
)
def test_what_holds_for_every_plan(values: dict, steps: int, guided: bool, changes: list[float]) -> None:
    try:
        policy = ReusePolicy(**values)
    except UsageError as refusal:
        assert "--reuse" in str(refusal)
        return
    changes = [math.inf, *changes][:steps]
    decider = Decider(policy, steps, guided=guided)
    plan = [decider.next(change) for change in changes]
    decider.reset()
    assert plan == [decider.next(change) for change in changes]
    if not policy.adaptive:
        made = make_plan(policy, steps, guided=guided, changes=changes)
        assert [(s.trunk, s.both) for s in made.steps] == [(s.trunk, s.both) for s in plan]
        plan = list(made.steps)

    assert plan[0].full
    always = {*range(policy.warmup), *range(max(0, steps - policy.final), steps)}
    assert all(plan[i].full for i in always if i < steps)
    longest = max(len(run) for run in "".join("F" if s.full else "." for s in plan).split("F"))
    assert longest <= policy.longest_run
    assert all(step.both for step in plan) or (guided and policy.reuses_guidance)
    assert policy.reuses_trunk or all(step.trunk != "reused" for step in plan)
    assert policy.reuses_tokens or all(step.trunk != "tokens" for step in plan)
    kept: bool | None = None
    for i, step in enumerate(plan):
        # A residual stands for the halves that it was made of.
        if step.trunk == "reused":
            assert step.both == plan[i - 1].both
        # Keys and values come from the last step of all tokens, for the halves that a token step runs.
        if step.trunk == "full":
            kept = step.keep
        if step.trunk == "tokens" and not policy.adaptive:
            assert kept
            assert step.both == (not guided or not policy.reuses_guidance)
        if step.keep:
            following = [s.trunk for s in plan[i + 1 :]]
            assert "tokens" in following[: following.index("full") if "full" in following else None]
    fraction = flop_fraction(plan, TRANSFORMER, 180, 60, 2 if guided else 1)
    assert 0 < fraction <= 1
    assert (fraction == 1) == all(step.full for step in plan)


def test_periods_of_one_reuse_nothing() -> None:
    for name in ("guidance", "trunk", "tokens"):
        policy = parse_policy(f"{name},guidance_period=1,trunk_period=1,token_period=1")
        assert policy is not None
        assert make_plan(policy, 25, guided=True).reused == 0


def test_a_threshold_reuses_the_trunk_until_the_changes_add_up() -> None:
    policy = ReusePolicy(warmup=1, final=0, trunk_threshold=0.5, longest_run=9)
    changes = [math.inf, 0.2, 0.2, 0.2, 0.2, 0.6, 0.1, 0.1, 0.1]
    assert make_plan(policy, 9, guided=True, changes=changes).kinds == (
        *("full", "trunk", "trunk", "full", "trunk", "full", "trunk", "trunk", "trunk"),
    )


def test_changes_of_the_table_are_those_of_the_first_norm_relative_to_the_step_before() -> None:
    table = np.ones((3, 2, 15, 4), np.float32)
    table[1, 0, :2] = 1.5
    table[2, 0, :2] = 1.2
    table[:, 1] = np.arange(3)[:, None, None]  # another block's rows do not count
    assert table_changes(table) == [math.inf, pytest.approx(0.5), pytest.approx(0.2)]


def test_the_fraction_of_operations_is_counted_by_hand() -> None:
    d, n, text, layers = TRANSFORMER.width, 180, TRANSFORMER.max_text_seq_length, TRANSFORMER.num_layers
    plan = make_plan(ReusePolicy(warmup=1, final=0, token_period=2), 2, guided=True).steps
    ends = 3 * 2 * n * TRANSFORMER.patch_elements * d
    full = ends + 2 * layers * (24 * (n + text) * d * d + 4 * (n + text) ** 2 * d)
    tokens = ends + 2 * layers * (24 * (60 + text) * d * d + 4 * (60 + text) * (n + text) * d)
    assert flop_fraction(plan, TRANSFORMER, n, 60, 2) == pytest.approx((full + tokens) / (2 * full))


def test_a_policy_reads_as_a_name_with_changes() -> None:
    assert parse_policy("off") is None
    assert parse_policy("trunk") == POLICIES["trunk"]
    read = parse_policy("trunk, trunk-period=3,trunk_order=1")
    assert (read.name, read.trunk_period, read.trunk_order) == ("trunk", 3, 1)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fast", "'fast' is not known; use one of off, quality, balanced, guidance, trunk"),
        ("", "'' is not known"),
        ("off,warmup=2", "'off' has no settings"),
        ("trunk,period=2", "'period=2' is no setting.*trunk_period"),
        ("trunk,warmup", "'warmup' is no setting"),
        ("trunk,warmup=two", "warmup='two' is not possible: give a whole number"),
        ("trunk,warmup=-1", "warmup=-1 is not possible: give a whole number from 0"),
        ("trunk,warmup=1,warmup=2", "warmup was given twice"),
        ("tokens,token_share=1.5", "token_share=1.5 is not possible: give a number from 0 to 1"),
        ("tokens,token_share=0", "token_share=0.0 is not possible: give a number above 0"),
        ("tokens,token_share=nan", "token_share=nan is not possible"),
        ("tokens,token_changed=2", "token_changed=2.0 is not possible: give a number from 0 to 1"),
        ("tokens,token_cache=fp8", "token_cache='fp8' is not possible: give one of compute, int8"),
        ("tokens,token_choice=dark", "token_choice='dark' is not possible: give one of pose, even, random"),
        ("guidance,guidance_decay=2", "guidance_decay=2.0 is not possible"),
        ("trunk,trunk_order=2", "trunk_order=2 is not possible: give a whole number from 0 to 1"),
        ("trunk,trunk_period=6", "trunk_period=6 leaves 5 steps in a row.*longest_run=5"),
        ("trunk,trunk_threshold=0.1", "trunk_period=2 and trunk_threshold=0.1 contradict"),
        ("combined,token_period=2", "trunk_period=2 leaves no step for token_period=2"),
        ("adaptive,token_period=2", "trunk_change=stem and token_period contradict"),
    ],
)
def test_what_cannot_be_is_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as refusal:
        parse_policy(text)
    assert "--reuse" in str(refusal.value)
    with pytest.raises(UsageError):
        Request(image="a", pose="b", prompt="c", reuse=text)


def test_a_request_takes_a_policy_and_nothing_else() -> None:
    assert Request(image="a", pose="b", prompt="c").policy is None
    assert Request(image="a", pose="b", prompt="c", reuse=POLICIES["trunk"]).policy is POLICIES["trunk"]
    with pytest.raises(UsageError, match="must be text or a ReusePolicy, not int"):
        Request(image="a", pose="b", prompt="c", reuse=3)  # type: ignore[arg-type]


def test_a_schedule_with_nothing_to_reuse_gives_a_notice_that_names_a_way() -> None:
    few = ReuseReport(make_plan(POLICIES["trunk"], 4, guided=True), 0, 1.0, 6, 6)
    (notice,) = few.notices()
    assert "of 4 steps, the first 3 and the last 1" in notice
    offered = re.findall(r"--reuse (\S+)\.$", notice)[0]
    assert make_plan(parse_policy(offered), 4, guided=True).reused > 0  # type: ignore[arg-type]
    unguided = ReuseReport(make_plan(POLICIES["guidance"], 25, guided=False), 0, 1.0, 6, 6)
    assert "none of its settings applied" in next(iter(unguided.notices()))
    assert not list(ReuseReport(make_plan(POLICIES["trunk"], 25, guided=True), 0, 0.6, 6, 6).notices())


def test_the_kept_difference_counts_less_with_age() -> None:
    kept = KeptDifference(decay=0.5)
    with pytest.raises(RuntimeError):
        kept.factor(3.0)
    kept.refreshed()
    assert [kept.factor(3.0), kept.factor(3.0)] == [1.0, 0.5]
    kept.refreshed()
    assert kept.factor(3.0) == 1.0
    kept.reset()
    with pytest.raises(RuntimeError):
        kept.factor(3.0)


def test_residuals_are_extrapolated_on_a_line_in_time() -> None:
    state = TrunkState(np.zeros((2, 1, 3, 4), np.float32))
    line = lambda time: 2.0 - 0.5 * time  # noqa: E731
    state.keep(-math.inf)[:] = line(0)
    assert state.weights(0.5) == (1.0, 0.0)  # one residual: as it was
    state.keep(1.0)[:] = line(1.0)
    assert state.weights(1.5) == (1.0, 0.0)  # a line from infinity has no slope
    state.keep(3.0)[:] = line(3.0)
    newest, before = state.weights(4.0)
    assert np.allclose(newest * state.newest + before * state.before, line(4.0))
    state.keep(3.0)
    assert state.weights(4.0) == (1.0, 0.0)  # nor has one between equal times
    state.reset()
    with pytest.raises(RuntimeError):
        state.weights(1.0)


def test_zeroth_order_keeps_one_residual() -> None:
    state = TrunkState(np.zeros((1, 1, 3, 4), np.float32))
    for time in (0.0, 1.0):
        state.keep(time)[:] = time
    assert state.weights(2.0) == (1.0, 0.0)
    assert state.before is not None and np.all(state.newest == 1.0)


@pytest.mark.parametrize("steps", [1, 4, 25, 61])
def test_times_rise_from_where_nothing_but_noise_is_left(steps: int) -> None:
    times = step_times(make_schedule(SchedulerConfig(snr_shift_scale=1.0), steps))
    assert times[0] == -math.inf
    rising = times[:-1] if steps == 61 else times  # 61 has one timestep more, -1: the noisiest again
    assert rising == sorted(rising)
    assert all(math.isfinite(time) for time in rising[1:])
