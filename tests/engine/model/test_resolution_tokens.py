"""Resolution tokens against PRX's form: two embedded rows in front of the embedded text."""

import math

import pytest
import torch
from torch import nn

from millrace.engine.checkpoint.weight_formats import save_diffusers, start_from
from millrace.engine.config import Model, Routing
from millrace.engine.model.conversion import diffusers_state
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.util.errors import UserError

PLAIN = Model(
    width=32, depth=2, heads=2, patch_size=2, in_channels=3, context_dim=8, attention_backend="reference"
)
TOKENS = PLAIN.model_copy(update={"resolution_tokens": True})
GRIDS, TEXTS = [(4, 4), (3, 5), (2, 6)], [3, 0, 5]


def filled(config):
    """A denoiser whose zero-initialised layers have values too, so that the text reaches the output."""
    denoiser = Denoiser(config)
    denoiser.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    for parameter in denoiser.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return denoiser


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(sum(r * c for r, c in GRIDS), 12, generator=generator)
    return tokens, torch.tensor([0.1, 0.5, 0.9]), torch.randn(sum(TEXTS), 8, generator=generator)


def embedded(embedder, edge):
    """PRX's embedding of one edge: 64 cosines, then 64 sines, then a two-layer network."""
    angles = torch.tensor([edge * math.exp(-math.log(10_000) * i / 64) for i in range(64)])
    hidden = embedder.in_layer.weight @ torch.cat((angles.cos(), angles.sin())) + embedder.in_layer.bias
    return embedder.out_layer.weight @ (hidden * torch.sigmoid(hidden)) + embedder.out_layer.bias


def test_it_is_the_model_with_two_rows_in_front_of_the_embedded_text():
    model = filled(TOKENS)
    tokens, t, text = inputs()
    layout = model.layouts.layout(GRIDS, offsets_of(TEXTS), max(TEXTS))
    found = model(tokens, t, text, layout).prediction

    plain = Denoiser(PLAIN)
    state = {n: p for n, p in model.state_dict().items() if not n.startswith("resolution_tokens.")}
    plain.load_state_dict(state)
    rows = []
    for (height, width), part in zip(GRIDS, model.txt_in(text).split(TEXTS), strict=True):
        rows.append(embedded(model.resolution_tokens.height, height * PLAIN.patch_size)[None])
        rows.append(embedded(model.resolution_tokens.width, width * PLAIN.patch_size)[None])
        rows.append(part)
    plain.txt_in = nn.Identity()
    longer = [length + 2 for length in TEXTS]
    layout = plain.layouts.layout(GRIDS, offsets_of(longer), max(longer))
    wanted = plain(tokens, t, torch.cat(rows), layout).prediction
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

    without = Denoiser(PLAIN)
    without.load_state_dict(state)
    layout = without.layouts.layout(GRIDS, offsets_of(TEXTS), max(TEXTS))
    other = without(tokens, t, text, layout).prediction
    assert (found - other).abs().max() > 1e-3


def test_both_embedders_and_the_text_learn():
    model = filled(TOKENS)
    tokens, t, text = inputs()
    text.requires_grad_()
    found = model(tokens, t, text, model.layouts.layout(GRIDS, offsets_of(TEXTS), max(TEXTS))).prediction
    found.square().sum().backward()
    for name, parameter in model.resolution_tokens.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    assert text.grad.abs().amin(1).max() > 0


def test_a_sample_does_not_depend_on_its_batch():
    model = filled(TOKENS)
    tokens, t, text = inputs()
    together = model(tokens, t, text, model.layouts.layout(GRIDS, offsets_of(TEXTS), max(TEXTS))).prediction
    layout = model.layouts.layout(GRIDS[2:], offsets_of(TEXTS[2:]), TEXTS[2])
    alone = model(tokens[31:], t[2:], text[3:], layout).prediction
    torch.testing.assert_close(together[31:], alone, rtol=1e-4, atol=1e-5)


def test_the_dense_form_has_them_too():
    model = filled(TOKENS)
    generator = torch.Generator().manual_seed(2)
    images, t = torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([0.2, 0.7])
    text = torch.randn(2, 4, 8, generator=generator)
    mask = torch.tensor([[True] * 4, [False, True, False, False]])
    found = model.predict(images, t, text, mask)
    for i in range(2):
        alone = model.predict(images[i : i + 1], t[i : i + 1], text[i][mask[i]][None])
        torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_parameters():
    extra = sum(p.numel() for p in Denoiser(TOKENS).parameters())
    extra -= sum(p.numel() for p in Denoiser(PLAIN).parameters())
    assert extra == 2 * (128 * 32 + 32 + 32 * 32 + 32)


def test_other_projects_have_no_place_for_them():
    model = Denoiser(TOKENS)
    with pytest.raises(
        UserError, match=r"resolution tokens, which have no place in diffusers' .*millrace sample"
    ):
        diffusers_state(model.state_dict(), TOKENS)


def test_starting_from_weights_without_them(tmp_path):
    plain, model = filled(PLAIN), Denoiser(TOKENS)
    save_diffusers(plain.state_dict(), PLAIN, tmp_path / "plain")
    model.init_weights(3)
    before = {n: p.clone() for n, p in model.resolution_tokens.state_dict().items()}
    _, message = start_from(model, tmp_path / "plain")
    assert message == (
        f"warning: {tmp_path / 'plain'} has no resolution tokens; this run's start from random weights"
    )
    assert torch.equal(model.text_kv.weight, plain.text_kv.weight)
    for name, value in model.resolution_tokens.state_dict().items():
        assert torch.equal(value, before[name])


def test_starting_without_them_from_their_weights_is_refused(monkeypatch):
    state = filled(TOKENS).state_dict()
    monkeypatch.setattr(
        "millrace.engine.checkpoint.weight_formats.load_weights",
        lambda *_: (state, TOKENS, Routing(), "a run"),
    )
    with pytest.raises(UserError, match=r"with resolution tokens; set model\.resolution_tokens to true"):
        start_from(Denoiser(PLAIN), "a run")
