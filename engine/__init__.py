"""Training engine for text-to-image flow transformers."""
