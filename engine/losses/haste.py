"""HASTE's attention alignment (arXiv 2505.16792): attention among image tokens follows the teacher's.

    L = -mean over blocks, heads, query tokens of  sum_j p_ij log s_ij
    s = softmax_j(q_i k_j / sqrt(D)) of the denoiser's block,  p = the same of the teacher's layer

The sums run over image tokens on both sides. The teacher's class token and registers are left out, as HASTE's
code does with the class token. The denoiser's text keys, which HASTE's SiT does not have, are left out too:
s is its attention among image tokens, renormalised, so how much a token looks at the caption is not touched.
Inside a routed span both softmaxes run over the tokens that are there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from millrace.engine.losses.repa import BlockRows
from millrace.kernels.support.packed import widen

QueriesKeys = tuple[Tensor, Tensor]
"""(rows, heads, D) each, after norm and rotation."""


def attention_loss(
    students: Sequence[QueriesKeys], teachers: Sequence[QueriesKeys], rows: Sequence[BlockRows], heads: int
) -> Tensor:
    """Cross-entropy (B,) FP32 of each sample's attention to the teacher's, averaged over blocks.

    Args:
        students: of each aligned block, over the rows that it sees.
        teachers: of the teacher's layer for each of them, over all T tokens.
        rows: what each block sees.
        heads: the first ones of both take part.
    """
    losses = []
    for (q, k), (teacher_q, teacher_k), seen in zip(students, teachers, rows, strict=True):
        parts = [x[:, :heads] for x in (q, k, seen.take(teacher_q), seen.take(teacher_k))]
        padded, own = zip(*(seen.padded(part) for part in parts), strict=True)
        # Maps are larger than what they are made of: one block's live at a time, in both directions.
        losses.append(
            checkpoint(_cross_entropy, *padded, own[0], use_reentrant=False, preserve_rng_state=False)
        )
    return torch.stack(losses).mean(0)


def _cross_entropy(q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor, own: Tensor | None) -> Tensor:
    """(B,) of queries and keys (B, N, heads, D); `own` (B, N) bool says which tokens count, None all."""
    student = _logits(q, k, own).log_softmax(-1)
    with torch.no_grad():
        teacher = _logits(teacher_q, teacher_k, own).softmax(-1)
    entropy = -torch.einsum("bhnm,bhnm->bhn", teacher, student).mean(1)
    if own is None:
        return entropy.mean(1)
    return (entropy * own).sum(1) / own.sum(1)


def _logits(q: Tensor, k: Tensor, own: Tensor | None) -> Tensor:
    """(B, heads, N, N) in FP32, FP64 of FP64; keys that do not count get the lowest finite one, so that
    zero times its logarithm is zero."""
    logits = torch.einsum("bnhd,bmhd->bhnm", widen(q), widen(k)) * q.shape[-1] ** -0.5
    if own is None:
        return logits
    return logits.masked_fill(~own[:, None, None], -1e30)
