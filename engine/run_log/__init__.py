"""Run log: what a run writes for people and programs."""
