"""Batch normalisation of latents against torch.nn.BatchNorm2d in float64."""

import torch

from millrace.engine.model.layout import patchify, unpatchify
from millrace.engine.repa_e.latent_norm import LatentNorm

CPU = torch.device("cpu")
CHANNELS, PATCH, MOMENTUM, EPS = 3, 2, 0.1, 1e-4


def norm():
    return LatentNorm(CHANNELS, PATCH, MOMENTUM, EPS, CPU)


def reference():
    return torch.nn.BatchNorm2d(CHANNELS, eps=EPS, momentum=MOMENTUM, affine=False).double()


def latents(seed=0, samples=4, height=6, width=4):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.5, 2.0, 10.0])[:, None, None]
    return torch.randn(samples, CHANNELS, height, width, generator=generator) * scale + scale


def packed(z):
    return patchify(z, PATCH).flatten(0, 1)


def unpacked(patches, z):
    grid = (z.shape[2] // PATCH, z.shape[3] // PATCH)
    return unpatchify(patches.unflatten(0, (len(z), -1)), grid, PATCH)


def test_training_and_evaluation_are_those_of_batch_norm():
    ours, theirs = norm(), reference()
    for seed in range(3):
        z = latents(seed)
        statistics = ours.statistics(ours.sums(z))
        found = unpacked(ours.normalise(packed(z), statistics), z)
        torch.testing.assert_close(found, theirs.train()(z.double()).float(), rtol=1e-5, atol=1e-6)
        ours.update(statistics)
        torch.testing.assert_close(ours.mean, theirs.running_mean.float())
        torch.testing.assert_close(ours.variance, theirs.running_var.float())
        found = unpacked(ours.evaluate(packed(z)), z)
        torch.testing.assert_close(found, theirs.eval()(z.double()).float(), rtol=1e-5, atol=1e-6)


def test_gradient_of_evaluation_treats_the_statistics_as_constants():
    ours = norm()
    z = latents()
    ours.update(ours.statistics(ours.sums(z)))
    patches = packed(z).requires_grad_()
    ours.evaluate(patches).sum().backward()
    wanted = (ours.variance + EPS).rsqrt()[:, None, None].expand(len(z), -1, *z.shape[2:])
    torch.testing.assert_close(patches.grad, packed(wanted))


def test_scale_and_shift_are_evaluation():
    ours = norm()
    z = latents()
    ours.update(ours.statistics(ours.sums(z)))
    found = ours.scale * (z - ours.shift)
    torch.testing.assert_close(found, unpacked(ours.evaluate(packed(z)), z), rtol=1e-5, atol=1e-6)


def test_a_batch_of_pictures_of_several_sizes_counts_positions():
    wide, small = latents(0, samples=2), latents(1, samples=1, height=2, width=2)
    ours = norm()
    mean, variance, count = ours.statistics(torch.cat([ours.sums(wide), ours.sums(small)]))
    everything = torch.cat([x.double().transpose(0, 1).flatten(1) for x in (wide, small)], dim=1)
    torch.testing.assert_close(mean, everything.mean(1))
    torch.testing.assert_close(variance, everything.var(1, correction=0))
    assert int(count) == 2 * 24 + 4


def test_a_momentum_of_one_replaces_the_running_statistics():
    ours, z = norm(), latents()
    ours.update(ours.statistics(ours.sums(z)), momentum=1.0)
    everything = z.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(ours.mean, everything.mean(1).float())
    torch.testing.assert_close(ours.variance, everything.var(1).float())


def test_a_large_offset_does_not_lose_the_variance():
    z = latents() + 1000
    _, variance, _ = norm().statistics(LatentNorm.sums(z))
    wanted = z.double().transpose(0, 1).flatten(1).var(1, correction=0)
    torch.testing.assert_close(variance, wanted, rtol=1e-6, atol=0)
