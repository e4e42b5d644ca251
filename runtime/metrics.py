"""How alike two clips are, frame by frame, and a picture of several clips side by side.

Clips are uint8 [F, H, W, 3] RGB. No measure here has learned weights:

- PSNR over all three channels;
- SSIM, Wang, Bovik, Sheikh, Simoncelli 2004 ("Image quality assessment: from error visibility to structural
  similarity"), on luma, with the paper's 11 x 11 Gaussian window (sigma 1.5), K1 = 0.01, K2 = 0.03, over the positions
  where the window lies within the frame;
- GMSD, Xue, Zhang, Mou, Bovik 2014 ("Gradient magnitude similarity deviation", arXiv 1308.3052), on luma: the
  perceptual distance. It follows the opinions of viewers about as well as measures many times its cost.

Luma is that of ITU-R BT.601 at full range: 0.299 R + 0.587 G + 0.114 B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.errors import InputError, UsageError

if TYPE_CHECKING:
    from PIL import ImageFont

__all__ = ["ClipMetrics", "compare_clips", "contact_sheet", "gmsd", "psnr", "ssim"]

Clip = NDArray[np.uint8]  # [F, H, W, 3]
PerFrame = NDArray[np.float64]  # [F]
Plane = NDArray[np.float64]  # [H, W]

PEAK = 255.0
LUMA = (0.299, 0.587, 0.114)
SSIM_RADIUS, SSIM_SIGMA = 5, 1.5
SSIM_C1, SSIM_C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
GMSD_T = 170.0  # the paper's constant for values up to 255
SMALLEST = 2 * SSIM_RADIUS + 1

BACKGROUND, INK, FAINT_INK = (24, 26, 30), (236, 236, 236), (150, 154, 160)
GAP, FONT_SIZE, WIDEST_LABEL = 6, 14, 220


@dataclass(frozen=True, eq=False)
class ClipMetrics:
    """The three measures of every frame, [F] float64 each."""

    psnr: PerFrame  # dB, higher is closer, infinite for equal frames
    ssim: PerFrame  # at most 1, which is equal
    gmsd: PerFrame  # at least 0, which is equal

    def as_json(self) -> dict[str, Any]:
        """Per-frame lists, their means and their worst values. An infinite PSNR becomes None: JSON has no infinity.

        The mean PSNR is the mean over the frames in dB, hence None where any frame is equal.
        """
        result: dict[str, Any] = {"frames": len(self.psnr)}
        for name, values, worst in (
            ("psnr", self.psnr, np.min),
            ("ssim", self.ssim, np.min),
            ("gmsd", self.gmsd, np.max),
        ):
            numbers = {"mean": float(np.mean(values)), "worst": float(worst(values))}
            result[name] = {key: number if math.isfinite(number) else None for key, number in numbers.items()}
            result[name]["per_frame"] = [number if math.isfinite(number) else None for number in values.tolist()]
        return result


def compare_clips(a: Clip, b: Clip) -> ClipMetrics:
    """All measures of two clips.

    Raises:
        InputError: the clips differ in frame count or size, or a frame is smaller than 11 x 11 pixels.
    """
    return ClipMetrics(psnr(a, b), ssim(a, b), gmsd(a, b))


def psnr(a: Clip, b: Clip) -> PerFrame:
    """Peak signal-to-noise ratio of every frame in dB, [F]; infinite for equal frames.

    Raises:
        InputError: the clips differ in frame count or size.
    """
    _check_alike(a, b)
    result = np.empty(len(a))
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        error = float(np.mean(np.square(x.astype(np.int32) - y)))
        result[i] = math.inf if error == 0 else 10 * math.log10(PEAK**2 / error)
    return result


def ssim(a: Clip, b: Clip) -> PerFrame:
    """Mean structural similarity of every frame, [F]; 1 for equal frames.

    Raises:
        InputError: the clips differ in frame count or size, or a frame is smaller than 11 x 11 pixels.
    """
    _check_alike(a, b)
    _check_large_enough(a)
    return np.array([_ssim_plane(_luma(x), _luma(y)) for x, y in zip(a, b, strict=True)])


def gmsd(a: Clip, b: Clip) -> PerFrame:
    """Gradient magnitude similarity deviation of every frame, [F]; 0 for equal frames, rarely above 0.35.

    Borders are left out (the paper's program pads them with zeros, which adds the same edge to both pictures).

    Raises:
        InputError: the clips differ in frame count or size, or a frame is smaller than 11 x 11 pixels.
    """
    _check_alike(a, b)
    _check_large_enough(a)
    result = np.empty(len(a))
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        m, n = _gradient_magnitude(_luma(x)), _gradient_magnitude(_luma(y))
        result[i] = np.std((2 * m * n + GMSD_T) / (m * m + n * n + GMSD_T))
    return result


def _check_alike(a: Clip, b: Clip) -> None:
    for clip in (a, b):
        if clip.ndim != 4 or clip.shape[3] != 3 or clip.dtype != np.uint8:
            raise InputError(
                f"A clip must be uint8 [frames, height, width, 3]; this is {clip.dtype} {list(clip.shape)}."
            )
    if a.shape[1:3] != b.shape[1:3]:
        raise InputError(
            f"The clips differ in size: {a.shape[2]}x{a.shape[1]} and {b.shape[2]}x{b.shape[1]} pixels. "
            "Only clips of one size can be compared."
        )
    if len(a) != len(b):
        raise InputError(
            f"The clips differ in length: {len(a)} and {len(b)} frames. Only clips of one length can be compared."
        )
    if a.size == 0:
        raise InputError("The clips have no frames or no pixels; there is nothing to compare.")


def _check_large_enough(clip: Clip) -> None:
    height, width = clip.shape[1:3]
    if min(height, width) < SMALLEST:
        raise InputError(f"The frames are {width}x{height} pixels; SSIM and GMSD need at least {SMALLEST}x{SMALLEST}.")


def _luma(frame: Clip) -> Plane:
    red, green, blue = LUMA
    luma: Plane = frame[..., 0] * red + frame[..., 1] * green + frame[..., 2] * blue
    return luma


def _gaussian() -> list[float]:
    """Weights at distances 0, 1, ... from the window's centre, summing to 1 over the whole (symmetric) window."""
    weights = np.exp(-0.5 * (np.arange(SSIM_RADIUS + 1) / SSIM_SIGMA) ** 2)
    return [float(weight) for weight in weights / (2 * weights.sum() - weights[0])]


def _blur(plane: Plane) -> Plane:
    """The Gaussian window's weighted mean around every position where it fits, [H, W] -> [H - 10, W - 10]."""
    weights = _gaussian()
    for axis in (0, 1):
        along = np.moveaxis(plane, axis, 0)
        inner = len(along) - 2 * SSIM_RADIUS
        centre = SSIM_RADIUS
        total = weights[0] * along[centre : centre + inner]
        for distance in range(1, SSIM_RADIUS + 1):
            before, after = centre - distance, centre + distance
            total += weights[distance] * (along[before : before + inner] + along[after : after + inner])
        plane = np.moveaxis(total, 0, axis)
    return plane


def _ssim_plane(x: Plane, y: Plane) -> float:
    # SSIM needs the two variances only as their sum: four blurs, not five.
    mean_x, mean_y = _blur(x), _blur(y)
    product, squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    covariance = _blur(x * y) - product
    variances = _blur(x * x + y * y) - squares
    similarity = (2 * product + SSIM_C1) * (2 * covariance + SSIM_C2)
    similarity /= (squares + SSIM_C1) * (variances + SSIM_C2)
    return float(np.mean(similarity))


def _gradient_magnitude(plane: Plane) -> Plane:
    """Halved by 2 x 2 means, then the length of the Prewitt gradient (divided by 3) where it fits."""
    height, width = plane.shape[0] // 2 * 2, plane.shape[1] // 2 * 2
    small = plane[:height, :width].reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3))
    down = (small[:-2] + small[1:-1] + small[2:]) / 3
    across = (small[:, :-2] + small[:, 1:-1] + small[:, 2:]) / 3
    length: Plane = np.hypot(down[:, 2:] - down[:, :-2], across[2:] - across[:-2])
    return length


