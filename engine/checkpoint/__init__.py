"""Checkpoints: writing, verifying, reading, resuming."""
