"""`dynamictrl demo`: the main job from end to end, with nothing to download."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from ..bundle.errors import UsageError
from .animate import make
from .console import json_option, note, print_json, verbose_option, working

HEIGHT, WIDTH, FRAMES, FPS, STEPS, SEED = 160, 96, 17, 8, 8, 42
PROMPT = "a person in a blue shirt waves, the background shows a green meadow"


@click.command("demo", short_help="Make a first clip from built-in tiny weights.")
@click.option("--out", default="demo.mp4", show_default=True, help="clip.mp4, clip.webm, or a folder for PNG frames.")
@json_option
@verbose_option
def command(out: str, as_json: bool) -> None:
    """Make a first clip: write a tiny checkpoint, export it, draw a person and a pose clip, animate.

    The weights are random: the clip shows that everything works, not what a trained model makes. Photo, pose clip and a
    contact sheet are written beside the clip. Needs the extra: pip install "dynamictrl-edge[export]"
    """
    try:
        from ..export.demo_checkpoint import write_demo_checkpoint
        from ..export.exporter import export_checkpoint
    except ImportError as error:
        raise UsageError(
            f"The demo exports a checkpoint first, which needs packages that are not installed ({error}). "
            'Install them: pip install "dynamictrl-edge[export]"'
        ) from error
    from PIL import Image

    from ..bundle.atomic import atomic_file
    from ..runtime import Animator
    from ..runtime.media import check_writer_target, read_clip
    from ..runtime.metrics import contact_sheet
    from .figure import draw_photo, draw_pose_clip

    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    check_writer_target(out)
    photo, pose = draw_photo(HEIGHT, WIDTH), draw_pose_clip(HEIGHT, WIDTH, FRAMES)
    with tempfile.TemporaryDirectory(prefix="dynamictrl-demo-") as folder, working(as_json) as progress:
        progress.stage("Writing a tiny checkpoint")
        write_demo_checkpoint(Path(folder) / "checkpoint")
        export_checkpoint(
            Path(folder) / "checkpoint",
            Path(folder) / "bundle",
            height=HEIGHT,
            width=WIDTH,
            frames=FRAMES,
            fps=FPS,
            progress=progress,
        )
        result = make(
            Animator.from_bundle(Path(folder) / "bundle", cache=False),
            out,
            None,
            progress,
            image=photo,
            pose=pose,
            prompt=PROMPT,
            num_inference_steps=STEPS,
            seed=SEED,
        )
    sheet = target.with_name(f"{target.stem}-sheet.png")
    frames = read_clip(out)[0]
    rows = [("photo", photo[None].repeat(len(frames), 0)), ("pose", pose), ("clip", frames)]
    with atomic_file(sheet) as temporary:
        Image.fromarray(contact_sheet(rows)).save(temporary, "PNG")
    result["sheet"] = str(sheet)
    if as_json:
        print_json(result)
    else:
        note(f"Wrote {out} ({result['frames']} frames) and {sheet}. The weights are random, so the clip is noise.")
