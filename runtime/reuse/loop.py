"""The denoising loop with reuse between steps: what a step's plan says becomes rows of prepared calls.

Before the loop every buffer is allocated (`Buffers`: in the process's memory or on a GPU) and every call prepared that some step
needs. A step that runs one guidance half gives it all cores. Nothing is read back from a device, except one number per step by
adaptive policies, and one prediction per step in which all tokens ran by policies that follow changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bundle.config import Geometry, TransformerConfig
from ...bundle.manifest import graph_form
from ..backends.base import Call
from ..denoiser import Denoiser, Latents, Loop, Turn
from ..scheduler import Schedule
from .caches import allocate, cache_bytes, cache_layout
from .guidance import KeptDifference
from .plan import Decider, Plan, StepPlan, flop_fraction, make_plan, table_changes
from .policy import ReusePolicy
from .report import ReuseReport
from .tokens import Tokens, Touched, choose_tokens, token_changes
from .trunk import TrunkState, step_times

__all__ = ["Reuse", "ReuseLoop"]

BOTH, CONDITIONAL = "both", "conditional"


@dataclass(frozen=True)
class Reuse:
    """What a loop with reuse is made from.

    plan: None for adaptive policies, which are decided during the loop. times: of every step (`trunk.step_times`).
    active: the active tokens, rising, as long as no changes are known; None where the policy reuses none. touched: what they
    are chosen from. guided: both guidance halves are computed. done: filled with what every step did.
    """

    policy: ReusePolicy
    size: Geometry
    times: list[float]
    plan: Plan | None
    active: Tokens | None
    touched: Touched | None
    guided: bool
    done: list[StepPlan] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        policy: ReusePolicy,
        size: Geometry,
        schedule: Schedule,
        table: np.ndarray,
        *,
        guided: bool,
        touched: Touched | None = None,
    ) -> Reuse:
        """Plans a loop.

        table: modulation of all blocks for the schedule, [T, layers, rows, D]. touched: the tokens that the pose touches
        (`tokens.drawn_tokens`), needed where tokens are reused.
        """
        plan = None
        if not policy.adaptive:
            plan = make_plan(policy, len(schedule), guided=guided, changes=table_changes(table))
        active = None
        if policy.reuses_tokens:
            if touched is None:
                raise ValueError("token reuse needs the tokens that the pose touches")
            active = choose_tokens(policy, touched)
        return cls(policy, size, step_times(schedule), plan, active, touched, guided)

    def report(self, config: TransformerConfig, precision: str) -> ReuseReport:
        """What the loop did, once it has ended."""
        tokens = self.size.video_tokens
        active = tokens if self.active is None else len(self.active)
        return ReuseReport(
            plan=Plan(self.policy, tuple(self.done)),
            cache_bytes=cache_bytes(self.policy, config, self.size, guided=self.guided, precision=precision),
            flop_fraction=flop_fraction(self.done, config, tokens, active, 2 if self.guided else 1),
            active_tokens=active,
            tokens=tokens,
        )

    def make_loop(
        self, denoiser: Denoiser, latents: Latents, initial: np.ndarray, grid: tuple[int, int, int]
    ) -> ReuseLoop:
        return ReuseLoop(self, denoiser, latents, initial, grid)


class ReuseLoop(Loop):
    """A loop whose steps follow a plan; every kind of step runs on the same weights."""

    def __init__(
        self, reuse: Reuse, denoiser: Denoiser, latents: Latents, initial: np.ndarray, grid: tuple[int, int, int]
    ):
        """`denoiser`: its guidance halves go through the blocks one after the other, since steps may leave one out."""
        if denoiser.together:
            raise ValueError("guidance halves must not go through a block together where steps reuse")
        super().__init__(denoiser, latents, initial, grid)
        self._reuse, policy = reuse, reuse.policy
        self._halves_count = len(self._halves)
        guided = self._halves_count == 2
        layout = cache_layout(policy, denoiser.config, reuse.size, guided=guided)
        self._caches = allocate(layout, self.buffers, self._pose.dtype, self._shared["proj_weight"].dtype)
        self._weights = [self.buffers.empty((2,), np.float32) for _ in range(self._halves_count)]
        self._weights_there: list[tuple[float, float] | None] = [None] * self._halves_count
        self._change = self.buffers.empty((1,), np.float32)
        self._rows: dict[tuple[str, str], list[list[Turn]]] = {}
        self._calls: dict[tuple[object, ...], Call] = {}
        self._difference = KeptDifference(policy.guidance_decay)
        self._residuals: Sequence[Sequence[Any]] = self._caches.get("residuals", ())
        self._trunks = [TrunkState(of_half) for of_half in self._residuals]
        self._decider = Decider(policy, len(reuse.times), guided=guided)
        self._both_prediction = self.prediction
        self._changes: NDArray[np.float32] | None = None  # [N]: of predictions
        self._whole_steps = 0
        if reuse.active is not None:
            self._place_tokens(reuse.active)
        for step in self._kinds():
            self._prepare(step)

    def _place_tokens(self, active: Tokens) -> None:
        """Everything of the active tokens that is the same in all steps until others are chosen; their number stays."""
        put, caches, text = self.buffers.put, self._caches, self._text.shape[1]
        put(caches["active"], active)
        others = np.setdiff1d(np.arange(self._pose.shape[1], dtype=np.int64), active)
        put(caches["kept"], others + text)
        self._tokens_take("pose")()
        rows = np.concatenate([np.arange(text), active + text])
        for table, taken in zip(self._rope_tables, caches["active_rope"], strict=True):
            put(taken, table[rows])

    def _kinds(self) -> Iterable[StepPlan]:
        """Every kind of step that may come."""
        plan, policy = self._reuse.plan, self._reuse.policy
        if plan is not None:
            return dict.fromkeys(plan.steps)
        halves = (True, False) if policy.reuses_guidance and self._halves_count == 2 else (True,)
        return [step for both in halves for step in (StepPlan("full", both), StepPlan("reused", both))]

    def _prepare(self, step: StepPlan) -> None:
        """All calls of such steps."""
        halves, composed = self._computed(step), step.trunk != "full"
        self._head_of(step)
        if self._reuse.policy.adaptive:
            for turn in range(2):
                self._trunk_probe(turn)
        if step.trunk != "reused":
            self._blocks_of(step)
        for h in halves:
            places = range(len(self._residuals[h])) if self._residuals else range(0)
            if step.trunk == "reused":
                for newest, before in product(places, repeat=2):
                    self._trunk_reuse(h, newest, before)
                continue
            if composed:
                self._tokens_take("stem")
                self._tokens_put(h)
            for place in places:
                self._trunk_keep(h, place, composed=composed)

    # One step

    def run_blocks(self, rows: np.ndarray, check: Callable[[], None]) -> None:
        """Stem, and as much of the blocks as this step's plan says; `rows` [layers, 15, D]."""
        self._run_stem(rows)
        step = self._next_step()
        self._reuse.done.append(step)
        time = self._reuse.times[len(self._reuse.done) - 1]
        halves, composed = self._computed(step), step.trunk != "full"
        if step.keep and self._changes is not None and self._reuse.touched is not None:
            self._place_tokens(choose_tokens(self._reuse.policy, self._reuse.touched, self._changes))
        if step.trunk == "reused":
            for h in halves:
                self._weigh(h, self._trunks[h].weights(time))
                self._trunk_reuse(h, *self._trunks[h].places)()
            return
        if composed:
            self._tokens_take("stem")()
        self._run(self._blocks_of(step), check)
        for h in halves:
            if composed:
                self._tokens_put(h)()
            if self._trunks:
                self._trunks[h].keep(time)
                self._trunk_keep(h, self._trunks[h].places[0], composed=composed)()

    def _weigh(self, h: int, weights: tuple[float, float]) -> None:
        """Weights of the residuals of half `h`; they are often those of the step before."""
        if self._weights_there[h] != weights:
            self.buffers.put(self._weights[h], np.array(weights, np.float32))
            self._weights_there[h] = weights

    def run_head(self, row: np.ndarray, guidance: float, coefficients: np.ndarray, noise: np.ndarray) -> None:
        """Head, guidance and the scheduler's update; `self.latents` holds the result."""
        step = self._reuse.done[-1]
        if step.both:
            self._difference.refreshed()
            self.prediction = self._both_prediction
        else:
            guidance = self._difference.factor(guidance)
            self.prediction = self._caches["conditional"]
        self._run_head(self._head_of(step), row, guidance, coefficients, noise)
        if step.trunk == "full" and self._reuse.policy.follows_changes:
            self._look_at_changes()

    def _look_at_changes(self) -> None:
        """Every token's prediction was computed in this step: how far it is from the last such step's. Waits for it."""
        whole, now = self._caches["whole"], self.buffers.get(self.prediction[-1])
        if self._whole_steps:
            self._changes = token_changes(whole, now, self._reuse.size)
        np.copyto(whole, now)
        self._whole_steps += 1

    def _next_step(self) -> StepPlan:
        """Adaptive policies wait here for the number that they decide by."""
        plan = self._reuse.plan
        if plan is not None:
            return plan.steps[len(self._reuse.done)]
        number = len(self._reuse.done)
        self._trunk_probe(number % 2)()
        return self._decider.next(float(self.buffers.get(self._change)[0]) if number else np.inf)

    def _computed(self, step: StepPlan) -> range:
        """The guidance halves that this step computes; the last is the conditional one."""
        return range(self._halves_count) if step.both else range(self._halves_count - 1, self._halves_count)

    def _blocks_of(self, step: StepPlan) -> Sequence[Sequence[Turn]]:
        """A row of calls for each half that this step computes."""
        if step.full and not step.keep:
            return self._halves
        graph = "tokens_reuse" if step.trunk == "tokens" else "tokens_keep" if step.keep else "block"
        return self._block_rows(graph, step.both)

    def _head_of(self, step: StepPlan) -> Call:
        composed = step.trunk != "full"
        if not step.both:
            return self._head_reuse(composed)
        return self._head_on(composed) if composed else self._head

    # Calls

    def _call(self, graph: str, key: tuple[object, ...], arrays: Callable[[], Mapping[str, Any]]) -> Call:
        name = (graph, *key)
        if name not in self._calls:
            self._calls[name] = self._backend.graph(graph).prepare(arrays())
        return self._calls[name]

    def _half(self, h: int) -> slice:
        return slice(h, h + 1)

    def _source(self, composed: bool) -> Any:
        """[B, N, D]: where this step's tokens are: as the last block wrote them, or put together from kept ones."""
        return self._caches["composed"] if composed else self._final

    def _trunk_keep(self, h: int, place: int, *, composed: bool) -> Call:
        return self._call(
            "trunk_keep",
            (h, place, composed),
            lambda: {
                "stem": self._stem_video,
                "video": self._source(composed)[self._half(h)],
                "residual": self._residuals[h][place],
            },
        )

    def _trunk_reuse(self, h: int, newest: int, before: int) -> Call:
        return self._call(
            "trunk_reuse",
            (h, newest, before),
            lambda: {
                "stem": self._stem_video,
                "newest": self._residuals[h][newest],
                "before": self._residuals[h][before],
                "weights": self._weights[h],
                "video_out": self._caches["composed"][self._half(h)],
            },
        )

    def _trunk_probe(self, turn: int) -> Call:
        modulated = self._caches["modulated"]
        return self._call(
            "trunk_probe",
            (turn,),
            lambda: {
                "video": self._stem_video,
                "modulation": self._row[0],
                "before": modulated[turn],
                "modulated": modulated[1 - turn],
                "change": self._change,
            },
        )

    def _tokens_take(self, what: str) -> Call:
        """The active tokens of `what`, the stem or the pose."""
        whole = {"stem": self._stem_video, "pose": self._pose}
        return self._call(
            "tokens_take",
            (what,),
            lambda: {
                "video": whole[what],
                "active": self._caches["active"],
                "video_out": self._caches[f"active_{what}"],
            },
        )

    def _tokens_put(self, h: int) -> Call:
        return self._call(
            "tokens_put",
            (h,),
            lambda: {
                "video": self._final[self._half(h)],
                "rows": self._caches["active_video"][self._caching(h)][len(self._blocks) % 2],
                "active": self._caches["active"],
                "video_out": self._caches["composed"][self._half(h)],
            },
        )

    def _head_on(self, composed: bool) -> Call:
        return self._call(
            "head",
            (composed,),
            lambda: {**self._head_arrays(), "video": self._source(composed), "prediction": self._both_prediction},
        )

    def _head_reuse(self, composed: bool) -> Call:
        return self._call(
            "head_reuse",
            (composed,),
            lambda: {
                **self._head_arrays(),
                "video": self._source(composed)[self._half(self._halves_count - 1)],
                "kept": self._both_prediction,
                "prediction": self._caches["conditional"],
            },
        )

    # Rows of calls, one per block

    def _caching(self, h: int) -> int:
        """The place of half `h` among those that keep keys and values."""
        return h - (self._halves_count - len(self._caches["keys"]))

    def _block_rows(self, graph: str, both: bool) -> list[list[Turn]]:
        """Calls of `graph` for every block, of both halves or of the conditional one.

        Keys are kept for the conditional half alone where token steps run without the other; that one runs `block` then.
        """
        key = (graph, BOTH if both else CONDITIONAL)
        if key not in self._rows:
            halves = self._computed(StepPlan("full", both))
            lanes = self.lanes if len(halves) > 1 else 1
            self._rows[key] = [self._row_of(graph, h, h % lanes, lanes) for h in halves]
        return self._rows[key]

    def _row_of(self, graph: str, h: int, lane: int, lanes: int) -> list[Turn]:
        if graph == "tokens_keep" and self._caching(h) < 0:
            graph = "block"
        arrays = self._active_arrays if graph == "tokens_reuse" else self._block_arrays
        row: list[Turn] = []
        for i, name in enumerate(self._denoiser.block_graphs):
            block = self._backend.graph(graph_form(graph, name), lane, lanes)
            call = block.prepare({**arrays(h, i), **self._cache_arrays(graph, h, i)})
            row.append(self._with_narrow_caches(graph, call, h, i, lane, lanes))
        return row

    def _with_narrow_caches(self, graph: str, call: Call, h: int, i: int, lane: int, lanes: int) -> Turn:
        """The block's call, and before or after it what brings its keys and values from int8 or to it."""
        if graph == "block" or "scales" not in self._caches:
            return call
        place, keep = self._caching(h), graph == "tokens_keep"
        narrow = {"keys_narrow": "keys", "values_narrow": "values", "scales": "scales"}
        other = self._backend.graph("cache_narrow" if keep else "cache_widen", lane, lanes).prepare(
            {**{port: self._caches[name][place][i] for port, name in narrow.items()}, **self._block_caches(h, i)}
        )
        return _in_turn(call, other) if keep else _in_turn(other, call)

    def _block_caches(self, h: int, i: int) -> dict[str, Any]:
        """Keys and values that the graph of block `i` gives or takes, [1, K, D]."""
        place, caches = self._caching(h), self._caches
        if "scales" in caches:
            return {name: caches[f"wide_{name}"][place] for name in ("keys", "values")}
        return {name: caches[name][place][i] for name in ("keys", "values")}

    def _active_arrays(self, h: int, i: int) -> dict[str, Any]:
        """What block `i` of half `h` reads and writes where only the active tokens run."""
        caches, place = self._caches, self._caching(h)
        video, poses = caches["active_video"][place], caches["active_poses"][place]
        return {
            **self._block_arrays(h, i),
            "video": video[i % 2] if i else caches["active_stem"],
            "pose": poses[i % 2] if i else caches["active_pose"],
            "rope_cos": caches["active_rope"][0],
            "rope_sin": caches["active_rope"][1],
            "video_out": video[(i + 1) % 2],
            "pose_out": poses[(i + 1) % 2],
        }

    def _cache_arrays(self, graph: str, h: int, i: int) -> dict[str, Any]:
        if graph == "block":
            return {}
        arrays = self._block_caches(h, i)
        return {**arrays, "rows": self._caches["kept"]} if graph == "tokens_keep" else arrays


def _in_turn(*calls: Turn) -> Turn:
    """These calls as one."""

    def run() -> None:
        for call in calls:
            call()

    return run
