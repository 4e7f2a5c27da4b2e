"""Each part against its equation, written out sample by sample in float64."""

import math

import pytest
import torch

from millrace.engine.config import Model
from millrace.engine.model.blocks import Block, BlockInputs, FinalLayer, VectorEmbedder, sinusoid
from millrace.engine.model.layout import LayoutCache

CONFIG = Model(width=24, depth=1, heads=3, mlp_ratio=2.5, attention_backend="reference")
GRIDS = [(2, 3), (1, 1), (3, 2)]
TEXT = [2, 5, 1]


def _randomize(module):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return module.double()


def _layer_norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)


def _rms_norm(x, weight):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def _gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _inputs():
    torch.manual_seed(1)
    layout = LayoutCache(CONFIG.axes, 100.0).layout(
        GRIDS, torch.tensor([0, 2, 7, 8], dtype=torch.int32), max(TEXT)
    )
    x = torch.randn(sum(layout.lengths), CONFIG.width, dtype=torch.float64)
    modulation = torch.randn(len(GRIDS), 6, CONFIG.width, dtype=torch.float64)
    text_kv = torch.randn(sum(TEXT), 2, CONFIG.heads, CONFIG.head_dim, dtype=torch.float64)
    return layout, x, modulation, text_kv


def _run(block, layout, x, modulation, text_kv):
    rows = layout.positions, layout.cu_seqlens, layout.max_seqlen
    text = layout.cu_seqlens_text, layout.max_seqlen_text
    return block(x, BlockInputs(*modulation.unbind(1), text_kv, layout.cos, layout.sin, *rows, *text))


def _rotate(x, grid):
    """RoPE of (N, H, D) as complex products: the first pairs turn with the row, the last with the column."""
    rows, columns = grid
    half = CONFIG.head_dim // 2
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(-1, 2).double()
    frequency = 100.0 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
    angle = torch.cat((place[:, :1] * frequency, place[:, 1:] * frequency), 1)[:, None]
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def _block_of_one_sample(block, grid, x, modulation, text_kv):
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
    y = (1 + scale) * _layer_norm(x) + shift
    q, k, v = (y @ block.qkv.weight.T).unflatten(1, (3, CONFIG.heads, CONFIG.head_dim)).unbind(1)
    q, k = _rotate(_rms_norm(q, block.query_norm), grid), _rotate(_rms_norm(k, block.key_norm), grid)
    keys = torch.cat((_rms_norm(text_kv[:, 0], block.text_key_norm), k))
    values = torch.cat((text_kv[:, 1], v))
    weights = torch.softmax(torch.einsum("nhd,mhd->hnm", q, keys) / math.sqrt(CONFIG.head_dim), -1)
    attended = torch.einsum("hnm,mhd->nhd", weights, values).flatten(1)
    x = x + gate * (attended @ block.attn_out.weight.T)
    y = (1 + mlp_scale) * _layer_norm(x) + mlp_shift
    gate_rows, up_rows = block.gate_up.weight.split(CONFIG.mlp_width)
    return x + mlp_gate * ((_gelu_tanh(y @ gate_rows.T) * (y @ up_rows.T)) @ block.down.weight.T)


def test_block_is_its_equation():
    block = _randomize(Block(CONFIG))
    layout, x, modulation, text_kv = _inputs()
    wanted = torch.cat(
        [
            _block_of_one_sample(block, grid, *sample)
            for grid, *sample in zip(
                GRIDS, x.split(layout.lengths), modulation, text_kv.split(TEXT), strict=True
            )
        ]
    )
    # The RoPE table is FP32, so agreement ends at its rounding.
    torch.testing.assert_close(_run(block, layout, x, modulation, text_kv), wanted, rtol=1e-6, atol=1e-6)


def test_block_with_closed_gates_is_the_identity():
    block = _randomize(Block(CONFIG))
    layout, x, modulation, text_kv = _inputs()
    modulation[:, [2, 5]] = 0
    assert torch.equal(_run(block, layout, x, modulation, text_kv), x)


def test_block_does_not_see_the_order_of_text():
    block = _randomize(Block(CONFIG))
    layout, x, modulation, text_kv = _inputs()
    reversed_text = torch.cat([part.flip(0) for part in text_kv.split(TEXT)])
    torch.testing.assert_close(
        _run(block, layout, x, modulation, reversed_text), _run(block, layout, x, modulation, text_kv)
    )


def test_final_layer_is_its_equation():
    layer = _randomize(FinalLayer(24, 5))
    layout, x, _, _ = _inputs()
    vector = torch.randn(len(GRIDS), 24, dtype=torch.float64)
    shift, scale = (vector @ layer.modulation.weight.T + layer.modulation.bias).split(24, 1)
    rows = torch.tensor(layout.lengths)
    modulated = (1 + scale.repeat_interleave(rows, 0)) * _layer_norm(x) + shift.repeat_interleave(rows, 0)
    wanted = modulated @ layer.linear.weight.T + layer.linear.bias
    torch.testing.assert_close(layer(x, vector, layout.cu_seqlens, layout.max_seqlen), wanted)


def test_vector_embedder_is_its_equation():
    embedder = _randomize(VectorEmbedder(8))
    features = torch.randn(3, 256, dtype=torch.float64)
    hidden = features @ embedder.in_layer.weight.T + embedder.in_layer.bias
    wanted = (hidden * torch.sigmoid(hidden)) @ embedder.out_layer.weight.T + embedder.out_layer.bias
    torch.testing.assert_close(embedder(features), wanted)


@pytest.mark.parametrize(("scale", "values"), [(1000.0, [0.0, 0.25, 1.0]), (1.0, [256.0, 1024.0])])
def test_sinusoid_is_its_formula(scale, values):
    found = sinusoid(torch.tensor(values), 256, scale)
    assert found.dtype == torch.float32
    angles = [[scale * value * 10_000 ** (-i / 128) for i in range(128)] for value in values]
    wanted = [[*map(math.cos, row), *map(math.sin, row)] for row in angles]
    # An FP32 angle near 1000 is off by up to 2^-14 after two roundings.
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=2e-4)
