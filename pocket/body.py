"""Bodies and how they move: builds, motions, and the joints in space that follow from them.

A joint is [F, 3] float64: x to the right of the picture, y up from the ground, z towards the viewer, in pixels. A person at
yaw 0 faces the viewer, so that the person's left is on the right of the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .exact import Floats, Stream, cosine, sine

__all__ = ["POINTS", "Build", "Skeleton", "draw_build", "draw_motion"]

DEGREE = 0.017453292519943295

# OpenPose's 18 body points in its order.
POINTS = (
    "nose", "neck",
    "right shoulder", "right elbow", "right wrist", "left shoulder", "left elbow", "left wrist",
    "right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle",
    "right eye", "left eye", "right ear", "left ear",
)  # fmt: skip
SIDES = (("right", -1.0), ("left", 1.0))


@dataclass(frozen=True)
class Build:
    """Lengths in pixels (at 96 rows): of bones, and half-widths of flesh."""

    torso: float
    upper_arm: float
    forearm: float
    thigh: float
    shank: float
    shoulder: float
    hip: float
    head: float
    girth: float  # factor on all half-widths


@dataclass(frozen=True)
class Skeleton:
    """Joints in space over time. `joints`: name -> [F, 3]; yaw [F] in radians; `seen` [F, 18], as a detector would."""

    joints: dict[str, Floats]
    yaw: Floats
    roll: Floats
    points: Floats  # [F, 18, 2] columns and rows in pixels, `POINTS` order
    seen: np.ndarray  # [F, 18] bool: points on the far side of the head are not


@dataclass
class Pose:
    """Angles over time, [F] degrees each. `spread` lifts a limb sideways, `swing` forwards; both from hanging down."""

    yaw: Floats
    lean: Floats
    sway: Floats
    spread: dict[str, Floats]  # "right upper arm", "left forearm", "right thigh", "left shank", ...
    swing: dict[str, Floats]
    shift: Floats  # pixels to the right


def draw_build(stream: Stream, rows: int) -> Build:
    tall = stream.between(0.93, 1.03) * rows / 96
    legs, arms = stream.between(0.94, 1.06) * tall, stream.between(0.94, 1.06) * tall
    return Build(
        torso=24.5 * tall,
        upper_arm=13.5 * arms,
        forearm=12.5 * arms,
        thigh=17.5 * legs,
        shank=17.0 * legs,
        shoulder=stream.between(8.6, 10.6) * tall,
        hip=stream.between(4.6, 5.6) * tall,
        head=stream.between(6.4, 7.2) * tall,
        girth=stream.between(0.85, 1.25) * tall,
    )


def draw_motion(stream: Stream, motion: str, build: Build, frames: int, hold: int, size: tuple[int, int]) -> Skeleton:
    """The joints of `motion` over `frames`; the first `hold` + 1 frames show the same moment. `size`: rows, columns."""
    time = np.maximum(np.arange(frames, dtype=np.float64) - hold, 0.0)
    pose = _draw_pose(stream, motion, time)
    return _joints(build, pose, size, stream.between(-2.0, 2.0) * size[1] / 64, stream.between(3.0, 6.0) * size[0] / 96)


def _draw_pose(stream: Stream, motion: str, time: Floats) -> Pose:
    still = np.zeros_like(time)
    start = stream.between(0.0, 360.0)
    beat = start + time * stream.between(12.0, 21.0)  # degrees of a cycle: 17 to 30 frames each
    wave, other = _sin(beat), _sin(beat + 90.0)
    yaw = stream.between(-35.0, 35.0) + still
    side = stream.choice((-1.0, 1.0))
    lead, trail = ("left", "right") if side > 0 else ("right", "left")
    idle = 3.0 * wave
    spread = {
        f"{name} {part}": angle + idle
        for name in ("right", "left")
        for part, angle in (("upper arm", stream.between(8.0, 18.0)), ("forearm", stream.between(4.0, 14.0)))
    }
    stance = stream.between(2.0, 8.0)
    spread |= {f"{name} {part}": stance + still for name in ("right", "left") for part in ("thigh", "shank")}
    swing = dict.fromkeys(spread, still)
    pose = Pose(yaw, still, 2.0 * wave, spread, swing, still)

    if motion == "walk":
        pose.yaw = side * stream.between(25.0, 95.0) + 4.0 * wave
        reach = stream.between(22.0, 34.0)
        for name, phase in (("right", 0.0), ("left", 180.0)):
            thigh = reach * _sin(beat + phase)
            bend = 10.0 + 24.0 * (1.0 + _sin(beat + phase + 80.0))
            swing[f"{name} thigh"], swing[f"{name} shank"] = thigh, thigh - bend
            arm = -0.9 * reach * _sin(beat + phase)
            swing[f"{name} upper arm"], swing[f"{name} forearm"] = arm, arm + 22.0
    elif motion == "wave":
        spread[f"{lead} upper arm"] = stream.between(85.0, 120.0) + 6.0 * wave
        spread[f"{lead} forearm"] = stream.between(160.0, 185.0) + stream.between(25.0, 42.0) * wave
        if stream.chance(0.4):
            spread[f"{trail} upper arm"] = 42.0 + still
            spread[f"{trail} forearm"] = -35.0 + 2.0 * wave  # hand on the hip
    elif motion == "dance":
        pose.yaw = yaw + stream.between(10.0, 30.0) * _sin(0.5 * beat)
        pose.sway = stream.between(5.0, 10.0) * wave
        pose.shift = stream.between(1.0, 3.5) * wave
        for name, phase in ((lead, 0.0), (trail, stream.choice((0.0, 180.0)))):
            spread[f"{name} upper arm"] = stream.between(60.0, 90.0) + 35.0 * _sin(beat + phase)
            spread[f"{name} forearm"] = stream.between(110.0, 140.0) + 45.0 * _sin(beat + phase + 60.0)
        for name, phase in ((lead, 0.0), (trail, 180.0)):
            bend = 16.0 * (1.0 + _sin(beat + phase))
            swing[f"{name} thigh"], swing[f"{name} shank"] = bend, -bend
            spread[f"{name} thigh"] = 6.0 + 0.4 * bend
    elif motion == "turn":
        pose.yaw = stream.between(-60.0, 60.0) + side * stream.between(4.0, 7.0) * time
        for name, phase in (("right", 0.0), ("left", 180.0)):
            step = 9.0 * (1.0 + _sin(beat + phase))
            swing[f"{name} thigh"], swing[f"{name} shank"] = step, -step
            swing[f"{name} forearm"] = 25.0 + still
        spread[f"{lead} upper arm"] = stream.between(15.0, 60.0) + 5.0 * wave
    elif motion == "squat":
        depth = stream.between(28.0, 40.0) * (1.0 - other)
        for name in ("right", "left"):
            swing[f"{name} thigh"], swing[f"{name} shank"] = depth, -0.8 * depth
            spread[f"{name} thigh"], spread[f"{name} shank"] = 8.0 + 0.3 * depth, 4.0 + still
            swing[f"{name} upper arm"] = 1.0 * depth
            swing[f"{name} forearm"] = 1.0 * depth + 15.0
        pose.lean = 0.35 * depth
    else:  # raise
        lift = stream.between(60.0, 72.0) * (1.0 - other)
        fold = stream.between(-20.0, 30.0)
        for name in ("right", "left"):
            spread[f"{name} upper arm"] = 12.0 + lift
            spread[f"{name} forearm"] = 12.0 + lift + fold * (1.0 - other) * 0.5
    return pose


def _joints(build: Build, pose: Pose, size: tuple[int, int], offset: float, margin: float) -> Skeleton:
    yaw, lean, sway = pose.yaw * DEGREE, pose.lean * DEGREE, pose.sway * DEGREE
    zero = np.zeros_like(yaw)

    def limb(name: str, side: float, length: float) -> Floats:
        """The vector of a limb in the body's own axes: its left, up, forward."""
        spread, swing = pose.spread[name] * DEGREE, pose.swing[name] * DEGREE
        return length * _vector(side * sine(spread), -cosine(spread) * cosine(swing), cosine(spread) * sine(swing))

    body: dict[str, Floats] = {"hips": _vector(zero, zero, zero)}
    spine = build.torso * _vector(sine(sway), cosine(sway) * cosine(lean), sine(lean))
    body["neck"] = spine
    across = _vector(cosine(sway), -sine(sway), zero)
    for name, side in SIDES:
        body[f"{name} shoulder"] = spine - 0.06 * spine + side * build.shoulder * across
        body[f"{name} elbow"] = body[f"{name} shoulder"] + limb(f"{name} upper arm", side, build.upper_arm)
        body[f"{name} wrist"] = body[f"{name} elbow"] + limb(f"{name} forearm", side, build.forearm)
        body[f"{name} hip"] = _vector(side * build.hip + zero, zero, zero)
        body[f"{name} knee"] = body[f"{name} hip"] + limb(f"{name} thigh", side, build.thigh)
        body[f"{name} ankle"] = body[f"{name} knee"] + limb(f"{name} shank", side, build.shank)
        foot = _vector(zero + 0.25 * side, zero - 0.25, zero + 1.0) * (0.2 * build.shank)
        body[f"{name} toe"] = body[f"{name} ankle"] + foot
    r = build.head
    up = spine / build.torso
    body["head"] = spine + (1.25 * r) * up
    forward = _vector(zero, -sine(lean), cosine(lean))

    def on_head(left: float, high: float, front: float) -> Floats:
        return body["head"] + (left * r) * across + (high * r) * up + (front * r) * forward

    body["nose"] = on_head(0.0, -0.1, 0.95)
    body["hair"], body["crown"] = on_head(0.0, 0.22, -0.28), on_head(0.0, -0.1, 0.25)
    body["braid"] = on_head(0.0, -1.9, -0.75)
    body["mouth"] = on_head(0.0, -0.5, 0.85)
    for name, side in SIDES:
        body[f"{name} eye"] = on_head(0.38 * side, 0.1, 0.85)
        body[f"{name} ear"] = on_head(0.95 * side, 0.0, -0.05)

    # The lower foot stands on the ground; then the body turns about its own axis and is put into the picture.
    lowest = np.minimum(body["right ankle"][:, 1], body["left ankle"][:, 1])
    cos, sin = cosine(yaw), sine(yaw)
    joints = {
        name: _vector(
            joint[:, 0] * cos + joint[:, 2] * sin + 0.5 * size[1] + offset + pose.shift,
            joint[:, 1] - lowest + margin,
            joint[:, 2] * cos - joint[:, 0] * sin,
        )
        for name, joint in body.items()
    }
    points = np.stack([np.stack([joints[p][:, 0], size[0] - joints[p][:, 1]], -1) for p in POINTS], 1)
    seen = np.ones(points.shape[:2], bool)
    for i, name in enumerate(POINTS):
        if name in ("nose", "right eye", "left eye", "right ear", "left ear"):
            nearer = joints[name][:, 2] - joints["head"][:, 2]
            seen[:, i] = nearer > (-0.5 * r if "ear" in name else -0.1 * r)
    return Skeleton(joints, yaw, sway, points, seen)


def _vector(x: Floats, y: Floats, z: Floats) -> Floats:
    """[F], [F], [F] -> [F, 3]"""
    return np.stack(np.broadcast_arrays(x, y, z), -1)


def _sin(degrees: Floats) -> Floats:
    return sine(degrees * DEGREE)
