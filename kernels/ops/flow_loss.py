"""Flow-matching loss with x-prediction and the contrastive term, per sample and over all elements.

With v_pred and v_target of every sample (PRX's conventions, t = 0 data, t = 1 noise):

    velocity:  v_pred = prediction,                              v_target = noise - clean
    sample:    v_pred = (x_t - prediction) / max(t, t_min),      v_target = (x_t - clean) / max(t, t_min)

    loss = mean (v_pred - v_target)^2  -  lambda * mean (v_pred - v_target[negative])^2

Forward is one pass over the data and keeps, in place of its inputs, what backward needs:

    residual = (v_pred - v_target) - lambda * (v_pred - v_target[negative])
    d loss / d prediction = 2 * residual * (1 for velocity, -1 / max(t, t_min) for sample) / elements

Flow matching: Lipman et al., arXiv 2210.02747. x-prediction compared in v-space: Li & He, arXiv 2511.13720.
Contrastive term: Stoica et al., arXiv 2506.05350; the negative's target keeps the negative's own t and noise.

The kernels: a sample's (length, P) part of a contiguous tensor is one run of numbers, so a program takes a
stretch of it whatever P is, and a row that starts over in a shorter negative is a number that does. Each
program writes one partial sum; a second kernel adds them in a fixed order.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from millrace.kernels.support import cuda_library
from millrace.kernels.support.checks import expect_offsets, expect_shape
from millrace.kernels.support.choice import choose
from millrace.kernels.support.compilation import Launch, meta
from millrace.kernels.support.packed import (
    rows_from_samples,
    sample_of_row,
    sample_slices,
    samples_from_rows,
    widen,
)
from millrace.kernels.support.registration import HAS_TRITON, register

if HAS_TRITON:
    import triton
    import triton.language as tl


def reference(
    prediction: Tensor,
    clean: Tensor,
    noise: Tensor,
    t: Tensor,
    cu_seqlens: Tensor,
    negative: Tensor | None,
    contrastive_weight: float,
    predicts_sample: bool,
    t_min: float,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The equations in plain PyTorch, differentiable in every tensor."""
    (total, features), samples = prediction.shape, len(t)
    prediction, clean, noise = widen(prediction), widen(clean), widen(noise)
    if predicts_sample:
        time = rows_from_samples(widen(t), cu_seqlens, total, max_seqlen)[:, None]
        noisy = (1 - time) * clean + time * noise
        prediction = (noisy - prediction) / time.clamp_min(t_min)
        target = (noisy - clean) / time.clamp_min(t_min)
    else:
        target = noise - clean
    error = (prediction - target).square()
    if contrastive_weight:
        if negative is None:
            negative = (torch.arange(samples, device=t.device) - 1) % samples
        own = sample_of_row(cu_seqlens, total)
        other = negative[own]
        length = torch.where(other >= 0, cu_seqlens.diff()[other], 0)
        row = torch.arange(total, device=t.device) - cu_seqlens[own]
        partner = (cu_seqlens[other] + row % length.clamp_min(1)).clamp_max(total - 1)
        weight = contrastive_weight * (length > 0)[:, None]
        error = error - weight * (prediction - target[partner]).square()
    row_error = error.sum(1)
    lengths = cu_seqlens.diff().clamp_min(1)
    per_sample = samples_from_rows(row_error, cu_seqlens, max_seqlen) / (lengths * features)
    return row_error.sum() / max(total * features, 1), per_sample


def _slopes(t: Tensor, predicts_sample: bool, t_min: float) -> tuple[Tensor, Tensor]:
    """What `_target_ratio` gives, for every sample (B,)."""
    t = widen(t)
    if not predicts_sample:
        return torch.ones_like(t), torch.ones_like(t)
    floored = t.clamp_min(t_min)
    return t / floored, -1 / floored


