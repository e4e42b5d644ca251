"""Measures how many bytes of activations TensorRT-RTX plans for every graph, at real widths, on a machine without a GPU.

    python benchmarks/activation_memory.py [--reuse] [--only REGEX] [--jobs 2]

The graphs are traced at the size of DynamiCtrl-5B (and of the 27-million-parameter benchmark model) without their weights; the
VAE's are zeros, which do not change what is measured. Each is built for several shapes, precisions and GPUs, and the
compiler's own report is written to `benchmarks/results/activation_memory.json`, with `--reuse` that of the graphs of reuse
between steps to `activation_memory_reuse.json`. `engines/activations.py` was fitted to both and is tested against them.
Quantized graphs are rewritten as `dynamictrl calibrate` does it.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from dynamictrl_edge.bundle.config import TextConfig, TransformerConfig, VaeConfig, geometry
from dynamictrl_edge.bundle.manifest import GraphSpec
from dynamictrl_edge.engines.builder import EngineJob
from dynamictrl_edge.engines.engine_set import Extent
from dynamictrl_edge.engines.profiles import profile_of
from dynamictrl_edge.engines.report import LayerReport, read_report
from dynamictrl_edge.engines.targets import Capability, capability_name
from dynamictrl_edge.engines.worker import Answer

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # so that this file also runs as a script

__all__ = ["Case", "Configs", "Graphs", "build", "cases", "configs_of", "record", "reuse_cases"]

TURING, AMPERE, ADA, BLACKWELL = (7, 5), (8, 6), (8, 9), (12, 0)
CURRENT = (AMPERE, ADA, BLACKWELL)
SIZES = ((288, 512, 17), (576, 1024, 37), (768, 1360, 37), (768, 1360, 81))  # the presets: height, width, frames
OTHER_TOKENS = (256, 2048, 4608)


class Configs(NamedTuple):
    transformer: TransformerConfig
    vae: VaeConfig
    text: TextConfig


class Case(NamedTuple):
    """One build: `axes` are the largest lengths of the graph's named axes; `base` as in `engines.model_facts`."""

    model: str
    graph: str
    precision: str
    base: str
    capabilities: tuple[Capability, ...]
    axes: Mapping[str, int]


def configs_of(model: str) -> Configs:
    """Configurations of one of `benchmarks.checkpoints.SPECS`."""
    from benchmarks.checkpoints import SPECS, text_config, vae_config

    spec = SPECS[model]
    return Configs(
        msgspec.convert(dataclasses.asdict(spec.transformer), TransformerConfig),
        msgspec.convert(vae_config(spec), VaeConfig),
        msgspec.convert(text_config(spec), TextConfig),
    )


def cases() -> Iterator[Case]:
    """What is measured of the exact loop."""
    yield from _blocks()
    yield from _small_graphs()
    yield from _vae_graphs()


def _blocks() -> Iterator[Case]:
    bases = (("fp16", "fp16", CURRENT), ("bf16", "bf16", CURRENT), ("fp16", "fp16", (TURING,)))
    for precision, base, capabilities in bases:
        for tokens, batch in itertools.product((*OTHER_TOKENS, *_tokens("full")), (1, 2)):
            yield _block("full", precision, base, capabilities, batch, tokens)
    # One GPU at a time, or Turing with the others: the same memory as far as was seen, so a few sizes do.
    for capabilities in ((AMPERE,), (ADA,), (BLACKWELL,), (TURING, *CURRENT)):
        for batch in (1, 2):
            yield _block("full", "fp16", "fp16", capabilities, batch, 20400)
    for base, batch, tokens in itertools.product(("fp16", "bf16"), (1, 2), (256, *_tokens("full"))):
        for precision in ("int8", "int8-weights"):
            yield _block("full", precision, base, CURRENT, batch, tokens)
        yield _block("full", "fp8", base, (ADA, BLACKWELL), batch, tokens)
    for batch in (1, 2):
        yield _block("full", "int8", "fp16", (TURING,), batch, 20400)
    for batch, tokens in itertools.product((1, 2), (256, 1728)):
        yield _block("full", "fp32", "fp32", CURRENT, batch, tokens)
    for precision, batch, tokens in itertools.product(("fp16", "bf16", "fp32"), (1, 2), (256, 1280, 4608)):
        yield _block("bench-27m", precision, precision, CURRENT, batch, tokens)


