"""Losses of end-to-end tuning against their formulas written out, in float64, values and gradients."""

import math

import pytest
import torch

from millrace.engine.repa_e.tuning_losses import (
    discriminator_loss,
    generator_loss,
    kl_divergence,
    reconstruction_loss,
)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_reconstruction_is_the_mean_absolute_error_of_each_picture():
    image, fake = drawn(2, 3, 4, 5), drawn(2, 3, 4, 5, seed=1)
    for b, found in enumerate(reconstruction_loss(image, fake)):
        numbers = zip(image[b].flatten().tolist(), fake[b].flatten().tolist(), strict=True)
        errors = [abs(x - y) for x, y in numbers]
        assert float(found) == pytest.approx(sum(errors) / len(errors), rel=1e-14)


def test_divergence_is_that_of_two_normal_distributions():
    mean, logvar = drawn(2, 3, 2, 2), drawn(2, 3, 2, 2, seed=1)
    q = torch.distributions.Normal(mean, (logvar / 2).exp())
    p = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    wanted = torch.distributions.kl_divergence(q, p).sum((1, 2, 3))
    torch.testing.assert_close(kl_divergence(mean, logvar), wanted, rtol=1e-12, atol=1e-12)


def test_divergence_is_that_of_the_autoencoders_posterior():
    vae = pytest.importorskip("diffusers.models.autoencoders.vae")
    parameters = drawn(2, 6, 2, 2)
    posterior = vae.DiagonalGaussianDistribution(parameters)
    torch.testing.assert_close(
        kl_divergence(posterior.mean, posterior.logvar), posterior.kl(), rtol=1e-12, atol=1e-12
    )


def test_adversarial_losses():
    real, fake = drawn(3, 1, 2, 2) * 2, drawn(3, 1, 2, 2, seed=1) * 2
    found = generator_loss(fake), discriminator_loss(real, fake)
    for b in range(3):
        r, f = real[b].flatten().tolist(), fake[b].flatten().tolist()
        hinge = sum(max(0, 1 - x) for x in r) / 4 + sum(max(0, 1 + x) for x in f) / 4
        assert float(found[0][b]) == pytest.approx(-sum(f) / 4, rel=1e-14)
        assert float(found[1][b]) == pytest.approx(hinge / 2, rel=1e-14)


@pytest.mark.parametrize(
    "loss", [reconstruction_loss, kl_divergence, discriminator_loss], ids=lambda loss: loss.__name__
)
def test_gradients(loss):
    first, second = drawn(2, 3, 2, 2), drawn(2, 3, 2, 2, seed=1)
    inputs = [x.requires_grad_() for x in (first, second)]
    assert torch.autograd.gradcheck(lambda *x: loss(*x).sum(), inputs)


def test_gradient_of_the_generator():
    fake = drawn(2, 1, 2, 2).requires_grad_()
    generator_loss(fake).sum().backward()
    torch.testing.assert_close(fake.grad, torch.full_like(fake, -1 / 4))


def test_a_normal_posterior_has_no_divergence():
    assert kl_divergence(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)).tolist() == [0.0]
    # A posterior of standard deviation s around 0 has ln(1/s) + (s^2 - 1) / 2 for each latent.
    wide = kl_divergence(torch.zeros(1, 2, 3, 3), torch.full((1, 2, 3, 3), 2 * math.log(3.0)))
    assert float(wide) == pytest.approx(18 * (-math.log(3.0) + 4), rel=1e-6)
