"""Everything that needs an NVIDIA GPU, in one command; writes results/gpu.json.

    python benchmarks/gpu.py [--size 1024x576x37 1360x768x37] [--only torch engines loop] [--dry-run]

`torch`: what PyTorch's kernels show at the real shapes, on a machine that has nothing but PyTorch, numpy and a driver: how long a
block takes, both guidance halves together against one after the other, what is saved by computing active tokens only, by one half,
and by skipping the blocks; int8 against bf16 products; and a step whose weights stream through a ring of slots against one whose
weights stay, with the memory that each takes.

`engines`: with TensorRT, pycuda and the package installed: a small random model is exported and built, and every stage of its clip
on the GPU backend compared with ONNX Runtime's on the processor; then the clip with weights that stay, weights that stream, and
steps as CUDA graphs (`gpu_clip`); then the block of the full-size model (`gpu_block`).

`loop`: a whole denoising loop of the full-size model (or `--spec`), random weights, bf16 and int8, against the published loop in
PyTorch (bf16): seconds per step, memory, and the relative RMS between the final latents; with as many blocks in memory as there
is room for, with the least memory that the planner allows, and with `--memory` GB; and with the presets of reuse, held against our
own whole loop (`gpu_loop`). It takes the package with its extras `export`, `calibrate` and `build`, TensorRT and pycuda, and for
the full-size model about 40 GB of disk, in a temporary folder. With `--folder F`, checkpoint, bundles and engines stay in F, and a
later call goes on from them: about 55 GB, or 30 with `--precision bf16` alone (all worked out from the weights, not tried).

What is not installed is skipped, and the receipt says so. It is written anew after each part and each loop: a machine that is lost
half way leaves what was measured; `--name` gives it another name, so that a second call leaves the first one's.

`--dry-run` goes through `torch` with toy shapes, and through `loop` with a tiny model and ONNX Runtime, on the processor. It writes
no receipt.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # so that this file also runs as a script

from benchmarks.loop import STEPS, attempt  # which needs nothing but numpy

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("torch", "engines", "loop")
WARM, RUNS = 3, 15
SHARES = (0.2, 0.4, 0.6)  # of the video tokens that are active
GEMM = 8192
SLOTS = 3


@dataclass(frozen=True)
class Model:
    """What the time of a step depends on; DynamiCtrl-5B's numbers."""

    width: int = 3072
    heads: int = 48
    layers: int = 42
    text: int = 226
    patch: int = 128  # numbers of a token's patch of latents

    @property
    def block_elements(self) -> int:
        return 12 * self.width**2


TOY = Model(width=64, heads=2, layers=4, text=6, patch=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", nargs="+", default=["1024x576x37", "1360x768x37"])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--name", default="gpu", help="name of the receipt")
    parser.add_argument("--dry-run", action="store_true", help="torch and loop, on the processor, with toy shapes")
    loop = parser.add_argument_group("loop")
    loop.add_argument("--spec", help="model, of benchmarks/checkpoints.py; default full, in a dry run tiny15")
    loop.add_argument("--precision", nargs="+", choices=["bf16", "int8"], default=["bf16", "int8"])
    loop.add_argument("--memory", nargs="*", type=float, metavar="GB", default=[6.0], help="budgets to stream with")
    loop.add_argument("--steps", type=int, default=STEPS)
    loop.add_argument("--rounds", type=int, default=2, help="loops that count, after a first one")
    loop.add_argument("--folder", type=Path, help="for checkpoint and bundles, which stay; default a temporary one")
    arguments = parser.parse_args()
    arguments.spec = arguments.spec or ("tiny15" if arguments.dry_run else "full")
    figures: dict[str, Any] = {}
    if arguments.dry_run:
        measure(arguments, figures, lambda: None)
        print(json.dumps(figures, indent=1))
    else:
        make_importable()
        from benchmarks.receipt import write_receipt

        names = ("spec", "precision", "memory", "steps", "rounds")
        settings = {"sizes": arguments.size, "runs": RUNS, "loop": {name: getattr(arguments, name) for name in names}}

        def note() -> None:
            write_receipt(arguments.name, settings, figures, seeds=[0])

        measure(arguments, figures, note)
        print(json.dumps(figures, indent=1))
        print(write_receipt(arguments.name, settings, figures, seeds=[0]))
    if all("skipped" in part for part in figures.values()):
        raise SystemExit(5)


