"""`engines/<key>/engines.json`: what an engine set is made of and what it was made for."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from ..bundle.errors import BundleError
from ..bundle.manifest import Manifest
from .targets import Capability, Flavour

__all__ = [
    "ANYWHERE",
    "ENGINES_FOLDER",
    "ENGINES_NAME",
    "SET_FORMAT",
    "SET_VERSION",
    "BuildOptions",
    "ClipSize",
    "EngineEntry",
    "EngineSet",
    "Extent",
    "engine_key",
    "graph_digest",
    "read_engine_set",
    "write_engine_set",
]

ENGINES_FOLDER = "engines"  # of the bundle; one folder per set
ENGINES_NAME = "engines.json"
ANYWHERE = "any"  # `EngineSet.platform` of engines that any system can run, as those of TensorRT-RTX
SET_FORMAT = "dynamictrl-edge-engines"
SET_VERSION = 1


class ClipSize(msgspec.Struct, frozen=True, order=True):
    """Pixels and frames of a clip."""

    height: int
    width: int
    frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


class Extent(msgspec.Struct, frozen=True):
    """The lengths that a dynamic axis may have: smallest, the one that the compiler optimizes for, largest."""

    least: int
    best: int
    most: int


class BuildOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a person chooses about a build; part of the key."""

    sizes: tuple[ClipSize, ...]  # every clip that the engines must take; the first is the one to optimize for
    tile: tuple[int, int]  # largest VAE tile in latents: rows, columns
    steps: int = 100  # most timesteps of a schedule
    batch: int = 2  # guidance halves that may go through a block together
    workspace: int | None = None  # bytes that the compiler may use for scratch memory; None: its own default
    version_compatible: bool = False  # TensorRT: engines for the lean runtime of any later version of the same major
    optimization_level: int | None = None  # 0..5; None: the compiler's default


class EngineEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One engine: its file with SHA-256 and size, the digest of the graph that it was made from, the shapes it takes
    ([least, best, most] for every dynamic input), and what its report says of memory (bytes). `broken`: rules that it breaks
    and was kept in spite of."""

    file: str
    sha256: str
    bytes: int
    report: str
    report_sha256: str
    graph_digest: str
    profile: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    activation_bytes: int
    weights_bytes: int
    kernels: int
    fused_attention: int
    seconds: float
    peak_rss: int
    broken: tuple[str, ...] = ()


class EngineSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All engines of a bundle for one flavour and version, and one or more compute capabilities."""

    format: str
    version: int
    key: str
    precision: str
    flavour: Flavour
    library_version: str
    platform: str  # ANYWHERE, or as `platform_name()` gives it: "linux-x86_64"
    capabilities: tuple[Capability, ...]
    targets: tuple[str, ...]
    options: BuildOptions
    axes: dict[str, Extent]  # of every named axis of every graph, "block.N" for example
    engines: dict[str, EngineEntry]
    provenance: dict[str, str]


def graph_digest(manifest: Manifest, graph: str) -> str:
    """Identity of a graph: SHA-256 over the hashes of its ONNX file and of the weights that it holds as constants."""
    spec = manifest.graphs[graph]
    digest = hashlib.sha256()
    for name in filter(None, (spec.file, spec.weights)):
        digest.update(f"{name}:{manifest.files[name].sha256}\n".encode())
    return digest.hexdigest()


def engine_key(
    manifest: Manifest,
    graphs: tuple[str, ...],
    flavour: Flavour,
    library_version: str,
    platform: str,
    capabilities: tuple[Capability, ...],
    options: BuildOptions,
) -> str:
    """Name of the set's folder: readable in front, a hash of everything that the engines depend on behind.

    Engines are never compared by their bytes: building twice does not give the same ones.
    """
    facts = {
        "format": SET_VERSION,
        "graphs": {name: graph_digest(manifest, name) for name in sorted(graphs)},
        "precision": manifest.label,
        "flavour": flavour,
        "library": library_version,
        "platform": platform,
        "capabilities": sorted(capabilities),
        "options": options,
    }
    digest = hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest()[:16]
    chips = "-".join(f"sm{major}{minor}" for major, minor in sorted(capabilities))
    return f"{flavour}-{library_version}-{chips}-{manifest.label}-{digest}"


def read_engine_set(folder: Path) -> EngineSet:
    """Reads and validates `folder/engines.json`; every refusal is a `BundleError` that names the file."""
    path = folder / ENGINES_NAME
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise BundleError(f"{str(folder)!r} is not an engine set: it has no {ENGINES_NAME}.") from None
    except OSError as error:
        raise BundleError(f"Cannot read {str(path)!r}: {error.strerror}.") from error
    try:
        head = msgspec.json.decode(raw)
        if not isinstance(head, dict) or head.get("format") != SET_FORMAT:
            raise BundleError(f"{str(path)!r} is not the description of an engine set.")
        if head.get("version") != SET_VERSION:
            raise BundleError(
                f"{str(path)!r} has format version {head.get('version')!r}; this program reads version {SET_VERSION}."
            )
        return msgspec.json.decode(raw, type=EngineSet)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{str(path)!r} is damaged ({error}).") from error


def write_engine_set(folder: Path, engines: EngineSet) -> None:
    """Writes `folder/engines.json`, indented for people and diffs."""
    (folder / ENGINES_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(engines), indent=1) + b"\n")
