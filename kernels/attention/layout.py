"""Layouts of queries and joint keys between the prologue and attention.

N and M bound the lengths of a sample's image and text.

    packed  q (T, H, D),    keys and values (T + S, H, D), the rows of a sample adjacent
    padded  q (B, N, H, D), keys and values (B, N + M, H, D); rows that no token owns come last and are zero

Image rows come before text rows, so padding is a suffix and one number a sample says where it begins.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from millrace.kernels.support.packed import sample_of_row, sample_slices

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


class PaddedRows(NamedTuple):
    """Row of each token in the flattened padded layout, (B * N,) for queries and (B * (N + M),) for keys."""

    q: Tensor
    """(T,) int64, of the queries."""
    image: Tensor
    """(T,) int64, of the image among keys and values."""
    text: Tensor
    """(S,) int64, of the text among keys and values."""

    @classmethod
    def of(
        cls, offsets: Tensor, offsets_text: Tensor, counts: tuple[int, int], bounds: tuple[int, int]
    ) -> "PaddedRows":
        """`counts` are T and S, `bounds` N and M. Waits for no device."""
        own, own_text = (sample_of_row(x, n) for x, n in zip((offsets, offsets_text), counts, strict=True))
        image = torch.arange(counts[0], device=offsets.device) - offsets[own]
        text = torch.arange(counts[1], device=offsets.device) - offsets_text[own_text]
        longest, keys = bounds[0], sum(bounds)
        return cls(
            own * longest + image, own * keys + image, own_text * keys + offsets.diff()[own_text] + text
        )


class PackedRows(NamedTuple):
    """Rows of one sample in the packed layout."""

    image: slice
    text: slice
    keys: slice
    """Of the image among keys and values."""
    text_keys: slice


def packed_rows(offsets: Tensor, offsets_text: Tensor) -> Iterator[PackedRows]:
    """The samples' rows. Reads the offsets on the host: free on the CPU."""
    for image, text in zip(sample_slices(offsets), sample_slices(offsets_text), strict=True):
        cut = image.stop + text.start
        yield PackedRows(
            image, text, slice(image.start + text.start, cut), slice(cut, image.stop + text.stop)
        )


def key_mask(cu_seqlens: Tensor, cu_seqlens_text: Tensor, keys: int) -> Tensor:
    """(B, 1, 1, keys) bool, which rows of the padded layout a sample's queries attend.

    A sample without tokens attends the first row, which is zero: softmax over nothing would be NaN.
    """
    used = (cu_seqlens.diff() + cu_seqlens_text.diff()).clamp(min=1)
    return (torch.arange(keys, device=cu_seqlens.device) < used[:, None])[:, None, None]
