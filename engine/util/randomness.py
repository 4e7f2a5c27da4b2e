"""Randomness that belongs to the sample, host side.

Every random choice about a sample (crop, caption, time, noise, route) is a pure function of
(seed, global sample index, purpose). A run therefore does not depend on how many processes it has,
on micro-batching, or on where it was interrupted. Host choices draw from NumPy's Philox, device choices
from `millrace.kernels.support.philox`; both take their keys from the same hash.
"""

import threading

import numpy as np

from millrace.kernels.support.philox import (
    hash_key,
    stream_key,
)

_of_thread = threading.local()


def host_generator(seed: int, index: int, purpose: str) -> np.random.Generator:
    """A NumPy generator for one choice about sample (or epoch) `index`."""
    return np.random.Generator(np.random.Philox(key=hash_key(stream_key(seed, purpose) ^ index)))


def passing_generator(seed: int, index: int, purpose: str) -> np.random.Generator:
    """What `host_generator` gives, until the next call in the same thread, and in a tenth of the time: the
    thread's one generator is set to another key."""
    if not hasattr(_of_thread, "state"):
        _of_thread.philox = np.random.Philox(key=0)
        _of_thread.generator = np.random.Generator(_of_thread.philox)
        _of_thread.state = _of_thread.philox.state  # nothing drawn, nothing buffered
    _of_thread.state["state"]["key"][0] = hash_key(stream_key(seed, purpose) ^ index)
    _of_thread.philox.state = _of_thread.state
    return _of_thread.generator


def epoch_order(seed: int, epoch: int, size: int, purpose: str = "order") -> np.ndarray:
    """Permutation (size,) int64 in which epoch `epoch` visits a data set of `size` samples."""
    return host_generator(seed, epoch, purpose).permutation(size)
