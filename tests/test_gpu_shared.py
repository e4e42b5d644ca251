"""A GPU that shares its memory with the processor at any time: weights are written where they are used, on the fake driver."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamictrl_edge.runtime.animator import Clip
from dynamictrl_edge.runtime.backends import cuda as cuda_door
from dynamictrl_edge.runtime.backends.gpu import CHUNK
from dynamictrl_edge.runtime.backends.ring import DeviceBlocks, Layout
from tests.cuda_fakes import Hazard
from tests.gpu_samples import TINY, TRT, Machinery, assert_nothing_left, assert_same, machinery, on_processor

PLACES = [(3, 0), (0, 2), (0, 3), (1, 2), (2, 1)]  # blocks that stay, slots for the others
WANTED: dict[str, Any] = {**TINY, "steps": 3}


@pytest.fixture(scope="module")
def reference(root: Path) -> Clip:
    return on_processor(root, **WANTED)


@pytest.fixture
def gpu(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machinery]:
    made = machinery(root, TRT, monkeypatch, integrated=True, shared=True)
    yield made
    made.animator.close()
    assert_nothing_left(made)


@pytest.mark.parametrize(("resident", "ring"), PLACES)
def test_the_clip_is_the_same_and_no_weight_is_copied(
    resident: int, ring: int, gpu: Machinery, reference: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.keep_blocks(monkeypatch, resident, ring)
    largest = 0
    copy_in = cuda_door.Stream.copy_in

    def noted(stream: cuda_door.Stream, address: int, source: Any) -> None:
        nonlocal largest
        largest = max(largest, source.nbytes)
        copy_in(stream, address, source)

    monkeypatch.setattr(cuda_door.Stream, "copy_in", noted)
    for _ in range(2):
        assert_same(gpu.animator(**WANTED), reference)
    assert gpu.cuda.locked == 2 * CHUNK  # for what comes and goes, and none for weights
    assert largest < gpu.backend.buffers.blocks[0]._bytes
    assert "mem_alloc" not in gpu.cuda.calls


@pytest.mark.parametrize("ring", [1, 2])
def test_writing_without_waiting_for_the_block_before_is_caught(
    ring: int, gpu: Machinery, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.keep_blocks(monkeypatch, 0, ring)
    wait = cuda_door.Event.wait

    def unless_of_a_slot(event: cuda_door.Event) -> None:
        if not any(slot.free is event for blocks in gpu.backend.buffers.blocks for slot in blocks._ring):
            wait(event)

    monkeypatch.setattr(cuda_door.Event, "wait", unless_of_a_slot)
    with pytest.raises(Hazard, match="by the host while"):
        gpu.animator(**WANTED)
    gpu.cuda.races = False  # what is left of it ends in peace


def test_the_gpu_works_while_weights_are_written(gpu: Machinery, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.keep_blocks(monkeypatch, 0, 2)
    gpu.engines.seconds = lambda graph: 0.01 if graph == "block" else 0.001
    fill = Layout.fill

    def slowly(layout: Layout, *arguments: Any) -> None:
        gpu.cuda.host_time += 0.015  # a block has two halves of 10 ms
        fill(layout, *arguments)

    monkeypatch.setattr(Layout, "fill", slowly)
    compute = gpu.cuda.streams[gpu.backend._gpu.compute.handle]
    idle: dict[int, int] = {}
    gpu.animator(
        **{**WANTED, "steps": 6},
        progress=lambda stage, done, total: idle.update({done: len(compute.idle)}) if stage == "denoise" else None,
    )
    assert sum(seconds for seconds, _ in compute.idle[idle[1] : idle[5]]) < 1e-9


def test_blocks_that_stay_are_written_once(gpu: Machinery, monkeypatch: pytest.MonkeyPatch, reference: Clip) -> None:
    written: list[int] = []
    copy = DeviceBlocks._copy

    def counted(blocks: DeviceBlocks, block: int, slot: Any) -> None:
        written.append(block)
        copy(blocks, block, slot)

    monkeypatch.setattr(DeviceBlocks, "_copy", counted)
    for _ in range(2):
        assert_same(gpu.animator(**WANTED), reference)
    assert sorted(written) == list(range(len(gpu.backend.buffers.blocks[0])))


def test_an_integrated_gpu_that_cannot_share_copies(
    root: Path, monkeypatch: pytest.MonkeyPatch, reference: Clip
) -> None:
    made = machinery(root, TRT, monkeypatch, integrated=True)
    made.keep_blocks(monkeypatch, 0, 2)
    assert_same(made.animator(**WANTED), reference)
    assert "managed_empty" not in made.cuda.calls
    made.animator.close()
    assert_nothing_left(made)
