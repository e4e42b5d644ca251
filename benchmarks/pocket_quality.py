"""How good the pocket model is: what it makes of clips that it was never trained on.

    python benchmarks/pocket_quality.py [--model pocket/model] [--clips 50] [--steps 10] [--no-write]

Exports the checkpoint, animates held-out clips on the CPU, measures them (`pocket.evaluate`) and writes the receipt
`benchmarks/results/pocket.json` and the contact sheet `docs/pocket.png`; then `python benchmarks/tables.py` puts the figures into
the README and the model card.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1]))  # so that this file also runs as a script

from benchmarks.receipt import ROOT, write_receipt
from dynamictrl_edge.bundle.tensors import sha256_of
from dynamictrl_edge.export.exporter import export_checkpoint
from pocket.clips import COLUMNS, FRAMES, ROWS, Pixels
from pocket.evaluate import MASKED_GUIDANCE, Animate, contact_sheet, evaluate, of_bundle, table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "pocket" / "model")
    parser.add_argument("--clips", type=int, default=50)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--masked-guidance", type=float, default=MASKED_GUIDANCE)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--no-write", action="store_true", help="only print the table")
    given = parser.parse_args()

    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        export_checkpoint(
            given.model, Path(folder) / "bundle", height=ROWS, width=COLUMNS, frames=FRAMES, fps=8, reuse=False
        )
        exported = time.perf_counter() - began
        animate, codec = of_bundle(Path(folder) / "bundle", steps=given.steps, threads=given.threads)
        report = evaluate(
            _timed(animate, seconds),
            codec,
            clips=given.clips,
            guidance=given.guidance,
            masked_guidance=given.masked_guidance,
            progress=lambda done, total: print(f"\r{done} of {total}", end="", file=sys.stderr, flush=True),
        )
    print(file=sys.stderr)
    print(table(report))
    if given.no_write:
        return 0
    weights = sorted(given.model.rglob("*.safetensors"))
    settings = {
        **report.settings,
        "steps": given.steps,
        "size": f"{COLUMNS}x{ROWS}x{FRAMES}",
        "weights": {str(path.relative_to(given.model)): sha256_of(path) for path in weights},
    }
    figures = {
        "rows": report.as_json()["rows"],
        "weights_bytes": sum(path.stat().st_size for path in weights),
        "export_seconds": exported,
        # With guidance 1, the model runs once a step; the masked clips' guidance doubles that.
        "clip_seconds": {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)},
    }
    print(write_receipt("pocket", settings, figures, seeds=range(given.clips)))
    Image.fromarray(_sheet(report.strips)).save(ROOT / "docs" / "pocket.png")
    return 0


def _timed(animate: Animate, seconds: list[float]) -> Animate:
    def timed(reference: Pixels, pose: Pixels | None, caption: str, seed: int, guidance: float) -> Pixels:
        began = time.perf_counter()
        made = animate(reference, pose, caption, seed, guidance)
        if guidance <= 1:
            seconds.append(time.perf_counter() - began)
        return made

    return timed


def _sheet(strips: list[tuple[str, Pixels, Pixels, Pixels, Pixels]], most: int = 4) -> Pixels:
    """The first clips with a whole reference, and as many with a masked one."""
    half = len(strips) // 2
    chosen = [*strips[:half][:most], *strips[half:][:most]]
    return np.ascontiguousarray(contact_sheet(chosen))


if __name__ == "__main__":
    sys.exit(main())
