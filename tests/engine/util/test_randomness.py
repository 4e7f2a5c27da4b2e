"""Host choices: a pure function of (seed, index, purpose), with the same keys as on the device."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from millrace.engine.util.randomness import (
    epoch_order,
    host_generator,
    passing_generator,
)
from millrace.kernels.support.philox import sample_keys


def draws(seed=0, index=0, purpose="crop"):
    return host_generator(seed, index, purpose).random(8)


def test_same_arguments_same_numbers():
    assert np.array_equal(draws(), draws())


@pytest.mark.parametrize("changed", [{"seed": 1}, {"index": 1}, {"purpose": "flip"}])
def test_each_argument_changes_the_numbers(changed):
    assert not np.intersect1d(draws(), draws(**changed)).size


def test_neighbouring_samples_are_independent():
    """Mean over 20000 samples of one draw each, and the product of neighbours, within five deviations."""
    values = np.array([host_generator(5, index, "time").random() for index in range(20_000)]) - 0.5
    assert abs(values.mean()) < 5 * np.sqrt(1 / 12 / values.size)
    assert abs((values[1:] * values[:-1]).mean()) < 5 / 12 / np.sqrt(values.size)


@pytest.mark.parametrize("seed", [0, 42, 2**63 - 1])
@pytest.mark.parametrize("index", [0, 1, 10**12])
def test_the_key_is_that_of_the_device(seed, index):
    """NumPy's Philox under the sample's device key gives the same stream."""
    key = int(sample_keys(seed, torch.tensor([index]), "route")) & (2**64 - 1)
    expected = np.random.Generator(np.random.Philox(key=key)).random(8)
    assert np.array_equal(host_generator(seed, index, "route").random(8), expected)


@pytest.mark.parametrize("size", [0, 1, 2, 1000])
def test_an_epoch_visits_every_sample_once(size):
    order = epoch_order(3, 7, size)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(size))


def test_epochs_and_seeds_have_their_own_order():
    assert np.array_equal(epoch_order(0, 0, 100), epoch_order(0, 0, 100))
    orders = {tuple(epoch_order(seed, epoch, 100)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_every_place_of_an_epoch_is_as_likely():
    """Where sample 0 comes in 4000 epochs of 8, within five standard deviations per place."""
    epochs, size = 4000, 8
    places = np.bincount([epoch_order(0, e, size).argmin() for e in range(epochs)], minlength=size)
    share = 1 / size
    assert np.abs(places - epochs * share).max() < 5 * np.sqrt(epochs * share * (1 - share))


def test_passing_generators_draw_what_lasting_ones_do():
    """Whatever was drawn before, from any purpose and in any thread."""

    def same(i):
        for purpose in ("crop", "flip", "crop"):
            passing, lasting = passing_generator(3, i, purpose), host_generator(3, i, purpose)
            # An odd number of 32-bit draws leaves half a word behind for the next.
            for draw in ("random", "integers"):
                arguments = () if draw == "random" else (1000,)
                assert getattr(passing, draw)(*arguments) == getattr(lasting, draw)(*arguments)
            assert passing.integers(2**40) == lasting.integers(2**40)
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(same, range(400)))
