"""`dynamictrl animate`"""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import click

from ..bundle.errors import InputError, UsageError
from .console import Bars, Progress, json_option, note, print_json, verbose_option, working

STAGES = {
    "verify": "Checking the bundle",
    "text": "Reading the prompt",
    "encode": "Encoding photo and pose",
    "denoise": "Denoising",
    "decode": "Decoding",
}


class SeedList(click.ParamType):
    """One seed or several: 42 or 1,2,3"""

    name = "seeds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            seeds = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a whole number or a list like 1,2,3", param, ctx)
        if len(set(seeds)) != len(seeds):
            self.fail(f"{value!r} names a seed twice", param, ctx)
        for seed in seeds:
            # Here and not only in the request, so that no clip is made before a later seed is refused.
            if not 0 <= seed < 2**64:
                self.fail(f"{seed} is not possible: a seed is a whole number from 0 to {2**64 - 1}", param, ctx)
        return seeds


@click.command("animate", short_help="Animate a photo with a pose clip and a prompt.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--image", required=True, type=click.Path(path_type=Path), help="Photo of the person (JPEG, PNG, WebP).")
@click.option(
    "--pose", required=True, type=click.Path(path_type=Path), help="Pose clip: a video, or a folder of frames."
)
@click.option("--prompt", required=True, help="What the clip shows: the person, the clothes, the background.")
@click.option("--out", required=True, help="clip.mp4, clip.webm, or a folder for PNG frames.")
@click.option("--negative-prompt", default="", help="What the clip should not show.")
@click.option("--steps", default=25, show_default=True, help="Denoising steps.")
@click.option(
    "--guidance", default=3.0, show_default=True, help="Guidance scale; 1 turns guidance off (twice as fast)."
)
@click.option("--seed", "seeds", type=SeedList(), default="42", show_default=True, help="One seed, or several: 1,2,3.")
@click.option("--height", type=int, help="Pixels, a multiple of 16. [default: the bundle's]")
@click.option("--width", type=int, help="Pixels, a multiple of 16. [default: the bundle's]")
@click.option("--frames", type=int, help="Frames to make, 4 n + 1. [default: the bundle's]")
@click.option("--fps", type=float, help="Frames per second; the pose clip is resampled to it. [default: the bundle's]")
@click.option(
    "--fit",
    type=click.Choice(["cover", "contain", "stretch"]),
    default="cover",
    show_default=True,
    help="How pictures are brought to the size.",
)
@click.option("--skip-frames", default=0, help="Leave out this many pose frames at the start.")
@click.option("--drop-prefix", default=0, help="Leave out this many frames of the result at its start.")
@click.option("--re-init-noise", is_flag=True, help="Take the noise's low frequencies from the photo.")
@click.option(
    "--tiling",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="VAE in tiles of the published size.",
)
@click.option(
    "--reuse",
    default="off",
    show_default=True,
    help="Use parts of earlier steps again, faster and less exact: off, quality, balanced, guidance, trunk, trunk-linear, table, "
    "adaptive, tokens or combined; with settings: trunk,trunk_period=3 (docs/reuse.md).",
)
@click.option(
    "--check-steps/--no-check-steps",
    default=None,
    help="End at the first step whose numbers overflow, and name it. [default: on the processor; a GPU waits once per step for it]",
)
@click.option(
    "--memory",
    type=float,
    help="Budget in GB, of main memory or the GPU's. [default: no limit; on a GPU, what is free]",
)
@click.option("--backend", type=click.Choice(["auto", "onnxruntime", "tensorrt"]), default="auto", show_default=True)
@click.option(
    "--cuda-graphs", is_flag=True, help="On a GPU, launch each step as one CUDA graph, where all weights stay."
)
@click.option("--threads", type=int, help="Processor cores to use. [default: all]")
@click.option("--no-cache", is_flag=True, help="Do not keep prompt embeddings on disk.")
@click.option("--save-latents", type=click.Path(path_type=Path), help="Also write the final latents as a .npy file.")
@json_option
@verbose_option
def command(
    bundle: Path,
    image: Path,
    pose: Path,
    prompt: str,
    out: str,
    negative_prompt: str,
    steps: int,
    guidance: float,
    seeds: tuple[int, ...],
    height: int | None,
    width: int | None,
    frames: int | None,
    fps: float | None,
    fit: str,
    skip_frames: int,
    drop_prefix: int,
    re_init_noise: bool,
    tiling: str,
    reuse: str,
    check_steps: bool | None,
    memory: float | None,
    backend: str,
    cuda_graphs: bool,
    threads: int | None,
    no_cache: bool,
    save_latents: Path | None,
    as_json: bool,
) -> None:
    """Animate the person in a photo: follow the pose clip, show what the prompt says.

    With several seeds, one clip is written per seed: clip-seed1.mp4, clip-seed2.mp4, ...
    """
    from ..runtime import Animator
    from ..runtime.reuse import parse_policy

    parse_policy(reuse)  # before a bundle is opened
    targets = [(seed, _for_seed(out, seed, seeds), _latents_for_seed(save_latents, seed, seeds)) for seed in seeds]
    for _, video, latents in targets:
        _check_targets(video, latents, inputs=(image, pose, bundle))
    opened = Animator.from_bundle(
        bundle, backend=backend, memory=memory, threads=threads, cache=not no_cache, cuda_graphs=cuda_graphs
    )
    with contextlib.closing(opened) as animator:
        results = []
        told: set[str] = set()
        for seed, video, latents in targets:
            with working(as_json) as progress:
                result = make(
                    animator,
                    video,
                    latents,
                    progress,
                    image=image,
                    pose=pose,
                    prompt=prompt,
                    negative_prompt=negative_prompt,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    seed=seed,
                    height=height,
                    width=width,
                    num_frames=frames,
                    fps=fps,
                    fit=fit,
                    skip_frames=skip_frames,
                    drop_prefix=drop_prefix,
                    re_init_noise=re_init_noise,
                    tiling=tiling,
                    reuse=reuse,
                    check_steps=check_steps,
                )
            results.append(result)
            for text in result["notices"]:
                if text not in told:
                    note(f"Note: {text}")
                    told.add(text)
            if not as_json:
                if result["reuse"] is not None:
                    note(result["reuse"]["summary"])
                total = sum(result["seconds"].values())
                note(
                    f"Wrote {video}: {result['frames']} frames of {result['width']}x{result['height']}, {total:.1f} s."
                )
    if as_json:
        print_json(results[0] if len(results) == 1 else results)


