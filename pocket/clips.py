"""`make_clip`: a drawn person in motion, with everything that is known of it. The same bits on every machine (see `exact`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .body import draw_build, draw_motion
from .exact import Stream
from .figure import PARTS, Part, draw_person, draw_pose
from .paint import ellipse
from .scenery import draw_scenery
from .wardrobe import COLOURS, HAIR, MOTIONS, RGB, Look, Place, caption, draw_look, draw_place

__all__ = [
    "COLUMNS",
    "FRAMES",
    "LEAD",
    "POSE_FRAMES",
    "ROWS",
    "Clip",
    "Masking",
    "Split",
    "empty_scene",
    "make_clip",
    "masked_reference",
]

ROWS, COLUMNS = 96, 64
FRAMES = 17  # that an animation has
LEAD = 4  # frames of the pose clip before the animation's first: a 1.5-style model drops the first latent frame
POSE_FRAMES = LEAD + FRAMES

Split = Literal["train", "held-out"]
Masking = Literal["none", "background", "clothes"]
Pixels = NDArray[np.uint8]

_SPLITS: dict[Split, int] = {"train": 0x7261696E, "held-out": 0x68656C64}
_HOLD_SHARE = 0.3  # clips that stand still during the lead, so that the animation begins with the photo's own pose


@dataclass(frozen=True, eq=False)
class Clip:
    """A drawn clip. H, W: `ROWS`, `COLUMNS`; F: `POSE_FRAMES`, of which an animation has the last `FRAMES`.

    frames, pose: [F, H, W, 3]. parts: [F, H, W], what a pixel shows, an index of `PARTS`. joints: [F, 18, 2] float64,
    columns and rows in pixels, OpenPose's order; seen: [F, 18] bool. reference: [H, W, 3], frame 0 with the background or
    the clothes blacked out where `masking` says so.
    """

    split: Split
    index: int
    frames: Pixels
    pose: Pixels
    parts: Pixels
    joints: NDArray[np.float64]
    seen: NDArray[np.bool_]
    reference: Pixels
    masking: Masking
    caption: str
    look: Look
    place: Place
    motion: str

    @property
    def truth(self) -> Pixels:
        """[FRAMES, H, W, 3]: what an animation of `reference` should be."""
        return self.frames[LEAD:]


def make_clip(split: Split, index: int, *, masking: Masking | None = None, motion: str | None = None) -> Clip:
    """Clip number `index` (0 or more) of a split; the splits have no seed in common.

    masking: of the reference, instead of the clip's own (half of the clips have one, of either kind as often).
    motion: a key of `MOTIONS` instead of the clip's own.
    """
    size = (ROWS, COLUMNS)
    look, place = draw_look(_stream(split, index, "look")), draw_place(_stream(split, index, "place"))
    stream = _stream(split, index, "rest")
    own_motion = stream.choice(tuple(MOTIONS))
    motion = motion or own_motion
    own_masking: Masking = "none" if stream.chance(0.5) else "background" if stream.chance(0.5) else "clothes"
    hold = LEAD if stream.chance(_HOLD_SHARE) else 0

    build = draw_build(stream, ROWS)
    colours = {
        "top": _shade(stream, COLOURS[look.top_colour]),
        "bottom": _shade(stream, COLOURS[look.bottom_colour]),
        "hair": _shade(stream, HAIR[look.hair]),
    }
    scenery, _ = empty_scene(split, index, place)
    skeleton = draw_motion(stream, motion, build, POSE_FRAMES, hold, size)
    people = draw_person(skeleton, build, look, colours, size)
    frames, parts = _compose(scenery, skeleton.joints["hips"][:, 0], build.girth, people)

    masking = masking or own_masking
    reference = masked_reference(frames[0], parts[0], masking)
    return Clip(
        split=split,
        index=index,
        frames=frames,
        pose=draw_pose(skeleton, size),
        parts=parts,
        joints=skeleton.points,
        seen=skeleton.seen,
        reference=reference,
        masking=masking,
        caption=caption(look, place, motion),
        look=look,
        place=place,
        motion=motion,
    )


def empty_scene(split: Split, index: int, place: Place) -> tuple[NDArray[np.float64], float]:
    """The background of a clip as it would be at `place`, [H, W, 3] in 0..255, and the row where its lower part begins."""
    return draw_scenery(_stream(split, index, "scenery"), place, (ROWS, COLUMNS))


def masked_reference(frame: Pixels, parts: Pixels, masking: Masking) -> Pixels:
    """A copy of `frame` [H, W, 3] with the pixels of the background, or of top and bottom, set to black."""
    result = frame.copy()
    if masking == "background":
        result[parts == PARTS.index("background")] = 0
    elif masking == "clothes":
        result[(parts == PARTS.index("top")) | (parts == PARTS.index("bottom"))] = 0
    return result


def _stream(split: Split, index: int, topic: str) -> Stream:
    """What is drawn from one stream does not move what is drawn from another."""
    if not 0 <= index < 1 << 32:
        raise ValueError(f"a clip's number is 0 to 2**32 - 1, not {index}")
    return Stream((_SPLITS[split] << 34) + (index << 2) + ("rest", "look", "place", "scenery").index(topic))


def _shade(stream: Stream, colour: RGB) -> RGB:
    light = stream.between(-10.0, 10.0)
    r, g, b = (min(max(c + light + stream.between(-6.0, 6.0), 0.0), 255.0) for c in colour)
    return r, g, b


def _compose(
    scenery: NDArray[np.float64], middle: NDArray[np.float64], girth: float, people: list[Part]
) -> tuple[Pixels, Pixels]:
    """Frames [F, H, W, 3] and what their pixels show [F, H, W]: every frame from its farthest part to its nearest."""
    count = len(middle)
    frames = np.repeat(scenery[None], count, axis=0)
    ground = np.stack([middle, np.full_like(middle, ROWS - 3.5)], -1)
    shadow = ellipse(ground, 15.0 * girth, 3.0 * girth, (ROWS, COLUMNS))
    rows, columns = shadow.area
    frames[:, rows, columns] = frames[:, rows, columns] * (1.0 - 0.4 * shadow.cover[..., None])

    shows = np.zeros((count, ROWS, COLUMNS), np.uint8)
    for f in range(count):
        # Python's sort keeps the order of equals, on every machine.
        for part in sorted(people, key=lambda part: float(part.near[f])):
            layer = part.layer
            area = (f, *layer.area)
            cover = layer.cover[f][..., None]
            colour = layer.shade[f][..., None] * np.asarray(part.colour)
            frames[area] = frames[area] + cover * (colour - frames[area])
            shows[area] = np.where(layer.cover[f] > 0.5, part.kind, shows[area])
    return np.floor(np.clip(frames, 0.0, 255.0) + 0.5).astype(np.uint8), shows
