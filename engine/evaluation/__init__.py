"""Evaluation: FID, CMMD, DINO-MMD, and what they need."""
