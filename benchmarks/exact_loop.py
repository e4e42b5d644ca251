"""Our denoising loop on the CPU against the published one in eager PyTorch: same weights, same inputs, same result.

    python benchmarks/exact_loop.py [--rounds 5] [--steps 10] [--size bench-27m bench-small]

Each side lives in a process of its own; the two run in turn, so that a change of the machine's speed meets both. A run
is one whole loop: for ours that includes conditioning, modulation tables and rotary tables, for PyTorch what its loop
does. Prompt embeddings and latents are given. Figures: seconds per loop, peak resident memory of each process, the
largest difference of the final latents, and the share of the machine's measured float32 GEMM ceiling that our loop's
floating-point operations reach.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))  # so that this file also runs as a script

from benchmarks.loop import GUIDANCE, SEED, STEPS, Job, Worker, model_facts, write_inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", default=["bench-27m", "bench-small"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--name", default="exact_loop", help="name of the receipt")
    arguments = parser.parse_args()

    from benchmarks.receipt import gemm_ceiling, paired, write_receipt

    ceiling = gemm_ceiling()
    figures: dict[str, Any] = {"gemm_ceiling_gflops": ceiling}
    for size in arguments.size:
        with tempfile.TemporaryDirectory() as folder:
            facts = prepare(size, Path(folder))
            workers = {side: Worker(job(side, Path(folder), arguments.steps)) for side in ("ours", "torch")}
            for worker in workers.values():
                worker.run()  # warm-up: page faults, thread pools, kernel choice
            pairs = paired(workers["torch"].run, workers["ours"].run, arguments.rounds)
            rss = {side: worker.close() for side, worker in workers.items()}
            ours, torch = (np.load(Path(folder) / f"{side}.npy") for side in ("ours", "torch"))
        flops = facts["gflop_per_step"] * arguments.steps
        seconds = pairs.b_median
        figures[size] = {
            **facts,
            "seconds": pairs,
            "latency_ratio": pairs.ratio_median,
            "peak_rss_mb": {side: value / 1e6 for side, value in rss.items()},
            "rss_ratio": rss["ours"] / rss["torch"],
            "max_difference": float(np.abs(ours - torch).max()),
            "our_gflops": flops / seconds,
            "share_of_gemm_ceiling": flops / seconds / ceiling.gflops,
        }
        print(json.dumps({size: figures[size]}, indent=1, default=vars))
    settings = {"steps": arguments.steps, "guidance": GUIDANCE, "rounds": arguments.rounds, "precision": "fp32"}
    print(write_receipt(arguments.name, settings, figures, seeds=[SEED]))


def prepare(size: str, folder: Path) -> dict[str, Any]:
    """Writes checkpoint, bundle and inputs; returns facts of the size."""
    from benchmarks.checkpoints import SPECS, write_checkpoint
    from dynamictrl_edge.export.exporter import export_checkpoint

    spec = SPECS[size]
    write_checkpoint(folder / "checkpoint", spec)
    manifest = export_checkpoint(folder / "checkpoint", folder / "bundle")
    size_in_pixels = (spec.height, spec.width, spec.frames)
    write_inputs(folder / "inputs.npz", manifest.transformer, manifest.vae, size_in_pixels)
    weights = sum(
        entry.bytes
        for name, entry in manifest.files.items()
        if name.startswith(("weights/block", "weights/mod", "weights/den"))
    )
    facts = model_facts(manifest.transformer, manifest.vae, size_in_pixels)
    return {**facts, "parameters_m": weights / 4e6}


def job(side: Any, folder: Path, steps: int) -> Job:
    """One side of what `prepare` wrote; its latents go to SIDE.npy."""
    model = folder / ("bundle" if side == "ours" else "checkpoint")
    return Job(side, model, folder / "inputs.npz", folder / f"{side}.npy", steps)


if __name__ == "__main__":
    main()
