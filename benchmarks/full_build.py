"""Builds all engines of a full-size random bundle with TensorRT-RTX, without a GPU, and says what it cost and gave.

    python benchmarks/full_build.py FOLDER [--precision fp16 bf16] [--t5-layers 1]

FOLDER needs room for the checkpoint and a bundle (28 GB with one T5 layer); it is left as it was. The block is also built
for other sizes and batches by itself, to learn its activation memory there.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TARGETS = {"fp16": ("rtx20", "rtx30", "rtx40", "rtx50"), "bf16": ("rtx30", "rtx40", "rtx50")}
MAIN = "1360x768x37"
SIZES = ("1024x576x37", "1360x768x37")
WORKERS = 2


def main() -> None:
    from benchmarks.checkpoints import write_checkpoint
    from benchmarks.receipt import write_receipt
    from dynamictrl_edge.export.exporter import export_checkpoint

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", nargs="+", default=["fp16", "bf16"], choices=sorted(TARGETS))
    parser.add_argument("--t5-layers", type=int, default=1)
    parser.add_argument("--spec", default="full")
    arguments = parser.parse_args()
    checkpoint, bundle = arguments.folder / "checkpoint", arguments.folder / "bundle"
    figures: dict[str, Any] = {}
    try:
        write_checkpoint(checkpoint, arguments.spec, t5_layers=arguments.t5_layers)
        for precision in arguments.precision:
            export_checkpoint(checkpoint, bundle, precision=precision)
            figures[precision] = build(bundle, TARGETS[precision])
            shutil.rmtree(bundle)
    finally:
        for folder in (checkpoint, bundle):
            shutil.rmtree(folder, ignore_errors=True)
    settings = {
        "spec": arguments.spec,
        "t5_layers": arguments.t5_layers,
        "size": MAIN,
        "workers": WORKERS,
        "targets": {name: list(targets) for name, targets in TARGETS.items()},
    }
    print(write_receipt("full_build", settings, figures))


def build(bundle: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """The whole set, the same once more, and the block at other sizes."""
    from dynamictrl_edge.bundle.store import Bundle
    from dynamictrl_edge.engines.build import build_set, plan_builds
    from dynamictrl_edge.engines.engine_set import BuildOptions
    from dynamictrl_edge.engines.machine import look_at_machine
    from dynamictrl_edge.engines.model_facts import facts_of
    from dynamictrl_edge.engines.planner import pick_tile
    from dynamictrl_edge.engines.profiles import parse_size
    from dynamictrl_edge.engines.targets import find_target

    opened = Bundle(bundle)
    targets = [find_target(name) for name in names]
    size = parse_size(MAIN)
    budget = int(1e9 * min(target.memory_gb for target in targets))
    tile = pick_tile(facts_of(opened.manifest), (size,), budget=budget)
    options = BuildOptions(sizes=(size,), tile=tile)
    (plan,) = plan_builds(opened, targets, "rtx", options, look_at_machine())
    made = build_set(opened, plan, workers=WORKERS)
    again = build_set(opened, plan, workers=WORKERS)
    engines = made.engines.engines
    figures = {
        "seconds": made.seconds,
        "seconds_again": again.seconds,
        "built_again": list(again.fresh),
        "tile": tile,
        "denoiser_seconds": sum(e.seconds for n, e in engines.items() if not n.startswith("vae_")),
        "denoiser_peak_rss": max(e.peak_rss for n, e in engines.items() if not n.startswith("vae_")),
        "vae_peak_rss": max(e.peak_rss for n, e in engines.items() if n.startswith("vae_")),
        "engine_bytes": sum(e.bytes for e in engines.values()),
        "engines": {
            name: {
                "bytes": entry.bytes,
                "seconds": entry.seconds,
                "peak_rss": entry.peak_rss,
                "kernels": entry.kernels,
                "fused_attention": entry.fused_attention,
                "activation_bytes": entry.activation_bytes,
                "weights_bytes": entry.weights_bytes,
            }
            for name, entry in engines.items()
        },
        "block": [block_at(opened, plan, text, batch) for text in SIZES for batch in (1, 2)],
    }
    print(figures)
    return figures


def block_at(bundle: Any, plan: Any, text: str, batch: int) -> dict[str, Any]:
    """The block alone, for one size and batch."""
    import msgspec

    from dynamictrl_edge.engines.builder import EngineJob, build_engine
    from dynamictrl_edge.engines.profiles import axes_of, parse_size, profile_of

    manifest = bundle.manifest
    spec = manifest.graphs["block"]
    options = msgspec.structs.replace(plan.options, sizes=(parse_size(text),), batch=batch)
    with tempfile.TemporaryDirectory() as folder:
        path = bundle.path(spec.file)
        job = EngineJob(
            graph="block",
            onnx=str(path),
            sha256=manifest.files[spec.file].sha256,
            weights=str(path.parent),
            ports=tuple(port.name for port in spec.inputs),
            profile=profile_of("block", spec, axes_of(manifest, options)),
            flavour="rtx",
            capabilities=plan.capabilities,
            engine=str(Path(folder) / "block.engine"),
            report="",
        )
        start = time.perf_counter()
        product, report = build_engine(job, lambda *_: True)
    return {
        "size": text,
        "batch": batch,
        "tokens": job.profile["video"][2][1],
        "seconds": time.perf_counter() - start,
        "bytes": product.bytes,
        "kernels": len(report.kernels),
        "fused_attention": report.fused_attention,
        "gemms": len(report.gemms),
        "activation_bytes": report.activation_bytes,
    }


if __name__ == "__main__":
    main()
