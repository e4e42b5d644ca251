"""Calibrates a full-size random checkpoint to int8 and says what its denoiser weighs, how long it took and the peak memory.

    python benchmarks/full_int8.py FOLDER [--spec full]

FOLDER needs room for 40 GB; it is left empty. The checkpoint has the layout of DynamiCtrl-5B (42 blocks of width 3072) with one
layer of T5-XXL, in fp16: ONNX Runtime observes blocks on the processor, which has no bf16 products, and the bytes are the
same. Sizes and memory are what counts here, so one clip of noise is observed for two steps at a small size, and the
calibration's slow parts that change numbers but no sizes (smoothing, error compensation of the blocks, the report) are left
out. It is told that the machine has 8 GB, so that blocks are read anew for every use; the peak counts mapped files too.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LOOP = ("weights/block_", "weights/denoiser.")  # the modulation works once per schedule, before the loop

EXPORT = """
import json, sys, time
from dynamictrl_edge.export.exporter import export_checkpoint
start = time.perf_counter()
manifest = export_checkpoint(sys.argv[1], sys.argv[2], precision="fp16", reuse=False)
sys.path.insert(0, sys.argv[3])
from benchmarks.receipt import peak_rss
from dynamictrl_edge.calibration.calibrate import denoiser_bytes
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "peak_rss": peak_rss(), "denoiser_bytes": denoiser_bytes(manifest.files)}))
"""

CALIBRATE = """
import json, sys, time
import numpy as np
from dynamictrl_edge.calibration import observe
from dynamictrl_edge.calibration.calibrate import Options, calibrate
from dynamictrl_edge.calibration.decide import Settings
from dynamictrl_edge.calibration.samples import Sample
class Marks:
    def __init__(self): self.at = []
    def stage(self, name, total=None): self.at.append((time.perf_counter(), name))
    def advance(self, amount=1): pass
size, memory = int(sys.argv[4]), float(sys.argv[5])
observe.physical_memory = lambda: int(memory * 1e9)
frames = np.random.default_rng(0).integers(0, 256, (9, size, size, 3), np.uint8)
sample = Sample(frames[0], frames, "noise", height=size, width=size, frames=9)
options = Options(settings=Settings(smooth=False, compensate=False), steps=2, guidance=1.0, report=False, text=False)
marks = Marks()
start = time.perf_counter()
made = calibrate(sys.argv[1], sys.argv[2], [sample], options, progress=marks)
end = time.perf_counter()
stages = {name: until - at for (at, name), (until, _) in zip(marks.at, marks.at[1:] + [(end, "")])}
sys.path.insert(0, sys.argv[3])
from benchmarks.receipt import peak_rss
facts = {"denoiser_bytes": made.denoiser_bytes, "modulation_snr": made.modulation.snr}
print(json.dumps({"seconds": end - start, "stages": stages, "peak_rss": peak_rss(), **facts}))
"""


def main() -> None:
    from benchmarks.checkpoints import SPECS, write_checkpoint
    from benchmarks.receipt import run_json, write_receipt
    from dynamictrl_edge.bundle.manifest import read_manifest

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--spec", default="full")
    parser.add_argument("--layers", type=int, help="other than the spec's")
    parser.add_argument("--size", type=int, default=32, help="rows and columns of the observed clip")
    parser.add_argument("--memory", type=float, default=8.0, help="GB that the machine is said to have")
    arguments = parser.parse_args()
    checkpoint, bundle, quantized = (arguments.folder / name for name in ("checkpoint", "bundle", "int8"))
    spec = SPECS[arguments.spec]
    if arguments.layers is not None:
        spec = replace(spec, transformer=replace(spec.transformer, num_layers=arguments.layers))
    try:
        written = write_checkpoint(checkpoint, spec, t5_layers=1, dtype="fp16")
        print(f"written: {written}", file=sys.stderr, flush=True)
        exported = run_json([sys.executable, "-c", EXPORT, str(checkpoint), str(bundle), str(ROOT)])
        print(f"exported: {exported}", file=sys.stderr, flush=True)
        shutil.rmtree(checkpoint)
        command = [sys.executable, "-c", CALIBRATE, str(bundle), str(quantized), str(ROOT)]
        calibrated = run_json([*command, str(arguments.size), str(arguments.memory)])
        print(f"calibrated: {calibrated}", file=sys.stderr, flush=True)
        files = read_manifest(quantized).files
        figures = {
            "parameters": written.parameters,
            "export": exported,
            "calibration": calibrated,
            "denoiser_gib": calibrated["denoiser_bytes"][1] / 2**30,
            "blocks_gib": sum(e.bytes for n, e in files.items() if n.startswith("weights/block_")) / 2**30,
            "loop_gib": sum(e.bytes for n, e in files.items() if n.startswith(LOOP)) / 2**30,
        }
    finally:
        for folder in (checkpoint, bundle, quantized):
            shutil.rmtree(folder, ignore_errors=True)
    settings = {
        "spec": arguments.spec,
        "t5_layers": 1,
        "precision": "fp16",
        "layers": spec.transformer.num_layers,
        "memory_gb": arguments.memory,
        "size": f"{arguments.size}x{arguments.size}x9",
    }
    print(write_receipt("full_int8", settings, figures))
    for name, value in figures.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
