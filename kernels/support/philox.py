"""Counter-based random numbers on any device: Philox-4x32-10 (Salmon et al., SC 2011).

A number is a pure function of (key of the sample, row within the sample, column), so it does not depend
on batch composition, process count or device. Counter c of key k gives four 32-bit words, hence four
normals by Box-Muller; row r of a (T, P) tensor uses the counters r * ceil(P / 4) + (0 .. ceil(P / 4) - 1).
The conversions to float are those of `triton.language.randn4x`, so that a Triton kernel draws the same.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from millrace.kernels.support.checks import expect_offsets, expect_shape
from millrace.kernels.support.compilation import Launch, meta
from millrace.kernels.support.keys import GOLDEN, MIX, stream_key
from millrace.kernels.support.packed import rows_from_samples
from millrace.kernels.support.registration import HAS_TRITON, register

if HAS_TRITON:
    import triton
    import triton.language as tl

_MASK = 0xFFFFFFFF
_KEYS = (0x9E3779B9, 0xBB67AE85)
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_BLOCK = 256

torch.compiler.assume_constant_result(stream_key)  # hashes a string, which dynamo would trace into


def sample_keys(seed: int, sample_index: Tensor, purpose: str) -> Tensor:
    """Keys (B,) int64 of samples `sample_index` (B,) int64: `hash_key(stream_key(seed, purpose) ^ index)`."""
    return _sample_keys(sample_index, _signed(stream_key(seed, purpose)))


def _keys_eager(sample_index: Tensor, stream: int) -> Tensor:
    z = (sample_index ^ stream) + _signed(GOLDEN)
    z = (z ^ _shift(z, 30)) * _signed(MIX[0])
    z = (z ^ _shift(z, 27)) * _signed(MIX[1])
    return z ^ _shift(z, 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64; torch's is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def philox(keys: Tensor, counters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words in [0, 2**32), each int64 of the broadcast shape of `keys` and `counters` (int64)."""
    k0, k1 = keys & _MASK, (keys >> 32) & _MASK
    c0, c1 = counters & _MASK, (counters >> 32) & _MASK
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        # The product of two 32-bit words wraps in int64; its two halves are right all the same.
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((high >> 32) & _MASK) ^ c1 ^ k0,
            high & _MASK,
            ((low >> 32) & _MASK) ^ c3 ^ k1,
            low & _MASK,
        )
        k0, k1 = (k0 + _KEYS[0]) & _MASK, (k1 + _KEYS[1]) & _MASK
    return c0, c1, c2, c3


def _unit(word: Tensor) -> Tensor:
    """A 32-bit word as FP32 in [0, 1)."""
    signed = torch.where(word > 0x7FFFFFFF, (1 << 32) - 1 - word, word)
    return signed.float() * 4.6566127342e-10


def uniform(keys: Tensor, count: int = 1) -> Tensor:
    """Uniform [0, 1) FP32 (B, count) from `keys` (B,) int64."""
    expect_shape("keys", keys, "B")
    return _uniform(keys, count)


def _uniform_eager(keys: Tensor, count: int) -> Tensor:
    words = philox(keys[:, None], torch.arange(math.ceil(count / 4), device=keys.device)[None])
    return torch.stack([_unit(word) for word in words], dim=-1).flatten(1)[:, :count].contiguous()


def normal(
    keys: Tensor, cu_seqlens: Tensor, total: int, features: int, max_seqlen: int | None = None
) -> Tensor:
    """Standard normal FP32 (T, P): rows of sample b are drawn under `keys[b]`.

    Args:
        keys: (B,) int64, one per sample.
        cu_seqlens: (B+1,) int32.
        total: T, the number of packed rows.
        features: P.
        max_seqlen: upper bound of the sample lengths, for the uniform fast path.
    """
    samples = expect_offsets("cu_seqlens", cu_seqlens)
    expect_shape("keys", keys, samples)
    starts = rows_from_samples(cu_seqlens[:-1].long(), cu_seqlens, total, max_seqlen)
    row = torch.arange(total, device=keys.device) - starts
    calls = math.ceil(features / 4)
    counters = row[:, None] * calls + torch.arange(calls, device=keys.device)
    words = philox(rows_from_samples(keys, cu_seqlens, total, max_seqlen)[:, None], counters)
    lanes = []
    for first, second in (words[:2], words[2:]):
        radius = torch.sqrt(-2.0 * torch.log(_unit(first).clamp_min(1e-7)))
        angle = _unit(second) * (2.0 * math.pi)
        lanes += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(lanes, dim=-1).flatten(1)[:, :features]


