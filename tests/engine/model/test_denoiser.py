"""The denoiser against diffusers' PRXTransformer2DModel with the same weights, and its own promises."""

import math
import random
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from diffusers import PRXTransformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode

import millrace.engine.model.denoiser as denoiser_module
from millrace.engine.checkpoint.weight_formats import to_diffusers
from millrace.engine.config import ActivationCheckpointing, Model
from millrace.engine.model.blocks import Block
from millrace.engine.model.conversion import diffusers_config, diffusers_state
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.layout import patchify
from millrace.engine.model.routing import Tread

LATENT = Model(width=32, depth=3, heads=2, in_channels=4, patch_size=2, context_dim=12)
PIXEL = Model(
    width=48,
    depth=2,
    heads=3,
    mlp_ratio=2.0,
    in_channels=3,
    patch_size=4,
    bottleneck=10,
    context_dim=12,
    rope_axes=(4, 12),
    rope_theta=500.0,
    resolution_embedding=True,
)
MODELS = pytest.mark.parametrize("config", [LATENT, PIXEL], ids=["latent", "pixel"])


def _random_denoiser(config):
    """Every parameter drawn, also those that training starts at zero or one."""
    generator = torch.Generator().manual_seed(3)
    denoiser = Denoiser(config)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return denoiser


def _inputs(config, grid, samples=3, text=6):
    generator = torch.Generator().manual_seed(4)
    rows, columns = grid
    patch = config.patch_size
    images = torch.randn(samples, config.in_channels, rows * patch, columns * patch, generator=generator)
    t = torch.rand(samples, generator=generator)
    return images, t, torch.randn(samples, text, config.context_dim, generator=generator)


