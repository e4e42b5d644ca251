"""A fault at every driver call, from opening to closing: named, and it leaves a clean state. Likewise what TensorRT refuses.

Nothing here ran on a GPU; see test_gpu_backend.py. Engines answer with a checksum of everything that they read, so that a clip
which read one wrong byte, of a weight that was not copied anew after a fault, say, is another clip.
"""

from __future__ import annotations

import gc
import itertools
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamictrl_edge.bundle.errors import DeviceError
from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.engines.engine_set import ClipSize
from dynamictrl_edge.runtime import Animator, Clip
from dynamictrl_edge.runtime import text as text_module
from dynamictrl_edge.runtime.backends import gpu_backend as gpu_module
from dynamictrl_edge.runtime.backends.gpu_backend import NUMPY, TensorRTBackend
from dynamictrl_edge.runtime.backends.ring import DeviceBlocks
from tests import trt_fake_runtime
from tests.cuda_fakes import FakeCuda
from tests.gpu_samples import TINY, TRT, Machinery, assert_nothing_left, assert_same, with_engines
from tests.trt_fake_runtime import FakeEngines, engine_set, fake_machine

SMALL = {**TINY, "guidance": 1.0, "frames": 5, "steps": 1}
WORKS_ON = 20  # after every so many faults a whole clip is made


@dataclass(frozen=True)
class Kind:
    """An error of CUDA. lasting: everything after it fails too. told: what a person reads."""

    text: str
    told: str
    of: str = "LogicError"
    lasting: bool = False


INVALID = Kind("invalid value", r"CUDA failed while \w.* \(\S+ failed: invalid value\)")
MEMORY = Kind("out of memory", r"no memory left for \w.* \(\S+ failed: out of memory\)", of="MemoryError")
LOST = Kind(
    "an illegal memory access was encountered",
    r"The GPU failed while \w.* \(\S+ failed: an illegal memory access was encountered\).*start the program again",
    of="LaunchError",
    lasting=True,
)


class Fault:
    """Fails the driver's call `number`, counted from now (the first is 1), or all calls from there on.

    call: the name of the first that failed. unheard: where nobody needs to know: the runtime waits for what is done anyway, locks
    memory that it can do without, or keeps what was compiled.
    """

    def __init__(self, cuda: FakeCuda, number: int, kind: Kind):
        self._cuda, self._kind = cuda, kind
        self._at = len(cuda.calls) + number
        self.call, self.unheard = "", False
        cuda.fail = self

    @property
    def lost(self) -> bool:
        """Everything fails from now on."""
        return bool(self.call) and self._kind.lasting

    def __call__(self, name: str) -> Exception | None:
        now = len(self._cuda.calls)
        if now < self._at or (now > self._at and not self._kind.lasting):
            return None
        if not self.call:
            self.call, self.unheard = name, not self._kind.lasting and _called_from("settle", "_keep", "_save_cache")
        return self._cuda.error(f"{name} failed: {self._kind.text}", self._kind.of)

    def over(self) -> None:
        self._cuda.fail = lambda name: None


def _called_from(*names: str) -> bool:
    frame: Any = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name in names and "runtime" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


@dataclass(frozen=True)
class Way:
    """How a clip lies in memory; resident: blocks that stay, None: as planned."""

    name: str
    resident: int | None = None
    ring: int = 0
    lockable: int = 0
    clip: Mapping[str, Any] = ()  # type: ignore[assignment]

    def __str__(self) -> str:
        return self.name

    @property
    def wanted(self) -> dict[str, Any]:
        return {**SMALL, **dict(self.clip)}


STAY = Way("all blocks stay")
STREAM = Way("blocks stream", 0, 2, clip={"steps": 2})
LOCKED = Way("one stays, two are locked", 1, 1, lockable=1 << 30)
LONG = Way("decoded in pieces, with guidance", clip={"frames": 17, "guidance": 3.0, "check_steps": True})


