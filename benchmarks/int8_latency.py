"""What int8 saves on a CPU: the denoising loop of the 27 M benchmark model, int8 against float32, in turn.

    python benchmarks/int8_latency.py [--rounds 7] [--steps 4]

Each side is a process of its own that runs whole loops (see exact_loop.py). How good the int8 model is does not matter here,
so it is calibrated with one clip of noise. The kernels are those that ONNX Runtime's own profile of one block names.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))  # so that this file also runs as a script

from benchmarks.exact_loop import job, prepare
from benchmarks.loop import GUIDANCE, SEED, Worker
from benchmarks.receipt import paired, write_receipt
from dynamictrl_edge.bundle.manifest import OWN, Port
from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.calibration.calibrate import Options, calibrate
from dynamictrl_edge.calibration.decide import Settings
from dynamictrl_edge.calibration.samples import Sample

__all__ = ["kernels"]

SIZE = "bench-27m"
TYPES: dict[str, Any] = {"float": np.float32, "float16": np.float16, "int8": np.int8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        exact, narrow = Path(name) / "float", Path(name) / "int8"
        exact.mkdir()
        narrow.mkdir()
        facts = prepare(SIZE, exact)
        options = Options(settings=Settings(smooth=False, compensate=False), steps=2, report=False, text=False)
        calibrate(exact / "bundle", narrow / "bundle", [noise()], options)
        shutil.copy(exact / "inputs.npz", narrow)
        workers = {folder: Worker(job("ours", folder, arguments.steps)) for folder in (exact, narrow)}
        for worker in workers.values():
            worker.run()  # warm-up
        pairs = paired(workers[exact].run, workers[narrow].run, arguments.rounds)
        peak = {folder.name: worker.close() / 1e6 for folder, worker in workers.items()}
        bundles = {folder.name: Bundle(folder / "bundle") for folder in (exact, narrow)}
        figures = {
            **facts,
            "seconds_float_int8": pairs,
            "peak_rss_mb": peak,
            "kernels": {side: kernels(bundle) for side, bundle in bundles.items()},
        }
    print(json.dumps(figures, indent=1, default=vars))
    settings = {"size": SIZE, "steps": arguments.steps, "guidance": GUIDANCE, "rounds": arguments.rounds}
    print(write_receipt("int8_latency", settings, figures, seeds=[SEED]))


def noise() -> Sample:
    frames = np.random.default_rng(SEED).integers(0, 256, (9, 64, 64, 3), np.uint8)
    return Sample(frames[0], frames, "noise", seed=SEED, height=64, width=64, frames=len(frames))


def kernels(bundle: Bundle) -> dict[str, int]:
    """How many kernels of each kind ONNX Runtime runs for one block, as its profile says. The linears
    are `MatMul` in float32 and `MatMulIntegerToFloat` in int8; attention's products are inside `MultiHeadAttention`."""
    import onnxruntime

    name = bundle.manifest.block_graphs[0]
    spec, model = bundle.graph(name + OWN if name + OWN in bundle.manifest.graphs else name)
    weights, random = bundle.tensors("block_00"), np.random.default_rng(SEED)
    axes = {"B": 1, "N": 24, "L": bundle.manifest.transformer.max_text_seq_length}
    axes["S"] = axes["N"] + axes["L"]

    def value(port: Port) -> np.ndarray:
        if port.name in weights:
            return weights[port.name]
        shape = [axes[d] if isinstance(d, str) else d for d in port.shape]
        return random.standard_normal(shape).astype(TYPES[port.dtype])

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "block")
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        session.run(None, {port.name: value(port) for port in spec.inputs})
        events = json.loads(Path(session.end_profiling()).read_text())
    found: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            found[event["args"]["op_name"]] += 1
    return dict(sorted(found.items()))


if __name__ == "__main__":
    main()
