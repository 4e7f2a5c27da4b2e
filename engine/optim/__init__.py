"""Optimizers, learning-rate schedule, EMA."""
