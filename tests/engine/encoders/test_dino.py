import sys

import pytest
import torch

from millrace.engine.encoders.dino import load_dino
from millrace.engine.encoders.teacher import vision_entry
from millrace.engine.util.errors import UserError

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
KEY = "alignment.teacher.path"
WITHOUT = {"name": "Dinov2", "num_register_tokens": None}
KINDS = [("dinov2", True), ("dinov2", False), ("dinov3", True)]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No test may reach the hub, whatever the machine allows."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def open_dino(kind, folder, dtype=torch.float32):
    return load_dino(kind, str(folder), KEY, CPU, dtype, "nobody/nothing")


def by_transformers(folder, pictures):
    """Patch tokens and attention probabilities of the real class, as its documentation has it called."""
    network = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    outputs = network(((pictures + 1) / 2 - mean) / std, output_attentions=True)
    prefix = 1 + getattr(network.config, "num_register_tokens", 0)
    return outputs.last_hidden_state[:, prefix:], [
        maps[:, :, prefix:, prefix:] for maps in outputs.attentions
    ]


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 5)])
@pytest.mark.parametrize(("kind", "registers"), KINDS)
def test_tokens_and_attention_are_those_of_transformers(tmp_path, kind, registers, rows, columns):
    dino = open_dino(kind, vision_entry(kind).tiny(tmp_path, **({} if registers else WITHOUT)))
    assert (dino.patch, dino.dim, dino.layers, dino.heads) == (14 if kind == "dinov2" else 16, 32, 3, 4)
    pictures = torch.rand(2, 3, rows * dino.patch, columns * dino.patch) * 2 - 1
    with torch.no_grad():
        expected, maps = by_transformers(tmp_path, pictures)
        tokens, attention = dino.tokens_and_attention(pictures, (2, 0))
        torch.testing.assert_close(dino.patch_tokens(pictures), tokens, rtol=0, atol=0)
    assert tokens.shape == (2, rows * columns, 32)
    torch.testing.assert_close(tokens, expected)
    assert (tokens[0] - tokens[1]).abs().max() > 0.05
    for (q, k), layer in zip(attention, (2, 0), strict=True):
        assert q.shape == k.shape == (2, rows * columns, 4, 8)
        among_patches = torch.einsum("bnhd,bmhd->bhnm", q, k).div(8**0.5).softmax(-1)
        renormalised = maps[layer] / maps[layer].sum(-1, keepdim=True)
        torch.testing.assert_close(among_patches, renormalised)
    assert dino.tokens_and_attention(pictures, ())[1] == []


@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
def test_frozen_but_differentiable_in_the_pictures(tmp_path, kind):
    dino = open_dino(kind, vision_entry(kind).tiny(tmp_path))
    assert not any(parameter.requires_grad for parameter in dino.network.parameters())
    assert not dino.network.training
    assert not isinstance(dino, torch.nn.Module)
    side = 2 * dino.patch
    pictures = (torch.rand(1, 3, side, side) * 2 - 1).requires_grad_()
    probe = torch.randn(1, 4, 32)
    (gradient,) = torch.autograd.grad((dino.patch_tokens(pictures) * probe).sum(), pictures)
    (expected,) = torch.autograd.grad((by_transformers(tmp_path, pictures)[0] * probe).sum(), pictures)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
    assert gradient.abs().max() > 1e-3


def test_bfloat16_and_autocast(tmp_path):
    vision_entry("dinov3").tiny(tmp_path)
    dino, exact = open_dino("dinov3", tmp_path, torch.bfloat16), open_dino("dinov3", tmp_path)
    pictures = torch.rand(1, 3, 32, 32) * 2 - 1
    tokens, expected = dino.patch_tokens(pictures), exact.patch_tokens(pictures)
    assert tokens.dtype == torch.bfloat16
    assert (tokens.float() - expected).norm() / expected.norm() < 0.05
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(exact.patch_tokens(pictures), expected, rtol=0, atol=0)


def test_pictures_of_other_sizes_are_refused(tmp_path):
    dino = open_dino("dinov2", vision_entry("dinov2").tiny(tmp_path))
    with pytest.raises(ValueError, match="28 x 30, expected multiples of the patch 14"):
        dino.patch_tokens(torch.zeros(1, 3, 28, 30))


def test_identity_names_family_and_source(tmp_path):
    assert open_dino("dinov3", vision_entry("dinov3").tiny(tmp_path)).identity == f"dinov3 {tmp_path}"


@pytest.mark.parametrize(("asked", "held"), [("dinov2", "dinov3"), ("dinov3", "dinov2")])
def test_another_family_is_refused(tmp_path, asked, held):
    vision_entry(held).tiny(tmp_path)
    with pytest.raises(UserError, match=rf"holds a {held}\w*, not a {asked}; set {KEY}") as caught:
        open_dino(asked, tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_and_incomplete_weights_name_the_key(tmp_path):
    with pytest.raises(UserError, match=rf"nowhere.*set {KEY} to") as caught:
        open_dino("dinov2", tmp_path / "nowhere")
    assert "\n" not in str(caught.value)
    network = transformers.AutoModel.from_pretrained(vision_entry("dinov2").tiny(tmp_path))
    state = {name: value for name, value in network.state_dict().items() if "layer.1." not in name}
    network.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match=r"lacks \d+ weights of Dinov2WithRegistersModel") as caught:
        open_dino("dinov2", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
def test_default_source(kind, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=vision_entry(kind).large.source):
        load_dino(kind, None, KEY, CPU, torch.float32, vision_entry(kind).large.source)


def test_missing_package_gives_the_pip_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install"):
        open_dino("dinov2", tmp_path)
