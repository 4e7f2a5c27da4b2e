"""The Triton kernels of `flow_loss`: what they compute stands there.

A sample's (length, P) part of a contiguous tensor is one run of numbers, so a program takes a stretch of it
whatever P is, and a row that starts over in a shorter negative is a number that does. Each program writes one
partial sum; a second kernel adds them in a fixed order.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from millrace.kernels.support.compilation import (
    Launch,
    meta,
)
from millrace.kernels.support.registration import HAS_TRITON

CHUNK, BLOCK = 4096, 1024
"""Elements of a program, and of one turn of its loop."""

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _target_ratio(time, t_min, SAMPLE: tl.constexpr):
        """v_target / (noise - clean), and v_pred - v_target per unit that the prediction falls short by."""
        if SAMPLE:
            floored = tl.maximum(time, t_min)
            return time / floored, -1.0 / floored
        else:
            return 1.0, 1.0

    @triton.jit
    def flow_loss_fwd_kernel(
        prediction,
        clean,
        noise,
        t,
        cu_seqlens,
        negative,
        residual,
        partial,
        contrastive_weight,
        t_min,
        FEATURES: tl.constexpr,
        SAMPLE: tl.constexpr,
        CONTRAST: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        sample, samples = tl.program_id(1), tl.num_programs(1)
        start = tl.load(cu_seqlens + sample).to(tl.int64) * FEATURES
        size = tl.load(cu_seqlens + sample + 1).to(tl.int64) * FEATURES - start
        ratio, slope = _target_ratio(tl.load(t + sample).to(tl.float32), t_min, SAMPLE)
        if CONTRAST:
            if negative is None:
                other = (sample + samples - 1) % samples
            else:
                other = tl.load(negative + sample).to(tl.int32)
            exists = (other >= 0) & (other < samples)
            other = tl.where(exists, other, sample)
            other_start = tl.load(cu_seqlens + other).to(tl.int64) * FEATURES
            other_size = tl.load(cu_seqlens + other + 1).to(tl.int64) * FEATURES - other_start
            weight = tl.where(exists & (other_size > 0), contrastive_weight, 0.0)
            other_ratio, _ = _target_ratio(tl.load(t + other).to(tl.float32), t_min, SAMPLE)

        first = tl.program_id(0).to(tl.int64) * CHUNK
        error = tl.zeros((BLOCK,), tl.float32)
        for begin in range(first, tl.minimum(first + CHUNK, size), BLOCK):
            place = begin + tl.arange(0, BLOCK)
            inside = place < size
            output = tl.load(prediction + start + place, mask=inside, other=0.0).to(tl.float32)
            data = tl.load(clean + start + place, mask=inside, other=0.0).to(tl.float32)
            drawn = tl.load(noise + start + place, mask=inside, other=0.0).to(tl.float32)
            target = ratio * (drawn - data)
            miss = slope * (output - (data if SAMPLE else target))
            gap = miss
            error += miss * miss
            if CONTRAST:
                # A negative at least as long is read straight on, with wide loads; a shorter one starts over.
                if other_size >= size:
                    data = tl.load(clean + other_start + place, mask=inside, other=0.0).to(tl.float32)
                    drawn = tl.load(noise + other_start + place, mask=inside, other=0.0).to(tl.float32)
                else:
                    turn = place % tl.maximum(other_size, 1)
                    reads = place < tl.where(other_size > 0, size, 0)
                    data = tl.load(clean + other_start + turn, mask=reads, other=0.0).to(tl.float32)
                    drawn = tl.load(noise + other_start + turn, mask=reads, other=0.0).to(tl.float32)
                away = miss + target - other_ratio * (drawn - data)
                error -= tl.where(inside, weight * away * away, 0.0)
                gap -= weight * away
            tl.store(residual + start + place, gap, mask=inside)
        at = sample.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        tl.store(partial + at, tl.sum(error, 0))

    @triton.jit
    def flow_loss_mean_fwd_kernel(
        partial,
        cu_seqlens,
        loss,
        per_sample,
        samples,
        chunks,
        elements,
        FEATURES: tl.constexpr,
        SAMPLES: tl.constexpr,
        CHUNKS: tl.constexpr,
    ):
        """One program: the partial sums (B, chunks) to the mean of each sample and of all elements."""
        total = tl.zeros((SAMPLES,), tl.float32)
        for first in range(0, samples, SAMPLES):
            sample = first + tl.arange(0, SAMPLES)
            inside = sample < samples
            sums = tl.zeros((SAMPLES, CHUNKS), tl.float32)
            for begin in range(0, chunks, CHUNKS):
                chunk = begin + tl.arange(0, CHUNKS)
                at = partial + sample[:, None].to(tl.int64) * chunks + chunk[None, :]
                sums += tl.load(at, mask=inside[:, None] & (chunk < chunks)[None, :], other=0.0)
            error = tl.sum(sums, 1)
            length = tl.load(cu_seqlens + sample + 1, mask=inside, other=0)
            length -= tl.load(cu_seqlens + sample, mask=inside, other=0)
            own = tl.maximum(length, 1).to(tl.float32) * FEATURES
            tl.store(per_sample + sample, tl.div_rn(error, own), mask=inside)
            total += error
        tl.store(loss, tl.div_rn(tl.sum(total, 0), elements))

    @triton.jit
    def flow_loss_bwd_kernel(
        residual,
        grad_loss,
        grad_per_sample,
        t,
        cu_seqlens,
        grad,
        grad_stride,
        t_min,
        share,
        FEATURES: tl.constexpr,
        SAMPLE: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        sample = tl.program_id(1)
        start = tl.load(cu_seqlens + sample).to(tl.int64) * FEATURES
        size = tl.load(cu_seqlens + sample + 1).to(tl.int64) * FEATURES - start
        _, slope = _target_ratio(tl.load(t + sample).to(tl.float32), t_min, SAMPLE)
        own = tl.load(grad_per_sample + sample * grad_stride) / tl.maximum(size, 1).to(tl.float32)
        factor = 2.0 * slope * (own + tl.load(grad_loss) * share)
        first = tl.program_id(0).to(tl.int64) * CHUNK
        for begin in range(first, tl.minimum(first + CHUNK, size), BLOCK):
            place = begin + tl.arange(0, BLOCK)
            inside = place < size
            gap = tl.load(residual + start + place, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad + start + place, factor * gap, mask=inside)


def _grid(residual: Tensor, samples: int, max_seqlen: int | None) -> tuple[int, int]:
    total, features = residual.shape
    longest = total if max_seqlen is None else max_seqlen
    return max(-(-longest * features // CHUNK), 1), samples


def forward_triton(
    prediction: Tensor,
    clean: Tensor,
    noise: Tensor,
    t: Tensor,
    cu_seqlens: Tensor,
    negative: Tensor | None,
    contrastive_weight: float,
    predicts_sample: bool,
    t_min: float,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    prediction, clean, noise, t = (x.contiguous() for x in (prediction, clean, noise, t))
    negative = None if negative is None else negative.contiguous()
    loss, per_sample = t.new_empty((), dtype=torch.float32), t.new_empty(len(t), dtype=torch.float32)
    residual = torch.empty_like(prediction)
    grid = _grid(residual, len(t), max_seqlen)
    partial = per_sample.new_empty(grid[1], grid[0])
    flow_loss_fwd_kernel[grid](
        prediction,
        clean,
        noise,
        t,
        cu_seqlens,
        negative,
        residual,
        partial,
        contrastive_weight,
        t_min,
        FEATURES=prediction.shape[1],
        SAMPLE=predicts_sample,
        CONTRAST=contrastive_weight != 0,
        CHUNK=CHUNK,
        BLOCK=BLOCK,
        num_warps=4,
    )
    flow_loss_mean_fwd_kernel[(1,)](
        partial,
        cu_seqlens,
        loss,
        per_sample,
        len(t),
        grid[0],
        float(max(prediction.numel(), 1)),
        FEATURES=prediction.shape[1],
        SAMPLES=32,
        CHUNKS=64,
        num_warps=8,
    )
    return loss, per_sample, residual


def backward_triton(
    residual: Tensor,
    grad_loss: Tensor,
    grad_per_sample: Tensor,
    t: Tensor,
    cu_seqlens: Tensor,
    predicts_sample: bool,
    t_min: float,
    max_seqlen: int | None,
) -> Tensor:
    grad, t = torch.empty_like(residual), t.contiguous()
    flow_loss_bwd_kernel[_grid(residual, len(t), max_seqlen)](
        residual,
        grad_loss,
        grad_per_sample,
        t,
        cu_seqlens,
        grad,
        grad_per_sample.stride(0),
        t_min,
        1 / max(residual.numel(), 1),
        FEATURES=residual.shape[1],
        SAMPLE=predicts_sample,
        CHUNK=CHUNK,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return grad


def configurations() -> Iterator[Launch]:
    """Latents (16 channels, patch 2) and pixels (patch 32), both predictions, with and without negatives."""
    for features in (64, 3072):
        for dtype in (torch.bfloat16, torch.float32):
            output, data = meta(4096, features, dtype=dtype), meta(4096, features, dtype=torch.float32)
            t, offsets = meta(4, dtype=torch.float32), meta(5, dtype=torch.int32)
            negative, loss = meta(4, dtype=torch.int64), meta(dtype=torch.float32)
            for sample, weight, other in ((False, 0.0, None), (False, 0.05, None), (True, 0.05, negative)):
                name = f"P={features} {dtype} sample={sample} weight={weight}"
                arguments = (output, data, data, t, offsets, other, weight, sample, 0.05, 1024)
                yield Launch(f"forward {name}", forward_triton, arguments)
            for sample in (False, True):
                arguments = (output, loss, t, t, offsets, sample, 0.05, 1024)
                yield Launch(f"backward P={features} {dtype} sample={sample}", backward_triton, arguments)
