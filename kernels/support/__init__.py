"""Support of the operations: registration, checks, choice, compilation, rows, packing, Philox."""