def make(animator: Any, video: str, latents: Path | None, progress: Progress, **arguments: Any) -> dict[str, Any]:
    """Makes one clip and writes it; returns what `--json` prints."""
    import numpy as np

    from ..bundle.atomic import atomic_file
    from ..runtime.media import open_writer

    bars = Bars(progress, STAGES)
    run, chunks = animator.start(progress=bars, **arguments)
    size = run.geometry
    with contextlib.ExitStack() as stack:
        # Both are written before either is moved into place: they appear together or not at all.
        aside = None if latents is None else stack.enter_context(atomic_file(latents))
        writer = stack.enter_context(open_writer(video, run.fps, size.height, size.width))
        for frames in chunks:
            writer.write(frames)
        if aside is not None:
            data = io.BytesIO()  # writing an array straight to a file hides why it failed
            np.save(data, run.latents, allow_pickle=False)
            aside.write_bytes(data.getbuffer())
    return {
        "out": str(video),
        "seed": run.request.seed,
        "frames": run.frames,
        "width": size.width,
        "height": size.height,
        "fps": float(run.fps),
        "steps": run.request.num_inference_steps,
        "guidance": run.request.guidance_scale,
        "backend": animator.backend.name,
        "latents": None if latents is None else str(latents),
        "seconds": {stage: round(value, 3) for stage, value in run.seconds.items()},
        "planned_peak_gb": round(run.plan.peak / 1e9, 3),
        "resident_blocks": run.plan.resident_blocks,
        "tiled": run.plan.tiled,
        "reuse": None if run.reuse is None else run.reuse.as_json(),
        "notices": list(run.notices),
    }


def _for_seed(out: str, seed: int, seeds: tuple[int, ...]) -> str:
    """`clip.mp4` -> `clip-seed7.mp4` when there are several seeds; `clip.v2/`, a folder, -> `clip.v2-seed7/`."""
    if len(seeds) == 1:
        return out
    folder = out.rstrip("/" + os.sep)
    if folder != out:
        return f"{folder}-seed{seed}{out[len(folder) :]}"
    path = Path(out)
    return str(path.with_name(f"{path.stem}-seed{seed}{path.suffix}")) if path.name else out


def _latents_for_seed(path: Path | None, seed: int, seeds: tuple[int, ...]) -> Path | None:
    return None if path is None else Path(_for_seed(str(path), seed, seeds))


def _check_targets(video: str, latents: Path | None, inputs: tuple[Path, ...]) -> None:
    """Refuses outputs that cannot be written or would destroy each other or an input, before any work is done."""
    from ..bundle.atomic import check_output_place
    from ..runtime.media import check_writer_target

    check_writer_target(video)
    outputs = {"--out": Path(video)}
    if latents is not None:
        check_output_place(latents)
        if latents.is_dir():
            raise InputError(
                f"--save-latents {str(latents)!r} is an existing folder; give a file name like latents.npy."
            )
        whole, part = Path(os.path.realpath(video)), Path(os.path.realpath(latents))
        if whole == part:
            raise UsageError(f"--save-latents and --out are both {video!r}. Give two names.")
        if whole in part.parents:
            raise UsageError(f"--save-latents {str(latents)!r} lies in the output {video!r}. Give another name.")
        outputs["--save-latents"] = latents
    for flag, output in outputs.items():
        if any(os.path.realpath(output) == os.path.realpath(source) for source in inputs):
            raise UsageError(f"{flag} {str(output)!r} would overwrite an input. Give another name.")
