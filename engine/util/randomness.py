"""Random keys of samples, host side: purposes of draws, and NumPy generators for them.

Every random choice about a sample (crop, caption, time, noise, route) is a pure function of
(seed, global sample index, purpose). A run therefore does not depend on how many processes it has,
on micro-batching, or on where it was interrupted. Host choices draw from NumPy's Philox, device choices
from `millrace.kernels.support.philox`; both take their keys from `millrace.kernels.support.keys`.
"""

import threading
from enum import StrEnum, unique

import numpy as np

from millrace.kernels.support.keys import GOLDEN, MIX, hash_key, stream_key

_of_thread = threading.local()


@unique
class Purpose(StrEnum):
    """What a draw is for. Two draws of one purpose about one sample are the same numbers: each has its own.

    The values are hashed into the keys: another value is another run.
    """

    ORDER = "order"
    """Permutation of an epoch, keyed by epoch. In a mixture or with buckets: `of` the part and the size."""
    RUNS = "runs"
    """Order of the runs of aspect-ratio buckets in an epoch, keyed by epoch; in a mixture `of` the part."""
    MIXTURE = "mixture"
    """Which slot of a step goes to which part of a mixture, keyed by step."""
    CROP = "crop"
    FLIP = "flip"
    CAPTION = "caption"
    """Long or short caption."""
    CAPTION_DROP = "caption drop"
    POSTERIOR = "posterior"
    """The autoencoder's noise."""
    TIME = "time"
    """Timestep of the flow."""
    NOISE = "noise"
    """Noise of the flow."""
    NEGATIVE = "negative"
    """How many places on the negative of the contrastive term stands."""
    ROUTE = "route"
    """Which tokens run through the routed blocks; drawn by `millrace.kernels.sample_route`."""
    PATH_DROP = "path drop"
    """Which samples SPRINT trains without the routed blocks."""
    ALIGNMENT = "alignment"
    """Initial weights of an alignment's projector; keyed by the seed alone."""
    ADAPTER = "adapter"
    """Initial factors of an adapter; keyed by the seed alone."""
    PICTURE = "picture"
    """Noise that sampling starts from, keyed by the number of the picture."""
    STRONG_ROUTE = "strong route"
    """Routes of guidance's strong branch; PRX's are drawn once, TREAD's `at` each step."""
    WEAK_ROUTE = "weak route"
    """Routes of guidance's weak branch, likewise."""
    HELD_OUT = "held out"
    """Which pictures are held out, keyed by the digest of their key."""

    def of(self, owner: str) -> str:
        """This purpose for one of several owners of a stream."""
        return f"{self} of {owner}"

    def at(self, step: int) -> str:
        """This purpose in one step of several."""
        return f"{self} {step}"


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


def hash_keys(seed: int, numbers: np.ndarray, purpose: str) -> np.ndarray:
    """`hash_key(stream_key(seed, purpose) ^ number)` of each of (n,) uint64 numbers, as uint64."""
    z = (numbers ^ np.uint64(stream_key(seed, purpose))) + np.uint64(GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX[0])
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX[1])
    return z ^ (z >> np.uint64(31))


def epoch_order(seed: int, epoch: int, size: int, purpose: str) -> np.ndarray:
    """Permutation (size,) in which epoch `epoch` visits a data set of `size` samples; uint32 where that
    holds them, else int64. Other threads run meanwhile."""
    order = np.arange(size, dtype=np.uint32 if size <= 1 << 32 else np.int64)
    host_generator(seed, epoch, purpose).shuffle(order)
    return order