def _forward_eager(
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
    """Sample by sample, so that nothing but the residual is as large as the batch."""
    residual = torch.empty_like(prediction, memory_format=torch.contiguous_format)
    spans, samples = sample_slices(cu_seqlens), len(t)
    ratio, slope = _slopes(t, predicts_sample, t_min)
    previous = [(b - 1) % samples for b in range(samples)]
    errors = []
    for b, other in enumerate(previous if negative is None else negative.tolist()):
        rows, length = spans[b], spans[other].stop - spans[other].start if other >= 0 else 0
        data = widen(clean[rows])
        target = (widen(noise[rows]) - data).mul_(ratio[b])
        gap = (widen(prediction[rows]) - (data if predicts_sample else target)).mul_(slope[b])
        error = gap.square().sum()
        if contrastive_weight and length:
            away = target.add_(gap)
            for begin in range(0, len(away), length):
                part = away[begin : begin + length]
                met = slice(spans[other].start, spans[other].start + len(part))
                part -= (widen(noise[met]) - widen(clean[met])).mul_(ratio[other])
            error = error - contrastive_weight * away.square().sum()
            gap.sub_(away, alpha=contrastive_weight)
        residual[rows] = gap
        errors.append(error)
    error, features = torch.stack(errors), prediction.shape[1]
    per_sample = error / (cu_seqlens.diff().clamp_min(1) * features)
    return error.sum() / max(prediction.numel(), 1), per_sample, residual


def _backward_eager(
    residual: Tensor,
    grad_loss: Tensor,
    grad_per_sample: Tensor,
    t: Tensor,
    cu_seqlens: Tensor,
    predicts_sample: bool,
    t_min: float,
    max_seqlen: int | None,
) -> Tensor:
    total, features = residual.shape
    _, slope = _slopes(t, predicts_sample, t_min)
    own = grad_per_sample / (cu_seqlens.diff().clamp_min(1) * features)
    factor = 2 * slope * (own + grad_loss / max(residual.numel(), 1))
    return (residual * rows_from_samples(factor, cu_seqlens, total, max_seqlen)[:, None]).to(residual.dtype)


CHUNK, BLOCK = 4096, 1024
"""Elements of a program, and of one turn of its loop."""


if HAS_TRITON:

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
            # A negative that does not exist (-1: the sample has none) reads the sample itself with weight 0,
            # so that no program branches and no address is out of range.
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
            # What backward needs of prediction, clean, noise and the negative, as one number an element.
            tl.store(residual + start + place, gap, mask=inside)
        at = sample.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        tl.store(partial + at, tl.sum(error, 0))

    @triton.jit(do_not_specialize=["samples", "chunks"])  # they change from batch to batch
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
            # div_rn: the plain division of a kernel is an approximation, PyTorch's is not.
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


def _forward_fake(
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
    per_sample = t.new_empty(t.shape, dtype=torch.promote_types(prediction.dtype, torch.float32))
    residual = torch.empty_like(prediction, memory_format=torch.contiguous_format)
    return per_sample.new_empty(()), per_sample, residual


def _backward_fake(residual: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(residual)


_forward = register(
    "flow_loss(Tensor prediction, Tensor clean, Tensor noise, Tensor t, Tensor cu_seqlens, Tensor? negative,"
    " float contrastive_weight, bool predicts_sample, float t_min, SymInt? max_seqlen)"
    " -> (Tensor, Tensor, Tensor)",
    eager=_forward_eager,
    triton=forward_triton,
    fake=_forward_fake,
)


_backward = register(
    "flow_loss_backward(Tensor residual, Tensor grad_loss, Tensor grad_per_sample, Tensor t,"
    " Tensor cu_seqlens, bool predicts_sample, float t_min, SymInt? max_seqlen) -> Tensor",
    eager=_backward_eager,
    triton=backward_triton,
    fake=_backward_fake,
)


def _operators(implementation: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if implementation == "triton":
        return _forward, _backward
    return cuda_library.flow_loss, cuda_library.flow_loss_backward


class _FlowLoss(torch.autograd.Function):
    """Gradient of the prediction alone."""

    @staticmethod
    def forward(
        ctx: Any,
        prediction: Tensor,
        clean: Tensor,
        noise: Tensor,
        t: Tensor,
        cu_seqlens: Tensor,
        negative: Tensor | None,
        implementation: str,
        *settings: Any,
    ) -> tuple[Tensor, Tensor]:
        forward, _ = _operators(implementation)
        loss, per_sample, residual = forward(prediction, clean, noise, t, cu_seqlens, negative, *settings)
        ctx.save_for_backward(residual, t, cu_seqlens)
        ctx.implementation, ctx.settings = implementation, settings[1:]
        return loss, per_sample

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_per_sample: Tensor) -> tuple[Tensor | None, ...]:
        residual, t, cu_seqlens = ctx.saved_tensors
        _, backward = _operators(ctx.implementation)
        grad = backward(residual, grad_loss, grad_per_sample, t, cu_seqlens, *ctx.settings)
        return grad, *(None,) * 10


def flow_loss(
    prediction: Tensor,
    clean: Tensor,
    noise: Tensor,
    t: Tensor,
    cu_seqlens: Tensor,
    contrastive_weight: float = 0.0,
    negative: Tensor | None = None,
    prediction_type: Literal["velocity", "sample"] = "velocity",
    t_min: float = 0.05,
    max_seqlen: int | None = None,
    eligible: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Loss of a packed batch.

    Gradients of `clean`, `noise` and `t` are right too, but whoever asks for one gets the plain path.

    Args:
        prediction, clean, noise: (T, P).
        t: (B,) in [0, 1].
        cu_seqlens: (B+1,) int32.
        contrastive_weight: lambda; 0, or a batch of one sample, leaves the term out.
        negative: (B,) int64, the sample whose target is pushed away from; -1 leaves the term of this sample
            out; default (i - 1) mod B. Where lengths differ, row r of sample i meets row r mod length of its
            negative; an empty negative has nothing to push away from, so its partner goes without the term.
        prediction_type: what the network outputs, `velocity` or `sample` (x0).
        t_min: floor of t in the division of `sample`.
        max_seqlen: upper bound of the sample lengths; without it the launch must cover T rows per sample.
        eligible: (B,) bool, the samples that take part in the contrastive term, by default all (as in PRX).
            A sample with False is neither pushed nor anybody's negative: use it for samples that train the
            unconditional model, whose captions were dropped. The default negative is then the nearest
            eligible sample before i, cyclically; if there is none but i, sample i goes without the term. The
            weight of the remaining ones stays lambda, so it does not depend on how many were left out.
        backend: `reference`, `triton` (plain PyTorch on the CPU), `cuda` (csrc), or `auto`, the fastest
            measured.

    Returns:
        loss: () FP32, the mean over all elements.
        per_sample: (B,) FP32, the mean over each sample's elements (0 for an empty sample).
    """
    samples = expect_offsets("cu_seqlens", cu_seqlens)
    expect_shape("prediction", prediction, "T", "P")
    expect_shape("clean", clean, *prediction.shape)
    expect_shape("noise", noise, *prediction.shape)
    expect_shape("t", t, samples)
    if negative is not None:
        expect_shape("negative", negative, samples)
    if eligible is not None:
        expect_shape("eligible", eligible, samples)
    if prediction_type not in ("velocity", "sample"):
        raise ValueError(f"prediction_type is {prediction_type!r}, expected 'velocity' or 'sample'")
    weight = contrastive_weight if samples > 1 else 0.0
    if eligible is not None and weight:
        negative = _among_eligible(negative, eligible)
    tensors = (prediction, clean, noise, t, cu_seqlens, negative)
    settings = (weight, prediction_type == "sample", t_min, max_seqlen)

    usable = {"cuda": lambda: cuda_library.rows_obstacle(prediction)}
    implementation = choose("flow_loss", backend, prediction, usable)
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (clean, noise, t))
    if implementation == "reference" or differentiable:
        return reference(*tensors, *settings)
    return _FlowLoss.apply(*tensors, implementation, *settings)


def _among_eligible(negative: Tensor | None, eligible: Tensor) -> Tensor:
    """Negatives (B,) int64 that lie, like their partners, in `eligible`; -1 where there is none."""
    samples = len(eligible)
    place = torch.arange(samples, device=eligible.device)
    if negative is None:
        # Two turns of the circle: the latest eligible place up to B - 1 + i is the nearest before B + i.
        turns = torch.cat((place, place + samples))
        latest = torch.where(eligible.repeat(2), turns, -1).cummax(0).values
        negative = latest[samples - 1 : -1] % samples
        eligible = eligible & (negative != place)
    return torch.where(eligible & eligible[negative.clamp_min(0)], negative, -1)


def configurations() -> Iterator[Launch]:
    """Latents (16 channels, patch 2) and pixels (patch 32), both predictions, with and without negatives; and
    the other patches that configurations have, in the dtype in which they predict them."""
    both, bf16, single = (torch.bfloat16, torch.float32), (torch.bfloat16,), (torch.float32,)
    for features, dtypes in {64: both, 3072: both, 32: bf16, 128: bf16, 768: bf16, 48: single}.items():
        for dtype in dtypes:
            output, data = meta(4096, features, dtype=dtype), meta(4096, features, dtype=torch.float32)
            t, offsets = meta(4, dtype=torch.float32), meta(5, dtype=torch.int32)
            negative, loss = meta(4, dtype=torch.int64), meta(dtype=torch.float32)
            negatives = ((False, 0.05, None), (True, 0.05, negative)) if dtypes == both else ()
            for sample, weight, other in ((False, 0.0, None), (True, 0.0, None), *negatives):
                name = f"P={features} {dtype} sample={sample} weight={weight}"
                arguments = (output, data, data, t, offsets, other, weight, sample, 0.05, 1024)
                yield Launch(f"forward {name}", forward_triton, arguments)
            for sample in (False, True):
                arguments = (output, loss, t, t, offsets, sample, 0.05, 1024)
                yield Launch(f"backward P={features} {dtype} sample={sample}", backward_triton, arguments)
