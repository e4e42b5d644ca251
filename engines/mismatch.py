"""The question whether an engine set fits, and its answer: what is requested, what may not match, (ok, reason)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from .engine_set import ClipSize
from .targets import Flavour

__all__ = ["Fit", "Mismatch", "Request"]


class Mismatch(Enum):
    """Every way in which a set may not fit. The order is that of the checks: a set that fails at a later one is nearer.

    The values are stable codes.
    """

    UNREADABLE = "unreadable"  # engines.json is missing, damaged or of another format version
    FORMAT = "format"
    EMPTY = "empty"
    BACKEND = "backend"  # of the other flavour than asked for
    # the machine
    NO_GPU = "no-gpu"
    GPU_TOO_OLD = "gpu-too-old"
    GPU_PRECISION = "gpu-precision"
    PLATFORM = "platform"
    CAPABILITY = "capability"
    NOT_INSTALLED = "not-installed"
    LEAN_ONLY = "lean-only"
    VERSION = "version"
    VERSION_MAJOR = "version-major"
    VERSION_OLDER = "version-older"
    DRIVER = "driver"
    # the bundle
    PRECISION = "precision"
    GRAPH_MISSING = "graph-missing"
    GRAPH_UNKNOWN = "graph-unknown"
    GRAPH_CHANGED = "graph-changed"
    KEY = "key"
    AXES = "axes"
    # the files
    FILE_OUTSIDE = "file-outside"
    ENGINE_MISSING = "engine-missing"
    ENGINE_SIZE = "engine-size"
    REPORT_MISSING = "report-missing"
    # the clip
    HEIGHT = "height"
    WIDTH = "width"
    FRAMES = "frames"
    TEXT = "text"
    TOKENS = "tokens"
    BATCH = "batch"
    STEPS = "steps"
    TILE = "tile"
    TOO_SMALL = "too-small"
    MEMORY = "memory"
    # the content of files, only when asked for: it takes seconds
    FILE_UNREADABLE = "file-unreadable"
    ENGINE_CHANGED = "engine-changed"
    REPORT_CHANGED = "report-changed"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the engines shall do.

    size: the clip. batch: guidance halves that go through a block together, 1 or 2. steps: timesteps of the schedule. tile:
    VAE tile in latents, rows and columns; None: what the set has. backend: the flavour that it must be; None: either.
    verify: hash the files too.
    """

    size: ClipSize
    batch: int = 2
    steps: int = 25
    tile: tuple[int, int] | None = None
    backend: Flavour | None = None
    verify: bool = False


class _Answer(NamedTuple):
    ok: bool
    reason: str


class Fit(_Answer):
    """(ok, reason), true if it fits; `mismatch` is the kind of a refusal."""

    mismatch: Mismatch | None

    def __new__(cls, mismatch: Mismatch | None = None, reason: str = "") -> Fit:
        made = super().__new__(cls, mismatch is None, reason)
        made.mismatch = mismatch
        return made

    def __bool__(self) -> bool:
        return self.ok
