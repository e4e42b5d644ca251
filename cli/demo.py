"""`dynamictrl demo`: the main job from end to end with the pocket model, and nothing to download."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from ..bundle.errors import DeviceError, from_os_error
from .animate import make
from .console import json_option, note, print_json, verbose_option, working

FPS, STEPS, SEED, PERSON, ZOOM = 8, 10, 42, 12, 2


@click.command("demo", short_help="Make a first clip with the pocket model that comes with this program.")
@click.option("--out", default="demo.mp4", show_default=True, help="clip.mp4, clip.webm, or a folder for PNG frames.")
@click.option(
    "--person",
    default=PERSON,
    show_default=True,
    type=click.IntRange(0, 2**32 - 1),
    metavar="N",
    help="Which person and motion; the model was trained on none of them.",
)
@click.option("--bundle", metavar="FOLDER", help="Keep the exported bundle in this new folder.")
@json_option
@verbose_option
def command(out: str, person: int, bundle: str | None, as_json: bool) -> None:
    """Make a first clip: export the pocket model, draw a person and a pose clip, animate.

    The pocket model is a small DynamiCtrl that was trained on drawn people (64x96 pixels, 17 frames). A contact sheet of photo,
    pose clip, truth and clip is written beside the clip. Needs the extra: pip install "dynamictrl-edge[export]"
    """
    try:
        from ..export.exporter import export_checkpoint
    except ImportError as error:
        raise DeviceError(
            f"The demo exports a checkpoint first, which needs packages that are not installed ({error}). "
            'Install them: pip install "dynamictrl-edge[export]"'
        ) from error
    from PIL import Image

    from ..bundle.atomic import atomic_file
    from ..pocket import MODEL
    from ..pocket.clips import COLUMNS, FRAMES, LEAD, ROWS, make_clip
    from ..runtime import Animator
    from ..runtime.media import check_writer_target, read_clip
    from ..runtime.metrics import contact_sheet, psnr

    target = Path(out)
    sheet = target.with_name(f"{target.stem}-sheet.png") if target.name else target
    drawn = make_clip("held-out", person, masking="none")
    with (
        _folder_made(target.parent),
        tempfile.TemporaryDirectory(prefix="dynamictrl-demo-") as folder,
        working(as_json) as progress,
    ):
        check_writer_target(out)
        exported = Path(bundle) if bundle is not None else Path(folder) / "bundle"
        export_checkpoint(MODEL, exported, height=ROWS, width=COLUMNS, frames=FRAMES, fps=FPS, progress=progress)
        result = make(
            Animator.from_bundle(exported, cache=False),
            out,
            None,
            progress,
            image=drawn.reference,
            pose=drawn.pose,
            prompt=drawn.caption,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            seed=SEED,
        )
        frames = read_clip(out)[0]
        rows = [
            ("photo", drawn.reference[None].repeat(FRAMES, 0)),
            ("pose", drawn.pose[LEAD:]),
            ("truth", drawn.truth),
            ("clip", frames),
        ]
        with atomic_file(sheet) as temporary:
            shown = [(label, clip.repeat(ZOOM, 1).repeat(ZOOM, 2)) for label, clip in rows]
            Image.fromarray(contact_sheet(shown)).save(temporary, "PNG")
    result["sheet"] = str(sheet)
    result["prompt"] = drawn.caption
    result["psnr"] = round(float(psnr(frames, drawn.truth).mean()), 2)
    if as_json:
        print_json(result)
    else:
        note(f"Wrote {out} ({result['frames']} frames) and {sheet}: {drawn.caption}.")


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
