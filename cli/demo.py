"""`dynamictrl demo`: the main job from end to end, with nothing to download."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from ..bundle.errors import DeviceError, from_os_error
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

    The weights are random: the clip shows that everything works, not what a trained model makes. A contact sheet of photo,
    pose clip and clip is written beside it. Needs the extra: pip install "dynamictrl-edge[export]"
    """
    try:
        from ..export.demo_checkpoint import write_demo_checkpoint
        from ..export.exporter import export_checkpoint
    except ImportError as error:
        raise DeviceError(
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
    sheet = target.with_name(f"{target.stem}-sheet.png") if target.name else target
    photo, pose = draw_photo(HEIGHT, WIDTH), draw_pose_clip(HEIGHT, WIDTH, FRAMES)
    with (
        _folder_made(target.parent),
        tempfile.TemporaryDirectory(prefix="dynamictrl-demo-") as folder,
        working(as_json) as progress,
    ):
        check_writer_target(out)
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
        frames = read_clip(out)[0]
        rows = [("photo", photo[None].repeat(len(frames), 0)), ("pose", pose), ("clip", frames)]
        with atomic_file(sheet) as temporary:
            Image.fromarray(contact_sheet(rows)).save(temporary, "PNG")
    result["sheet"] = str(sheet)
    if as_json:
        print_json(result)
    else:
        note(f"Wrote {out} ({result['frames']} frames) and {sheet}. The weights are random, so the clip is noise.")


@contextlib.contextmanager
def _folder_made(folder: Path) -> Iterator[None]:
    """Creates a folder with those above it; on an error, the ones that were created go again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        if missing:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise from_os_error(error, "create the output folder", folder) from error
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()  # only while it is empty
        raise
