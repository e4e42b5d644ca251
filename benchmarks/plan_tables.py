"""Writes docs/memory.md: what the memory planner says about DynamiCtrl-5B, and how good its estimates are.

    python benchmarks/plan_tables.py [--check]

`--check` changes nothing and fails if the file is not what would be written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dynamictrl_edge.bundle.config import TextConfig, TransformerConfig, VaeConfig
from dynamictrl_edge.engines.activations import estimate_activation
from dynamictrl_edge.engines.planner import PRESETS, RING, MemoryPlan, ModelFacts, model_facts, plan
from dynamictrl_edge.engines.stages import CONTEXT, PROCESS
from dynamictrl_edge.runtime.reuse.device import memory_of
from dynamictrl_edge.runtime.reuse.policy import POLICIES, parse_policy

ROOT = Path(__file__).resolve().parents[1]

__all__ = ["Estimate", "document", "estimates", "full_size_facts", "receipts"]

PATH = ROOT / "docs" / "memory.md"
RECEIPTS = tuple(
    ROOT / "benchmarks" / "results" / f"{name}.json" for name in ("activation_memory", "activation_memory_reuse")
)
TABLED = ("bf16", "fp16", "int8")
BUDGETS = (6, 8, 12, 16, 24)
GB = 1e9
SMALL = 250_000_000  # bytes; below, the error is told in megabytes


class Estimate(NamedTuple):
    """A build of the receipt, and what the planner would have said: bytes."""

    build: Mapping[str, Any]
    measured: int
    estimated: int

    @property
    def error(self) -> float:
        return self.estimated / self.measured - 1


def full_size_facts(precision: str, base: str | None = None) -> ModelFacts:
    """DynamiCtrl-5B: CogVideoX1.5-5B's transformer and VAE, T5-XXL's encoder (`checkpoints.SPECS["full"]`)."""
    return model_facts(TRANSFORMER, VAE, TEXT, precision, base)


# Written out here so that the tables are made without PyTorch; a test holds them against the checkpoint that is measured.
TRANSFORMER = TransformerConfig(
    num_attention_heads=48,
    attention_head_dim=64,
    num_layers=42,
    in_channels=32,
    out_channels=16,
    patch_size=2,
    patch_size_t=2,
    text_embed_dim=4096,
    time_embed_dim=512,
    ofs_embed_dim=512,
    max_text_seq_length=226,
    sample_height=300,
    sample_width=300,
    sample_frames=81,
)
VAE = VaeConfig(
    block_out_channels=(128, 256, 256, 512),
    latent_channels=16,
    layers_per_block=3,
    sample_height=480,
    sample_width=720,
    scaling_factor=0.7,
    invert_scale_latents=True,
)
TEXT = TextConfig(d_model=4096, d_kv=64, d_ff=10240, num_heads=64, num_layers=24, vocab_size=32128)


def estimates(receipt: Mapping[str, Any], models: Mapping[str, tuple[Any, Any, Any]]) -> list[Estimate]:
    """Every build of the receipt whose model is in `models` (transformer, VAE and text configurations by name)."""
    found = []
    for build in receipt["figures"]["builds"]:
        if build["model"] not in models:
            continue
        facts = model_facts(*models[build["model"]], build["precision"], build["base"])
        major, minor = min(_capability(name) for name in build["capabilities"])
        guess = estimate_activation(build["graph"], facts, build["axes"], capability=(major, minor))
        found.append(Estimate(build, build["activation_bytes"], guess))
    return found


def _capability(name: str) -> tuple[int, int]:
    """ "SM120" -> (12, 0)"""
    digits = name.removeprefix("SM")
    return int(digits[:-1]), int(digits[-1])


def receipts() -> dict[str, Any]:
    """The receipts of all graphs as one."""
    read = [json.loads(path.read_text()) for path in RECEIPTS]
    builds = [build for one in read for build in one["figures"]["builds"]]
    return {**read[0], "figures": {"builds": builds}}


def document(receipt: Mapping[str, Any]) -> str:
    """The whole of docs/memory.md."""
    parts = [_introduction(), _fits_tables(), _least_table(), _reuse_table(), _stage_table(), _unified()]
    parts += [_accuracy(receipt), _open()]
    return "\n\n".join(parts) + "\n"


def _introduction() -> str:
    return f"""# GPU memory

<!-- Written by benchmarks/plan_tables.py; do not edit. -->

