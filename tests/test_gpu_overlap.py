"""Streamed weights: the ring itself on a fake driver, the simulation of it at full size, and what the plan says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from benchmarks.overlap import BUDGETS, LINKS, PAGE, Rates, cost, page, rates_of, seconds
from benchmarks.plan_tables import full_size_facts
from dynamictrl_edge.engines.planner import GB, PRESETS, plan
from dynamictrl_edge.runtime.backends.cuda import open_device
from dynamictrl_edge.runtime.backends.gpu import Gpu
from dynamictrl_edge.runtime.backends.ring import DeviceBlocks, spread
from tests.cuda_fakes import FakeCuda

SMALL, MIDDLE, LARGE = PRESETS[:3]


class File(dict[str, np.ndarray]):
    """A block's weights, whose pages nobody counts."""

    def release(self) -> None: ...

    def prefetch(self) -> None: ...


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    FakeCuda().install(monkeypatch)
    made = Gpu(open_device())
    yield made
    made.close()


def files(count: int) -> list[Any]:
    return [
        File(weight=np.full((33, 7), i, np.float32), bias=np.arange(i, i + 5, dtype=np.float16)) for i in range(count)
    ]


@pytest.mark.parametrize("lockable", [0, 1 << 20])
@pytest.mark.parametrize(
    ("count", "resident", "ring"), [(7, 0, 3), (7, 0, 2), (7, 3, 3), (7, 6, 1), (7, 7, 0), (2, 0, 2), (9, 4, 2)]
)
@pytest.mark.parametrize("copy", [0.2, 1.0, 2.5])
def test_every_block_finds_its_weights_when_the_simulation_says(
    count: int, resident: int, ring: int, copy: float, lockable: int, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Races and stale weights would be found; the times are those of `benchmarks.overlap`."""
    steps, fake, held = 4, _fake(gpu), files(count)
    blocks = DeviceBlocks(gpu, held)
    fake.copy_rate = blocks._bytes / copy
    gpu.begin(count * blocks._bytes + 1024, ring)
    gpu.lockable = lockable
    blocks.resident = resident
    blocks.open()
    compute = fake.streams[gpu.compute.handle]
    begun, ends = compute.time, []
    fake.host_time = fake.streams[gpu.copying.handle].time = begun
    for _ in range(steps):
        for i in range(count):
            blocks.ahead(i)
            for _half in range(2):
                spans = [(array.address, array.address + array.nbytes) for array in blocks[i].values()]
                with fake.work(gpu.compute.handle, 0.5, f"block {i}", reads=spans):
                    for name, (first, last) in zip(blocks[i], spans, strict=True):
                        assert fake.bytes_at(first, last - first).tobytes() == held[i][name].tobytes()
            blocks.done(i)
        ends.append(compute.time - begun)
    expected = seconds(count, resident, ring, steps, Rates(1.0, 0.0, copy), kept=lockable > 0 and resident < count)
    assert ends == pytest.approx(expected)
    gpu.settle()
    blocks.close()
    with gpu.device.calling("freeing"):
        blocks.free()
    assert gpu.arena is not None and gpu.arena.used == 0


def _fake(gpu: Gpu) -> FakeCuda:
    import sys

    return sys.modules["pycuda.driver"].fake  # type: ignore[attr-defined, no-any-return]


def test_streamed_blocks_are_spread_and_the_last_is_one_of_them() -> None:
    assert spread(42, 42) == tuple(range(42))
    assert spread(42, 0) == ()
    assert spread(6, 2) == (2, 5)
    for streamed in range(1, 43):
        places = spread(42, streamed)
        gaps = np.diff([-1, *places])
        assert len(set(places)) == streamed and places[-1] == 41 and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("size", [MIDDLE, LARGE], ids=str)
def test_at_full_size_streaming_costs_less_than_3_percent(size: Any, precision: str, link: str, kept: bool) -> None:
    streaming = 0
    for budget in BUDGETS[size]:
        made = plan(full_size_facts(precision), size, budget=int(budget * GB), batch=1)
        streaming += made.ring > 0
        assert cost(made, rates_of(made, precision, size, LINKS[link]), kept=kept) < 0.03
    assert streaming >= 2


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_where_copies_do_not_hide_the_plan_says_so_and_keeps_what_fits(precision: str) -> None:
    tight, roomy = (plan(full_size_facts(precision), SMALL, budget=n * 10**9, batch=1) for n in (4, 12))
    slow = rates_of(tight, precision, SMALL, LINKS["PCIe 4 x8"])
    assert tight.ring > 0 and slow.copy > slow.compute
    assert f"up to {tight.hidden_up_to / 1e12:.0f} TFLOP/s" in tight.reason
    assert tight.hidden_up_to < tight.block_flop / slow.compute  # what this GPU reaches
    assert roomy.ring == 0 and "Copying" not in roomy.reason


def test_a_block_that_takes_as_long_as_its_copy_is_on_the_edge() -> None:
    made = plan(full_size_facts("bf16"), SMALL, budget=4 * 10**9, batch=1)
    assert made.block_flop / made.hidden_up_to == pytest.approx(made.block_bytes / LINKS["PCIe 4 x8"])


def test_without_ahead_of_time_copies_the_simulation_would_see_it() -> None:
    """One slot: each copy waits for the block before it."""
    assert seconds(10, 0, 1, 5, Rates(1.0, 0.0, 0.5), kept=True)[-1] == pytest.approx(5 * 10 * 1.5)
    assert seconds(10, 0, 2, 5, Rates(1.0, 0.0, 0.5), kept=True)[-1] == pytest.approx(5 * 10 + 0.5)


def test_the_page_holds_the_table_of_now() -> None:
    text = PAGE.read_text()
    assert page(text) == text