def _error(found, wanted):
    """Largest error as a share of the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


MASKS = {
    "full": [[1] * 6] * 3,
    "padded_right": [[1, 1, 0, 0, 0, 0], [1] * 6, [1, 1, 1, 1, 0, 0]],
    "padded_left": [[0, 0, 0, 0, 1, 1], [1] * 6, [0, 0, 1, 1, 1, 1]],
    "scattered": [[0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 1], [1] * 6],
    "one_token": [[0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]],
    "one_empty": [[1] * 6, [0] * 6, [0, 1, 1, 0, 0, 0]],
    "all_empty": [[0] * 6] * 3,
}


@MODELS
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (6, 1)], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_predict_equals_diffusers(config, grid, mask):
    denoiser = _random_denoiser(config)
    images, t, text = _inputs(config, grid)
    text_mask = torch.tensor(MASKS[mask], dtype=torch.bool)
    with torch.no_grad():
        wanted = to_diffusers(denoiser)(images, t, text, attention_mask=text_mask).sample
        found = denoiser.predict(images, t, text, text_mask)
    assert _error(found, wanted) < 1e-5


@MODELS
def test_predict_without_mask_reads_all_text(config):
    denoiser = _random_denoiser(config)
    images, t, text = _inputs(config, (2, 3))
    with torch.no_grad():
        wanted = to_diffusers(denoiser)(images, t, text).sample
        assert _error(denoiser.predict(images, t, text), wanted) < 1e-5


@MODELS
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_mixed_grids_in_one_forward_equal_diffusers_one_by_one(config, backend):
    denoiser = _random_denoiser(config.model_copy(update={"attention_backend": backend}))
    theirs = to_diffusers(denoiser)
    grids, texts = [(2, 3), (5, 2), (1, 1), (3, 3)], [4, 1, 6, 2]
    samples = [_inputs(config, grid, samples=1, text=s) for grid, s in zip(grids, texts, strict=True)]
    times = torch.tensor([0.0, 0.3, 1.0, 0.7])
    offsets = torch.tensor([0, 4, 5, 11, 13], dtype=torch.int32)
    layout = denoiser.layouts.layout(grids, offsets, max(texts))
    tokens = torch.cat([patchify(images[0], config.patch_size) for images, _, _ in samples])
    with torch.no_grad():
        packed = denoiser(tokens, times, torch.cat([text[0] for _, _, text in samples]), layout).prediction
        for i, part in enumerate(packed.split(layout.lengths)):
            images, _, text = samples[i]
            wanted = theirs(images, times[i : i + 1], text).sample[0]
            assert _error(part, patchify(wanted, config.patch_size)) < 1e-5


@MODELS
def test_gradients_equal_diffusers(config):
    denoiser = _random_denoiser(config)
    theirs = to_diffusers(denoiser)
    images, t, text = _inputs(config, (3, 4))
    text_mask = torch.tensor(MASKS["padded_left"], dtype=torch.bool)
    target = torch.randn(images.shape, generator=torch.Generator().manual_seed(5))
    F.mse_loss(denoiser.predict(images, t, text, text_mask), target).backward()
    F.mse_loss(theirs(images, t, text, attention_mask=text_mask).sample, target).backward()
    found = diffusers_state({name: p.grad for name, p in denoiser.named_parameters()}, config)
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert wanted[name].abs().max() > 0, name
        assert _error(found[name], wanted[name]) < 1e-4, name


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ({}, 1_170_691_648),
        ({"in_channels": 32}, 1_170_921_088),
        ({"in_channels": 32, "patch_size": 1}, 1_170_576_928),
        ({"in_channels": 3, "patch_size": 32, "bottleneck": 256}, 1_177_215_744),
        ({"width": 3584, "depth": 24}, 6_985_046_080),
        (
            {
                "width": 3584,
                "depth": 24,
                "in_channels": 3,
                "patch_size": 16,
                "bottleneck": 768,
                "context_dim": 2048,
            },
            6_989_766_144,
        ),
        (
            {
                "width": 3584,
                "depth": 24,
                "in_channels": 3,
                "patch_size": 16,
                "bottleneck": 768,
                "context_dim": 2048,
                "resolution_embedding": True,
            },
            7_003_535_872,
        ),
    ],
    ids=["small", "flux2", "dcae", "jit_32", "base", "pixel_7b", "pixel_7b_resolution"],
)
def test_published_models_have_their_parameter_count(values, count):
    config = Model(**values)
    with torch.device("meta"):
        ours = Denoiser(config)
        theirs = PRXTransformer2DModel(**diffusers_config(config))
    assert sum(parameter.numel() for parameter in ours.parameters()) == count
    assert sum(parameter.numel() for parameter in theirs.parameters()) == count


def test_images_must_divide_into_patches():
    images, t, text = _inputs(LATENT, (2, 2))
    with pytest.raises(ValueError, match=r"3 x 4, expected multiples of patch_size 2"):
        Denoiser(LATENT).predict(images[:, :, :3], t, text)


def test_taps_are_the_outputs_of_blocks():
    denoiser = _random_denoiser(LATENT)
    outputs = []
    for block in denoiser.blocks:
        block.register_forward_hook(lambda _block, _inputs, output: outputs.append(output))
    images, t, text = _inputs(LATENT, (2, 2))
    layout = denoiser.layouts.layout([(2, 2)] * 3, torch.tensor([0, 6, 12, 18], dtype=torch.int32), 6)
    tokens = patchify(images, 2).flatten(0, 1)
    last, first = denoiser(tokens, t, text.flatten(0, 1), layout, taps=(2, 0)).features
    assert last is outputs[2]
    assert first is outputs[0]


class _CountProducts(TorchDispatchMode):
    """Matrix products that really run, by phase; a result that checkpointing kept is not computed again."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


def _loss_and_gradients(checkpointing, reentrant=False):
    """Loss, gradients, and the matrix products and block calls of the backward pass."""
    denoiser = _random_denoiser(LATENT)
    denoiser.checkpoint_activations(checkpointing, reentrant)
    calls = []
    for i, block in enumerate(denoiser.blocks):
        block.register_forward_pre_hook(lambda _block, _inputs, i=i: calls.append(i))
    loss = denoiser.predict(*_inputs(LATENT, (3, 4))).square().mean()
    calls.clear()
    with _CountProducts() as products:
        loss.backward()
    return loss.detach(), {n: p.grad for n, p in denoiser.named_parameters()}, products.count, sorted(calls)


@pytest.mark.parametrize(
    ("policy", "every", "reentrant", "recomputed"),
    [
        ("full", 1, False, [0, 1, 2]),
        ("full", 1, True, [0, 1, 2]),
        ("full", 2, False, [0, 2]),
        ("selective", 1, False, [0, 1, 2]),
        ("selective", 2, False, [0, 2]),
    ],
)
def test_activation_checkpointing_changes_no_number(policy, every, reentrant, recomputed):
    loss, gradients, products, calls = _loss_and_gradients(ActivationCheckpointing())
    assert calls == []
    found = _loss_and_gradients(ActivationCheckpointing(policy=policy, every=every), reentrant)
    assert torch.equal(found[0], loss)
    for name in gradients:
        torch.testing.assert_close(found[1][name], gradients[name], rtol=1e-6, atol=1e-7)
    assert found[3] == recomputed
    if policy == "selective":
        assert found[2] == products
    else:
        assert found[2] > products


