"""Data sources: where pictures and captions come from, one kind a file."""