if HAS_TRITON:

    @triton.jit
    def _unit_of_word(word):
        """`_unit` of a uint32, to the bit."""
        signed = word.to(tl.int32, bitcast=True)
        return tl.where(signed < 0, -signed - 1, signed).to(tl.float32) * 4.6566127342e-10

    @triton.jit
    def uniform_at(key, place):
        """`uniform` of an int64 key at the places int32 >= 0, to the bit."""
        a, b, c, d = tl.philox(key, (place // 4).to(tl.uint32), 0, 0, 0)
        lane = place % 4
        return _unit_of_word(tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d)))

    @triton.jit
    def _box_muller(first, second):
        radius = tl.sqrt(-2.0 * tl.log(tl.maximum(_unit_of_word(first), 1e-7)))
        angle = _unit_of_word(second) * 6.283185307179586
        return radius * tl.cos(angle), radius * tl.sin(angle)

    @triton.jit
    def normal_four(key, counter):
        """The four numbers of `normal` for each counter int32 >= 0 (N,): (N, 4) FP32, to a few roundings."""
        a, b, c, d = tl.philox(key, counter.to(tl.uint32), 0, 0, 0)
        first, second = _box_muller(a, b)
        third, fourth = _box_muller(c, d)
        return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (counter.shape[0], 4))

    @triton.jit(do_not_specialize=["total"])
    def uniform_fwd_kernel(keys, out, count, total, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        key = tl.load(keys + at // count, mask=at < total, other=0)
        tl.store(out + at, uniform_at(key, (at % count).to(tl.int32)), mask=at < total)

    @triton.jit(do_not_specialize=["stream", "total"])
    def sample_keys_fwd_kernel(
        sample_index,
        keys,
        stream,
        total,
        GOLDEN: tl.constexpr,
        FIRST: tl.constexpr,
        SECOND: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        index = tl.load(sample_index + at, mask=at < total, other=0)
        z = (index ^ stream.to(tl.int64)).to(tl.uint64, bitcast=True) + GOLDEN
        z = (z ^ (z >> 30)) * FIRST
        z = (z ^ (z >> 27)) * SECOND
        tl.store(keys + at, (z ^ (z >> 31)).to(tl.int64, bitcast=True), mask=at < total)


def _uniform_triton(keys: Tensor, count: int) -> Tensor:
    keys, out = keys.contiguous(), _uniform_fake(keys, count)
    total = out.numel()
    if total:
        uniform_fwd_kernel[(triton.cdiv(total, _BLOCK),)](keys, out, count, total, BLOCK=_BLOCK, num_warps=4)
    return out


def _keys_triton(sample_index: Tensor, stream: int) -> Tensor:
    sample_index, keys = sample_index.contiguous(), _keys_fake(sample_index, stream)
    total = keys.numel()
    if total:
        constants = {"GOLDEN": GOLDEN, "FIRST": MIX[0], "SECOND": MIX[1], "BLOCK": _BLOCK}
        grid = (triton.cdiv(total, _BLOCK),)
        sample_keys_fwd_kernel[grid](sample_index, keys, stream, total, **constants, num_warps=4)
    return keys


def _uniform_fake(keys: Tensor, count: int) -> Tensor:
    return keys.new_empty(keys.shape[0], count, dtype=torch.float32)


def _keys_fake(sample_index: Tensor, stream: int) -> Tensor:
    return sample_index.new_empty(sample_index.shape)


# Operators, because plain PyTorch takes some 200 kernels for a draw of a few numbers, which on a GPU is a
# millisecond of launches in every step.
_uniform = register(
    "uniform(Tensor keys, SymInt count) -> Tensor",
    eager=_uniform_eager,
    triton=_uniform_triton,
    fake=_uniform_fake,
    dtypes=(torch.int64,),
)
_sample_keys = register(
    "sample_keys(Tensor sample_index, int stream) -> Tensor",
    eager=_keys_eager,
    triton=_keys_triton,
    fake=_keys_fake,
    dtypes=(torch.int64,),
)


def configurations() -> Iterator[Launch]:
    """The draws of 32 samples' times and dropped paths."""
    index = meta(32, dtype=torch.int64)
    # A stream is a hash: one of 64 bits, and so an int64 to Triton.
    yield Launch("keys", _keys_triton, (index, -(2**62) - 5))
    for count in (1, 3):
        yield Launch(f"uniform count={count}", _uniform_triton, (index, count))
