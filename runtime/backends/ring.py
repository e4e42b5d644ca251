"""The denoiser's weights on a GPU: some blocks stay, the others stream through a ring of slots while blocks before them compute.

A copy goes from the mapped file into page-locked memory (by this thread) and from there into the slot (by the GPU, in a stream of
its own). Events order the two streams: a block computes after its copy, and a slot is written after the block that used it.
Blocks that stay are spread evenly between those that stream, so that each streamed one has as much time as can be had. Where the
host has memory to spare, streamed blocks stay in page-locked memory, and this thread copies each of them only once.

Where the processor sees the GPU's memory (`Device.shared`), there is no copy in between: this thread writes into the slot itself,
after the next block was enqueued, so that the GPU has work while it does.

The thread of the loop waits in two places, never for the newest work: for a page-locked buffer whose copy began several blocks
ago, or the slot that it writes into, and for the block `PACE` before this one, so that cancelling need not wait for a long queue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...bundle.errors import DeviceError
from ...bundle.tensors import MappedTensors
from .arena import Arena, DeviceArray, Piece, aligned
from .cuda import Event, Pinned

if TYPE_CHECKING:
    from .gpu import Gpu

__all__ = ["PACE", "STAGED", "DeviceBlocks", "Layout", "spread"]

STAGED = 3  # page-locked buffers of one block each
PACE = 4  # blocks that may be enqueued beyond the one that computes
EARLY = 2  # blocks that stay are copied so many blocks before their first use


def spread(count: int, streamed: int) -> tuple[int, ...]:
    """`streamed` of `count` places, as evenly as possible, the last always among them."""
    return tuple((k + 1) * count // streamed - 1 for k in range(streamed))


class Layout:
    """Where the tensors of a block lie in its slot, each at an aligned place."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self.places: dict[str, int] = {}
        self.nbytes = 0
        for name, array in tensors.items():
            self.places[name] = self.nbytes
            self.nbytes += aligned(array.nbytes)

    def fill(self, target: np.ndarray, tensors: Mapping[str, np.ndarray]) -> None:
        """Writes all tensors into [nbytes] uint8."""
        for name, start in self.places.items():
            raw = tensors[name].reshape(-1).view(np.uint8)
            np.copyto(target[start : start + raw.nbytes], raw)


class _Slot:
    """Room for one block. `ready`: its copy is done; `free`: the block that used it is done."""

    def __init__(self, piece: Piece, ready: Event, free: Event):
        self.piece, self.ready, self.free = piece, ready, free


class _Staging:
    """Page-locked room for one block. `sent`: the last copy from it is done. `block`: whose weights are in it."""

    def __init__(self, memory: Pinned, sent: Event):
        self.memory, self.sent = memory, sent
        self.block: int | None = None


class _Weight(DeviceArray):
    """A tensor of a block, wherever that block lies at the moment."""

    def __init__(self, slots: Mapping[int, _Slot], block: int, array: np.ndarray, offset: int):
        self._slots, self._block, self._offset = slots, block, offset
        self.shape, self.dtype = array.shape, array.dtype

    @property
    def address(self) -> int:
        return self._slots[self._block].piece.address + self._offset


