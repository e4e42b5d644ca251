"""Turns a bundle into a quantized bundle, from what the runtime itself sees on a calibration set, and shows what it cost."""