def _block(
    model: str, precision: str, base: str, capabilities: tuple[Capability, ...], batch: int, tokens: int
) -> Case:
    text = configs_of(model).transformer.max_text_seq_length
    axes = {"B": batch, "N": tokens, "L": text, "S": tokens + text}
    return Case(model, "block", precision, base, capabilities, axes)


def _tokens(model: str) -> list[int]:
    transformer, vae, _ = configs_of(model)
    return [geometry(transformer, vae, *size).video_tokens for size in SIZES]


def _small_graphs() -> Iterator[Case]:
    for model, precision in itertools.product(("full", "bench-27m"), ("fp16", "bf16")):
        transformer, vae, _ = configs_of(model)
        length = transformer.max_text_seq_length
        for height, width, frames in SIZES[:3]:
            g = geometry(transformer, vae, height, width, frames)
            latents = {"F": g.latent_frames, "H": g.latent_height, "W": g.latent_width, "N": g.video_tokens}
            yield Case(model, "stem", precision, precision, CURRENT, latents)
            for batch in (1, 2):
                yield Case(model, "head", precision, precision, CURRENT, {"B": batch, **latents})
            yield Case(model, "conditioning", precision, precision, CURRENT, {"B": 2, "L": length, **latents})
        for steps in (1, 25, 100, 1000):
            yield Case(model, "modulation", precision, precision, CURRENT, {"T": steps})
            yield Case(model, "head_modulation", precision, precision, CURRENT, {"T": steps})
        for batch in (1, 2):
            yield Case(model, "text_block", precision, precision, CURRENT, {"B": batch, "S": length})


def reuse_cases() -> Iterator[Case]:
    """What is measured of reuse between steps: as engines are built, with any number of tokens active and kept, and less."""
    yield from _token_steps()
    for model, precision, sizes in (
        *(("full", precision, (SIZES[0], SIZES[2])) for precision in ("fp16", "bf16")),
        ("bench-27m", "fp32", SIZES[:1]),
    ):
        transformer, vae, _ = configs_of(model)
        for height, width, frames in sizes:
            g = geometry(transformer, vae, height, width, frames)
            n = g.video_tokens
            latents = {"F": g.latent_frames, "H": g.latent_height, "W": g.latent_width, "N": n}
            yield Case(model, "head_reuse", precision, precision, CURRENT, latents)
            for graph in ("trunk_keep", "trunk_reuse", "trunk_probe"):
                yield Case(model, graph, precision, precision, CURRENT, {"N": n})
            for graph in ("tokens_take", "tokens_put"):
                yield Case(model, graph, precision, precision, CURRENT, {"N": n, "A": n})
            for graph in ("cache_narrow", "cache_widen"):
                yield Case(model, graph, precision, precision, CURRENT, {"K": n})


def _token_steps() -> Iterator[Case]:
    kinds: tuple[tuple[str, str, tuple[Capability, ...]], ...] = (
        *((precision, "bf16", CURRENT) for precision in ("bf16", "int8", "int8-weights")),
        *((precision, "fp16", CURRENT) for precision in ("fp16", "int8")),
        ("fp8", "bf16", (ADA, BLACKWELL)),
        ("fp16", "fp16", (TURING,)),
    )
    for (precision, base, capabilities), batch in itertools.product(kinds, (1, 2)):
        for tokens in (1728, 20400):
            yield from _token_step("full", precision, base, capabilities, batch, tokens)
    for batch in (1, 2):
        yield from _token_step("full", "fp32", "fp32", CURRENT, batch, 1728)
        for precision in ("fp16", "fp32"):
            yield from _token_step("bench-27m", precision, precision, CURRENT, batch, 1280)


