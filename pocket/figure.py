"""A person as layers, from far to near, and the pose drawing that DynamiCtrl is given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .body import POINTS, Build, Skeleton
from .exact import Floats, cosine, sine
from .paint import Layer, capsule, ellipse, trapezoid
from .wardrobe import RGB, Look

__all__ = ["PARTS", "Part", "draw_person", "draw_pose"]

# What a pixel shows. 0 is the background.
PARTS = ("background", "skin", "hair", "top", "bottom", "shoes", "face")

# OpenPose's limbs in drawing order, and the hues that limbs and points share in that order.
LIMBS = (
    ("neck", "right shoulder"), ("neck", "left shoulder"), ("right shoulder", "right elbow"),
    ("right elbow", "right wrist"), ("left shoulder", "left elbow"), ("left elbow", "left wrist"),
    ("neck", "right hip"), ("right hip", "right knee"), ("right knee", "right ankle"),
    ("neck", "left hip"), ("left hip", "left knee"), ("left knee", "left ankle"),
    ("neck", "nose"), ("nose", "right eye"), ("right eye", "right ear"), ("nose", "left eye"), ("left eye", "left ear"),
)  # fmt: skip
HUES: tuple[RGB, ...] = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0),
    (0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255),
    (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85),
)  # fmt: skip
LIMB_BRIGHTNESS = 0.6


@dataclass(frozen=True)
class Part:
    """A painted part: layer, colour, kind (an index of `PARTS`), and its distance [F], larger is nearer."""

    layer: Layer
    colour: RGB
    kind: int
    near: Floats


def draw_person(
    skeleton: Skeleton, build: Build, look: Look, colours: dict[str, RGB], size: tuple[int, int]
) -> list[Part]:
    """The parts of a person, in no order. `colours`: of hair, top and bottom as they are in this clip."""
    joints = skeleton.joints
    flat = {name: np.stack([joint[:, 0], size[0] - joint[:, 1]], -1) for name, joint in joints.items()}
    turned, faced = np.abs(sine(skeleton.yaw)), np.abs(cosine(skeleton.yaw))
    g, r = build.girth, build.head
    parts: list[Part] = []

    def add(layer: Layer, colour: RGB, kind: str, near: Floats) -> None:
        parts.append(Part(layer, colour, PARTS.index(kind), near))

    def stick(a: str, b: str, start: float, end: float, colour: RGB, kind: str, bias: float = 0.0) -> None:
        depth = 0.5 * (joints[a][:, 2] + joints[b][:, 2]) + bias
        add(capsule(flat[a], flat[b], start, end, size), colour, kind, depth)

    top, bottom, hair = colours["top"], colours["bottom"], colours["hair"]
    long_sleeves, dress = look.top == "sweater", look.top == "dress"
    for side in ("right", "left"):
        leg = bottom if look.bottom == "trousers" else look.skin
        leg_kind = "bottom" if look.bottom == "trousers" else "skin"
        thigh = (bottom, "bottom") if look.bottom != "skirt" else (look.skin, "skin")
        stick(f"{side} hip", f"{side} knee", 4.3 * g, 3.2 * g, *thigh)
        stick(f"{side} knee", f"{side} ankle", 3.0 * g, 2.1 * g, leg, leg_kind, -0.5)
        stick(f"{side} ankle", f"{side} toe", 2.2 * g, 2.0 * g, look.shoes, "shoes", 0.5)
        sleeve = (look.skin, "skin") if dress else (top, "top")
        stick(f"{side} shoulder", f"{side} elbow", 2.9 * g, 2.3 * g, *sleeve, 1.5)
        forearm = (top, "top") if long_sleeves else (look.skin, "skin")
        stick(f"{side} elbow", f"{side} wrist", 2.2 * g, 1.8 * g, *forearm, 2.5)
        ahead = flat[f"{side} wrist"] + 0.16 * (flat[f"{side} wrist"] - flat[f"{side} elbow"])
        add(ellipse(ahead, 2.2 * g, 2.2 * g, size), look.skin, "skin", joints[f"{side} wrist"][:, 2] + 2.4)

    # The trunk is an oval seen from some side.
    wide = np.sqrt((faced * build.shoulder) * (faced * build.shoulder) + (turned * 4.6 * g) * (turned * 4.6 * g))
    waist = (
        np.sqrt((faced * build.hip * 1.25) * (faced * build.hip * 1.25) + (turned * 4.2 * g) * (turned * 4.2 * g))
        + 0.8 * g
    )
    trunk = joints["hips"][:, 2]
    chest = flat["neck"] + 0.06 * (flat["hips"] - flat["neck"])
    add(trapezoid(chest, flat["hips"], wide, waist, size), top, "top", trunk)
    add(capsule(flat["right shoulder"], flat["left shoulder"], 2.9 * g, 2.9 * g, size), top, "top", trunk + 0.1)
    stick("neck", "head", 2.5 * g, 2.3 * g, look.skin, "skin", 0.3)
    if look.bottom == "skirt":
        knees = 0.5 * (flat["right knee"] + flat["left knee"])
        hem = flat["hips"] + 0.8 * (knees - flat["hips"])
        apart = 0.35 * np.abs(flat["right knee"][:, 0] - flat["left knee"][:, 0])
        above = flat["hips"] + 0.12 * (flat["neck"] - flat["hips"])
        kind, colour = ("top", top) if dress else ("bottom", bottom)
        # In front of both thighs, whichever way the person stands.
        thighs = [0.5 * (joints[f"{side} hip"][:, 2] + joints[f"{side} knee"][:, 2]) for side in ("right", "left")]
        near = np.maximum(trunk, np.maximum(*thighs)) + 0.8
        add(trapezoid(above, hem, waist, waist + apart + 2.2 * g, size), colour, kind, near)
    else:
        stick("right hip", "left hip", 4.3 * g, 4.3 * g, bottom, "bottom", -0.2)

    add(ellipse(flat["head"], 0.98 * r, 1.1 * r, size), look.skin, "skin", joints["head"][:, 2] + 0.6)
    add(ellipse(flat["crown"], 0.80 * r, 0.95 * r, size), look.skin, "skin", joints["crown"][:, 2] + 0.8)
    add(ellipse(flat["hair"], 1.1 * r, 1.1 * r, size), hair, "hair", joints["hair"][:, 2] + 0.7)
    if look.long_hair:
        add(capsule(flat["hair"], flat["braid"], 0.95 * r, 0.7 * r, size), hair, "hair", joints["braid"][:, 2])
    for name, dark, wide_, high in (
        ("right eye", (40, 35, 45), 0.17, 0.2),
        ("left eye", (40, 35, 45), 0.17, 0.2),
        ("mouth", (150, 60, 60), 0.3, 0.11),
    ):
        seen = joints[name][:, 2] - joints["head"][:, 2]  # shrinks to nothing at the rim of the head
        open_ = np.clip(seen / (0.5 * r), 0.001, 1.0)
        spot = ellipse(flat[name], wide_ * r * open_, high * r, size)
        spot = Layer(spot.cover * np.clip(seen, 0.0, 1.0)[:, None, None], np.ones_like(spot.cover), spot.top, spot.left)
        add(spot, dark, "face", joints["crown"][:, 2] + 1.0)
    return parts


def draw_pose(skeleton: Skeleton, size: tuple[int, int]) -> NDArray[np.uint8]:
    """[F, H, W, 3]: the body points as DWPose draws them, sticks thick enough for small pictures (3 px at 96 rows)."""
    points, seen = skeleton.points, skeleton.seen
    thick = 1.6 * size[0] / 96
    picture = np.zeros((len(points), *size, 3))
    for (a, b), hue in zip(LIMBS, HUES, strict=False):
        i, j = POINTS.index(a), POINTS.index(b)
        layer = capsule(points[:, i], points[:, j], 0.85 * thick, 0.85 * thick, size, flat=True)
        _lay(picture, layer, tuple(LIMB_BRIGHTNESS * c for c in hue), seen[:, i] & seen[:, j])
    for i, hue in enumerate(HUES):
        _lay(picture, ellipse(points[:, i], thick, thick, size), hue, seen[:, i])
    return np.floor(picture + 0.5).astype(np.uint8)


def _lay(picture: Floats, layer: Layer, colour: tuple[float, ...], seen: NDArray[np.bool_]) -> None:
    rows, columns = layer.area
    cover = (layer.cover * seen[:, None, None])[..., None]
    under = picture[:, rows, columns]
    picture[:, rows, columns] = under + cover * (np.asarray(colour) - under)
