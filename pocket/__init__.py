"""Pocket: a DynamiCtrl small enough to train on two processor cores, and the drawn people it is trained on.

`clips.make_clip` draws a clip with everything that is known of it, `python -m pocket.training.train --out FOLDER` trains VAE, text
encoder and transformer, `evaluate` measures a checkpoint on clips that were never trained on.
"""