class DeviceBlocks:
    """`base.BlockWeights` in the memory of a GPU."""

    def __init__(self, gpu: Gpu, files: Sequence[MappedTensors]):
        self._gpu, self._files = gpu, files
        self._layouts = [Layout(file) for file in files]
        self._bytes = max(layout.nbytes for layout in self._layouts)
        self.resident = len(files)
        self._slots: dict[int, _Slot] = {}  # where each block is; of a streamed one, where it was copied last
        self._weights = [
            {name: _Weight(self._slots, i, file[name], place) for name, place in layout.places.items()}
            for i, (file, layout) in enumerate(zip(files, self._layouts, strict=True))
        ]
        self._streamed: tuple[int, ...] = ()
        self._ring: list[_Slot] = []
        self._events: list[tuple[Event, Event]] = []  # of all slots that ever were; they serve again
        self._staging: list[_Staging] = []
        self._kept: dict[int, _Staging] = {}  # of streamed blocks, if they have page-locked memory of their own
        self._fences: list[Event] = []
        self._loaded: set[int] = set()
        self._home: Arena | None = None  # where the slots are
        self._written = False  # by this thread, into memory that it shares with the GPU
        self._copied = self._used = self._passed = self._turn = 0

    @property
    def settled(self) -> bool:
        return not self._streamed and len(self._loaded) == len(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Mapping[str, DeviceArray]:
        return self._weights[index]

    def open(self) -> None:
        """Takes slots for `resident` blocks and for the ring, and page-locked memory; nothing is copied yet.

        If all blocks are kept and lie where they lay in the last request, they are there.
        """
        gpu, count = self._gpu, len(self._files)
        self._streamed = spread(count, count - self.resident)
        home = gpu.kept if gpu.kept is not None and not self._streamed else gpu.arena
        if self._home is not None and self._home is home:
            return
        self._forget()
        self._home = home
        try:
            with gpu.device.calling("preparing the blocks' weights"):
                self._take_room(count)
        except BaseException:
            self._forget()  # else the next request would find a home and take it for whole
            raise

    def _take_room(self, count: int) -> None:
        gpu, home = self._gpu, self._home
        slots = [self._slot(i) for i in range(count - len(self._streamed) + min(gpu.ring, len(self._streamed)))]
        stay = sorted(set(range(count)) - set(self._streamed))
        self._slots.update(zip(stay, slots, strict=False))
        self._ring = slots[len(stay) :]
        # One by one: what there is after a fault is completed by the next request.
        while len(self._fences) < PACE:
            self._fences.append(gpu.device.event())
        # The arena's places may still be read by what was computed before.
        gpu.fence.record(gpu.compute)
        self._written = home is not None and home.seen is not None
        if self._written:
            gpu.fence.wait()
            return
        gpu.copying.wait_for(gpu.fence)
        while len(self._staging) < min(STAGED, count):
            self._staging.append(_Staging(gpu.device.pinned(self._bytes), gpu.device.event()))
        self._keep(self._streamed if self._bytes * len(self._streamed) <= gpu.lockable else ())

    def _slot(self, number: int) -> _Slot:
        if number == len(self._events):
            self._events.append((self._gpu.device.event(), self._gpu.device.event()))
        if self._home is None:
            raise RuntimeError("a request must begin before anything runs")
        return _Slot(self._home.take(self._bytes, "a block's weights"), *self._events[number])

    def _keep(self, blocks: Sequence[int]) -> None:
        """Page-locked memory for these blocks, and for no others; none at all where the system does not give so much."""
        for block in set(self._kept) - set(blocks):
            self._kept.pop(block).memory.free()
        device = self._gpu.device
        try:
            for block in blocks:
                if block not in self._kept:
                    self._kept[block] = _Staging(device.pinned(self._bytes), device.event())
        except DeviceError:
            self._gpu.lockable = 0
            self._keep(())

    def ahead(self, index: int) -> None:
        """Enqueues the copies that there is room for, and lets the compute stream wait for that of block `index`."""
        gpu = self._gpu
        with gpu.device.calling(f"copying the weights of block {index}"):
            self._fences[self._passed % PACE].wait()
            self._load(index)
            if not self._written:
                self._go_on(index, len(self._ring))
            elif index in self._streamed and self._copied == self._used:  # the very first
                self._stream()
            gpu.compute.wait_for(self._slots[index].ready)

    def _go_on(self, index: int, room: int) -> None:
        """Copies as many streamed blocks as have `room`, and what stays and comes soon after block `index`."""
        while self._ring and self._copied < self._used + room:
            self._stream()
        for early in range(index + 1, min(index + 1 + EARLY, len(self._files))):
            self._load(early)

    def _stream(self) -> None:
        """Copies the next streamed block into the next slot."""
        block, slot = self._streamed[self._copied % len(self._streamed)], self._ring[self._copied % len(self._ring)]
        self._slots[block] = slot
        self._copy(block, slot)
        self._copied += 1

    def _load(self, block: int) -> None:
        """Copies a block that stays, once."""
        if block not in self._streamed and block not in self._loaded:
            self._copy(block, self._slots[block])
            self._loaded.add(block)

    def _copy(self, block: int, slot: _Slot) -> None:
        gpu, file, layout = self._gpu, self._files[block], self._layouts[block]
        if (seen := slot.piece.seen) is not None:
            slot.free.wait()
            layout.fill(seen, file)
            self._release(file)
            return
        staging = self._kept.get(block)
        if staging is None:
            staging = self._staging[self._turn % len(self._staging)]
            self._turn += 1
        if staging.block != block:
            staging.sent.wait()
            layout.fill(staging.memory[: layout.nbytes], file)
            staging.block = block
            self._release(file)
        gpu.copying.wait_for(slot.free)
        with gpu.copying_weights(layout.nbytes):
            gpu.copying.copy_in(slot.piece.address, staging.memory[: layout.nbytes])
        staging.sent.record(gpu.copying)
        slot.ready.record(gpu.copying)

    def _release(self, file: MappedTensors) -> None:
        file.release()  # the pages go back; they stay in the system's file cache
        if self._streamed:
            self._files[self._streamed[(self._copied + 1) % len(self._streamed)]].prefetch()

    def done(self, index: int) -> None:
        """Marks the place in the compute stream behind block `index`."""
        gpu = self._gpu
        with gpu.device.calling(f"finishing block {index}"):
            self._slots[index].free.record(gpu.compute)
            self._fences[self._passed % PACE].record(gpu.compute)
        self._passed += 1
        streams = index in self._streamed
        self._used += streams
        if self._written:
            with gpu.device.calling(f"writing weights after block {index}"):
                self._go_on(index, len(self._ring) - streams)  # but the slot of this block, for which the GPU works now

    def close(self) -> None:
        """Gives the slots back, but those that are kept; the streams must have settled. Page-locked memory stays for the next
        request."""
        if self._home is None or self._home is not self._gpu.kept:
            self._forget()

    def _forget(self) -> None:
        self._slots.clear()
        self._ring, self._home = [], None
        self._loaded.clear()
        self._copied = self._used = 0

    def free(self) -> None:
        """Gives everything back; the caller has made the context current."""
        self._forget()
        while self._staging:
            self._staging.pop().memory.free()
        self._keep(())
        self._events.clear()
        self._fences.clear()
