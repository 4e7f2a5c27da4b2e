"""Pixels in place of an autoencoder: the denoiser works on pictures in [-1, 1] (JiT)."""

import torch
from torch import Tensor

from millrace.engine import config as settings
from millrace.engine.encoders.autoencoder import Autoencoder, AutoencoderEntry, Posterior


class Pixels(Autoencoder):
    """No autoencoder: the denoiser works on pixels in [-1, 1]."""

    channels = 3
    factor = 1
    identity = "pixels"
    stochastic = False

    def _posterior(self, images: Tensor) -> Posterior:
        return Posterior(images, None)

    def _sample(self, posterior: Posterior, noise: Tensor | None) -> Tensor:
        return posterior.sampled(None)

    def _decode(self, latents: Tensor) -> Tensor:
        return latents


def _open(_config: settings.Autoencoder, _device: torch.device) -> Autoencoder:
    return Pixels()


ENTRY = AutoencoderEntry(Pixels.channels, Pixels.factor, _open)
