"""Encoders: the frozen networks around the denoiser, and how a batch is encoded ahead of the step."""
