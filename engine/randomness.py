"""Randomness that belongs to the sample, host side.

Every random choice about a sample (crop, caption, time, noise, route) is a pure function of
(seed, global sample index, purpose). A run therefore does not depend on how many processes it has,
on micro-batching, or on where it was interrupted. Host choices draw from NumPy's Philox, device choices
from `millrace.kernels.random`; both take their keys from the same hash.
"""

import numpy as np

from millrace.kernels.random import hash_key, stream_key


def host_generator(seed: int, index: int, purpose: str) -> np.random.Generator:
    """A NumPy generator for one choice about sample (or epoch) `index`."""
    return np.random.Generator(np.random.Philox(key=hash_key(stream_key(seed, purpose) ^ index)))


def epoch_order(seed: int, epoch: int, size: int, purpose: str = "order") -> np.ndarray:
    """Permutation (size,) int64 in which epoch `epoch` visits a data set of `size` samples."""
    return host_generator(seed, epoch, purpose).permutation(size)