def contact_sheet(rows: Sequence[tuple[str, Clip]], columns: int = 6, *, cell: int = 256) -> NDArray[np.uint8]:
    """A picture that shows clips one below the other, uint8 [H', W', 3] RGB.

    Frames are evenly spaced, the first and the last among them; their numbers stand on top, the clips' labels at the
    left (shortened where too long). Frames larger than `cell` pixels are shrunk, smaller ones left as they are.

    Args:
        rows: (label, clip) from top to bottom, all clips of one length and size.
        columns: frames to show of each clip; fewer where the clips are shorter.
        cell: the longer side of a shown frame, at most, in pixels.

    Raises:
        UsageError: `columns` or `cell` is below 1.
        InputError: there is no clip, or the clips differ in frame count or size.
    """
    from PIL import Image, ImageDraw, ImageFont

    if columns < 1 or cell < 1:
        raise UsageError(
            f"A contact sheet needs at least one column and one pixel per frame, not {columns} and {cell}."
        )
    if not rows:
        raise InputError("There is no clip to put on the contact sheet.")
    first = rows[0][1]
    for _, clip in rows:
        _check_alike(first, clip)
    frames, height, width = first.shape[:3]
    picked = np.linspace(0, frames - 1, min(columns, frames)).round().astype(int).tolist()
    shrink = min(1.0, cell / max(height, width))
    shown = (max(1, round(width * shrink)), max(1, round(height * shrink)))

    font = ImageFont.load_default(FONT_SIZE)
    labels = [_shortened(label, font) for label, _ in rows]
    left = GAP + max(math.ceil(font.getlength(label)) for label in labels) + GAP
    line = FONT_SIZE + GAP
    step_x = max(shown[0], math.ceil(font.getlength(str(frames - 1)))) + GAP
    step_y = max(shown[1], line) + GAP
    sheet = Image.new("RGB", (left + len(picked) * step_x, GAP + line + len(rows) * step_y), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for column, index in enumerate(picked):
        draw.text((left + column * step_x, GAP), str(index), fill=FAINT_INK, font=font)
    for row, (label, (_, clip)) in enumerate(zip(labels, rows, strict=True)):
        top = GAP + line + row * step_y
        draw.text((GAP, top), label, fill=INK, font=font)
        for column, index in enumerate(picked):
            frame = Image.fromarray(np.ascontiguousarray(clip[index]))
            if frame.size != shown:
                frame = frame.resize(shown, Image.Resampling.LANCZOS)
            sheet.paste(frame, (left + column * step_x, top))
    return np.asarray(sheet).copy()


def _shortened(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    label = " ".join(label.split())[:WIDEST_LABEL]  # no character is narrower than a pixel
    if font.getlength(label) <= WIDEST_LABEL:
        return label
    while label and font.getlength(label + "...") > WIDEST_LABEL:
        label = label[:-1]
    return label + "..."
