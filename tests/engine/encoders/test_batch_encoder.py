"""From pictures and captions to packed tokens, with towers whose output is known."""

import pytest
import torch

from millrace.engine.config import Autoencoder, TextTower
from millrace.engine.data import Batch, signed_unit
from millrace.engine.encoders.autoencoder import open_autoencoder
from millrace.engine.encoders.batch_encoder import BatchEncoder
from millrace.engine.encoders.text_encoder import open_text_encoder
from millrace.engine.model.layout import LayoutCache, unpatchify

CPU = torch.device("cpu")
GRIDS = [(2, 3), (4, 4), (2, 3)]


class Halving:
    """An autoencoder that averages 2 x 2 pixels and adds the posterior's noise as it is."""

    channels, factor, stochastic, identity = 3, 2, True, "halving"

    def encode(self, images, noise=None):
        return torch.nn.functional.avg_pool2d(images, 2) + noise


def batch_of(first=0):
    generator = torch.Generator().manual_seed(1)
    images = [
        torch.randint(256, (3, 8 * rows, 8 * columns), dtype=torch.uint8, generator=generator)
        for rows, columns in GRIDS
    ]
    captions = ["a cat", "", "one two three"]
    return Batch(images, captions, ["a", "b", "c"], torch.arange(first, first + 3))


def preparation(autoencoder, patch, seed=0):
    tower = open_text_encoder(TextTower(kind="hash"), 8, CPU, torch.float32)
    return BatchEncoder(autoencoder, tower, LayoutCache((4, 4), 10_000.0), patch, seed, CPU)


def pixels():
    return open_autoencoder(Autoencoder(kind="pixels"), CPU)


def test_pixels_come_back_out_of_the_pack():
    batch = batch_of()
    prepared = preparation(pixels(), 8)(batch)
    assert prepared.layout.grids == tuple(GRIDS)
    assert prepared.layout.cu_seqlens.tolist() == [0, 6, 22, 28]
    assert prepared.clean.shape == (28, 3 * 64)
    for tokens, grid, image in zip(prepared.clean.split([6, 16, 6]), GRIDS, batch.images, strict=True):
        assert torch.equal(unpatchify(tokens, grid, 8), signed_unit(image))
    assert prepared.keys == ["a", "b", "c"]
    assert prepared.sample_index.tolist() == [0, 1, 2]


def test_text_is_packed_in_sample_order():
    batch = batch_of()
    prepared = preparation(pixels(), 8)(batch)
    tower = open_text_encoder(TextTower(kind="hash"), 8, CPU, torch.float32)
    alone = [tower.encode([caption]).embeddings for caption in batch.captions]
    assert [len(rows) for rows in alone] == [3, 1, 4]  # words and the end token
    assert torch.equal(prepared.text, torch.cat(alone))
    assert prepared.layout.cu_seqlens_text.tolist() == [0, 3, 4, 8]
    assert prepared.layout.max_seqlen_text >= 4


def test_latents_keep_their_sample_though_sizes_are_encoded_together():
    batch = batch_of()
    with_noise = preparation(Halving(), 4)(batch)
    assert with_noise.layout.grids == tuple(GRIDS)
    for i, tokens in enumerate(with_noise.clean.split([6, 16, 6])):
        single = Batch([batch.images[i]], [batch.captions[i]], [batch.keys[i]], batch.sample_index[i : i + 1])
        assert torch.equal(preparation(Halving(), 4)(single).clean, tokens)


@pytest.mark.parametrize("part", range(3))
def test_the_posteriors_noise_is_normal_and_belongs_to_the_sample(part):
    batch = batch_of()
    means = torch.nn.functional.avg_pool2d(signed_unit(batch.images[part])[None], 2)[0]

    def noise(first=0, seed=0):
        tokens = preparation(Halving(), 4, seed)(batch_of(first)).clean.split([6, 16, 6])[part]
        return unpatchify(tokens, GRIDS[part], 4) - means

    n = noise().numel()
    assert abs(float(noise().mean())) < 4 / n**0.5
    assert float(noise().std()) == pytest.approx(1, abs=4 / (2 * n) ** 0.5)
    assert not torch.equal(noise(), noise(first=3))
    assert not torch.equal(noise(), noise(seed=1))


def test_nothing_is_recorded_for_backward():
    prepared = preparation(pixels(), 8)(batch_of())
    assert not prepared.clean.requires_grad
    assert not prepared.text.requires_grad
    assert not prepared.clean.is_inference()
