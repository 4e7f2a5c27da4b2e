"""Support of the operations: registration, checks, autocast, choice, compilation, rows, packing, Philox."""
