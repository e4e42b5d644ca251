"""`bundle.json`: what a bundle is made of, validated on read and complete enough to refuse what does not fit."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import msgspec

from .config import SizeDefaults, TextConfig, TransformerConfig, VaeConfig
from .errors import BundleError
from .precision import PRECISIONS

__all__ = [
    "BLOCK",
    "BLOCK_KINDS",
    "FORMAT_VERSION",
    "OWN",
    "SCHEMES",
    "FileEntry",
    "GraphSpec",
    "Manifest",
    "Port",
    "Quantization",
    "Scheme",
    "graph_form",
    "graph_kind",
    "inside",
    "read_manifest",
    "write_manifest",
]

FORMAT_NAME = "dynamictrl-edge-bundle"
FORMAT_VERSION = 1
MANIFEST_NAME = "bundle.json"
BLOCK = "block"
BLOCK_KINDS = (BLOCK, "tokens_keep", "tokens_reuse")  # a transformer block, and its forms for token reuse
OWN = "_cpu"  # ends the names of graphs in ONNX Runtime's own operators, which no other runtime has

Scheme = Literal["int8", "fp8", "int8-weights"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)


class Port(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input or output of a graph: `dtype` is the ONNX element type's name in lower case (float, float16, bfloat16,
    int64, ...); `shape` holds numbers and the names of dynamic axes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class GraphSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One ONNX graph. `weights` names the file under `weights/` that its external initializers lie in, if any."""

    file: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    weights: str | None = None


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """SHA-256 (hex) and size in bytes of one file of the bundle."""

    sha256: str
    bytes: int


class Quantization(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `calibrate` made of a bundle.

    scheme: int8, fp8 (weights and activations of linears) or int8-weights (weights alone). blocks: for every block, the
    graph that runs it. linears: for every graph with quantized linears, their names; a linear that is not there is in the
    bundle's own precision. weights_only: graphs whose linears have quantized weights, whatever the scheme.
    """

    scheme: Scheme
    blocks: tuple[str, ...]
    linears: dict[str, tuple[str, ...]]
    weights_only: tuple[str, ...] = ()


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Everything that the runtime knows about a bundle before it opens another file of it.

    `precision` is the format of everything that is not quantized.
    """

    format: str
    version: int
    precision: str
    transformer: TransformerConfig
    vae: VaeConfig
    scheduler: dict[str, Any]
    defaults: SizeDefaults
    graphs: dict[str, GraphSpec]
    files: dict[str, FileEntry]
    provenance: dict[str, str]
    text: TextConfig | None = None
    quantization: Quantization | None = None

    @property
    def label(self) -> str:
        """The precision as people call it: fp32, bf16, fp16, int8, fp8 or int8-weights."""
        return self.precision if self.quantization is None else self.quantization.scheme

    def quantized_linears(self, graph: str) -> tuple[str, ...]:
        """Linears of a graph whose weights and activations are both quantized."""
        found = self.quantization
        return () if found is None or graph in found.weights_only else found.linears.get(graph, ())

    @property
    def block_graphs(self) -> tuple[str, ...]:
        """For every block, the graph that runs it."""
        return (BLOCK,) * self.transformer.num_layers if self.quantization is None else self.quantization.blocks

    @property
    def total_bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())


def graph_kind(name: str) -> str:
    """The graph that `name` is a form of: "block" for all its mixtures in a quantized bundle, else `name` itself."""
    return next((kind for kind in BLOCK_KINDS if name.startswith(f"{kind}_")), name)


def graph_form(kind: str, block: str) -> str:
    """The graph of `kind` (of `BLOCK_KINDS`) that takes the weights which `block`, one of `Manifest.block_graphs`, takes:
    "tokens_keep", "block_keeps_out" -> "tokens_keep_keeps_out"."""
    return kind + block.removeprefix(BLOCK)


def inside(root: Path, name: str) -> Path:
    """The path of bundle file `name`; `BundleError` if it would leave the folder `root` (absolute, `..`, or a link)."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or not pure.parts:
        raise BundleError(f"The bundle {str(root)!r} names the file {name!r}, which lies outside its folder. Refused.")
    path = root / pure
    try:
        path.resolve().relative_to(root.resolve())
    except (ValueError, RuntimeError, OSError):  # RuntimeError: a link that leads to itself
        raise BundleError(f"In the bundle {str(root)!r}, {name!r} is a link that leaves the folder. Refused.") from None
    return path


def read_manifest(root: Path) -> Manifest:
    """Reads and validates `root/bundle.json`; every refusal is a `BundleError` that names the file and the field."""
    path = root / MANIFEST_NAME
    hint = "A bundle is the folder that 'dynamictrl export CHECKPOINT BUNDLE' writes."
    if not root.is_dir():
        why = "it is a file" if root.exists() else "it does not exist"
        raise BundleError(f"There is no bundle at {str(root)!r}: {why}. {hint}")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        if (root / "model_index.json").exists():
            hint = f"It looks like a checkpoint; export it first: dynamictrl export {root} BUNDLE"
        raise BundleError(f"{str(root)!r} is not a bundle: it has no {MANIFEST_NAME}. {hint}") from None
    except OSError as error:
        raise BundleError(f"Cannot read {str(path)!r}: {error.strerror}.") from error
    try:
        head = msgspec.json.decode(raw)
        if not isinstance(head, dict) or head.get("format") != FORMAT_NAME:
            raise BundleError(f"{str(path)!r} is not the manifest of a DynamiCtrl Edge bundle.")
        if head.get("version") != FORMAT_VERSION:
            raise BundleError(
                f"{str(path)!r} has format version {head.get('version')!r}; this program reads version {FORMAT_VERSION}. "
                "Export the checkpoint again with this program, or install the version that wrote the bundle."
            )
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(
            f"{str(path)!r} is damaged ({error}). Copy the bundle again, or export the checkpoint again."
        ) from error
    if manifest.precision not in PRECISIONS:
        raise BundleError(f"{str(path)!r}: precision {manifest.precision!r} is not one of {', '.join(PRECISIONS)}.")
    for name in manifest.files:
        inside(root, name)
    for label, graph in manifest.graphs.items():
        for name in filter(None, (graph.file, graph.weights)):
            if name not in manifest.files:
                raise BundleError(f"{str(path)!r}: graph {label!r} uses {name!r}, which is not in the list of files.")
    _check_quantization(path, manifest)
    return manifest


def _check_quantization(path: Path, manifest: Manifest) -> None:
    quantization, layers = manifest.quantization, manifest.transformer.num_layers
    if quantization is None:
        return
    if len(quantization.blocks) != layers:
        raise BundleError(f"{str(path)!r} names graphs for {len(quantization.blocks)} blocks; the model has {layers}.")
    for name in quantization.blocks:
        if name not in manifest.graphs:
            raise BundleError(
                f"{str(path)!r}: its quantization uses the graph {name!r}, which is not in the list of graphs."
            )


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Writes `root/bundle.json`, indented, so that people and diffs can read it."""
    (root / MANIFEST_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
