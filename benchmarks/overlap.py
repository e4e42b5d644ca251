"""What streaming a block's weights costs beside computing, simulated: the table in docs/gpu.md.

    python benchmarks/overlap.py [--check]

The simulation goes through the loop as `runtime.backends.ring` does, with three clocks: the host's (copying into page-locked
memory), the link's and the GPU's. `tests/test_gpu_overlap.py` holds it against the ring itself, run on a fake driver. Rates are
assumptions: a GPU that computes at its peak, which leaves copies the least time; a link that reaches 80 % of its own; no contention
for memory.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # so that this file also runs as a script

from benchmarks.plan_tables import full_size_facts
from dynamictrl_edge.engines.engine_set import ClipSize
from dynamictrl_edge.engines.planner import GB, PRESETS, MemoryPlan, plan
from dynamictrl_edge.runtime.backends.ring import EARLY, PACE, STAGED, spread

PAGE = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"
BEGIN, END = "<!-- overlap: written by benchmarks/overlap.py -->", "<!-- end of overlap -->"

BF16, INT8 = 165e12, 660e12  # FLOP/s of a GeForce RTX 4090's matrix units at their peak, with float32 (int32) sums
LINKS = {"PCIe 4 x16": 25e9, "PCIe 4 x8": 12.5e9}  # bytes per second, of 31.5 and 15.75
MEMORY = 8e9  # bytes per second that one thread copies into page-locked memory
STEPS = 25
BUDGETS = {PRESETS[0]: (4, 8, 12), PRESETS[1]: (4, 6, 8), PRESETS[2]: (5, 6, 8)}  # GB


@dataclass(frozen=True)
class Rates:
    """Seconds for one block: to compute both guidance halves, to fill page-locked memory, to copy to the GPU."""

    compute: float
    fill: float
    copy: float


def seconds(layers: int, resident: int, ring: int, steps: int, rates: Rates, *, kept: bool) -> list[float]:
    """When the GPU ends each step. `kept`: streamed blocks have page-locked memory of their own."""
    streamed = spread(layers, layers - resident)
    host = link = gpu = 0.0
    fences, free, ready = [0.0] * PACE, [0.0] * max(1, ring), [0.0] * max(1, ring)
    sent: list[float] = [0.0] * min(STAGED, layers)
    holds: list[int | None] = [None] * len(sent)
    loaded: dict[int, float] = {}  # blocks that stay, and when they are there
    filled: set[int] = set()
    copied = used = passed = turn = 0
    ends = []

    def copy(block: int, slot_free: float) -> float:
        nonlocal host, link, turn
        if kept and block in streamed:
            if block not in filled:
                filled.add(block)
                host += rates.fill
            link = max(link, host, slot_free) + rates.copy
            return link
        place = turn % len(sent)
        turn += 1
        if holds[place] != block:
            host, holds[place] = max(host, sent[place]) + rates.fill, block
        sent[place] = link = max(link, host, slot_free) + rates.copy
        return link

    def load(block: int) -> None:
        if block not in streamed and block not in loaded:
            loaded[block] = copy(block, 0.0)

    for _ in range(steps):
        for block in range(layers):
            host = max(host, fences[passed % PACE])
            load(block)
            while streamed and copied < used + ring:
                slot = copied % ring
                ready[slot] = copy(streamed[copied % len(streamed)], free[slot])
                copied += 1
            for early in range(block + 1, min(block + 1 + EARLY, layers)):
                load(early)
            there = ready[used % ring] if block in streamed else loaded[block]
            gpu = max(gpu, host, there) + rates.compute
            fences[passed % PACE] = gpu
            passed += 1
            if block in streamed:
                free[used % ring] = gpu
                used += 1
        ends.append(gpu)
    return ends


def rates_of(made: MemoryPlan, precision: str, size: ClipSize, link: float) -> Rates:
    facts = full_size_facts(precision)
    d, length = facts.transformer.width, facts.transformer.max_text_seq_length
    linears = 2 * 24 * (tokens_of(size) + length) * d * d
    attention = made.block_flop - linears
    compute = linears / (INT8 if facts.quantized else BF16) + attention / BF16
    return Rates(compute, made.block_bytes / MEMORY, made.block_bytes / link)


def tokens_of(size: ClipSize) -> int:
    from dynamictrl_edge.bundle.config import geometry

    facts = full_size_facts("bf16")
    return geometry(facts.transformer, facts.vae, size.height, size.width, size.frames).video_tokens


def cost(made: MemoryPlan, rates: Rates, *, kept: bool) -> float:
    """Share of the time that 25 steps take longer than with all blocks in memory from the start."""
    streaming = seconds(made.layers, made.resident_blocks, made.ring, STEPS, rates, kept=kept)[-1]
    return streaming / (made.layers * STEPS * rates.compute) - 1


def table() -> str:
    names = ("clip", "precision", "budget", "blocks that stay", "a block computes", "its copy, x16 / x8")
    lines = [f"| {' | '.join((*names, *LINKS, 'x8, little host memory'))} |", "|---" * 9 + "|"]
    for size, budgets in BUDGETS.items():
        for precision in ("bf16", "int8"):
            for budget in budgets:
                made = plan(full_size_facts(precision), size, budget=int(budget * GB), batch=1)
                lines.append(_row(made, size, precision, budget))
    return "\n".join(lines)


def _row(made: MemoryPlan, size: ClipSize, precision: str, budget: int) -> str:
    wide, narrow = (rates_of(made, precision, size, link) for link in LINKS.values())
    stay = "all" if made.ring == 0 else f"{made.resident_blocks} of {made.layers}"
    found = [cost(made, wide, kept=True), cost(made, narrow, kept=True), cost(made, narrow, kept=False)]
    cells = [
        str(size),
        precision,
        f"{budget} GB",
        stay,
        f"{wide.compute * 1e3:.1f} ms",
        f"{wide.copy * 1e3:.1f} / {narrow.copy * 1e3:.1f} ms",
        *(f"{100 * one:+.1f} %" for one in found),
    ]
    return f"| {' | '.join(cells)} |"


def page(text: str) -> str:
    """docs/gpu.md with the table of now."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{PAGE} lacks the marks {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="say whether the page is what this script writes")
    check = parser.parse_args().check
    old = PAGE.read_text()
    new = page(old)
    if check:
        return int(old != new)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
