"""Adapter files: what peft makes of them over diffusers' model is what the run computed, merged or not."""

import json
import re

import pytest
import torch
from diffusers import PRXTransformer2DModel
from safetensors.torch import load_file

from millrace.engine import export
from millrace.engine.checkpoint.adapter_files import CONFIG, TENSORS
from millrace.engine.checkpoint.checkpoints import save_checkpoint
from millrace.engine.checkpoint.model_weights import checkpoint_state
from millrace.engine.checkpoint.sharded_tensors import Piece
from millrace.engine.checkpoint.weight_formats import save_diffusers
from millrace.engine.config import Adapter, Config, Model
from millrace.engine.config.loading import merge, parse_config
from millrace.engine.model.adapters import AdaptedLinear, add_adapter
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.freezing import freeze, store_frozen
from millrace.engine.util.errors import UserError

LATENT = {"width": 32, "depth": 3, "heads": 2, "in_channels": 16, "patch_size": 2, "context_dim": 12}
PIXEL = {
    "width": 48,
    "depth": 2,
    "heads": 3,
    "mlp_ratio": 2.0,
    "in_channels": 3,
    "patch_size": 16,
    "bottleneck": 10,
    "context_dim": 12,
    "rope_axes": (4, 12),
    "resolution_embedding": True,
}
MODELS = {"latent": LATENT, "pixel": PIXEL}
KINDS = pytest.mark.parametrize("kind", ["lora", "dora"])


