"""Comparison of runs: their curves, the noise between seeds, verdicts."""