class Workshop:
    """Opens animators quickly: one set of engines for all drivers, and what is not the driver's business is done once."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch):
        self._bundle = Bundle(root)
        self.patch = pytest.MonkeyPatch()  # until the next driver: what it replaced would live as long as the patch
        self.engines = FakeEngines(TRT, root, FakeCuda()).install(patch)
        self.engines.compute = self._checksum
        shapes, fitting, tokenizer = (
            trt_fake_runtime.output_shapes,
            gpu_module.find_fitting,
            text_module.PromptTokenizer.from_file,
        )
        known: dict[Any, Any] = {}

        def once(make: Any, key: Any, *given: Any) -> Any:
            if key not in known:
                known[key] = make(*given)
            return known[key]

        def quick_shapes(*given: Any) -> Any:
            return once(shapes, (given[1], tuple(given[2].items())), *given)

        patch.setattr(trt_fake_runtime, "output_shapes", quick_shapes)
        patch.setattr(gpu_module, "find_fitting", lambda *given: once(fitting, given[3], *given))
        patch.setattr(text_module.PromptTokenizer, "from_file", lambda path: once(tokenizer, path, path))
        patch.setattr(Animator, "_verify", lambda *given: None)  # reads files

    def driver(self) -> FakeCuda:
        self.patch.undo()
        cuda = FakeCuda(races=False).install(self.patch)
        pop = cuda.module.Context.pop

        def popped() -> None:
            pop()
            if isinstance(cuda.fail, Fault) and cuda.fail.lost:
                raise cuda.fail("Context.pop")  # CUDA tells earlier errors here too

        cuda.module.Context.pop = staticmethod(popped)
        self.engines.cuda = cuda
        return cuda

    def open(self, cuda: FakeCuda, way: Way) -> Machinery:
        backend = TensorRTBackend.open(self._bundle, machine=fake_machine(TRT, cuda))
        made = Machinery(cuda, self.engines, backend, Animator(self._bundle, backend, cache=False))
        if way.resident is not None:
            made.keep_blocks(self.patch, way.resident, way.ring, lockable=way.lockable)
        return made

    def _checksum(self, graph: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        spec, manifest = self.engines.manifest.graphs[graph], self.engines.manifest
        found = 0
        for port in spec.inputs:
            found = zlib.crc32(np.ascontiguousarray(feeds[port.name]).data, found)
        inputs = {port.name: feeds[port.name].shape for port in spec.inputs}
        shapes = trt_fake_runtime.output_shapes(manifest, graph, inputs)
        return {p.name: np.full(shapes[p.name], found / 2**32 - 0.5, NUMPY[p.dtype]) for p in spec.outputs}


@pytest.fixture
def workshop(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    made = Workshop(root, monkeypatch)
    gc.collect()
    gc.freeze()  # collecting looks at what a test made, and at nothing else
    yield made
    made.patch.undo()
    gc.unfreeze()


def told_nothing(made: Machinery) -> None:
    """Forgets what the fakes wrote down, which collecting would look at."""
    made.engines.module.calls.clear()
    made.engines.runs.clear()
    for stream in made.cuda.streams.values():
        stream.idle.clear()


def attempt(made: Machinery, wanted: Mapping[str, Any], fault: Fault, kind: Kind) -> Clip | None:
    """A clip under a fault, which must be told; None if it was."""
    clip = None
    try:
        clip = made.animator(**wanted)
    except DeviceError as error:
        assert re.search(kind.told, str(error)), (fault.call, str(error))
        assert not fault.unheard, (fault.call, str(error))
    fault.over()
    told_nothing(made)
    assert made.cuda.stack == ["the host application's"], fault.call
    assert clip is None or fault.unheard or not fault.call, f"nobody was told of {fault.call}"
    return clip


def left(made: Machinery) -> tuple[Any, ...]:
    """What is there between requests; activations have a piece of the arena until the next."""
    gc.collect()
    cuda, gpu, work = made.cuda, made.backend._gpu, made.backend._work
    used = 0 if gpu.arena is None else gpu.arena.used
    # Its arena is another one if the fault came before the request's was made ready.
    held = work.nbytes if work is not None and work._arena is gpu.arena else 0
    return cuda.memory, cuda.locked, +cuda.live, used - held, 0 if gpu.kept is None else gpu.kept.used


# A warm animator


@pytest.mark.parametrize(
    ("way", "kind"),
    [(STAY, INVALID), (STREAM, MEMORY), (STREAM, LOST), (LOCKED, INVALID), (LONG, MEMORY)],
    ids=lambda value: value.name if isinstance(value, Way) else value.text,
)
def test_a_fault_at_every_call_of_a_clip_is_named_and_leaves_nothing(way: Way, kind: Kind, workshop: Workshop) -> None:
    made = workshop.open(workshop.driver(), way)
    good = made.animator(**way.wanted)
    calls = len(made.cuda.calls)
    assert_same(made.animator(**way.wanted), good)
    calls, before = len(made.cuda.calls) - calls, left(made)
    for number in itertools.count(1):
        fault = Fault(made.cuda, number, kind)
        clip = attempt(made, way.wanted, fault, kind)
        if clip is not None:
            assert_same(clip, good)
        if not fault.call:
            break
        assert left(made) == before, (number, fault.call)
        if number % WORKS_ON == 0:
            assert_same(made.animator(**way.wanted), good)
            assert left(made) == before
    assert number > calls
    made.animator.close()
    assert_nothing_left(made)


# From opening to closing


@pytest.mark.parametrize("way", [STAY, LOCKED], ids=str)
def test_a_fault_at_every_call_since_opening_is_named_and_the_animator_works_on(way: Way, workshop: Workshop) -> None:
    good = None
    for number in itertools.count(first_number(way, workshop)):
        cuda = workshop.driver()
        fault, made = Fault(cuda, number, INVALID), None
        try:
            made = workshop.open(cuda, way)
        except DeviceError as error:
            assert re.search(INVALID.told, str(error)), (fault.call, str(error))
        if made is None:
            gc.collect()
            assert cuda.retained <= 1 and not +cuda.live and cuda.stack == ["the host application's"]
            continue
        attempt(made, way.wanted, fault, INVALID)
        if fault.call and number % WORKS_ON == 0:
            good = good or made.animator(**way.wanted)
            assert_same(made.animator(**way.wanted), good)
        made.animator.close()
        assert_nothing_left(made)
        if not fault.call:
            break


def first_number(way: Way, workshop: Workshop) -> int:
    """The first call that differs from where all blocks stay: when room is made for them."""
    if way is STAY:
        return 1
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as looking:
        made, open_blocks = workshop.open(workshop.driver(), way), DeviceBlocks.open
        looking.setattr(DeviceBlocks, "open", lambda blocks: (seen.append(len(made.cuda.calls)), open_blocks(blocks)))
        made.animator(**way.wanted)
    made.animator.close()
    return seen[0]


def test_a_gpu_that_is_lost_is_told_and_closing_raises_nothing(workshop: Workshop) -> None:
    """At every call until the first graph runs, and then at each seventh: for those, what is told is seen above."""
    number, ran = 0, False
    while True:
        number += 7 if ran else 1
        cuda = workshop.driver()
        fault, made, text = Fault(cuda, number, LOST), None, ""
        try:
            made = workshop.open(cuda, STREAM)
            made.animator(**STREAM.wanted)
        except DeviceError as error:
            text = str(error)
        ran = ran or bool(workshop.engines.runs)
        assert re.search(LOST.told, text) or not fault.call, (fault.call, text)
        assert cuda.stack == ["the host application's"], fault.call
        if made is None:
            continue
        made.animator.close()
        told_nothing(made)
        assert cuda.stack == ["the host application's"], fault.call
        with pytest.raises(DeviceError, match="closed"):
            made.animator(**STREAM.wanted)
        if not fault.call:
            break


@pytest.mark.parametrize("kind", [INVALID, LOST], ids=lambda kind: kind.text)
@pytest.mark.parametrize("way", [STAY, LOCKED], ids=str)
def test_a_fault_while_closing_raises_nothing_and_the_rest_is_given_back(
    way: Way, kind: Kind, workshop: Workshop
) -> None:
    for number in itertools.count(1):
        made = workshop.open(workshop.driver(), way)
        made.animator(**way.wanted)
        fault = Fault(made.cuda, number, kind)
        made.animator.close()
        fault.over()
        if not kind.lasting:
            assert_nothing_left(made)  # at once, and not when the animator is collected
        assert made.cuda.stack == ["the host application's"], fault.call
        if not fault.call:
            break
        made.animator.close()


def test_a_context_that_another_part_of_the_process_ended_is_told_as_such(workshop: Workshop) -> None:
    made = workshop.open(workshop.driver(), STAY)
    made.animator(**SMALL)
    Fault(made.cuda, 1, Kind("invalid device context", "", lasting=True))
    with pytest.raises(DeviceError, match=r"The GPU failed while .*invalid device context.*start the program again"):
        made.animator(**SMALL)
    made.animator.close()


# Engine sets


def test_a_fault_while_changing_to_another_engine_set_leaves_no_mixture(
    bundle10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = with_engines(bundle10, tmp_path, TRT)
    small, large = {**SMALL, "width": 64}, {**SMALL, "height": 112}  # each fits one set
    folder = engine_set(root, TRT, sizes=(ClipSize(height=112, width=48, frames=17),))
    workshop = Workshop(root, monkeypatch)
    made = workshop.open(workshop.driver(), STAY)
    good = [made.animator(**small), made.animator(**large)]
    for number in itertools.count(1):
        assert_same(made.animator(**small), good[0])
        assert made.backend.folder != folder
        opened = len(made.backend._graphs)
        told_nothing(made)
        fault = Fault(made.cuda, number, INVALID)
        try:
            made.animator.start(**large)  # plans, and changes to the set that fits
        except DeviceError as error:
            assert re.search(INVALID.told, str(error)), (fault.call, str(error))
        else:
            assert not fault.call or fault.unheard
        fault.over()
        assert_same(made.animator(**large), good[1])
        assert made.backend.folder == folder == made.backend._library._cache_file.parent  # type: ignore[union-attr]
        again = [name for name, _ in made.engines.module.calls].count("Runtime.deserialize_cuda_engine")
        assert again == opened == len(made.backend._graphs)
        if not fault.call:
            break
    assert number > 3
    made.animator.close()
    assert_nothing_left(made)


# TensorRT

REFUSES = "Error Code 1: something is wrong"


class Refusal:
    """TensorRT refuses call `number` of those that it can refuse, counted from now; or all of a name but that."""

    def __init__(self, engines: FakeEngines, number: int, *, passing: str = ""):
        self.call, self._left, self._passing = "", number, passing
        engines.fail = self

    def __call__(self, name: str) -> str | None:
        if name == self._passing:
            return None
        self._left -= 1
        if self._left:
            return None
        self.call = name
        return REFUSES


@pytest.mark.parametrize("warm", [True, False])
def test_whatever_tensorrt_refuses_is_told_in_its_words_and_leaves_nothing(warm: bool, workshop: Workshop) -> None:
    """A warm animator's engines are open. Of a cold one, tensors' addresses are left out: there are many, and all alike."""
    made = workshop.open(workshop.driver(), STAY)
    good = made.animator(**SMALL)
    before = left(made)
    for number in itertools.count(1):
        if not warm:
            made.backend._close_engines()
        passing = "" if warm else "IExecutionContext.set_tensor_address"
        refusal, text = Refusal(made.engines, number, passing=passing), ""
        try:
            assert_same(made.animator(**SMALL), good)
        except DeviceError as error:
            text = str(error)
        made.engines.fail = lambda name: None
        if not refusal.call:
            break
        assert REFUSES in text, (refusal.call, text)
        told_nothing(made)
        if number % WORKS_ON == 0:
            assert_same(made.animator(**SMALL), good)
            assert left(made) == before
    assert number > (40 if warm else 70)
    assert_same(made.animator(**SMALL), good)
    made.animator.close()
    assert_nothing_left(made)
