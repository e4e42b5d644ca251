"""Training of the pocket checkpoint, from a clone: `python -m pocket.training.train --out FOLDER`."""
