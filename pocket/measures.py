"""What a made clip is measured by, beside PSNR and SSIM: all that the generator knows of the true one.

`made` is always [FRAMES, H, W, 3] uint8, the clip that stands for `clip.truth`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .body import POINTS
from .clips import FRAMES, LEAD, Clip, Pixels, empty_scene
from .figure import PARTS
from .wardrobe import COLOURS, PLACES, Place

__all__ = ["BONES", "SEARCH", "background_colours", "clothes_colours", "identity", "limb_errors", "person_psnr"]

# Limbs whose place is measured: a name and the two body points that it lies between.
BONES = (
    ("head", "neck", "nose"),
    ("right upper arm", "right shoulder", "right elbow"), ("right forearm", "right elbow", "right wrist"),
    ("left upper arm", "left shoulder", "left elbow"), ("left forearm", "left elbow", "left wrist"),
    ("right thigh", "right hip", "right knee"), ("right shank", "right knee", "right ankle"),
    ("left thigh", "left hip", "left knee"), ("left shank", "left knee", "left ankle"),
)  # fmt: skip
SEARCH = 12  # pixels, the largest displacement that is looked for, in either direction
REACH = 5.0  # pixels around a bone that show the limb and a rim of what surrounds it
RIM = 0.5  # weight of pixels that do not show the person


def person_psnr(made: Pixels, clip: Clip) -> float:
    """PSNR in dB over the pixels where the true clip shows the person, all frames together."""
    shown = clip.parts[LEAD:] != PARTS.index("background")
    error = np.square(made.astype(np.float64) - clip.truth)[shown].mean()
    return float(10 * np.log10(255**2 / max(float(error), 1e-9)))


def limb_errors(made: Pixels, clip: Clip) -> NDArray[np.float64]:
    """How far limbs are from where they should be, in pixels, [FRAMES, len(BONES)].

    The neighbourhood of a limb in the true frame is looked for in the made frame: among all shifts up to `SEARCH` pixels
    in rows and columns, the one with the least squared colour difference, person's pixels counting in full, others
    `RIM`; of equals the smallest. The length of that shift is the error: 0 for the true clip itself.
    """
    span = 2 * SEARCH + 1
    lengths = np.hypot(*np.mgrid[-SEARCH : SEARCH + 1, -SEARCH : SEARCH + 1])
    person = clip.parts[LEAD:] != PARTS.index("background")
    result = np.zeros((FRAMES, len(BONES)))
    for f in range(FRAMES):
        truth = clip.truth[f].astype(np.float64)
        near = np.stack([_around(clip, LEAD + f, start, end) for _, start, end in BONES])  # [bones, H, W]
        weight = near * np.where(person[f], 1.0, RIM)
        weight = weight / np.maximum(weight.sum((1, 2), keepdims=True), 1e-9)
        padded = np.pad(made[f].astype(np.float64), ((SEARCH, SEARCH), (SEARCH, SEARCH), (0, 0)), mode="edge")
        # Sums of w (truth - made)^2 for all shifts at once, as correlations: w truth^2 - 2 w truth made + w made^2.
        size = padded.shape[:2]
        templates = np.concatenate([weight[..., None] * truth * -2, weight[..., None]], axis=-1)
        pictures = np.concatenate([padded, np.square(padded).sum(-1, keepdims=True)], axis=-1)
        spectrum = np.conj(np.fft.rfft2(templates, size, axes=(1, 2))) * np.fft.rfft2(pictures, axes=(0, 1))
        cost = np.fft.irfft2(spectrum.sum(-1), size, axes=(1, 2))[:, :span, :span]
        for b in range(len(BONES)):
            if near[b].any():  # else it is outside the frame
                result[f, b] = lengths[cost[b] <= cost[b].min() + 1e-3].min()
    return result


def clothes_colours(made: Pixels, clip: Clip) -> dict[str, bool]:
    """Whether top and bottom have the colour that the caption names rather than another: {"top": ..., "bottom": ...}.

    The mean colour where the true clip shows the garment, against every named colour, as bright as the truth shades it.
    """
    names = list(COLOURS)
    palette = np.array([COLOURS[name] for name in names])
    result = {}
    for part, named in (("top", clip.look.top_colour), ("bottom", clip.look.bottom_colour)):
        shown = clip.parts[LEAD:] == PARTS.index(part)
        if shown.sum() < 50:
            continue
        away = np.linalg.norm(palette - made[shown].mean(0), axis=1)
        result[part] = names[int(away.argmin())] == named
    return result


def background_colours(made: Pixels, clip: Clip) -> dict[str, bool]:
    """Whether the background's two zones have the colours that the caption names: {"upper": ..., "lower": ...}.

    The mean colour of each zone, where the true clip shows no person, against the same background painted in each of the
    colours that its kind can have.
    """
    kind, place = clip.place.kind, clip.place
    _, uppers, lowers = PLACES[kind]
    _, line = empty_scene(clip.split, clip.index, place)
    free = clip.parts[LEAD:] == PARTS.index("background")
    row = np.arange(free.shape[1])
    result = {}
    for zone, names, rows in (("upper", list(uppers), row < line - 2), ("lower", list(lowers), row > line + 2)):
        places = [
            Place(kind, name, place.lower) if zone == "upper" else Place(kind, place.upper, name) for name in names
        ]
        shown = free & rows[None, :, None]
        share = shown.mean(0)[..., None]
        wanted = np.array([(empty_scene(clip.split, clip.index, p)[0] * share).sum((0, 1)) for p in places])
        found = made[shown].mean(0)
        away = np.linalg.norm(wanted / share.sum() - found, axis=1)
        result[zone] = names[int(away.argmin())] == getattr(place, zone)
    return result


def identity(made: Pixels, clip: Clip, bins: int = 6) -> float:
    """How alike the colours of top, bottom and hair are to those in the (unmasked) reference frame, 0..1.

    Intersection of RGB histograms with `bins` soft bins per channel, where the true clip shows the part; mean of parts.
    """
    scores = []
    for part in ("top", "bottom", "hair"):
        here = clip.parts[LEAD:] == PARTS.index(part)
        there = clip.parts[0] == PARTS.index(part)
        if here.sum() < 30 or there.sum() < 10:
            continue
        scores.append(float(np.minimum(_histogram(made[here], bins), _histogram(clip.frames[0][there], bins)).sum()))
    return float(np.mean(scores)) if scores else 1.0


def _around(clip: Clip, frame: int, start: str, end: str) -> NDArray[np.bool_]:
    """[H, W]: the pixels within `REACH` of the line between two body points."""
    p, q = clip.joints[frame, POINTS.index(start)], clip.joints[frame, POINTS.index(end)]
    row, column = np.mgrid[: clip.frames.shape[1], : clip.frames.shape[2]]
    x, y = column + 0.5 - p[0], row + 0.5 - p[1]
    d = q - p
    t = np.clip((x * d[0] + y * d[1]) / max(float(d @ d), 1e-6), 0, 1)
    inside: NDArray[np.bool_] = np.hypot(x - t * d[0], y - t * d[1]) <= REACH
    return inside


def _histogram(colours: NDArray[np.uint8], bins: int) -> NDArray[np.float64]:
    """[N, 3] -> shares of bins^3 bins; a colour is divided between its two nearest bins per channel."""
    place = colours.astype(np.float64) / 255 * (bins - 1)
    low = np.minimum(np.floor(place).astype(int), bins - 2)
    high = place - low
    result = np.zeros((bins,) * 3)
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, high, 1 - high), axis=1)
        index = low + corner
        np.add.at(result, (index[:, 0], index[:, 1], index[:, 2]), weight)
    return result / len(colours)
