"""Support of the operations: registration, checks, autocast, choice, packages, compilation, rows, packing,
Philox."""
