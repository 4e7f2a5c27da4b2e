"""Flow-matching loss with x-prediction and the contrastive term, per sample and over all elements.

With v_pred and v_target of every sample (PRX's conventions, t = 0 data, t = 1 noise):

    velocity:  v_pred = prediction,                              v_target = noise - clean
    sample:    v_pred = (x_t - prediction) / max(t, t_min),      v_target = (x_t - clean) / max(t, t_min)

    loss = mean (v_pred - v_target)^2  -  lambda * mean (v_pred - v_target[negative])^2

Flow matching: Lipman et al., arXiv 2210.02747. x-prediction compared in v-space: Li & He, arXiv 2511.13720.
Contrastive term: Stoica et al., arXiv 2506.05350; the negative's target keeps the negative's own t and noise.
"""

from typing import Literal

import torch
from torch import Tensor

from millrace.kernels.checks import expect_offsets, expect_shape
from millrace.kernels.packed import rows_from_samples, sample_of_row, samples_from_rows, widen


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
) -> tuple[Tensor, Tensor]:
    """Loss of a packed batch.

    Args:
        prediction, clean, noise: (T, P).
        t: (B,) in [0, 1].
        cu_seqlens: (B+1,) int32.
        contrastive_weight: lambda; 0, or a batch of one sample, leaves the term out.
        negative: (B,) int64, the sample whose target is pushed away from; default (i - 1) mod B.
            Where lengths differ, row r of sample i meets row r mod length of its negative; an empty
            negative has nothing to push away from, so its partner goes without the term.
        prediction_type: what the network outputs, `velocity` or `sample` (x0).
        t_min: floor of t in the division of `sample`.
        max_seqlen: upper bound of the sample lengths, for the uniform fast path.

    Returns:
        loss: () FP32, the mean over all elements.
        per_sample: (B,) FP32, the mean over each sample's elements (0 for an empty sample).
    """
    samples = expect_offsets("cu_seqlens", cu_seqlens)
    expect_shape("prediction", prediction, "T", "P")
    total, features = prediction.shape
    expect_shape("clean", clean, total, features)
    expect_shape("noise", noise, total, features)
    expect_shape("t", t, samples)
    if prediction_type not in ("velocity", "sample"):
        raise ValueError(f"prediction_type is {prediction_type!r}, expected 'velocity' or 'sample'")

    prediction, clean, noise = widen(prediction), widen(clean), widen(noise)
    if prediction_type == "velocity":
        target = noise - clean
    else:
        time = rows_from_samples(widen(t), cu_seqlens, total, max_seqlen)[:, None]
        noisy = (1 - time) * clean + time * noise
        prediction = (noisy - prediction) / time.clamp_min(t_min)
        target = (noisy - clean) / time.clamp_min(t_min)

    error = (prediction - target).square()
    if contrastive_weight and samples > 1:
        rows, present = _negative_rows(cu_seqlens, total, negative)
        weight = contrastive_weight * present[:, None]
        error = error - weight * (prediction - target[rows]).square()
    row_error = error.sum(1)
    lengths = cu_seqlens.diff().clamp_min(1)
    per_sample = samples_from_rows(row_error, cu_seqlens, max_seqlen) / (lengths * features)
    return row_error.sum() / max(total * features, 1), per_sample


def _negative_rows(cu_seqlens: Tensor, total: int, negative: Tensor | None) -> tuple[Tensor, Tensor]:
    """For each packed row, the row of its negative's target (T,) int64, and whether it has one (T,) bool."""
    samples = cu_seqlens.numel() - 1
    if negative is None:
        negative = (torch.arange(samples, device=cu_seqlens.device) - 1) % samples
    expect_shape("negative", negative, samples)
    own = sample_of_row(cu_seqlens, total)
    other = negative[own]
    row = torch.arange(total, device=cu_seqlens.device) - cu_seqlens[own]
    length = cu_seqlens.diff()[other]
    return (cu_seqlens[other] + row % length.clamp_min(1)).clamp_max(total - 1), length > 0
