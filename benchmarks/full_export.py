"""Exports a full-size random checkpoint and says what it cost: wall time against copying the same bytes, peak memory.

    python benchmarks/full_export.py FOLDER [--t5-layers 4] [--precision bf16]

FOLDER needs room for three times the checkpoint (42 GB with four T5 layers); it is left empty. The checkpoint has the
layout of DynamiCtrl-5B (42 blocks of width 3072, sharded bf16 safetensors), CogVideoX 1.5's VAE and T5-XXL's encoder
with as many layers as asked for.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CHILD = """
import json, sys, time
from dynamictrl_edge.export.exporter import export_checkpoint
marks = []
class Marks:
    def stage(self, name, total=None): marks.append((time.perf_counter(), name))
    def rename(self, name): marks.append((time.perf_counter(), name))
    def advance(self, amount=1): pass
start = time.perf_counter()
manifest = export_checkpoint(sys.argv[1], sys.argv[2], precision=sys.argv[3], progress=Marks())
end = time.perf_counter()
spent = {"weights": 0.0, "graphs": 0.0}
for (at, name), (until, _) in zip(marks, marks[1:] + [(end, "")]):
    spent["graphs" if name.startswith("graph") else "weights"] += until - at
sys.path.insert(0, sys.argv[4])
from benchmarks.receipt import peak_rss
print(json.dumps({"seconds": end - start, **spent, "peak_rss": peak_rss(), "bytes": manifest.total_bytes}))
"""


def main() -> None:
    from benchmarks.checkpoints import write_checkpoint
    from benchmarks.receipt import run_json, write_receipt

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--t5-layers", type=int, default=4)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--spec", default="full")
    arguments = parser.parse_args()
    checkpoint, copy, bundle = (arguments.folder / name for name in ("checkpoint", "copy", "bundle"))
    written = write_checkpoint(checkpoint, arguments.spec, t5_layers=arguments.t5_layers)
    try:
        copies = [copied(checkpoint, copy)]
        exported = run_json([sys.executable, "-c", CHILD, str(checkpoint), str(bundle), arguments.precision, str(ROOT)])
        copies.append(copied(checkpoint, copy))
        copy_seconds = sum(copies) / len(copies)
        figures = {
            "checkpoint_bytes": written.bytes,
            "parameters": written.parameters,
            "bundle_bytes": exported["bytes"],
            "export_seconds": exported["seconds"],
            "weights_seconds": exported["weights"],
            "graphs_seconds": exported["graphs"],
            "copy_seconds": copies,
            "weights_over_copy": exported["weights"] / copy_seconds,
            "export_over_copy": exported["seconds"] / copy_seconds,
            "peak_rss_gb": exported["peak_rss"] / 1e9,
        }
    finally:
        for folder in (checkpoint, copy, bundle):
            shutil.rmtree(folder, ignore_errors=True)
    settings = {"spec": arguments.spec, "t5_layers": arguments.t5_layers, "precision": arguments.precision}
    print(write_receipt("full_export", settings, figures))
    for name, value in figures.items():
        print(f"{name}: {value}")


def copied(source: Path, target: Path) -> float:
    """Seconds that `cp -r` and a flush to the disk take; the copy is removed again."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync", "-f", str(target)], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


if __name__ == "__main__":
    main()
