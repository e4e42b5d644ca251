"""Checkpoint in, bundle out. The only part of the project that imports torch."""
