"""Where queries and joint keys lie between the prologue and attention. N and M bound the lengths of a
sample's image and text.

    packed  q (T, H, D),    keys and values (T + S, H, D), the rows of a sample adjacent
    padded  q (B, N, H, D), keys and values (B, N + M, H, D); rows that no token owns come last and are zero

Image rows come before text rows, so padding is a suffix and one number a sample says where it begins.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from millrace.kernels.packed import sample_slices

Joint = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values."""


def joint_shapes(
    qkv: Tensor, text_kv: Tensor, cu_seqlens: Tensor, max_seqlen: int, max_seqlen_text: int, padded: bool
) -> tuple[torch.Size, torch.Size]:
    """Shapes of the queries, and of the keys and of the values."""
    total, _, heads, dim = qkv.shape
    if padded:
        samples = cu_seqlens.shape[0] - 1
        sizes = (samples, max_seqlen), (samples, max_seqlen + max_seqlen_text)
    else:
        sizes = (total,), (total + text_kv.shape[0],)
    return tuple(torch.Size((*size, heads, dim)) for size in sizes)


class SampleRows(NamedTuple):
    """Rows of one sample."""

    image: slice
    text: slice
    q: Any
    """Index of the queries; of the keys and values of image and of text, below."""
    keys: Any
    text_keys: Any


def sample_rows(offsets: Tensor, offsets_text: Tensor, padded: bool) -> Iterator[SampleRows]:
    """The samples' rows in each tensor. Reads the offsets on the host: free on the CPU."""
    pairs = zip(sample_slices(offsets), sample_slices(offsets_text), strict=True)
    for b, (image, text) in enumerate(pairs):
        if padded:
            n, m = image.stop - image.start, text.stop - text.start
            rows = (b, slice(0, n)), (b, slice(0, n)), (b, slice(n, n + m))
        else:
            cut = image.stop + text.start
            rows = image, slice(image.start + text.start, cut), slice(cut, image.stop + text.stop)
        yield SampleRows(image, text, *rows)


def key_mask(cu_seqlens: Tensor, cu_seqlens_text: Tensor, keys: int) -> Tensor:
    """(B, 1, 1, keys) bool, which rows of the padded layout a sample's queries attend.

    A sample without tokens attends the first row, which is zero: softmax over nothing would be NaN.
    """
    used = (cu_seqlens.diff() + cu_seqlens_text.diff()).clamp(min=1)
    return (torch.arange(keys, device=cu_seqlens.device) < used[:, None])[:, None, None]
