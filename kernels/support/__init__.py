"""Support of the operations: registration, checks, autocast, choice, packages, compilation, accuracy, rows,
packing, Philox."""