def measure(arguments: argparse.Namespace, figures: dict[str, Any], note: Callable[[], None]) -> None:
    """Fills `figures` part by part; `note()` is called whenever there is more."""
    dry = arguments.dry_run
    for name in PARTS:
        if name not in arguments.only or (dry and name == "engines"):
            continue
        print(f"part {name}", file=sys.stderr, flush=True)
        found = figures[name] = {}
        if name == "torch":
            sizes = {"toy": 24} if dry else {size: tokens(size) for size in arguments.size}
            part = partial(torch_part, TOY if dry else Model(), sizes, "cpu" if dry else "cuda")
        elif name == "engines":
            part = partial(engines_part, arguments)
        else:
            part = partial(loop_part, arguments, found, note)
        found.update(attempt(part))
        give_back()
        note()


def give_back() -> None:
    """What a part left in the GPU's memory, which the next one may need."""
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_importable() -> None:
    """Lets the receipt's few modules be imported where the package is not installed."""
    try:
        import dynamictrl_edge  # noqa: F401
    except ModuleNotFoundError:
        place = Path(tempfile.mkdtemp())
        package = place / "dynamictrl_edge"
        package.mkdir()
        for source in (*(ROOT / "package").iterdir(), ROOT / "bundle", ROOT / "runtime"):
            (package / source.name).symlink_to(source)
        sys.path.append(str(place))


def tokens(size: str) -> int:
    """Video tokens of "1360x768x37": patches of 16 x 16 pixels and two latent frames."""
    width, height, frames = map(int, size.split("x"))
    latents = (frames - 1) // 4 + 1
    return (latents + latents % 2) // 2 * (height // 16) * (width // 16)


# PyTorch's kernels


class Timer:
    """Median seconds of a call, by CUDA's events or the processor's clock."""

    def __init__(self, torch: Any, device: str):
        self._torch, self._cuda = torch, device == "cuda"

    def __call__(self, call: Callable[[], Any]) -> float:
        times = []
        for i in range(WARM + RUNS if self._cuda else 2):
            if self._cuda:
                begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call()
                end.record()
                end.synchronize()
                taken = begin.elapsed_time(end) / 1e3
            else:
                start = time.perf_counter()
                call()
                taken = time.perf_counter() - start
            if i >= WARM or not self._cuda:
                times.append(taken)
        return statistics.median(times)