def test_no_checkpointing_without_gradients(monkeypatch):
    denoiser = _random_denoiser(LATENT)
    inputs = _inputs(LATENT, (2, 2))
    with torch.no_grad():
        wanted = denoiser.predict(*inputs)
        denoiser.checkpoint_activations(ActivationCheckpointing(policy="full"))
        monkeypatch.setattr(denoiser_module, "checkpoint", None)
        assert torch.equal(denoiser.predict(*inputs), wanted)


def test_initial_weights_are_pytorch_defaults_with_zero_modulation_and_output():
    config = Model(width=64, depth=2, heads=4, in_channels=4, context_dim=40, resolution_embedding=True)
    denoiser = Denoiser(config)
    for parameter in denoiser.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    denoiser.init_weights(7)
    zero = ("modulation.", "final_layer.")
    for name, module in denoiser.named_modules():
        if isinstance(module, Block):
            for norm in (module.query_norm, module.key_norm, module.text_key_norm):
                assert torch.equal(norm, torch.ones(16))
        elif isinstance(module, torch.nn.Linear):
            for parameter in module.parameters():
                if f"{name}.".startswith(zero):
                    assert not parameter.any(), name
                    continue
                # Kaiming uniform with a = sqrt(5) is U(-1, 1) / sqrt(fan_in), the biases' rule too.
                unit = parameter.detach() * module.in_features**0.5
                spread = 0.6 / unit.numel() ** 0.5
                assert unit.abs().max() <= 1, name
                assert abs(unit.square().mean() - 1 / 3) < 4 * spread, name
                assert abs(unit.mean()) < 4 * spread, name


def test_initial_weights_follow_the_seed():
    first, again, other = (Denoiser(LATENT) for _ in range(3))
    first.init_weights(7)
    again.init_weights(7)
    other.init_weights(8)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.txt_in.weight, other.txt_in.weight)
    assert not torch.equal(first.blocks[0].qkv.weight, first.blocks[1].qkv.weight)


def test_untrained_model_predicts_zero():
    denoiser = Denoiser(PIXEL)
    denoiser.init_weights(0)
    with torch.no_grad():
        assert not denoiser.predict(*_inputs(PIXEL, (2, 2))).any()


def test_sixteen_bit_weights_predict():
    """All layers follow the dtype of the pictures, the resolution embedding too."""
    denoiser = _random_denoiser(PIXEL).bfloat16()
    images = torch.randn(2, 3, 8, 12, dtype=torch.bfloat16)
    text = torch.randn(2, 5, 12, dtype=torch.bfloat16)
    out = denoiser.predict(images, torch.tensor([0.2, 0.9]), text)
    wide = denoiser.float().predict(images.float(), torch.tensor([0.2, 0.9]), text.float())
    assert out.dtype == torch.bfloat16
    assert (out.float() - wide).norm() < 0.05 * wide.norm()


@pytest.mark.parametrize("routed", [False, True])
def test_compiled_blocks_take_any_sizes(routed):
    """Mixed grids, captions and routes change every size; blocks stay whole graphs, compiled few times."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    denoiser = _random_denoiser(LATENT)
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    for block in denoiser.blocks:
        block.compile(backend=count)
    numbers = random.Random(0)
    policy = Tread(1, 1, 0.5)
    for step in range(8):
        lengths = [numbers.randint(3, 20) for _ in range(3)]
        grids = [numbers.choice([(4, 4), (3, 5), (5, 3), (2, 7)]) for _ in range(3)]
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        layout = denoiser.layouts.layout(grids, offsets, max(lengths))
        span = policy.draw(layout, 0, torch.arange(3) + 3 * step) if routed else None
        tokens = torch.randn(sum(layout.lengths), 16)
        out = denoiser(tokens, torch.rand(3), torch.randn(sum(lengths), 12), layout, span).prediction
        out.sum().backward()
    assert not torch._dynamo.utils.counters["graph_break"]
    assert 1 <= len(graphs) <= 5
