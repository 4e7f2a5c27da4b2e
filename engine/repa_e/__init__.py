"""REPA-E: end-to-end tuning of the autoencoder; an ordinary run imports nothing of it."""
