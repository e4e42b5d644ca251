"""Writes the table of docs/reuse.md: bytes of caches and operations done of every policy, for DynamiCtrl-5B.

    python benchmarks/reuse_caches.py [--check]

Both come from the functions that the runtime allocates and reports with. `--check` changes nothing and fails if the table is
not what would be written.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from dynamictrl_edge.bundle.config import geometry
from dynamictrl_edge.runtime.reuse.caches import cache_bytes
from dynamictrl_edge.runtime.reuse.plan import flop_fraction, make_plan
from dynamictrl_edge.runtime.reuse.policy import POLICIES, ReusePolicy, parse_policy
from dynamictrl_edge.runtime.reuse.tokens import active_count

sys.path.append(str(Path(__file__).resolve().parents[1]))  # so that this file also runs as a script

from benchmarks.plan_tables import ROOT, TRANSFORMER, VAE

__all__ = ["document", "table"]

PATH = ROOT / "docs" / "reuse.md"
SIZES = ((1360, 768, 37), (1024, 576, 37))
STEPS = 25
PLACE = re.compile(r"(?<=<!-- caches -->\n).*?(?=<!-- end -->)", re.DOTALL)


def table() -> str:
    """With guidance, in bf16."""
    titles = [f"{width}x{height}x{frames}" for width, height, frames in SIZES]
    lines = [
        f"| `--reuse` | operations done, {titles[0]} | caches | operations done, {titles[1]} | caches |",
        "|---|---|---|---|---|",
    ]
    for name in (*POLICIES, "tokens,token_cache=int8", "combined,token_cache=int8"):
        policy = parse_policy(name)
        if policy is None:
            raise ValueError(f"{name} reuses nothing")
        cells = [f"`{name}`"]
        for width, height, frames in SIZES:
            size = geometry(TRANSFORMER, VAE, height, width, frames)
            cells.append(_fraction(policy, size.video_tokens))
            need = cache_bytes(policy, TRANSFORMER, size, guided=True, precision="bf16")
            cells.append(f"{need / 1e9:.2f} GB")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _fraction(policy: ReusePolicy, tokens: int) -> str:
    if policy.trunk_threshold > 0:
        return "follows from the model"
    plan = make_plan(policy, STEPS, guided=True)
    return f"{flop_fraction(plan.steps, TRANSFORMER, tokens, active_count(policy, tokens), 2):.0%}"


def document() -> str:
    """docs/reuse.md with the table as it should be."""
    made, count = PLACE.subn(lambda _: table(), PATH.read_text())
    if count != 1:
        raise SystemExit(f"{PATH.name} has no place for the table: <!-- caches --> and <!-- end -->")
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check, made = parser.parse_args().check, document()
    if not check:
        PATH.write_text(made)
    elif made != PATH.read_text():
        print("docs/reuse.md is out of date; run python benchmarks/reuse_caches.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
