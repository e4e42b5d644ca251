"""The loop with reuse, on the golden models: what reuses nothing equals the full loop, the rest equals a plain reference."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamictrl_edge.bundle.config import Geometry
from dynamictrl_edge.bundle.manifest import graph_form
from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.calibration.decide import snr
from dynamictrl_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend
from dynamictrl_edge.runtime.denoiser import Denoiser, Latents
from dynamictrl_edge.runtime.noise import NoiseSource
from dynamictrl_edge.runtime.reuse.caches import Widths, cache_layout
from dynamictrl_edge.runtime.reuse.loop import Reuse
from dynamictrl_edge.runtime.reuse.policy import ReusePolicy, parse_policy
from dynamictrl_edge.runtime.reuse.tokens import choose_tokens, token_changes
from dynamictrl_edge.runtime.scheduler import Schedule, SchedulerConfig, advance, make_schedule
from tests.conftest import Export, Quantized
from tests.golden import max_abs
from tests.test_reuse_tokens import allocated

MODELS = ("cogvideox10-tiny", "cogvideox15-tiny", "learned")
GUIDANCE = 3.0
Arrays = dict[str, np.ndarray]


class Model:
    """A golden model with latents of its own making."""

    def __init__(self, root: Path):
        self.bundle = Bundle(root)
        self.backend = OnnxRuntimeBackend(self.bundle)
        self.denoiser = Denoiser(self.bundle, self.backend)
        self.config = config = self.bundle.manifest.transformer
        stored = config.use_learned_positional_embeddings
        frames, height, width = (3, config.sample_height, config.sample_width) if stored else (4, 8, 12)
        grid = config.token_grid(frames, height, width)
        self.size = Geometry(
            height=8 * height, width=8 * width, frames=4 * frames - 3, latent_frames=frames, latent_height=height,
            latent_width=width, padding_frames=0, pose_frames=4 * frames - 3, grid=grid,
        )  # fmt: skip
        random = np.random.default_rng(3)
        shape = (1, frames, config.latent_channels, height, width)
        embeds = (2, config.max_text_seq_length, config.text_embed_dim)
        self.initial, image, pose = (random.standard_normal(shape).astype(np.float32) for _ in range(3))
        self.latents = Latents(random.standard_normal(embeds).astype(np.float32), image, pose)
        self.touched = random.random(grid) > 0.8

    def schedule(self, steps: int) -> Schedule:
        return make_schedule(SchedulerConfig.from_dict(self.bundle.manifest.scheduler), steps)

    def of_halves(self, guided: bool) -> Latents:
        latents = self.latents
        return latents if guided else Latents(latents.prompt_embeds[1:], latents.image, latents.pose)

    def graph_of(self, kind: str, block: int) -> Any:
        return self.backend.graph(graph_form(kind, self.bundle.manifest.block_graphs[block]))

    def run(self, policy: ReusePolicy | None, steps: int, *, guided: bool = True) -> tuple[list[np.ndarray], list[str]]:
        """Latents after every step, and the kinds of the steps."""
        schedule = self.schedule(steps)
        reuse = None
        if policy is not None:
            table, _ = self.denoiser.modulation(schedule)
            reuse = Reuse.of(policy, self.size, schedule, table, guided=guided, touched=self.touched)
        loop = self.denoiser.denoise(
            self.of_halves(guided),
            self.initial,
            schedule,
            GUIDANCE if guided else 1.0,
            NoiseSource(5),
            self.size.grid,
            make_loop=None if reuse is None else reuse.make_loop,
        )
        latents = [step.latents.copy() for step in loop]
        return latents, [] if reuse is None else [step.kind for step in reuse.done]


@pytest.fixture(scope="session")
def model(exported: Export) -> Any:
    """`model(name)`"""
    return cache(lambda name: Model(exported(name)))


@pytest.fixture(scope="session")
def quantized_model(quantized: Quantized) -> Any:
    """`quantized_model(scheme, kept)`: so many linears stay in high precision."""
    return cache(lambda scheme, kept=None: Model(quantized(scheme, kept=kept)))


def policy_of(text: str) -> ReusePolicy:
    policy = parse_policy(text)
    assert policy is not None
    return policy


# --- what reuses nothing


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("guided", [True, False])
def test_periods_of_one_are_the_full_loop_bit_by_bit(name: str, guided: bool, model: Any) -> None:
    full, _ = model(name).run(None, 5, guided=guided)
    for text in ("guidance,guidance_period=1", "trunk,trunk_period=1", "tokens,token_period=1"):
        got, kinds = model(name).run(policy_of(text), 5, guided=guided)
        assert kinds == ["full"] * 5
        assert all(np.array_equal(a, b) for a, b in zip(got, full, strict=True))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("guided", [True, False])
def test_token_reuse_with_all_tokens_active_equals_the_full_loop(name: str, guided: bool, model: Any) -> None:
    full, _ = model(name).run(None, 8, guided=guided)
    got, kinds = model(name).run(policy_of("tokens,warmup=1,final=0,token_share=1"), 8, guided=guided)
    assert kinds == ["full", "tokens", "tokens", "tokens"] * 2
    assert max(max_abs(a, b) for a, b in zip(got, full, strict=True)) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_an_adaptive_policy_that_tolerates_nothing_equals_the_full_loop(name: str, model: Any) -> None:
    full, _ = model(name).run(None, 5)
    got, kinds = model(name).run(policy_of("adaptive,trunk_threshold=1e-9"), 5)
    assert kinds == ["full"] * 5
    assert all(np.array_equal(a, b) for a, b in zip(got, full, strict=True))
    _, kinds = model(name).run(policy_of("adaptive,trunk_threshold=99,warmup=1,final=1,longest_run=2"), 8)
    assert kinds == ["full", "trunk", "trunk", "full", "trunk", "trunk", "full", "full"]


# --- what does, held against a loop that keeps everything and is written without it


def reference(
    model: Model, policy: ReusePolicy, steps: int, guided: bool, chosen: list[np.ndarray] | None = None
) -> list[np.ndarray]:
    """The latents after every step; buffers are new arrays, halves run one after the other, the update is numpy's. `chosen`
    gets the active tokens that were chosen by how much they changed."""
    chosen = [] if chosen is None else chosen
    schedule = model.schedule(steps)
    table, heads = model.denoiser.modulation(schedule)
    reuse = Reuse.of(policy, model.size, schedule, table, guided=guided, touched=model.touched)
    assert reuse.plan is not None
    graph, shared, latents = model.backend.graph, dict(model.bundle.tensors("denoiser")), model.of_halves(guided)
    conditions = graph("conditioning")(
        {"prompt_embeds": latents.prompt_embeds, "image_latents": latents.image, "pose_latents": latents.pose, **shared}
    )
    length, noise, halves = conditions["text"].shape[1], NoiseSource(5), range(2 if guided else 1)
    cos, sin = model.denoiser.rope(model.size.grid, length)
    active = np.arange(0) if reuse.active is None else reuse.active

    def through(h: int, stem: np.ndarray, at: int, tokens: np.ndarray | None) -> tuple[np.ndarray, list[Arrays]]:
        """Tokens after all blocks, of all tokens or of the active ones, and what each block gave."""
        others = np.setdiff1d(np.arange(model.size.video_tokens), active)
        rows = np.concatenate([np.arange(length), active + length])
        take = slice(None) if tokens is None else tokens
        video, text, pose = stem[:, take], conditions["text"][h : h + 1], conditions["pose"][:, take]
        given = []
        for i in range(model.config.num_layers):
            feeds = {
                "video": np.ascontiguousarray(video),
                "text": text,
                "pose": np.ascontiguousarray(pose),
                "modulation": table[at, i],
                "rope_cos": cos if tokens is None else cos[rows],
                "rope_sin": sin if tokens is None else sin[rows],
                **model.bundle.tensors(f"block_{i:02d}"),
            }
            if tokens is None and len(active):
                outputs = model.graph_of("tokens_keep", i)({**feeds, "rows": others + length})
            elif tokens is None:
                outputs = model.graph_of("block", i)(feeds)
            else:
                outputs = model.graph_of("tokens_reuse", i)(
                    {**feeds, **{n: caches[h][i][n] for n in ("keys", "values")}}
                )
            given.append(outputs)
            video, text, pose = outputs["video_out"], outputs["text_out"], outputs["pose_out"]
        return video, given

    x, x0, found = model.initial, np.zeros_like(model.initial), []
    caches: dict[int, list[Arrays]] = {}
    refreshed: dict[int, np.ndarray] = {}
    residuals: dict[int, list[tuple[float, np.ndarray]]] = {h: [] for h in halves}
    difference, age = np.zeros_like(x), 0
    whole: list[np.ndarray] = []  # conditional predictions of all tokens
    for at, (step, plan) in enumerate(zip(schedule.steps, reuse.plan.steps, strict=True)):
        stem = graph("stem")({"latents": x, "image_tokens": conditions["image_tokens"], **shared})["video"]
        predictions = {}
        if plan.keep and len(whole) > 1 and policy.token_changed > 0:
            changes = token_changes(whole[-2], whole[-1], model.size)
            active = choose_tokens(policy, model.touched, changes)
            chosen.append(active)
        for h in halves if plan.both else halves[-1:]:
            if plan.trunk == "reused":
                (time, tokens), *before = residuals[h]
                if policy.trunk_order == 1 and before and math.isfinite(before[0][0]):
                    slope = (tokens - before[0][1]) / np.float32(time - before[0][0])
                    tokens = tokens + np.float32(reuse.times[at] - time) * slope
                video = stem + tokens
            else:
                if plan.trunk == "tokens":
                    part, _ = through(h, stem, at, active)
                    video = refreshed[h].copy()
                    video[:, active] = part
                else:
                    video, given = through(h, stem, at, None)
                    if plan.keep:
                        refreshed[h], caches[h] = video, given
                residuals[h] = [(reuse.times[at], video - stem), *residuals[h]][:2]
            zeros = np.zeros_like(x)
            feeds = {"video": video, "modulation": heads[at], "latents": zeros, "x0_old": zeros, "noise": zeros}
            feeds["coefficients"] = np.zeros(7, np.float32)
            predictions[h] = graph("head")({**feeds, **shared})["prediction"]
        positive = predictions[halves[-1]]
        if plan.trunk == "full":
            whole.append(positive[0])
        if plan.both:
            difference, age = positive - predictions[0], 0
        else:
            age += 1
        v = positive + np.float32((GUIDANCE - 1) * policy.guidance_decay**age) * difference if guided else positive
        for _ in range(step.draws - 1):
            noise.skip(x.shape)
        x, x0 = advance(step, x, v, x0, noise.normal(x.shape))
        found.append(x)
    return found


SHORT = "warmup=1,final=1"


@pytest.mark.parametrize(
    "text",
    [
        f"guidance,{SHORT}",
        f"guidance,{SHORT},guidance_period=3,guidance_decay=0.7",
        f"trunk,{SHORT},trunk_period=3",
        f"trunk-linear,{SHORT}",
        f"trunk-linear,{SHORT},guidance_period=2",
        f"table,{SHORT},trunk_threshold=0.5,guidance_period=3",
        f"tokens,{SHORT}",
        f"tokens,{SHORT},token_choice=random,token_share=0.7,guidance_period=2",
        f"combined,{SHORT},trunk_order=1",
        f"combined,{SHORT},guidance_period=1,token_share=0.1",
        "tokens,warmup=2,final=1,token_changed=0.5",
        "combined,warmup=2,final=1,token_changed=1,token_share=0.3",
    ],
)
@pytest.mark.parametrize("guided", [True, False])
def test_reused_steps_are_those_of_a_plain_reference(text: str, guided: bool, model: Any) -> None:
    tiny, policy = model("cogvideox15-tiny"), policy_of(text)
    got, kinds = tiny.run(policy, 10, guided=guided)
    assert set(kinds) != {"full"} or (not guided and not policy.reuses_trunk and not policy.reuses_tokens)
    for one, wanted in zip(got, reference(tiny, policy, 10, guided), strict=True):
        assert max_abs(one, wanted) < 1e-4


def test_tokens_that_changed_are_chosen_at_every_refresh(model: Any) -> None:
    tiny, policy = model("cogvideox15-tiny"), policy_of(f"tokens,{SHORT},token_changed=0.5,token_share=0.4")
    chosen: list[np.ndarray] = []
    reference(tiny, policy, 20, True, chosen)
    first = choose_tokens(policy, tiny.touched)
    assert len(chosen) >= 2 and all(len(one) == len(first) for one in chosen)
    assert not np.array_equal(chosen[0], chosen[-1])  # they follow the clip
    nearest = choose_tokens(policy_of(f"tokens,{SHORT},token_share=0.18"), tiny.touched)
    assert all(np.isin(nearest, one).all() for one in chosen)


@pytest.mark.parametrize(
    "text", [f"tokens,{SHORT},token_share=0.3", f"combined,{SHORT}", f"tokens,{SHORT},token_share=1"]
)
@pytest.mark.parametrize("guided", [True, False])
def test_caches_in_int8_cost_little(text: str, guided: bool, model: Any) -> None:
    tiny = model("cogvideox15-tiny")
    wide, kinds = tiny.run(policy_of(text), 10, guided=guided)
    narrow, same = tiny.run(policy_of(f"{text},token_cache=int8"), 10, guided=guided)
    assert kinds == same
    first = next(i for i, kind in enumerate(kinds) if kind.startswith("tokens"))
    assert all(np.array_equal(a, b) for a, b in zip(narrow[:first], wide[:first], strict=True))
    found = min(snr(a, b) for a, b in zip(wide[first:], narrow[first:], strict=True))
    assert found > 45
    assert np.array_equal(narrow[-1], wide[-1]) == ("token_share=1" in text)  # then nothing is kept


def test_caches_in_int8_are_one_byte_a_number_and_a_scale_a_head(model: Any) -> None:
    tiny = model("cogvideox15-tiny")
    narrow, wide = (
        cache_layout(policy_of(f"tokens,token_cache={kind}"), tiny.config, tiny.size, guided=True)
        for kind in ("int8", "compute")
    )
    assert {name: narrow[name].shape for name in wide} == {name: buffer.shape for name, buffer in wide.items()}
    width, layers, heads = Widths.of("bf16"), tiny.config.num_layers, tiny.config.num_attention_heads
    for name in ("keys", "values"):
        assert 2 * narrow[name].bytes(width) == wide[name].bytes(width)
        assert layers * narrow[f"wide_{name}"].bytes(width) == wide[name].bytes(width)
    assert narrow["scales"].shape == (2, layers, 2, heads)


@pytest.mark.parametrize("rows", [1, 7])
def test_every_head_has_its_own_scale(rows: int, model: Any) -> None:
    tiny, random = model("cogvideox15-tiny"), np.random.default_rng(2)
    heads, d = tiny.config.num_attention_heads, tiny.config.width
    sizes = 10.0 ** np.arange(heads).repeat(d // heads)  # heads of very different sizes
    given = {name: (random.standard_normal((1, rows, d)) * sizes).astype(np.float32) for name in ("keys", "values")}
    given["values"][..., : d // heads] = 0
    kept = tiny.backend.graph("cache_narrow")(given)
    found = tiny.backend.graph("cache_widen")(kept)
    for i, (name, exact) in enumerate(given.items()):
        assert kept[f"{name}_narrow"].dtype == np.int8
        largest = np.abs(exact).reshape(rows, heads, -1).max(axis=(0, 2))
        np.testing.assert_allclose(kept["scales"][i], np.maximum(largest, 1e-30) / 127, rtol=1e-6)
        steps = (largest / 127).repeat(d // heads)
        assert (np.abs(found[name] - exact) <= 0.5001 * steps).all()


# --- quantized bundles

SCHEMES = [("int8", None), ("int8", 3), ("int8-weights", None), ("fp8", None)]


@pytest.mark.parametrize(("scheme", "kept"), SCHEMES)
def test_token_reuse_with_all_tokens_active_equals_the_quantized_full_loop(
    scheme: str, kept: int | None, quantized_model: Any
) -> None:
    tiny = quantized_model(scheme, kept)
    mixtures = set(tiny.bundle.manifest.block_graphs)
    assert (mixtures == {"block"}) == (kept is None)
    full, _ = tiny.run(None, 8)
    got, kinds = tiny.run(policy_of("tokens,warmup=1,final=0,token_share=1"), 8)
    assert kinds == ["full", "tokens", "tokens", "tokens"] * 2
    assert max(max_abs(a, b) for a, b in zip(got, full, strict=True)) < 1e-4


@pytest.mark.parametrize(("scheme", "kept"), SCHEMES)
def test_reused_steps_of_a_quantized_bundle_are_those_of_a_plain_reference(
    scheme: str, kept: int | None, quantized_model: Any
) -> None:
    tiny, policy = quantized_model(scheme, kept), policy_of(f"combined,{SHORT},trunk_order=1")
    got, kinds = tiny.run(policy, 10)
    assert set(kinds) == {"full", "trunk", "tokens+guidance", "trunk+guidance"}
    for one, wanted in zip(got, reference(tiny, policy, 10, True), strict=True):
        # What lies between two integers may fall on either side, and all steps after that differ; without, 120 dB are left.
        assert snr(wanted, one) > 30


def test_a_quantized_bundle_keeps_caches_in_int8(quantized_model: Any) -> None:
    """The same two graphs serve every mixture."""
    tiny, text = quantized_model("int8", 3), f"tokens,{SHORT},token_share=0.3"
    wide, kinds = tiny.run(policy_of(text), 8)
    narrow, same = tiny.run(policy_of(f"{text},token_cache=int8"), 8)
    assert kinds == same and "tokens" in kinds
    assert 25 < snr(wide[-1], narrow[-1]) < 120


def test_halves_in_turn_are_the_halves_side_by_side(model: Any) -> None:
    tiny, policy = model("cogvideox10-tiny"), policy_of("combined,warmup=1,final=0,guidance_period=1")
    aside, _ = tiny.run(policy, 8)
    tiny.denoiser.side_by_side = False
    try:
        in_turn, _ = tiny.run(policy, 8)
    finally:
        tiny.denoiser.side_by_side = True
    assert max(max_abs(a, b) for a, b in zip(aside, in_turn, strict=True)) < 1e-4


def test_the_report_says_what_was_done_and_allocated(model: Any) -> None:
    tiny, policy = model("cogvideox15-tiny"), policy_of("combined,warmup=1,final=1")
    schedule = tiny.schedule(9)
    table, _ = tiny.denoiser.modulation(schedule)
    reuse = Reuse.of(policy, tiny.size, schedule, table, guided=True, touched=tiny.touched)
    loop = reuse.make_loop(tiny.denoiser, tiny.latents, tiny.initial, tiny.size.grid)
    taken = allocated(list(loop._caches.values()))
    loop.close()
    steps = tiny.denoiser.denoise(
        tiny.latents, tiny.initial, schedule, GUIDANCE, NoiseSource(5), tiny.size.grid, make_loop=reuse.make_loop
    )
    assert len(list(steps)) == 9
    report = reuse.report(tiny.config, "fp32")
    assert report.cache_bytes == taken
    assert report.as_json()["steps"] == list(reuse.plan.kinds)
    assert 0.3 < report.flop_fraction < 0.8
    assert "9 steps with --reuse combined: 3 full" in report.summary()


# --- graphs


@pytest.mark.parametrize("name", ["block", "block_cpu"])
def test_active_rows_with_kept_keys_are_rows_of_the_whole_block(name: str, model: Any) -> None:
    """In the portable graphs and in those of ONNX Runtime's own operators, two halves at once and any number of rows."""
    import onnxruntime

    tiny, random = model("cogvideox15-tiny"), np.random.default_rng(4)
    d, n, text = tiny.config.width, 12, 5
    suffix = name.removeprefix("block")

    def run(graph: str, feeds: Arrays) -> Arrays:
        session = onnxruntime.InferenceSession(tiny.bundle.graph(graph + suffix)[1], providers=["CPUExecutionProvider"])
        values = session.run(None, {port.name: feeds[port.name] for port in session.get_inputs()})
        return {port.name: value for port, value in zip(session.get_outputs(), values, strict=True)}

    angle = random.standard_normal((text + n, tiny.config.attention_head_dim // 2)).astype(np.float32)
    feeds: Arrays = {
        "video": random.standard_normal((2, n, d)).astype(np.float32),
        "text": random.standard_normal((2, text, d)).astype(np.float32),
        "pose": random.standard_normal((1, n, d)).astype(np.float32),
        "modulation": random.standard_normal((15, d)).astype(np.float32),
        "rope_cos": np.cos(angle),
        "rope_sin": np.sin(angle),
        **tiny.bundle.tensors("block_00"),
    }
    whole = run("block", feeds)
    for active in (np.array([7]), np.array([0, 3, 4, 11]), np.arange(n)):
        rows = np.concatenate([np.arange(text), active + text])
        others = np.setdiff1d(np.arange(n), active) + text
        kept = run("tokens_keep", {**feeds, "rows": others})
        assert all(max_abs(kept[port], value) < 1e-6 for port, value in whole.items())
        part = run(
            "tokens_reuse",
            {
                **feeds,
                **{port: feeds[port][:, active] for port in ("video", "pose")},
                **{port: feeds[port][rows] for port in ("rope_cos", "rope_sin")},
                **{port: kept[port] for port in ("keys", "values")},
            },
        )
        assert max_abs(part["video_out"], whole["video_out"][:, active]) < 2e-5
        assert max_abs(part["pose_out"], whole["pose_out"][:, active]) < 2e-5
        assert max_abs(part["text_out"], whole["text_out"]) < 2e-5
