"""The choice of active tokens, and the bytes of the caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamictrl_edge.bundle.config import geometry
from dynamictrl_edge.bundle.errors import BundleError, DeviceError
from dynamictrl_edge.bundle.manifest import BLOCK_KINDS, Quantization
from dynamictrl_edge.runtime.backends.host import HOST
from dynamictrl_edge.runtime.memory import MemoryPlan, block_activations, plan_memory
from dynamictrl_edge.runtime.reuse.caches import Widths, allocate, cache_bytes, cache_layout
from dynamictrl_edge.runtime.reuse.fit import check_graphs, needed_graphs, plan_with_caches
from dynamictrl_edge.runtime.reuse.policy import POLICIES, ReusePolicy, parse_policy
from dynamictrl_edge.runtime.reuse.tokens import active_count, choose_tokens, distances, drawn_tokens, token_changes
from tests.bundle_samples import TRANSFORMER, VAE, small_manifest
from tests.test_memory import BLOCK, FULL


def test_a_token_is_touched_where_and_when_something_is_drawn() -> None:
    size = geometry(TRANSFORMER, VAE, 64, 96, 9)  # 3 latent frames, tokens of 16 x 16 pixels
    pose = np.zeros((9, 64, 96, 3), np.uint8)
    pose[0, 5, 5] = 255  # latent frame 0 is frame 0 alone
    pose[1, 17, 40, 1] = 200
    pose[4, 63, 95, 2] = 200  # frames 1 to 4 are latent frame 1
    pose[5, 0, 95] = 17
    pose[6, 40, 40] = 16  # darker than anything that is drawn
    touched = drawn_tokens(pose, size, 4)
    assert touched.shape == size.grid == (3, 4, 6)
    assert {tuple(map(int, at)) for at in np.argwhere(touched)} == {(0, 0, 0), (1, 1, 2), (1, 3, 5), (2, 0, 5)}


def test_padding_frames_of_models_that_pair_latent_frames_count_with_their_token() -> None:
    size = geometry(msgspec.structs.replace(TRANSFORMER, patch_size_t=2), VAE, 32, 32, 9)
    assert (size.latent_frames, size.pose_frames, size.grid) == (4, 13, (2, 2, 2))
    pose = np.zeros((13, 32, 32, 3), np.uint8)
    pose[4, 0, 0] = 255  # latent frame 1, first token time
    pose[5, 31, 31] = 255  # latent frame 2, second
    touched = drawn_tokens(pose, size, 4)
    assert np.array_equal(np.argwhere(touched), [[0, 0, 0], [1, 1, 1]])


def test_distance_is_to_the_skeleton_of_the_same_time_or_one_beside_it() -> None:
    touched = np.zeros((4, 3, 5), bool)
    touched[0, 1, 1] = True
    found = distances(touched).reshape(4, 3, 5)
    row, column = np.mgrid[:3, :5]
    for time in (0, 1):
        assert np.allclose(found[time], np.hypot(row - 1, column - 1))
    assert np.isinf(found[2:]).all()


@settings(max_examples=50)
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)),
    share=st.floats(0.01, 1),
    choice=st.sampled_from(["pose", "even", "random"]),
    seed=st.integers(0, 9),
)
def test_every_choice_has_the_same_number_of_tokens(grid: tuple, share: float, choice: str, seed: int) -> None:
    policy = ReusePolicy(token_period=2, token_share=share, token_choice=choice)
    touched = np.random.default_rng(seed).random(grid) > 0.8
    active = choose_tokens(policy, touched)
    assert len(active) == active_count(policy, touched.size)
    assert np.all(np.diff(active) > 0) and active[0] >= 0 and active[-1] < touched.size
    assert np.array_equal(active, choose_tokens(policy, touched))
    if choice == "pose":
        away = distances(touched)
        others = np.setdiff1d(np.arange(touched.size), active)
        assert not len(others) or away[active].max() <= away[others].min()


@settings(max_examples=50)
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)),
    share=st.floats(0.01, 1),
    changed=st.floats(0, 1),
    choice=st.sampled_from(["pose", "even", "random"]),
    seed=st.integers(0, 9),
)
def test_a_share_of_the_active_tokens_are_those_that_changed_most(
    grid: tuple, share: float, changed: float, choice: str, seed: int
) -> None:
    policy = ReusePolicy(token_period=2, token_share=share, token_choice=choice, token_changed=changed)
    random = np.random.default_rng(seed)
    touched, changes = random.random(grid) > 0.8, random.random(grid).reshape(-1).astype(np.float32)
    count = active_count(policy, touched.size)
    active = choose_tokens(policy, touched, changes)
    assert len(active) == count and np.all(np.diff(active) > 0)
    moved = round(changed * count)
    without = choose_tokens(policy, touched)
    assert len(np.intersect1d(active, without)) >= count - moved
    others = np.setdiff1d(np.arange(touched.size), active)
    if moved and len(others):
        # What is not active changed no more than any of those that were chosen for it.
        assert np.sort(changes[active])[-moved:].min() >= changes[others].max()
    if changed == 0:
        assert np.array_equal(active, without)


def test_the_change_of_a_token_is_that_of_its_patch() -> None:
    for patch_in_time in (None, 2):
        config = msgspec.structs.replace(TRANSFORMER, patch_size_t=patch_in_time)
        size = geometry(config, VAE, 32, 64, 9)
        shape = (size.latent_frames, config.latent_channels, size.latent_height, size.latent_width)
        before = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        now = before.copy()
        now[-1, 1, -1, -2] += 2
        now[0, :, 0, 2] -= 1
        changes = token_changes(before, now, size).reshape(size.grid)
        assert np.allclose(changes[-1, -1, -1], 4) and np.allclose(changes[0, 0, 1], config.latent_channels)
        assert np.count_nonzero(changes) == 2


def test_without_a_skeleton_the_active_tokens_lie_spread() -> None:
    nothing = np.zeros((4, 6, 6), bool)
    policy = ReusePolicy(token_period=2, token_share=0.25)
    per_time = np.bincount(choose_tokens(policy, nothing) // 36, minlength=4)
    assert per_time.min() >= 7 and per_time.max() <= 11


# --- bytes

SIZES = {"1360x768x37": (768, 1360, 37), "1024x576x37": (576, 1024, 37)}


@pytest.mark.parametrize(
    "name", [*POLICIES, "tokens,token_cache=int8", "combined,token_cache=int8", "tokens,token_changed=0.5"]
)
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize(("precision", "compute"), [("fp32", np.float32), ("fp16", np.float16)])
def test_bytes_are_those_of_what_is_allocated(name: str, guided: bool, precision: str, compute: type) -> None:
    size = geometry(TRANSFORMER, VAE, 64, 96, 9)
    policy = parse_policy(name)
    assert policy is not None
    layout = cache_layout(policy, TRANSFORMER, size, guided=guided)
    made = allocate(layout, HOST, np.dtype(np.float32), np.dtype(compute))
    assert set(made) == set(layout)
    counted = cache_bytes(policy, TRANSFORMER, size, guided=guided, precision=precision)
    assert allocated(list(made.values())) == counted
    on_device = cache_bytes(policy, TRANSFORMER, size, guided=guided, precision=precision, device=True)
    assert counted - on_device == (made["whole"].nbytes if policy.follows_changes else 0)


def allocated(buffers: Any) -> int:
    """Bytes of arrays in nested lists."""
    return sum(map(allocated, buffers)) if isinstance(buffers, list) else buffers.nbytes


def test_bytes_at_full_size_are_mostly_keys_and_values() -> None:
    size = geometry(FULL.transformer, FULL.vae, *SIZES["1360x768x37"])
    policy = parse_policy("tokens,token_share=0.25,guidance_period=4")
    assert policy is not None
    layout = cache_layout(policy, FULL.transformer, size, guided=True)
    widths = Widths.of("bf16")
    keys = sum(layout[name].bytes(widths) for name in ("keys", "values"))
    assert keys == 2 * 42 * 15300 * 3072 * 2  # two, layers, inactive tokens, width, bytes
    total = cache_bytes(policy, FULL.transformer, size, guided=True, precision="bf16")
    assert keys < total < 1.1 * keys


def test_the_plan_counts_caches_in_the_denoising_stage() -> None:
    size = geometry(FULL.transformer, FULL.vae, 288, 512, 17)
    for budget in (None, 60):
        without, caching = (
            plan_memory(FULL, size, halves=2, tiling="on", budget=budget, block=BLOCK, caches=caches)
            for caches in (0, 10**9)
        )
        assert caching.stages["denoise"] - without.stages["denoise"] == 10**9
        assert caching.stages["vae"] == without.stages["vae"]


def test_caches_that_do_not_fit_are_refused_with_their_bytes_and_what_fits() -> None:
    size = geometry(FULL.transformer, FULL.vae, 288, 512, 17)
    made = plan_memory(FULL, size, halves=2, tiling="on", budget=None, block=BLOCK)

    def room_for(limit: int) -> Callable[[int], MemoryPlan]:
        def plan(caches: int) -> MemoryPlan:
            if caches > limit:
                raise DeviceError("It does not fit.")
            return made

        return plan

    assert plan_with_caches(room_for(0), None, FULL, size, guided=True) is made
    assert plan_with_caches(room_for(10**10), POLICIES["tokens"], FULL, size, guided=True) is made
    need = cache_bytes(POLICIES["trunk"], FULL.transformer, size, guided=True, precision="fp32")
    with pytest.raises(DeviceError) as refusal:
        plan_with_caches(room_for(need), POLICIES["tokens"], FULL, size, guided=True)
    bytes_needed = cache_bytes(POLICIES["tokens"], FULL.transformer, size, guided=True, precision="fp32")
    text, fitting = str(refusal.value).split("these fit: ")
    assert f"caches of --reuse tokens need {bytes_needed / 1e9:.2f} GB beside the clip. It does not fit." in text
    names = [name.split(" (")[0] for name in fitting.split(", ")]
    assert {"off", "trunk"} <= set(names)
    assert "tokens" not in names and "trunk-linear" not in names
    assert "the same" not in names  # a bundle without the graphs that narrow caches
    graphs = {**FULL.graphs, **dict.fromkeys(("cache_narrow", "cache_widen"), small_manifest({}).graphs["block"])}
    exported = msgspec.structs.replace(FULL, graphs=graphs)
    same = parse_policy("tokens,token_cache=int8")
    assert same is not None
    narrow = cache_bytes(same, FULL.transformer, size, guided=True, precision="fp32")
    sessions = 4 * block_activations(FULL.transformer, size, fused=False)  # two graphs of a block for each half
    limit = sessions + (narrow + bytes_needed) // 2
    with pytest.raises(DeviceError, match=rf"the same with token_cache=int8 \({narrow / 1e9:.2f} GB\)\.$"):
        plan_with_caches(room_for(limit), POLICIES["tokens"], exported, size, guided=True)
    # Where the clip alone does not fit, that is what is said.
    with pytest.raises(DeviceError, match=r"^It does not fit\.$"):
        plan_with_caches(room_for(-1), POLICIES["tokens"], FULL, size, guided=True)


# --- bundles


def test_a_bundle_without_the_graphs_is_refused_with_what_it_lacks() -> None:
    manifest = small_manifest({})
    with pytest.raises(BundleError, match=r"the graphs of --reuse trunk \(trunk_keep, trunk_reuse\): it"):
        check_graphs(manifest, "b", POLICIES["trunk"], guided=True)
    check_graphs(manifest, "b", POLICIES["guidance"], guided=False)  # needs none then
    with pytest.raises(BundleError, match="head_reuse"):
        check_graphs(manifest, "b", POLICIES["guidance"], guided=True)


def test_token_steps_must_take_the_weights_of_quantized_blocks() -> None:
    manifest = small_manifest({})
    graphs = dict.fromkeys(needed_graphs(POLICIES["combined"], guided=True), manifest.graphs["block"])
    manifest = msgspec.structs.replace(manifest, graphs=graphs)
    check_graphs(manifest, "b", POLICIES["combined"], guided=True)
    blocks = ("block", "block_keeps_out", "block_keeps_out")
    all_of = {"": ("qkv", "out"), "_keeps_out": ("qkv",)}
    linears = {kind + mixture: names for kind in BLOCK_KINDS for mixture, names in all_of.items()}

    def check(policy: str, **changes: tuple[str, ...] | None) -> None:
        given = {name: names for name, names in {**linears, **changes}.items() if names is not None}
        quantization = Quantization(scheme="int8", blocks=blocks, linears=given)
        named = {**graphs, **dict.fromkeys(given, graphs["tokens_keep"])}
        quantized = msgspec.structs.replace(manifest, graphs=named, quantization=quantization)
        check_graphs(quantized, "b", POLICIES[policy], guided=True)

    check("combined")
    for kind in ("tokens_keep", "tokens_reuse"):
        for mixture, others in (("", None), ("", ("qkv",)), ("_keeps_out", None), ("_keeps_out", ("qkv", "out"))):
            with pytest.raises(
                BundleError, match=r"was quantized by a version.*off, quality, balanced, guidance, trunk"
            ):
                check("combined", **{kind + mixture: others})
            check("trunk", **{kind + mixture: others})
