"""The split of weights into matrices, against the conversion to Photoroom/PRX's names and the blocks."""

import pytest
import torch

from millrace.engine.config import Model, Routing
from millrace.engine.model.conversion import prx_state
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.optim.matrices import block_matrices

TINY = Model(width=16, depth=3, heads=2, patch_size=1, in_channels=4, context_dim=8, mlp_ratio=3.5)
C, F, DEPTH = 16, 56, 3


def parts(named, chunked=False):
    """Every matrix by value, in order."""
    found = []
    for name, weight in named.items():
        stack = block_matrices(name, tuple(weight.shape), TINY, chunked)
        if stack is not None:
            found += list(weight.detach().view(stack.count, stack.rows, stack.columns))
    return found


def test_they_are_the_matrices_of_prxs_blocks():
    """PRX's rule, on PRX's own weights: two-dimensional and "blocks" in the name."""
    denoiser = Denoiser(TINY)
    denoiser.init_weights(0)
    torch.nn.init.normal_(denoiser.modulation.weight)
    theirs = prx_state(denoiser.state_dict(), TINY)
    wanted = [weight for name, weight in theirs.items() if weight.dim() == 2 and "blocks" in name]
    found = parts(dict(denoiser.named_parameters()))
    assert len(found) == len(wanted) == DEPTH * 7
    values = {tuple(matrix.flatten().tolist()) for matrix in wanted}
    assert len(values) == len(wanted)
    assert {tuple(matrix.flatten().tolist()) for matrix in found} == values
    assert {matrix.shape for matrix in found} == {matrix.shape for matrix in wanted}


def test_chunks_are_what_the_block_takes_apart():
    denoiser = Denoiser(TINY)
    torch.nn.init.normal_(denoiser.modulation.weight)
    named = dict(denoiser.named_parameters())
    x, modulation = torch.randn(5, C), named["modulation.weight"]
    stack = block_matrices("modulation.weight", tuple(modulation.shape), TINY, chunked=True)
    assert stack == (DEPTH * 6, C, C)
    wanted = torch.nn.functional.linear(x, modulation).unflatten(1, (DEPTH, 6, C))
    torch.testing.assert_close(torch.einsum("bi,noi->bno", x, modulation.view(stack)), wanted.flatten(1, 2))
    assert block_matrices("blocks.1.qkv.weight", (3 * C, C), TINY, chunked=True) == (3, C, C)
    assert block_matrices("text_kv.weight", (DEPTH * 2 * C, C), TINY, chunked=True) == (DEPTH * 2, C, C)
    assert block_matrices("blocks.0.gate_up.weight", (2 * F, C), TINY, chunked=True) == (2, F, C)
    assert block_matrices("blocks.0.down.weight", (C, F), TINY, chunked=True) == (1, C, F)


@pytest.mark.parametrize("chunked", [False, True])
def test_nothing_else_is_a_matrix(chunked):
    denoiser = Denoiser(TINY, Routing(policy="sprint", start=1, end=1))
    rest = [
        name
        for name, weight in denoiser.named_parameters()
        if block_matrices(name, tuple(weight.shape), TINY, chunked) is None
    ]
    blocks = [name for name in rest if name.startswith("blocks.")]
    assert {name.split(".")[2] for name in blocks} == {"query_norm", "key_norm", "text_key_norm"}
    outside = ("img_in", "txt_in", "time_in", "final_layer", "fusion", "modulation.bias")
    assert all(name.startswith(outside) for name in rest if name not in blocks)
    assert block_matrices("alignment.blocks.0.qkv.weight", (48, 16), TINY, chunked) is None
