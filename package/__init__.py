"""DynamiCtrl Edge: animate a photo with a pose clip and a prompt, fast, on one NVIDIA GPU (or a CPU)."""

__version__ = "0.1.0"
