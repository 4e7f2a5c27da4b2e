"""Sampling: solver, guidance, trained models, grids."""
