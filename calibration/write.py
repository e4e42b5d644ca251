"""Writes the quantized bundle: new graphs and weights of the blocks, the modulation, the conditioning and the text encoder; all
else as it was."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import onnx

from ..bundle.errors import BundleError
from ..bundle.manifest import (
    BLOCK_KINDS,
    OWN,
    FileEntry,
    GraphSpec,
    Manifest,
    Quantization,
    Scheme,
    graph_form,
    write_manifest,
)
from ..bundle.store import Bundle
from ..bundle.tensors import MappedTensors, TensorWriter
from ..export.workspace import spec_of
from .block_graph import LINEARS, MODULATION_LINEARS, TEXT_LINEARS, modulation_graph, quantized
from .blocks import BlockCandidate
from .choose import Choice, graph_name
from .conditioning import narrowed_graph
from .graphs import read_model

__all__ = ["Writer"]


@dataclass
class Writer:
    """Fills the folder of a new bundle; `tick` is called with the bytes that were written."""

    source: Bundle
    root: Path
    tick: Callable[[int], None] = lambda nbytes: None
    files: dict[str, FileEntry] = field(default_factory=dict)
    graphs: dict[str, GraphSpec] = field(default_factory=dict)
    linears: dict[str, tuple[str, ...]] = field(default_factory=dict)
    weights_only: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for folder in ("graphs", "weights", "calibration"):
            (self.root / folder).mkdir()

    def blocks(self, scheme: Scheme, candidates: list[BlockCandidate], choice: Choice) -> tuple[str, ...]:
        """Graphs and weights of all blocks; returns the graph of each."""
        names = tuple(graph_name(kept) for kept in choice.kept)
        for name, linears in dict(zip(names, choice.quantized, strict=True)).items():
            self._block_graph(name, [n for n in LINEARS if n in linears], scheme)
        if "block" not in self.graphs:  # what plans for a bundle looks at it
            self._block_graph("block", list(LINEARS), scheme)
        for i, (candidate, linears) in enumerate(zip(candidates, choice.quantized, strict=True)):
            weights = candidate.weights(linears)
            order = [port.name for port in self.graphs[names[i]].inputs if port.name in weights]
            self._tensors(f"block_{i:02d}", {name: weights[name] for name in order}, candidate.narrow, candidate.exact)
            candidate.release()
        return names

    def modulation(self, factors: Sequence[np.ndarray | None], narrowed: Sequence[Path] | None) -> None:
        """The modulation of all blocks: multiplied by `factors` [15, D] where any are given, with the weights of the files
        `narrowed` where those are."""
        model = read_model(self.source, "modulation")
        if narrowed is not None:
            model = quantized(model, MODULATION_LINEARS, "int8-weights")
            self.linears["modulation"] = MODULATION_LINEARS
            self.weights_only.append("modulation")
        scaled = any(one is not None for one in factors)
        if scaled:
            model = modulation_graph(model)
        if narrowed is None and not scaled:
            return
        self.graph("modulation", model)
        neutral = np.ones((15, self.source.manifest.transformer.width), np.float32)
        for i, factor in enumerate(factors):
            name = f"modulation_{i:02d}"
            stored = self.source.tensors(name) if narrowed is None else MappedTensors(narrowed[i], error=BundleError)
            rows = {"row_scale": neutral if factor is None else factor} if scaled else {}
            self._tensors(name, {**stored, **rows}, stored)
            stored.release()

    def conditioning(self, linears: Sequence[str], shared: Path) -> None:
        """The conditioning with int8 weights of `linears`; `shared`: all weights that the denoiser's graphs share."""
        self.graph("conditioning", narrowed_graph(self.source, linears))
        self.linears["conditioning"] = tuple(linears)
        self.weights_only.append("conditioning")
        stored = MappedTensors(shared, error=BundleError)
        self._tensors("denoiser", dict(stored), stored)
        stored.release()

    def text(self, narrowed: Sequence[Path]) -> None:
        """The text encoder with the weights of these files, one per layer."""
        self.graph("text_block", quantized(read_model(self.source, "text_block"), TEXT_LINEARS, "int8-weights"))
        self.linears["text_block"] = TEXT_LINEARS
        self.weights_only.append("text_block")
        for i, path in enumerate(narrowed):
            stored = MappedTensors(path, error=BundleError)
            self._tensors(f"text_block_{i:02d}", dict(stored), stored)
            stored.release()

    def _block_graph(self, name: str, linears: list[str], scheme: Scheme) -> None:
        """The block's graph `name`, and its forms for token reuse where the source has them: all take the same weights."""
        graphs = self.source.manifest.graphs
        for kind in (kind for kind in BLOCK_KINDS if kind in graphs):
            made = graph_form(kind, name)
            for own, form in (("", "portable"), (OWN, "cpu")):
                if (base := kind + own) in graphs:
                    self.graph(made + own, quantized(read_model(self.source, base), linears, scheme, form))  # type: ignore[arg-type]
            if linears:
                self.linears[made] = tuple(linears)
                if scheme == "int8-weights":
                    self.weights_only.append(made)

    def _tensors(self, name: str, arrays: Mapping[str, np.ndarray], *sources: MappedTensors) -> None:
        """Writes `weights/<name>.safetensors`; arrays are of the files `sources`, or float32."""
        file = f"weights/{name}.safetensors"
        table = [(key, _dtype(key, array, sources), array.shape) for key, array in arrays.items()]
        with TensorWriter(self.root / file, table) as writer:
            for key, array in arrays.items():
                writer.write(key, array)
                self.tick(array.nbytes)
            self.files[file] = FileEntry(writer.close(), writer.nbytes)

    def graph(self, name: str, model: onnx.ModelProto) -> None:
        """Adds `graphs/<name>.onnx`; the standard operators are checked by onnx."""
        if not name.endswith(OWN):
            onnx.checker.check_model(model, full_check=True)
        file = f"graphs/{name}.onnx"
        self.data(file, model.SerializeToString(deterministic=True))
        self.graphs[name] = spec_of(model, file)

    def data(self, file: str, content: bytes) -> None:
        """Adds a file that is no graph."""
        (self.root / file).write_bytes(content)
        self.files[file] = FileEntry(hashlib.sha256(content).hexdigest(), len(content))

    def rest(self) -> None:
        """Copies what was not written anew, and lists the graphs in the source's order."""
        manifest = self.source.manifest
        graphs = {name: self.graphs.get(name, spec) for name, spec in manifest.graphs.items()}
        self.graphs = graphs | {name: spec for name, spec in self.graphs.items() if name not in graphs}
        for name, entry in manifest.files.items():
            if name not in self.files and not name.startswith("calibration/"):
                shutil.copyfile(self.source.path(name), self.root / name)
                self.files[name] = entry
                self.tick(entry.bytes)

    def manifest(self, scheme: Scheme, blocks: tuple[str, ...], provenance: Mapping[str, str]) -> Manifest:
        """Writes and returns the manifest."""
        source = self.source.manifest
        made = msgspec.structs.replace(
            source,
            graphs=self.graphs,
            files=self.files,
            provenance={**source.provenance, **provenance},
            quantization=Quantization(
                scheme=scheme, blocks=blocks, linears=self.linears, weights_only=tuple(self.weights_only)
            ),
        )
        write_manifest(self.root, made)
        return made


def _dtype(name: str, array: np.ndarray, sources: Sequence[MappedTensors]) -> str:
    """The safetensors name of an array's type; numpy does not know them all."""
    for source in sources:
        if name in source and source[name] is array:
            return source.infos[name].dtype
    if array.dtype != np.float32:
        raise ValueError(f"{name!r} is of no file, and {array.dtype}")
    return "F32"