class Block:
    """A block's computing on random weights: modulated norms, merged projections, rotary positions, attention, feed-forward."""

    def __init__(self, torch: Any, model: Model, device: str):
        self.torch, self.model = torch, model
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.flat = self._random(model.block_elements, device)
        self.rows = self._random(9 * model.width, device).reshape(9, model.width)

    def _random(self, count: int, device: str) -> Any:
        values = self.torch.randn(count, device=device, dtype=self.torch.float32, generator=None)
        return (values / self.model.width**0.5).to(self.dtype)

    def matrices(self, flat: Any) -> list[Any]:
        """Query-key-value, output and the feed-forward's two, as views of one flat array."""
        d = self.model.width
        shapes = ((d, 3 * d), (d, d), (d, 4 * d), (4 * d, d))
        ends = list(itertools.accumulate(a * b for a, b in shapes))
        return [flat[end - a * b : end].view(a, b) for (a, b), end in zip(shapes, ends, strict=True)]

    def __call__(self, x: Any, rope: tuple[Any, Any], kept: tuple[Any, Any] | None = None, flat: Any = None) -> Any:
        """[B, S, D] -> the same. `kept`: keys and values [B, heads, K, 64] of tokens that are not computed."""
        torch, functional, rows = self.torch, self.torch.nn.functional, self.rows
        qkv, out, up, down = self.matrices(self.flat if flat is None else flat)
        b, s, d = x.shape
        heads = self.model.heads
        y = functional.layer_norm(x, (d,)) * (1 + rows[0]) + rows[1]
        q, k, v = ((y @ qkv).view(b, s, 3, heads, d // heads)).permute(2, 0, 3, 1, 4)
        q, k = (self._turned(functional.layer_norm(t, (d // heads,)), rope) for t in (q, k))
        if kept is not None:
            k, v = torch.cat([k, kept[0]], 2), torch.cat([v, kept[1]], 2)
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, d)
        x = x + (y @ out) * rows[2]
        y = functional.layer_norm(x, (d,)) * (1 + rows[3]) + rows[4]
        return x + (functional.gelu(y @ up, approximate="tanh") @ down) * rows[5]

    def _turned(self, t: Any, rope: tuple[Any, Any]) -> Any:
        cos, sin = rope
        first, second = t.chunk(2, -1)
        return self.torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def torch_part(model: Model, sizes: dict[str, int], device: str) -> dict[str, Any]:
    """All figures of the first part. `sizes`: video tokens by name."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("PyTorch finds no GPU")
    torch.manual_seed(0)
    timer = Timer(torch, device)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    with torch.inference_mode():
        found["products"] = products(torch, timer, GEMM if device == "cuda" else 64, device)
        for name, count in sizes.items():
            found[name] = at_size(torch, timer, model, count, device)
            print(name, found[name], file=sys.stderr)
    return found


def products(torch: Any, timer: Timer, n: int, device: str) -> dict[str, Any]:
    """FLOP/s of the largest square products: what everything else is held against."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    found: dict[str, Any] = {"bf16_tflops": 2 * n**3 / timer(lambda: a @ b) / 1e12}
    whole = [torch.randint(-127, 127, (n, n), device=device, dtype=torch.int8) for _ in range(2)]
    try:
        found["int8_tops"] = 2 * n**3 / timer(lambda: torch._int_mm(whole[0], whole[1])) / 1e12
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        found["int8_tops"] = f"not available: {error}"
    return found


def at_size(torch: Any, timer: Timer, model: Model, count: int, device: str) -> dict[str, Any]:
    """One clip size: `count` video tokens."""
    block = Block(torch, model, device)
    s, d, heads = count + model.text, model.width, model.heads
    x = torch.randn(2, s, d, device=device).to(block.dtype)
    angles = torch.randn(s, d // heads // 2, device=device)
    rope = (angles.cos().to(block.dtype), angles.sin().to(block.dtype))
    one = timer(lambda: block(x[:1], rope))
    two = timer(lambda: block(x, rope))
    flop = 24 * s * d * d + 4 * s * s * d
    patches = torch.randn(1, count, model.patch, device=device).to(block.dtype)
    embed = torch.randn(model.patch, d, device=device).to(block.dtype)
    ends = timer(lambda: (patches @ embed) @ embed.T)  # stem and head
    active: dict[str, Any] = {}
    for share in SHARES:
        rows = max(1, round(share * count)) + model.text
        kept = tuple(torch.randn(1, heads, s - rows, d // heads, device=device).to(block.dtype) for _ in range(2))
        part = (rope[0][:rows], rope[1][:rows])
        taken = timer(lambda: block(x[:1, :rows], part, kept))  # noqa: B023
        by_flop = (24 * rows * d * d + 4 * rows * s * d) / flop
        active[str(share)] = {"seconds": taken, "of_a_block": taken / one, "by_flop": by_flop}
    return {
        "tokens": count,
        "block_seconds": one,
        "block_tflops": flop / one / 1e12,
        "both_halves_together": two / (2 * one),
        "guidance_reuse": one / two,
        "active_tokens": active,
        "trunk_reuse": ends / (model.layers * one),
        "streaming": streaming(torch, timer, block, x, rope, device),
    }


def streaming(torch: Any, timer: Timer, block: Block, x: Any, rope: tuple[Any, Any], device: str) -> dict[str, Any]:
    """One step of all blocks, halves in turn: weights that stay, and weights that come through a ring of slots."""
    layers, cuda = block.model.layers, device == "cuda"

    def halves(flat: Any) -> None:
        for h in range(2):
            block(x[h : h + 1], rope, flat=flat)

    def resident() -> None:
        for _ in range(layers):
            halves(block.flat)

    source = block.flat.cpu().pin_memory() if cuda else block.flat.clone()
    slots = [torch.empty_like(block.flat) for _ in range(SLOTS)]
    copying = torch.cuda.Stream() if cuda else None
    ready = [torch.cuda.Event() for _ in slots] if cuda else []
    free = [torch.cuda.Event() for _ in slots] if cuda else []

    def copy(number: int) -> None:
        slot = number % SLOTS
        if not cuda:
            slots[slot].copy_(source)
            return
        with torch.cuda.stream(copying):
            copying.wait_event(free[slot])
            slots[slot].copy_(source, non_blocking=True)
            ready[slot].record(copying)

    def streamed() -> None:
        for event in free:
            event.record()
        for number in range(SLOTS - 1):
            copy(number)
        for number in range(layers):
            if number + SLOTS - 1 < layers:
                copy(number + SLOTS - 1)
            if cuda:
                torch.cuda.current_stream().wait_event(ready[number % SLOTS])
            halves(slots[number % SLOTS])
            if cuda:
                free[number % SLOTS].record()

    alone = timer(lambda: slots[0].copy_(source, non_blocking=True))
    stays, streams = timer(resident), timer(streamed)
    found = {
        "block_bytes": source.numel() * source.element_size(),
        "copy_seconds": alone,
        "copy_bytes_per_second": source.numel() * source.element_size() / alone,
        "step_seconds_resident": stays,
        "step_seconds_streamed": streams,
        "cost": streams / stays - 1,
    }
    if cuda:
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


# Engines


def engines_part(arguments: argparse.Namespace) -> dict[str, Any]:
    """A small clip on the GPU backend against the processor, and the full-size block."""
    from benchmarks import gpu_block
    from dynamictrl_edge.engines.machine import look_at_machine

    machine = look_at_machine()
    if machine.gpu is None:
        raise RuntimeError(f"no NVIDIA GPU: {machine.no_gpu}")
    if not machine.flavours:
        raise RuntimeError("no TensorRT is installed")
    given = argparse.Namespace(size=arguments.size, spec="full", batch=1, dry_run=False)
    found: dict[str, Any] = {}
    for flavour in sorted(machine.flavours):
        found[flavour] = {
            "clip": attempt(lambda: clip(flavour)),  # noqa: B023
            "block": attempt(lambda: gpu_block.measure(flavour, machine.gpu.capability, given)),  # noqa: B023
        }
    return found


def clip(flavour: str) -> dict[str, Any]:
    """The 27 M-parameter model: export, build, and the same request on both backends (`gpu_clip`)."""
    import numpy as np

    from benchmarks.checkpoints import SPECS, write_checkpoint
    from benchmarks.gpu_clip import compare
    from dynamictrl_edge.cli.main import run
    from dynamictrl_edge.export.exporter import export_checkpoint

    random = np.random.default_rng(0)
    wanted: dict[str, Any] = {
        "image": random.integers(0, 255, (256, 256, 3), dtype=np.uint8),
        "pose": random.integers(0, 255, (9, 256, 256, 3), dtype=np.uint8),
        "prompt": "a person who dances",
        "steps": 10,
        **{"height": 256, "width": 256, "frames": 9},
    }
    with tempfile.TemporaryDirectory() as name:
        checkpoint, bundle = Path(name) / "checkpoint", Path(name) / "bundle"
        write_checkpoint(checkpoint, SPECS["bench-27m"])
        export_checkpoint(checkpoint, bundle, precision="fp16", reuse=False)
        line = ["build", str(bundle), "--target", "local", "--backend", flavour, "--batch", "1", "--size", "256x256x9"]
        if run(line) != 0:
            raise RuntimeError("the engines were not built")
        return compare(bundle, wanted)


# The whole loop


def loop_part(arguments: argparse.Namespace, found: dict[str, Any], note: Callable[[], None]) -> dict[str, Any]:
    """The denoising loop against PyTorch's; fills `found` as it goes."""
    from benchmarks.checkpoints import SPECS
    from benchmarks.gpu_loop import Wanted, measure
    from dynamictrl_edge.engines.engine_set import ClipSize
    from dynamictrl_edge.engines.profiles import parse_size

    dry, spec = arguments.dry_run, SPECS[arguments.spec]
    own = ClipSize(spec.height, spec.width, spec.frames)
    wanted = Wanted(
        spec=arguments.spec,
        sizes=(own,) if dry else tuple(map(parse_size, arguments.size)),
        steps=arguments.steps,
        rounds=arguments.rounds,
        memory=tuple(arguments.memory),
        precisions=tuple(arguments.precision),
        keep=arguments.folder is not None,
        dry=dry,
    )
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        return measure(wanted, folder, found, note)


if __name__ == "__main__":
    main()
