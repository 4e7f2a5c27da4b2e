"""REPA-E autoencoder: FLUX.1's, tuned end to end with a denoiser (arXiv 2504.10483)."""

from dataclasses import replace

from millrace.engine.encoders.autoencoder import diffusers_entry
from millrace.engine.encoders.autoencoders.flux1 import FLUX1

ENTRY = diffusers_entry(16, 8, replace(FLUX1, source="REPA-E/e2e-flux-vae"))
