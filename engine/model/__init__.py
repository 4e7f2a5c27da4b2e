"""Model: the PRX denoiser on packed tokens."""
