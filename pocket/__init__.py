"""Pocket: a DynamiCtrl small enough to train on two processor cores, and the drawn people it is trained on.

`MODEL` is the trained checkpoint (diffusers layout) that comes with this package, `clips.make_clip` draws a clip with everything
that is known of it, `evaluate` measures a model on clips that were never trained on. Training itself
(`python -m pocket.training.train --out FOLDER`) is in the source repository only.
"""

from pathlib import Path

__all__ = ["MODEL"]

MODEL = Path(__file__).resolve().parent / "model"
