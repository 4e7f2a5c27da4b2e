"""The flow-matching path x_t = (1 - t) x0 + t n (Lipman et al., arXiv 2210.02747), t = 1 is noise.

The noise is given, or drawn here from the samples' keys (`millrace.kernels.support.philox`): then one pass
over the data reads x0 and writes x_t, and n where the caller wants it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from millrace.kernels.support.checks import expect_offsets, expect_shape
from millrace.kernels.support.compilation import Launch, meta
from millrace.kernels.support.packed import rows_from_samples, sample_slices, widen
from millrace.kernels.support.philox import normal
from millrace.kernels.support.registration import HAS_TRITON, register

if HAS_TRITON:
    import triton
    import triton.language as tl

    from millrace.kernels.support.philox import normal_four

CHUNK, BLOCK = 4096, 1024
"""Elements of a program, and of one turn of its loop."""


def reference(
    clean: Tensor, noise: Tensor, t: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None
) -> Tensor:
    """The equation in plain PyTorch, differentiable in every tensor."""
    time = rows_from_samples(widen(t), cu_seqlens, len(clean), max_seqlen)[:, None]
    return ((1 - time) * widen(clean) + time * widen(noise)).to(clean.dtype)


if HAS_TRITON:

    @triton.jit
    def add_noise_fwd_kernel(
        clean,
        noise,
        t,
        cu_seqlens,
        noisy,
        FEATURES: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        sample = tl.program_id(1)
        start = tl.load(cu_seqlens + sample).to(tl.int64) * FEATURES
        size = tl.load(cu_seqlens + sample + 1).to(tl.int64) * FEATURES - start
        time = tl.load(t + sample).to(tl.float32)
        first = tl.program_id(0).to(tl.int64) * CHUNK
        for begin in range(first, tl.minimum(first + CHUNK, size), BLOCK):
            place = begin + tl.arange(0, BLOCK)
            inside = place < size
            data = tl.load(clean + start + place, mask=inside, other=0.0).to(tl.float32)
            drawn = tl.load(noise + start + place, mask=inside, other=0.0).to(tl.float32)
            tl.store(noisy + start + place, (1.0 - time) * data + time * drawn, mask=inside)

    @triton.jit
    def add_noise_drawn_fwd_kernel(
        clean,
        keys,
        t,
        cu_seqlens,
        noisy,
        noise,
        noise_scale,
        FEATURES: tl.constexpr,
        RETURN_NOISE: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        sample = tl.program_id(1)
        start = tl.load(cu_seqlens + sample).to(tl.int64)
        length = tl.load(cu_seqlens + sample + 1).to(tl.int64) - start
        time = tl.load(t + sample).to(tl.float32)
        key = tl.load(keys + sample)
        # A counter gives four neighbours of a row; the last of a row may give fewer.
        CALLS: tl.constexpr = (FEATURES + 3) // 4
        lane = tl.arange(0, 4)
        first = tl.program_id(0) * (CHUNK // 4)
        end = tl.minimum((first + CHUNK // 4).to(tl.int64), length * CALLS).to(tl.int32)
        for begin in range(first, end, BLOCK // 4):
            counter = begin + tl.arange(0, BLOCK // 4)
            drawn = noise_scale * normal_four(key, counter)
            if FEATURES % 4 == 0:
                place = start * FEATURES + (counter[:, None] * 4 + lane[None, :])
                inside = (counter < end)[:, None]
            else:
                column = (counter % CALLS)[:, None] * 4 + lane[None, :]
                place = (start + counter // CALLS)[:, None] * FEATURES + column
                inside = (counter < end)[:, None] & (column < FEATURES)
            data = tl.load(clean + place, mask=inside, other=0.0).to(tl.float32)
            tl.store(noisy + place, (1.0 - time) * data + time * drawn, mask=inside)
            if RETURN_NOISE:
                tl.store(noise + place, drawn, mask=inside)


def _grid(clean: Tensor, features: int, samples: int, max_seqlen: int | None) -> tuple[int, int]:
    longest = len(clean) if max_seqlen is None else max_seqlen
    return max(-(-longest * features // CHUNK), 1), samples


def _given_triton(
    clean: Tensor, noise: Tensor, t: Tensor, cu_seqlens: Tensor, max_seqlen: int | None
) -> Tensor:
    clean, noise, t = clean.contiguous(), noise.contiguous(), t.contiguous()
    noisy, features = torch.empty_like(clean), clean.shape[1]
    add_noise_fwd_kernel[_grid(clean, features, len(t), max_seqlen)](
        clean, noise, t, cu_seqlens, noisy, FEATURES=features, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=4
    )
    return noisy


def _drawn_triton(
    clean: Tensor,
    keys: Tensor,
    t: Tensor,
    cu_seqlens: Tensor,
    noise_scale: float,
    return_noise: bool,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    clean, keys, t = clean.contiguous(), keys.contiguous(), t.contiguous()
    noisy, noise = _drawn_fake(clean, keys, t, cu_seqlens, noise_scale, return_noise, max_seqlen)
    features = clean.shape[1]
    add_noise_drawn_fwd_kernel[_grid(clean, -(-features // 4) * 4, len(t), max_seqlen)](
        clean,
        keys,
        t,
        cu_seqlens,
        noisy,
        noise,
        noise_scale,
        FEATURES=features,
        RETURN_NOISE=return_noise,
        CHUNK=CHUNK,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return noisy, noise


def _given_eager(
    clean: Tensor, noise: Tensor, t: Tensor, cu_seqlens: Tensor, max_seqlen: int | None
) -> Tensor:
    """Sample by sample, so that only the result is as large as the batch."""
    noisy, time = torch.empty_like(clean, memory_format=torch.contiguous_format), widen(t)
    for b, rows in enumerate(sample_slices(cu_seqlens)):
        noisy[rows] = (widen(clean[rows]) * (1 - time[b])).add_(widen(noise[rows]) * time[b])
    return noisy


def _drawn_eager(
    clean: Tensor,
    keys: Tensor,
    t: Tensor,
    cu_seqlens: Tensor,
    noise_scale: float,
    return_noise: bool,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    noise = normal(keys, cu_seqlens, *clean.shape, max_seqlen).contiguous()
    if noise_scale != 1.0:
        noise *= noise_scale
    noisy = _given_eager(clean, noise, t, cu_seqlens, max_seqlen)
    return noisy, noise if return_noise else noise.new_empty(0, clean.shape[1])


def _given_fake(clean: Tensor, *_: object) -> Tensor:
    return torch.empty_like(clean, memory_format=torch.contiguous_format)


def _drawn_fake(
    clean: Tensor,
    keys: Tensor,
    t: Tensor,
    cu_seqlens: Tensor,
    noise_scale: float,
    return_noise: bool,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    rows = clean.shape[0] if return_noise else 0
    noise = clean.new_empty((rows, clean.shape[1]), dtype=torch.float32)
    return torch.empty_like(clean, memory_format=torch.contiguous_format), noise


_given = register(
    "add_noise(Tensor clean, Tensor noise, Tensor t, Tensor cu_seqlens, SymInt? max_seqlen) -> Tensor",
    eager=_given_eager,
    triton=_given_triton,
    fake=_given_fake,
)
_drawn = register(
    "add_drawn_noise(Tensor clean, Tensor keys, Tensor t, Tensor cu_seqlens, float noise_scale,"
    " bool return_noise, SymInt? max_seqlen) -> (Tensor, Tensor)",
    eager=_drawn_eager,
    triton=_drawn_triton,
    fake=_drawn_fake,
)


def add_noise(
    clean: Tensor,
    noise: Tensor,
    t: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    noise_scale: float = 1.0,
    return_noise: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Move each sample along its path to its time.

    Args:
        clean: (T, P).
        noise: (T, P), or the samples' keys (B,) int64 from which the numbers of
            `millrace.kernels.support.philox.normal` are drawn (on CUDA to a few roundings of FP32).
        t: (B,) in [0, 1].
        cu_seqlens: (B+1,) int32.
        max_seqlen: upper bound of the sample lengths; without it the launch must cover T rows per sample.
        noise_scale: standard deviation of the drawn noise; given noise is taken as it is.
        return_noise: give the noise back too.

    Returns:
        (T, P) in the dtype of clean, formed in FP32; with `return_noise` a tuple of it and the noise (T, P),
        FP32 if drawn.
    """
    samples = expect_offsets("cu_seqlens", cu_seqlens)
    expect_shape("clean", clean, "T", "P")
    expect_shape("t", t, samples)
    drawn = not noise.is_floating_point()
    expect_shape("noise", noise, *((samples,) if drawn else clean.shape))
    if not drawn and noise_scale != 1.0:
        raise ValueError(f"noise_scale is {noise_scale}, expected 1.0 with given noise: scale it yourself")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (clean, noise, t)):
        if drawn:
            noise = normal(noise, cu_seqlens, *clean.shape, max_seqlen) * noise_scale
        noisy = reference(clean, noise, t, cu_seqlens, max_seqlen)
    elif drawn:
        noisy, noise = _drawn(clean, noise, t, cu_seqlens, noise_scale, return_noise, max_seqlen)
    else:
        noisy = _given(clean, noise, t, cu_seqlens, max_seqlen)
    return (noisy, noise) if return_noise else noisy


def configurations() -> Iterator[Launch]:
    """Latents (16 channels, patch 2) and pixels (patch 32), and a width that no counter divides; the other
    patches that configurations have, in FP32, in which they come."""
    t, offsets = meta(4, dtype=torch.float32), meta(5, dtype=torch.int32)
    keys = meta(4, dtype=torch.int64)
    for features in (32, 48, 128, 768):
        clean = meta(4096, features, dtype=torch.float32)
        yield Launch(f"drawn P={features}", _drawn_triton, (clean, keys, t, offsets, 1.0, True, 1024))
    for features in (64, 3072, 27):
        for dtype in (torch.bfloat16, torch.float32):
            clean = meta(4096, features, dtype=dtype)
            noise = meta(4096, features, dtype=torch.float32)
            name = f"P={features} {dtype}"
            yield Launch(f"given {name}", _given_triton, (clean, noise, t, offsets, 1024))
            yield Launch(f"drawn {name}", _drawn_triton, (clean, keys, t, offsets, 1.0, True, 1024))