def _fill(tensors, seed, std=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            tensor.normal_(std=std, generator=generator)


def _inputs(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    side = 2 * model.patch_size
    images = torch.randn(2, model.in_channels, side, side, generator=generator)
    text = torch.randn(2, 5, model.context_dim, generator=generator)
    return images, torch.tensor([0.3, 0.8]), text


@pytest.fixture
def adapted(tmp_path):
    """`adapted(kind)` -> (run with a checkpoint, the Denoiser with factors that are trained)."""

    def make(kind, model="latent", **more):
        base, checkpoints = tmp_path / "base", tmp_path / "checkpoints"
        values = {
            "model": MODELS[model],
            "run": {"init_from": str(base)},
            "adapter": {"kind": kind, "rank": 3, "alpha": 6.0, "targets": ["*"], **more},
        }
        if model == "pixel":
            values["conditioning"] = {"autoencoder": {"kind": "pixels"}}
        config = parse_config(merge(Config().model_dump(mode="json"), values), "test")
        denoiser = Denoiser(config.model)
        _fill(denoiser.parameters(), 0)
        save_diffusers(denoiser.state_dict(), config.model, base)
        add_adapter(denoiser, config.adapter, 0)
        factors = [p for name, p in denoiser.named_parameters() if "lora_" in name]
        _fill(factors, 2)
        freeze(denoiser, config)
        store_frozen(denoiser, torch.float32)
        pieces = [
            Piece(f"master/{name}", tuple(p.shape), 0, p.detach().flatten())
            for name, p in denoiser.named_parameters()
        ]
        meta = {"step": 1, "samples": 1, "skipped": 0, "updates": 1, "data": "x"}
        meta |= {"text_tower": "hash", "autoencoder": "pixels", "config": config.model_dump(mode="json")}
        save_checkpoint(checkpoints, 1, pieces, meta, keep=1)
        return tmp_path, denoiser

    return make


@KINDS
def test_an_adapter_begins_as_the_model(kind):
    denoiser = Denoiser(Model(**LATENT))
    _fill(denoiser.parameters(), 0)
    wanted = denoiser.predict(*_inputs(denoiser.config))
    add_adapter(denoiser, Adapter(kind=kind, targets=("*",)), 0)
    store_frozen(denoiser, torch.float32)
    assert sum(isinstance(module, AdaptedLinear) for module in denoiser.modules()) == 8 + 4 * 3
    torch.testing.assert_close(denoiser.predict(*_inputs(denoiser.config)), wanted, rtol=1e-4, atol=1e-4)


@KINDS
def test_merged_weights_compute_the_same(adapted, kind):
    run, denoiser = adapted(kind)
    state, config = checkpoint_state(run)
    plain = Denoiser(config.model)
    plain.load_state_dict(state)
    found, wanted = (model.predict(*_inputs(config.model)) for model in (plain, denoiser))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("model", list(MODELS))
@KINDS
def test_peft_over_diffusers_computes_the_same(adapted, tmp_path, kind, model):
    peft = pytest.importorskip("peft")
    run, denoiser = adapted(kind, model)
    words = ["--checkpoint", str(run), "--weights", "model"]
    assert export.main([*words, "--output", str(tmp_path / "adapter"), "--adapter"]) == 0
    assert export.main([*words, "--output", str(tmp_path / "merged")]) == 0
    base = json.loads((tmp_path / "adapter" / CONFIG).read_text())["base_model_name_or_path"]
    theirs = PRXTransformer2DModel.from_pretrained(base)
    images, t, text = _inputs(denoiser.config)
    with torch.no_grad():
        wanted = denoiser.predict(images, t, text)
        plain = theirs(images, t, text).sample
        loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
        found = loaded(images, t, text).sample
        merged = PRXTransformer2DModel.from_pretrained(tmp_path / "merged")(images, t, text).sample
        unloaded = loaded.merge_and_unload()(images, t, text).sample
        card = (tmp_path / "adapter" / "README.md").read_text()
        names = {}
        exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names)
        in_place = names["base"](images, t, text).sample
    close = {"rtol": 1e-4, "atol": 1e-4 * wanted.abs().max().item()}
    assert not torch.allclose(plain, wanted, rtol=0.01, atol=0.01)
    for result in (found, merged, unloaded, in_place):
        torch.testing.assert_close(result, wanted, **close)
    stored = load_file(tmp_path / "adapter" / TENSORS)
    ours = sum(p.numel() for name, p in denoiser.named_parameters() if name.endswith("lora_B"))
    assert sum(t.numel() for name, t in stored.items() if "lora_B" in name) == ours


@KINDS
def test_gradients_are_those_of_peft(kind):
    """Of every factor of one layer, DoRA's norm held constant as peft holds it."""
    peft = pytest.importorskip("peft")
    ours = torch.nn.ModuleDict({"layer": torch.nn.Linear(7, 5)})
    theirs = torch.nn.ModuleDict({"layer": torch.nn.Linear(7, 5)})
    theirs.load_state_dict(ours.state_dict())
    lora = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["layer"], use_dora=kind == "dora")
    theirs = peft.inject_adapter_in_model(lora, theirs)["layer"]
    layer = AdaptedLinear(ours["layer"], Adapter(kind=kind, rank=3, alpha=6))
    _fill([layer.lora_A, layer.lora_B], 3)
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(layer.lora_A)
        theirs.lora_B["default"].weight.copy_(layer.lora_B)
    pairs = [(layer.lora_A, theirs.lora_A["default"].weight), (layer.lora_B, theirs.lora_B["default"].weight)]
    if kind == "dora":
        layer.lora_magnitude.data = layer.weight.detach().norm(dim=1) * 1.2
        magnitude = theirs.lora_magnitude_vector["default"].weight
        magnitude.data = layer.lora_magnitude.detach().clone()
        pairs.append((layer.lora_magnitude, magnitude))
    layer.measure()
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(4))
    wanted, found = theirs(x), layer(x)
    torch.testing.assert_close(found, wanted)
    wanted.square().sum().backward()
    found.square().sum().backward()
    for own, other in pairs:
        torch.testing.assert_close(own.grad, other.grad)


@pytest.mark.parametrize(
    ("more", "changes", "message"),
    [
        ({"unfrozen": ["blocks.0.query_norm"]}, [], "besides its adapter"),
        ({}, ["--format", "prx"], "goes with --output alone"),
    ],
)
def test_what_peft_cannot_hold_is_refused(adapted, tmp_path, more, changes, message):
    run, _ = adapted("lora", **more)
    words = ["--checkpoint", str(run), "--output", str(tmp_path / "out"), "--adapter", *changes]
    with pytest.raises(UserError, match=message):
        export.main(words)
