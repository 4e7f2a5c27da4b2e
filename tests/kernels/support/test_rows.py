"""How backward launches over rows are cut: what their partial sums weigh, and that no row is lost."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from millrace.kernels import gated_residual, gated_residual_norm_modulate, prenorm_modulate
from millrace.kernels.support.compilation import MULTIPROCESSORS, meta
from millrace.kernels.support.rows import SHORTEST_RUN, sum_launch

SAMPLES, WIDTH = 32, 1792
OPERATIONS = {"norm_modulate": (2, 3), "gated_residual": (1, 2), "gated_residual_norm_modulate": (3, 4)}
"""Vectors that are summed, and gradients (T, C) that are read or written."""


@pytest.mark.parametrize(("tokens", "share"), [(64, 0.1), (128, 0.05), (256, 0.025), (1024, 0.01)])
@pytest.mark.parametrize(("vectors", "gradients"), OPERATIONS.values(), ids=OPERATIONS)
def test_partial_sums_are_small(tokens, share, vectors, gradients):
    """Of 32 samples in BF16, whole or routed (64 tokens are SPRINT's at 256 pixels)."""
    chunks, samples = sum_launch(meta(SAMPLES * tokens, WIDTH), SAMPLES, tokens).grid
    assert chunks * samples <= MULTIPROCESSORS
    partial = 4 * vectors * chunks * samples * WIDTH
    assert partial <= share * 2 * gradients * SAMPLES * tokens * WIDTH


@pytest.mark.parametrize("samples", [1, 7, 32, 200])
@pytest.mark.parametrize("longest", [0, 1, 3, 64, 300, 1024, None])
def test_programs_are_as_many_as_run_at_once(samples, longest):
    chunks, _ = sum_launch(meta(samples * 4, 64), samples, longest).grid
    assert chunks == 1 or chunks * samples <= MULTIPROCESSORS
    assert chunks == 1 or (chunks - 1) * SHORTEST_RUN < (4 * samples if longest is None else longest)


LENGTHS = {"1": (1,), "3": (3,), "64": (64, 64), "300": (300,), "1024": (1024,), "ragged": (5, 0, 40, 1, 17)}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_matches_autograd_over_any_number_of_rows(lengths, offsets, spans, assert_accurate):
    """A residual branch: norm, gated sum with the next norm, gated sum."""
    cu_seqlens, rows = offsets(*lengths), spans(*lengths)

    def branch(x, modulation):
        shift, scale, gate, *rest = modulation.unbind(1)
        x, y = prenorm_modulate(x, shift, scale, cu_seqlens, max_seqlen=max(lengths))
        x, y = gated_residual_norm_modulate(x, y, gate, *rest[:2], cu_seqlens, max_seqlen=max(lengths))
        return gated_residual(x, y, rest[2], cu_seqlens, max_seqlen=max(lengths))

    def formula(x, modulation):
        def norm(x):
            centred = x - x.mean(1, keepdim=True)
            return centred / torch.sqrt(centred.square().mean(1, keepdim=True) + 1e-6)

        parts = []
        for span, (shift, scale, gate, *rest) in zip(rows, modulation.unbind(0), strict=True):
            own = x[span]
            own = own + gate * ((1 + scale) * norm(own) + shift)
            parts.append(own + rest[2] * ((1 + rest[1]) * norm(own) + rest[0]))
        return torch.cat(parts)

    assert_accurate(
        branch, formula, x=torch.randn(sum(lengths), 24), modulation=torch.randn(len(lengths), 6, 24) / 2
    )


class _Adds(TorchDispatchMode):
    """Counts what autograd adds up beside the operators."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_) and result.dim() == 2:
            self.rows += 1
        return result


def test_the_streams_gradient_needs_no_kernel_of_its_own():
    """What comes back is x itself, and its gradient enters the norm's backward operator."""
    x = meta(64, 24).requires_grad_()
    vectors = meta(2, 24).requires_grad_()
    cu_seqlens = meta(3, dtype=torch.int32)
    stream, y = prenorm_modulate(x, vectors, vectors, cu_seqlens, max_seqlen=32)
    out = gated_residual(stream, y, vectors, cu_seqlens, 32)
    with _Adds() as adds:
        torch.autograd.grad(out, x, torch.empty_like(out))
    assert adds.rows == 0


def test_the_stream_is_no_copy():
    x = torch.randn(5, 24, requires_grad=True)
    stream, _ = prenorm_modulate(
        x, torch.zeros(2, 24), torch.zeros(2, 24), torch.tensor([0, 3, 5], dtype=torch.int32)
    )
    assert stream.data_ptr() == x.data_ptr()
