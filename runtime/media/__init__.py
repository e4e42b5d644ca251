"""Pictures and clips in, clips out. Everything inside is numpy, [frames, rows, columns, RGB], uint8.

Pillow and PyAV are imported when a file is opened, so importing this package costs next to nothing.
"""

from __future__ import annotations

from .clip import read_clip
from .fit import FITS, Fit
from .photo import load_photo, photo_to_tensor
from .pose import DEFAULT_FOLDER_FPS, PoseClip, load_pose, pose_to_tensor
from .timing import Rate, as_rate
from .writer import FrameWriter, check_writer_target, open_writer

__all__ = [
    "DEFAULT_FOLDER_FPS",
    "FITS",
    "Fit",
    "FrameWriter",
    "PoseClip",
    "Rate",
    "as_rate",
    "check_writer_target",
    "load_photo",
    "load_pose",
    "open_writer",
    "photo_to_tensor",
    "pose_to_tensor",
    "read_clip",
]
