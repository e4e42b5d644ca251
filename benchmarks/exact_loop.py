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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STEPS, GUIDANCE, SEED = 10, 3.0, 42


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", default=["bench-27m", "bench-small"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--name", default="exact_loop", help="name of the receipt")
    parser.add_argument("--worker", choices=("ours", "torch"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve({"ours": our_loop, "torch": published_loop}[arguments.worker](arguments.folder, arguments.steps))
        return

    from benchmarks.receipt import gemm_ceiling, paired, write_receipt

    ceiling = gemm_ceiling()
    figures: dict[str, Any] = {"gemm_ceiling_gflops": ceiling}
    for size in arguments.size:
        with tempfile.TemporaryDirectory() as folder:
            facts = prepare(size, Path(folder))
            workers = {side: Worker(side, Path(folder), arguments.steps) for side in ("ours", "torch")}
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
    from dynamictrl_edge.bundle.config import geometry
    from dynamictrl_edge.export.exporter import export_checkpoint

    spec = SPECS[size]
    write_checkpoint(folder / "checkpoint", spec)
    manifest = export_checkpoint(folder / "checkpoint", folder / "bundle")
    made = geometry(manifest.transformer, manifest.vae, spec.height, spec.width, spec.frames)
    config = manifest.transformer
    generator = np.random.default_rng(SEED)
    shape = (1, made.latent_frames, config.latent_channels, made.latent_height, made.latent_width)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    image = np.zeros(shape, np.float32)
    image[:, :1] = normal(1, 1, *shape[2:])
    np.savez(
        folder / "inputs.npz",
        prompt_embeds=normal(2, config.max_text_seq_length, config.text_embed_dim),
        image=image,
        pose=normal(*shape),
        initial=normal(*shape),
        grid=np.array(made.grid),
    )
    n = made.video_tokens + config.max_text_seq_length
    flops = 2 * config.num_layers * (24 * n * config.width**2 + 4 * n * n * config.width)  # both guidance halves
    weights = sum(
        entry.bytes
        for name, entry in manifest.files.items()
        if name.startswith(("weights/block", "weights/mod", "weights/den"))
    )
    return {
        "width": config.width,
        "blocks": config.num_layers,
        "video_tokens": made.video_tokens,
        "text_tokens": config.max_text_seq_length,
        "parameters_m": weights / 4e6,
        "gflop_per_step": flops / 1e9,
    }


def our_loop(folder: Path, steps: int) -> Callable[[], np.ndarray]:
    from dynamictrl_edge.bundle.store import Bundle
    from dynamictrl_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend
    from dynamictrl_edge.runtime.denoiser import Denoiser, Latents
    from dynamictrl_edge.runtime.noise import NoiseSource
    from dynamictrl_edge.runtime.scheduler import SchedulerConfig, make_schedule

    bundle = Bundle(folder / "bundle")
    backend = OnnxRuntimeBackend(bundle)
    denoiser = Denoiser(bundle, backend)
    schedule = make_schedule(SchedulerConfig.from_dict(bundle.manifest.scheduler), steps)
    given = dict(np.load(folder / "inputs.npz"))
    latents = Latents(given["prompt_embeds"], given["image"], given["pose"])
    grid = tuple(int(n) for n in given["grid"])

    def run() -> np.ndarray:
        denoiser.forget_schedule()
        for step in denoiser.denoise(latents, given["initial"], schedule, GUIDANCE, NoiseSource(SEED), grid):
            final = step.latents
        return final

    return run


def published_loop(folder: Path, steps: int) -> Callable[[], np.ndarray]:
    import torch

    from benchmarks.published_torch import denoise, load_scheduler, load_transformer, rotary_tables

    model = load_transformer(folder / "checkpoint" / "transformer")
    scheduler = load_scheduler(folder / "checkpoint" / "scheduler")
    given = {name: torch.from_numpy(array) for name, array in np.load(folder / "inputs.npz").items()}
    frames, _, height, width = given["initial"].shape[1:]

    def run() -> np.ndarray:
        with torch.inference_mode():
            return denoise(
                model,
                scheduler,
                prompt_embeds=given["prompt_embeds"],
                latents=given["initial"],
                image_latents=given["image"],
                pose_latents=given["pose"],
                rotary=rotary_tables(model.config, 8 * height, 8 * width, frames),
                steps=steps,
                guidance=GUIDANCE,
                generator=torch.Generator().manual_seed(SEED),
            ).numpy()

    return run


def serve(run: Callable[[], np.ndarray]) -> None:
    """Worker process: for every line on stdin one run; answers with its seconds. At the end its peak memory."""
    side = sys.argv[sys.argv.index("--worker") + 1]
    folder = Path(sys.argv[sys.argv.index("--folder") + 1])
    from benchmarks.receipt import peak_rss

    for _ in sys.stdin:
        start = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - start
        np.save(folder / f"{side}.npy", result)
        print(json.dumps({"seconds": seconds, "rss": peak_rss()}), flush=True)


class Worker:
    """One side in a process of its own."""

    def __init__(self, side: str, folder: Path, steps: int):
        command = [sys.executable, __file__, "--worker", side, "--folder", str(folder), "--steps", str(steps)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._rss = 0

    def run(self) -> float:
        """Seconds of one loop."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the worker has no pipes")
        stdin.write("run\n")
        stdin.flush()
        answer = json.loads(stdout.readline())
        self._rss = answer["rss"]
        return float(answer["seconds"])

    def close(self) -> int:
        """Ends the process; returns its peak resident bytes."""
        self._process.communicate()
        return self._rss


if __name__ == "__main__":
    main()
