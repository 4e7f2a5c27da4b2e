"""The frozen networks around the denoiser: text towers (`text`) and autoencoders (`autoencoder`)."""