def _token_step(
    model: str, precision: str, base: str, capabilities: tuple[Capability, ...], batch: int, tokens: int
) -> Iterator[Case]:
    n, text = tokens, configs_of(model).transformer.max_text_seq_length
    whole = {"B": batch, "N": n, "L": text, "S": n + text, "K": n}
    yield Case(model, "tokens_keep", precision, base, capabilities, whole)
    for active, kept in ((n, n), (2 * n // 5, n - 2 * n // 5), (n // 10, n - n // 10)):
        axes = {"B": batch, "A": active, "L": text, "Q": active + text, "K": kept}
        yield Case(model, "tokens_reuse", precision, base, capabilities, axes)


def _vae_graphs() -> Iterator[Case]:
    tiles = {"full": ((16, 22), (30, 45), (48, 85), (96, 170)), "bench-27m": ((16, 16), (40, 64))}
    for model, precision in itertools.product(tiles, ("fp16", "bf16")):
        for rows, columns in tiles[model]:
            yield from _vae(model, precision, CURRENT, rows, columns)
    yield from _vae("full", "fp16", (TURING,), 30, 45)
    yield from _vae("full", "fp32", CURRENT, 16, 22)


def _vae(model: str, precision: str, capabilities: tuple[Capability, ...], rows: int, columns: int) -> Iterator[Case]:
    area = {"latent_height": rows, "latent_width": columns}
    for graph, lengths in (
        ("vae_encoder_first", ({"frames": 13}, {"frames": 9})),
        ("vae_encoder_next", ({},)),
        ("vae_decoder_first", ({"latent_frames": 3},)),
        ("vae_decoder_first_even", ({},)),
        ("vae_decoder_next", ({},)),
    ):
        for length in lengths:
            yield Case(model, graph, precision, precision, capabilities, {**area, **length})


class Graphs:
    """ONNX files of a model's graphs, traced when they are first asked for, in a folder that the caller removes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[tuple[str, str, str, str], tuple[GraphSpec, Path]] = {}

    def get(self, model: str, graph: str, precision: str, base: str) -> tuple[GraphSpec, Path]:
        """The graph's description, and its file in a folder that also holds `weights/`."""
        key = (model, graph, precision, base)
        if key not in self._known:
            self._known[key] = self._make(*key)
        return self._known[key]

    def _make(self, model: str, graph: str, precision: str, base: str) -> tuple[GraphSpec, Path]:
        import onnx

        from dynamictrl_edge.export.reuse import reuse_modules
        from dynamictrl_edge.export.text_encoder import TextBlock, text_block_signature
        from dynamictrl_edge.export.trace import trace
        from dynamictrl_edge.export.transformer import graph_modules
        from dynamictrl_edge.export.workspace import Workspace

        configs = configs_of(model)
        format: Any = base
        root = self._folder / f"{model}-{graph}-{precision}-{base}"
        root.mkdir()
        workspace = Workspace(root)
        if graph.startswith("vae_"):
            self._add_vae(workspace, model, graph, format)
        elif graph == "text_block":
            module, signature = TextBlock(configs.text, format), text_block_signature(configs.text, format)
            workspace.add_graph(graph, trace(module, signature, name=graph))
        else:
            modules = {**graph_modules(configs.transformer, base), **reuse_modules(configs.transformer, base)}
            traced = trace(*modules[graph], name=graph)
            if precision != base:
                from dynamictrl_edge.calibration.block_graph import LINEARS, quantized

                traced = quantized(traced, LINEARS, precision)
                onnx.checker.check_model(traced)
            workspace.add_graph(graph, traced)
        spec = workspace.graphs[graph]
        return spec, root / spec.file

    def _add_vae(self, workspace: Any, model: str, graph: str, precision: Any) -> None:
        import onnx

        from benchmarks.checkpoints import SPECS, vae_config
        from dynamictrl_edge.bundle.precision import SAFETENSORS_NAME
        from dynamictrl_edge.export.vae import WeightFile, export_vae_graph, vae_tensors

        config = vae_config(SPECS[model])
        kind: Any = graph.split("_")[1]
        path = workspace.weights_path(f"vae_{kind}")
        _write_zeros(path, {t.target: t.shape for t in vae_tensors(kind, config)}, SAFETENSORS_NAME[precision])
        info = export_vae_graph(graph, config, precision, workspace.root / "graphs", WeightFile.read(path))
        workspace.add_graph(graph, onnx.load(info.path, load_external_data=False), weights=f"vae_{kind}")


def _write_zeros(path: Path, shapes: Mapping[str, Sequence[int]], dtype: str) -> None:
    """A safetensors file of zeros, which take no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * {"F32": 4, "F16": 2, "BF16": 2}[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def build(case: Case, spec: GraphSpec, path: Path, folder: Path) -> LayerReport:
    """Builds one engine with TensorRT-RTX in a process of its own, as `dynamictrl build` does; the engine is thrown away.

    Raises `RuntimeError` with the compiler's cause.
    """
    axes = {f"{case.graph}.{axis}": Extent(_least(axis, most, case), most, most) for axis, most in case.axes.items()}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        job = EngineJob(
            graph=case.graph,
            onnx=str(path),
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            weights=str(path.parents[1] / "weights"),
            ports=tuple(port.name for port in spec.inputs),
            profile=profile_of(case.graph, spec, axes),
            flavour="rtx",
            capabilities=case.capabilities,
            engine=f"{scratch}/engine",
            report=f"{scratch}/report.json",
        )
        command = [sys.executable, "-m", "dynamictrl_edge.engines.worker"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as child:
            if child.stdin is None or child.stdout is None:
                raise RuntimeError("the compiler's process has no pipes")
            child.stdin.write(msgspec.json.encode(job) + b"\n")
            child.stdin.flush()  # stays open: its end would end the child
            answers = [msgspec.json.decode(line, type=Answer) for line in child.stdout]
        last = answers[-1] if answers else Answer()
        if last.product is None:
            raise RuntimeError(f"{case}: {last.failure.text if last.failure else 'the compiler died'}")
        return read_report(Path(job.report))


def _least(axis: str, most: int, case: Case) -> int:
    """What `dynamictrl build` takes as the smallest: one token, one step, one latent; the text is always whole."""
    if axis == "L" or (case.graph == "text_block" and axis == "S"):
        return most
    if axis in ("S", "Q"):
        return case.axes["L"] + 1
    patch = configs_of(case.model).transformer
    return {"F": patch.time_patch, "H": patch.patch_size, "W": patch.patch_size}.get(axis, 1)


def record(case: Case, report: LayerReport) -> dict[str, Any]:
    """A row of the receipt."""
    return {
        "model": case.model,
        "graph": case.graph,
        "precision": case.precision,
        "base": case.base,
        "capabilities": [capability_name(capability) for capability in case.capabilities],
        "axes": dict(case.axes),
        "activation_bytes": report.activation_bytes,
        "kernels": len(report.kernels),
    }


def main() -> None:
    from benchmarks.receipt import write_receipt

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--reuse", action="store_true", help="measure the graphs of reuse between steps")
    parser.add_argument("--only", default="", help="measure cases whose text matches, and write no receipt")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at work at once; one may need 3 GB")
    arguments = parser.parse_args()
    listed = reuse_cases() if arguments.reuse else cases()
    chosen = [case for case in listed if re.search(arguments.only, str(case))]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(arguments.jobs) as pool:
        folder = Path(name)
        graphs = Graphs(folder)
        made = [(case, *graphs.get(case.model, case.graph, case.precision, case.base)) for case in chosen]
        rows = []
        for case, report in zip(chosen, pool.map(lambda one: build(*one, folder), made), strict=True):
            rows.append(record(case, report))
            print(json.dumps(rows[-1]), flush=True)
    seconds = time.perf_counter() - start
    print(f"{len(rows)} builds in {seconds:.0f} s")
    if not arguments.only:
        settings = {"sizes": [f"{width}x{height}x{frames}" for height, width, frames in SIZES]}
        receipt = "activation_memory_reuse" if arguments.reuse else "activation_memory"
        print(write_receipt(receipt, settings, {"builds": rows, "seconds": seconds}))


if __name__ == "__main__":
    main()
