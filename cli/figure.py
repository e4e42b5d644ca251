"""A procedurally drawn person and pose clip for the demo: OpenPose's body points and colours, as DynamiCtrl is given."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["body", "draw_photo", "draw_pose_clip"]

# Pairs of body points (OpenPose 18) and one colour per pair, red to magenta round the hue circle.
LIMBS = (
    ("neck", "right shoulder"),
    ("neck", "left shoulder"),
    ("right shoulder", "right elbow"),
    ("right elbow", "right wrist"),
    ("left shoulder", "left elbow"),
    ("left elbow", "left wrist"),
    ("neck", "right hip"),
    ("right hip", "right knee"),
    ("right knee", "right ankle"),
    ("neck", "left hip"),
    ("left hip", "left knee"),
    ("left knee", "left ankle"),
    ("neck", "nose"),
    ("nose", "right eye"),
    ("right eye", "right ear"),
    ("nose", "left eye"),
    ("left eye", "left ear"),
)

Points = dict[str, tuple[float, float]]


def body(phase: float) -> Points:
    """Joint positions at `phase` (0..1) of a wave with the left arm; x, y as shares of the frame's height, x from its middle."""
    swing = math.sin(2 * math.pi * phase)
    points = {
        "nose": (0.0, 0.16),
        "right eye": (-0.02, 0.145),
        "left eye": (0.02, 0.145),
        "right ear": (-0.04, 0.155),
        "left ear": (0.04, 0.155),
        "neck": (0.0, 0.24),
    }
    for side, sign in (("right", -1), ("left", 1)):
        points[f"{side} shoulder"] = (sign * 0.085, 0.25)
        points[f"{side} hip"] = (sign * 0.05, 0.52)
        points[f"{side} knee"] = (sign * (0.06 + 0.01 * swing), 0.7)
        points[f"{side} ankle"] = (sign * 0.065, 0.88)
    points["right elbow"], points["right wrist"] = (-0.12, 0.38), (-0.12 - 0.01 * swing, 0.5)
    lift = math.radians(-60 + 35 * swing)
    points["left elbow"] = (0.16, 0.32)
    points["left wrist"] = (0.16 + 0.13 * math.cos(lift), 0.32 + 0.13 * math.sin(lift))
    return points


def draw_pose_clip(height: int, width: int, frames: int) -> np.ndarray:
    """[frames, height, width, 3] uint8: the skeleton on black, one wave."""
    return np.stack([_skeleton(height, width, body(i / max(1, frames - 1))) for i in range(frames)])


def draw_photo(height: int, width: int) -> np.ndarray:
    """[height, width, 3] uint8: the person at the start of the wave, in a blue shirt on a meadow."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, height), (150, 190, 235))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, int(0.6 * height), width, height), fill=(90, 150, 70))
    points = {name: _pixel(point, height, width) for name, point in body(0.0).items()}

    def limb(names: tuple[str, ...], colour: tuple[int, int, int], share: float) -> None:
        draw.line([points[name] for name in names], fill=colour, width=max(2, int(share * height)), joint="curve")

    for side in ("right", "left"):
        limb((f"{side} hip", f"{side} knee", f"{side} ankle"), (50, 50, 70), 0.06)
        limb((f"{side} shoulder", f"{side} elbow"), (40, 80, 170), 0.05)
        limb((f"{side} elbow", f"{side} wrist"), (225, 180, 150), 0.035)
    corners = ("right shoulder", "left shoulder", "left hip", "right hip")
    draw.polygon([points[name] for name in corners], fill=(40, 80, 170))
    x, y = points["nose"]
    radius = 0.055 * height
    draw.ellipse((x - radius, y - 1.3 * radius, x + radius, y + 1.3 * radius), fill=(225, 180, 150))
    draw.pieslice((x - radius, y - 1.4 * radius, x + radius, y + 0.6 * radius), 180, 360, fill=(70, 45, 25))
    return np.asarray(image)


def _pixel(point: tuple[float, float], height: int, width: int) -> tuple[float, float]:
    return width / 2 + point[0] * height, point[1] * height


def _skeleton(height: int, width: int, points: Points) -> np.ndarray:
    import colorsys

    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    stick = max(2, round(0.015 * height))
    for i, (a, b) in enumerate(LIMBS):
        colour = tuple(int(255 * 0.6 * c) for c in colorsys.hsv_to_rgb(i / (len(LIMBS) + 1), 1, 1))
        draw.line([_pixel(points[a], height, width), _pixel(points[b], height, width)], fill=colour, width=stick)
    for i, point in enumerate(points.values()):
        colour = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(i / len(points), 1, 1))
        x, y = _pixel(point, height, width)
        draw.ellipse((x - stick / 2, y - stick / 2, x + stick / 2, y + stick / 2), fill=colour)
    return np.asarray(image)
