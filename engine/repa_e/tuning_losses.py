"""Losses of the autoencoder and its discriminator in end-to-end tuning (REPA-E, arXiv 2504.10483).

    autoencoder      w_r |x - x'| + w_p LPIPS(x, x') + w_k KL(q || N(0, 1)) - w_g D(x') + w_a alignment
    discriminator    (max(0, 1 - D(x)) + max(0, 1 + D(x'))) / 2

x is a picture, x' its reconstruction from a sample of the posterior q, D the logits of the discriminator.
Pixels and logits are averaged over a picture, the divergence is summed over its latents; then all are
averaged over samples. Every function gives one number a sample.

The weights are constants, as in the authors' code: VQGAN's adaptive weight of the adversarial term is not
there.
"""

import torch.nn.functional as F
from torch import Tensor

from millrace.kernels.support.packed import widen


def reconstruction_loss(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean absolute error (B,) of pictures (B, 3, h, w)."""
    return (widen(reconstruction) - widen(image)).abs().flatten(1).mean(1)


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) (B,), in nats, summed over the latents (B, C, h, w)."""
    mean, logvar = widen(mean), widen(logvar)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


def generator_loss(fake: Tensor) -> Tensor:
    """-mean(fake) (B,) of the logits (B, ...) of reconstructions."""
    return -widen(fake).flatten(1).mean(1)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss (B,) of the logits (B, ...) of pictures and of their reconstructions (Lim & Ye,
    arXiv 1705.02894), halved as in VQGAN's code."""
    above = F.relu(1 - widen(real)).flatten(1).mean(1)
    below = F.relu(1 + widen(fake)).flatten(1).mean(1)
    return (above + below) / 2
