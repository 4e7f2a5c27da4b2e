"""Keys of random streams, host side: SplitMix64 hashes of (seed, purpose), without torch.

The one place where keys are derived: for the engine's host choices (`engine/util/randomness.py`), and for the
tensor form, `philox.sample_keys`. It lies in `kernels` because an operation (`sample_route`) draws too, and
kernels know no engine. `millrace.kernels` imports its operations only when they are asked for, so that who
needs these keys alone, to prepare data or to read a command line, does without torch.
"""

import zlib

GOLDEN = 0x9E3779B97F4A7C15
MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""Constants of SplitMix64."""
_MASK64 = (1 << 64) - 1


def hash_key(value: int) -> int:
    """SplitMix64 (Steele et al., OOPSLA 2014) of a 64-bit integer."""
    z = (value + GOLDEN) & _MASK64
    z = ((z ^ (z >> 30)) * MIX[0]) & _MASK64
    z = ((z ^ (z >> 27)) * MIX[1]) & _MASK64
    return z ^ (z >> 31)


def stream_key(seed: int, purpose: str) -> int:
    """64-bit key of one purpose ("noise", "time", ...) of one run."""
    return hash_key(hash_key(seed & _MASK64) ^ zlib.crc32(purpose.encode()))
