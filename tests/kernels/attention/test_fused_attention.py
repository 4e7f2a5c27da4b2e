"""What the fused attention promises beyond the equations, which `test_rope_attention.py` holds it to."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from millrace.kernels.attention.fused_attention import fused_attention
from millrace.kernels.support.registration import uses_triton

LENGTHS, TEXT_LENGTHS, HEADS = (3, 0, 18), (2, 5, 1), 2


@pytest.fixture
def arguments(offsets, device):
    """Positional arguments in FP32, RoPE's angles all zero."""

    def build(dim=16, scale=0.25):
        total = sum(LENGTHS)
        learned = torch.randn(total, 3, HEADS, dim), torch.randn(sum(TEXT_LENGTHS), 2, HEADS, dim)
        learned = [x.to(device).requires_grad_() for x in (*learned, *(torch.rand(3, dim) + 0.5).unbind(0))]
        cos, sin = torch.ones(1, dim // 2, device=device), torch.zeros(1, dim // 2, device=device)
        positions = torch.zeros(total, dtype=torch.int64, device=device)
        bounds = max(LENGTHS) + 1, max(TEXT_LENGTHS) + 1
        return *learned, cos, sin, positions, offsets(*LENGTHS), offsets(*TEXT_LENGTHS), *bounds, 1e-6, scale

    return build


def test_saves_inputs_output_and_one_number_a_row(arguments, device):
    given = arguments()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = fused_attention(*given)
    known = {x.untyped_storage().data_ptr() for x in (*given[:10], out)}
    (new,) = (x for x in saved if x.untyped_storage().data_ptr() not in known)
    assert new.shape == (HEADS, sum(LENGTHS))


def test_saved_number_is_the_log_of_the_softmax_denominator(arguments, spans):
    given = arguments()
    qkv, text_kv, *weights = (x.detach().double() for x in given[:5])
    with torch.no_grad():
        _, lse = torch.ops.millrace.rope_attention_fused(*given)

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    for s, u in zip(spans(*LENGTHS), spans(*TEXT_LENGTHS), strict=True):
        keys = torch.cat((norm(qkv[s, 1], weights[1]), norm(text_kv[u, 0], weights[2])))
        logits = torch.einsum("nhd,mhd->hnm", norm(qkv[s, 0], weights[0]), keys) * 0.25
        torch.testing.assert_close(lse[:, s].double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_gradient_may_have_any_strides(arguments, device):
    given = arguments()
    out = fused_attention(*given)
    heads_first = torch.randn(HEADS, *out.shape[::2], device=device).transpose(0, 1)
    expanded = torch.randn(16, device=device).expand(out.shape)
    features_apart = torch.randn(*out.shape[:1], 16, HEADS, device=device).transpose(1, 2)
    for towards in (heads_first, expanded, features_apart):
        got = torch.autograd.grad(out, given[:5], towards, retain_graph=True)
        expected = torch.autograd.grad(out, given[:5], towards.contiguous(), retain_graph=True)
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y)


def test_counts_its_products(arguments):
    """Two products forward and five backward, of 2 multiply-adds a pair of query and key."""
    given = arguments()
    pairs = sum(n * (n + m) for n, m in zip(LENGTHS, TEXT_LENGTHS, strict=True))
    with FlopCounterMode(display=False) as forward:
        out = fused_attention(*given)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 4 * pairs * HEADS * 16
    assert backward.get_total_flops() == 10 * pairs * HEADS * 16


def test_counts_its_products_without_data(arguments):
    """On meta tensors, where lengths cannot be read, as many as the bounds allow."""
    given = [x.detach().to("meta") if torch.is_tensor(x) else x for x in arguments()]
    with FlopCounterMode(display=False) as counter:
        out = fused_attention(*given)
    assert out.shape == (21, HEADS, 16)
    assert counter.get_total_flops() == 4 * 21 * (19 + 6) * HEADS * 16


def test_refuses_a_head_dim_that_tensor_cores_do_not_take(arguments):
    given = arguments(dim=24)
    if uses_triton(given[0]):
        with pytest.raises(ValueError, match=r"takes head_dim \(16, 32, 64, 128\), qkv has 24"):
            fused_attention(*given)
    else:
        assert fused_attention(*given).shape == (21, HEADS, 24)
