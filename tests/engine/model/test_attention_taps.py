"""Queries and keys that the denoiser hands out are those that its attention uses."""

import math

import pytest
import torch

import millrace.engine.model.blocks as blocks
from millrace.engine.config import ActivationCheckpointing, Model, Routing
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.routing import Sprint, Tread
from millrace.kernels.attention.prologue import prologue

CONFIG = Model(width=32, depth=5, heads=4, in_channels=4, context_dim=12)
GRIDS = [(4, 4), (2, 5), (3, 3)]
INDEX = torch.tensor([11, 5, 900])
ROUTES = pytest.mark.parametrize("policy", ["none", "tread", "sprint"])


def case(policy="none"):
    denoiser = Denoiser(CONFIG, Routing(policy=policy, start=1, end=3))
    generator = torch.Generator().manual_seed(0)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    layout = denoiser.layouts.layout(GRIDS, torch.tensor([0, 3, 4, 8], dtype=torch.int32), 4)
    tokens = torch.randn(sum(layout.lengths), 16, generator=generator)
    text = torch.randn(8, 12, generator=generator)
    made = {"none": None, "tread": Tread(1, 3, 0.5), "sprint": Sprint(1, 3, 0.5)}[policy]
    span = None if made is None else made.draw(layout, 42, INDEX)
    return denoiser, (tokens, torch.rand(3, generator=generator), text, layout, span)


@ROUTES
def test_they_are_those_of_the_kernels_prologue(policy, monkeypatch):
    denoiser, inputs = case(policy)
    seen, attention = [], blocks.rope_attention

    def noted(*args, **options):
        # Without text and one sample of all rows, the prologue's own queries and keys are the image's.
        qkv, text_kv, *norms_and_angles = args[:8]
        none = torch.zeros(2, dtype=torch.int32)
        rows = torch.tensor([0, len(qkv)], dtype=torch.int32)
        seen.append(prologue(qkv, text_kv[:0], *norms_and_angles, rows, none, len(qkv), 0, False)[:2])
        return attention(*args, **options)

    monkeypatch.setattr(blocks, "rope_attention", noted)
    with torch.no_grad():
        _, (features,), (first, last) = denoiser(*inputs, taps=(2,), attention_taps=(2, 4), tapped_heads=3)
    rows = len(inputs[0]) if inputs[4] is None else len(inputs[4].route.index)
    assert len(features) == len(first[0]) == rows
    assert len(last[0]) == len(inputs[0])
    for (q, k), block in ((first, 2), (last, 4)):
        assert q.shape[1:] == k.shape[1:] == (3, 8)
        torch.testing.assert_close(q, seen[block][0].view(-1, 4, 8)[:, :3], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(k, seen[block][1].view(-1, 4, 8)[:, :3], rtol=1e-5, atol=1e-6)


def test_equations_of_one_row():
    denoiser, inputs = case()
    projected = []
    handle = denoiser.blocks[0].qkv.register_forward_hook(lambda _module, _args, out: projected.append(out))
    with torch.no_grad():
        ((q, _),) = denoiser(*inputs, attention_taps=(0,), tapped_heads=4).attention
    handle.remove()
    row = 16 + 7  # the second picture's row 1, column 2
    x = projected[0][row, :32].view(4, 8)[2].double()
    x = x / (x.square().mean() + 1e-6).sqrt() * denoiser.blocks[0].query_norm.double()
    for pair in range(4):
        angle = (1, 2)[pair // 2] * 10_000.0 ** (-(pair % 2) / 2)
        a, b = x[2 * pair], x[2 * pair + 1]
        expected = [
            math.cos(angle) * a - math.sin(angle) * b,
            math.sin(angle) * a + math.cos(angle) * b,
        ]
        torch.testing.assert_close(q[row, 2, 2 * pair : 2 * pair + 2].double(), torch.stack(expected))


@ROUTES
def test_taps_change_nothing_else(policy):
    denoiser, inputs = case(policy)
    with torch.no_grad():
        plain = denoiser(*inputs).prediction
        tapped = denoiser(*inputs, attention_taps=(1, 3), tapped_heads=2).prediction
    assert torch.equal(plain, tapped)


@ROUTES
@pytest.mark.parametrize(
    ("activations", "reentrant"), [("full", False), ("full", True), ("selective", False)]
)
def test_gradients_under_activation_checkpointing(policy, activations, reentrant):
    def gradients(checkpointed):
        denoiser, inputs = case(policy)
        if checkpointed:
            denoiser.checkpoint_activations(ActivationCheckpointing(policy=activations), reentrant)
        prediction, _, ((q, k),) = denoiser(*inputs, attention_taps=(2,), tapped_heads=2)
        (prediction.square().mean() + (q * k).sin().mean()).backward()
        return {name: parameter.grad for name, parameter in denoiser.named_parameters()}

    plain, again = gradients(False), gradients(True)
    assert plain["blocks.2.query_norm"].abs().max() > 0
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)


def test_gradient_reaches_the_blocks_before_and_not_those_after():
    denoiser, inputs = case()
    ((q, k),) = denoiser(*inputs, attention_taps=(2,), tapped_heads=2).attention
    (q * k).sum().backward()
    assert denoiser.blocks[1].down.weight.grad.abs().max() > 0
    assert denoiser.blocks[3].down.weight.grad is None
    # Values and the heads that were not asked for have no part in it.
    rows = denoiser.blocks[2].qkv.weight.grad.view(3, 4, 8, 32)
    assert rows[:2, :2].abs().amax((1, 2, 3)).min() > 0
    assert torch.equal(rows[2], torch.zeros_like(rows[2]))
    assert torch.equal(rows[:, 2:], torch.zeros_like(rows[:, 2:]))