What a clip needs on a GPU is planned before anything is allocated, from the model's configuration, the clip's size and a
budget. The stages of a clip take turns in one arena: text encoder, VAE encoder, modulation table, denoising, VAE decoder. The
planner then chooses, as far as the budget goes:

- the VAE's **tile**: the whole frame, else the published tile (half of the VAE's sample size each way), else a smaller one;
- how many of the denoiser's **blocks stay** between steps. The others stream from the host through {RING} slots (2 where memory
  is short) while the blocks before them compute;
- whether both **guidance halves** go through a block together, which takes twice the activations, so only once all blocks stay.

**No GPU has run any of this yet.** Activations are estimated by formulas that were fitted to what the TensorRT-RTX builder
reports (below); weights and buffers are counted; {CONTEXT / 1e6:.0f} MB are an allowance for the CUDA context and libraries. If
engines exist, their own reports replace the estimates. GB are 1e9 bytes; a card's "8 GB" are usually 8.6 of these, of which a
desktop takes its share.

All numbers on this page are for DynamiCtrl-5B (42 blocks of width 3072, T5-XXL, CogVideoX 1.5's VAE) with guidance and 25 steps.
In int8 the blocks' matrix products are quantized over bf16; text encoder and VAE are counted in bf16."""


def _fits_tables() -> str:
    lines = ["## Does it fit?"]
    for size in PRESETS:
        lines += [
            "",
            f"### {size}",
            "",
            "| precision | budget | fits | blocks that stay | guidance halves | VAE tile, pixels | peak | in stage |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for precision in TABLED:
            facts = full_size_facts(precision)
            for budget in BUDGETS:
                lines.append(_fits_row(facts, plan(facts, size, budget=int(budget * GB)), budget))
    return "\n".join(lines)


def _fits_row(facts: ModelFacts, made: MemoryPlan, budget: int) -> str:
    if not made.fits:
        return f"| {made.precision} | {budget} GB | **no** | needs {made.smallest_budget / GB:.2f} GB | | | | |"
    stay = "all" if made.resident_blocks == made.layers else f"{made.resident_blocks} of {made.layers}"
    halves = "together" if made.batch == 2 else "in turn"
    stage = made.largest_stage.name
    cells = (
        made.precision,
        f"{budget} GB",
        "yes",
        stay,
        halves,
        _pixels(facts, made),
        f"{made.peak / GB:.2f} GB",
        stage,
    )
    return f"| {' | '.join(cells)} |"


def _pixels(facts: ModelFacts, made: MemoryPlan) -> str:
    scale = facts.vae.spatial_compression
    return "whole frame" if made.tile.whole else f"{made.tile.columns * scale}x{made.tile.rows * scale}"


def _least_table() -> str:
    lines = [
        "## Smallest budgets",
        "",
        "With blocks streamed through two slots, halves in turn and the smallest tile; and, for comparison, what everything in "
        "memory at once (all blocks, halves together, whole frames) would take.",
        "",
        "| clip | " + " | ".join(f"{precision}, least | everything" for precision in TABLED) + " |",
        "|---|" + "---|" * (2 * len(TABLED)),
    ]
    for size in PRESETS:
        cells = [str(size)]
        for precision in TABLED:
            made = plan(full_size_facts(precision), size)
            cells += [f"{made.smallest_budget / GB:.2f} GB", f"{made.peak / GB:.2f} GB"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _reuse_table() -> str:
    columns = [(size, precision) for size in PRESETS[1:3] for precision in ("bf16", "int8")]
    lines = [
        "## Reuse between steps",
        "",
        "With `inspect --memory GB --reuse NAME` the plan also has the caches of that policy and the activations of its "
        "graphs, whose engines take any number of active tokens. What does not fit is refused with its bytes and the policies "
        "that do. Smallest budgets, as above:",
        "",
        "| `--reuse` | " + " | ".join(f"{size} in {precision}" for size, precision in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name in ("off", *POLICIES, "tokens,token_cache=int8", "combined,token_cache=int8"):
        policy = parse_policy(name)
        reuse = None if policy is None else memory_of(policy, TRANSFORMER)
        made = [plan(full_size_facts(precision), size, reuse=reuse) for size, precision in columns]
        lines.append(f"| `{name}` | " + " | ".join(f"{one.smallest_budget / GB:.2f} GB" for one in made) + " |")
    return "\n".join(lines)


def _stage_table() -> str:
    size = PRESETS[2]
    lines = ["## What lies in memory", ""]
    for precision in ("bf16", "int8"):
        made = plan(full_size_facts(precision), size, budget=int(6 * GB))
        lines += [f"{size} in {precision} within 6 GB, in MB:", "", "| stage | total | of which |", "|---|---|---|"]
        for stage in made.stages:
            items = ", ".join(f"{item.name} {item.bytes / 1e6:,.0f}" for item in stage.items)
            lines.append(f"| {stage.name} | {stage.total / 1e6:,.0f} | {items} |")
        lines.append("")
    lines.append(
        "The text encoder's stage falls away for a prompt whose embeddings are on disk. Embedding rows of the text encoder "
        "are gathered on the host, so that its table is never on the GPU."
    )
    return "\n".join(lines)


def _unified() -> str:
    lines = [
        "## Unified memory",
        "",
        f"On Jetson and DGX Spark the GPU shares the host's memory: the program ({PROCESS / 1e6:.0f} MB, an allowance) and the "
        "clip's frames count too. Weights are not counted twice.",
        "",
        "| clip | " + " | ".join(f"{precision}, least" for precision in TABLED) + " |",
        "|---|" + "---|" * len(TABLED),
    ]
    for size in PRESETS:
        made = [plan(full_size_facts(precision), size, unified=True) for precision in TABLED]
        lines.append(f"| {size} | " + " | ".join(f"{one.smallest_budget / GB:.2f} GB" for one in made) + " |")
    return "\n".join(lines)


def _accuracy(receipt: Mapping[str, Any]) -> str:
    versions = receipt["versions"]
    lines = [
        "## How good the estimates are",
        "",
        f"{len(receipt['figures']['builds'])} engines were built with TensorRT-RTX {versions.get('tensorrt_rtx', '')} at several "
        "sizes, without a GPU (`activation_memory.json` and `activation_memory_reuse.json` in `benchmarks/results`). Estimate "
        f"against the builder's report, for the full-size model; builds of less than {SMALL / 1e6:.0f} MB are listed by their "
        "difference in MB:",
        "",
        "| graph | precisions | builds | largest | furthest below | furthest above | small ones, MB |",
        "|---|---|---|---|---|---|---|",
        *_accuracy_rows(estimates(receipt, {"full": (TRANSFORMER, VAE, TEXT)})),
        "",
        "In fp32 attention is not fused, and from some size on the compiler's report leaves the scores out, which it takes from "
        "the device while it runs (kernels of type `allocate`); the planner counts them.",
    ]
    return "\n".join(lines)


def _accuracy_rows(found: list[Estimate]) -> Iterator[str]:
    groups: dict[tuple[str, str], list[Estimate]] = {}
    for one in found:
        quantized = one.build["precision"] != one.build["base"]
        what = "fp32" if one.build["base"] == "fp32" else "int8, fp8, int8-weights" if quantized else "bf16, fp16"
        groups.setdefault((one.build["graph"], what), []).append(one)
    for (graph, what), members in groups.items():
        large = [one for one in members if one.measured >= SMALL]
        small = [(one.estimated - one.measured) / 1e6 for one in members if one.measured < SMALL]
        most = max(one.measured for one in members)
        below, above = (
            _percent(extreme(0.0, *(one.error for one in large))) if large else "" for extreme in (min, max)
        )
        rest = f"{_rounded(min(small))} to {_rounded(max(small))}" if small else ""
        yield f"| {graph} | {what} | {len(members)} | {most / GB:.2f} GB | {below} | {above} | {rest} |"


def _percent(share: float) -> str:
    rounded = round(100 * share, 1)
    return f"{rounded:+.1f} %" if rounded else "0 %"


def _rounded(megabytes: float) -> str:
    return f"{round(megabytes):+d}" if round(megabytes) else "0"


def _open() -> str:
    return """## What is not known

- Whether a GPU agrees: the CUDA context's size, memory that TensorRT-RTX takes for kernels compiled on the device, and
  fragmentation are in the allowance, not measured.
- TensorRT (Jetson, servers) plans activations of its own; there these estimates are a guess until engines are built.
- `block` in int8-weights was measured in an earlier form than `calibrate` writes now, which needs 2.00 GB instead of 1.83 GB for
  one half at 1360x768x37; its estimate is still that of the earlier form. The graphs of token reuse were measured as they are
  written.
- That an engine for two halves needs half of its memory when one goes through. The plan does not count on it: for "in turn",
  build with `--batch 1`."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    text = document(receipts())
    if check:
        if not PATH.is_file() or PATH.read_text() != text:
            print("docs/memory.md is not what the planner says; run python benchmarks/plan_tables.py", file=sys.stderr)
            return 1
        return 0
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
