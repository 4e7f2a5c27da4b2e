"""Text encoders, one kind a file: `ENTRY` of each is what the registry finds."""
