"""Checkpoints: saving, verifying, loading, resuming."""
