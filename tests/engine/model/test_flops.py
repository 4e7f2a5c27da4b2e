"""FLOPs by formula against PyTorch's counter on the real denoiser, and against published sizes of PRX."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from millrace.engine.config import Adapter, Autoencoder, Conditioning, Config, Model, Optimizer, Routing
from millrace.engine.model.adapters import add_adapter
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.flops import dense_training_flops, forward_flops, training_flops
from millrace.engine.model.freezing import freeze
from millrace.engine.model.routing import Sprint, Tread
from millrace.kernels.attention import backends

LATENT = Model(width=64, depth=6, heads=4, in_channels=4, context_dim=24)
BOTTLENECK = Model(width=48, depth=5, heads=2, patch_size=4, in_channels=3, bottleneck=10, context_dim=20)
RESOLUTION = Model(width=48, depth=3, heads=3, mlp_ratio=2.5, resolution_embedding=True, context_dim=12)
TOKENS = LATENT.model_copy(update={"resolution_tokens": True})
MODELS = {"latent": LATENT, "bottleneck": BOTTLENECK, "resolution": RESOLUTION, "tokens": TOKENS}

PIXELS = Conditioning(autoencoder=Autoencoder(kind="pixels"))

SQUARE = [(4, 4), (4, 4), (4, 4)]
MIXED = [(4, 6), (5, 3), (4, 4)]
EVEN, RAGGED = [9, 9, 9], [5, 1, 17]

PRX = Model(width=1792, depth=16, heads=28, in_channels=16, patch_size=2, context_dim=2304)
PRX_JIT = PRX.model_copy(update={"in_channels": 3, "patch_size": 32, "bottleneck": 256})


def counted(config, grids, text_lengths, policy=None, routing=None):
    """FLOPs of (forward, backward) that PyTorch counts while the denoiser runs a packed batch."""
    denoiser = Denoiser(config, routing)
    offsets = torch.tensor([0, *text_lengths]).cumsum(0).int()
    layout = denoiser.layouts.layout(grids, offsets, max(text_lengths))
    features = config.in_channels * config.patch_size**2
    tokens, t = torch.randn(sum(layout.lengths), features), torch.rand(len(grids))
    text = torch.randn(sum(text_lengths), config.context_dim)
    span = policy.draw(layout, 0, torch.arange(len(grids))) if policy else None
    with FlopCounterMode(display=False) as forward:
        prediction = denoiser(tokens, t, text, layout, span).prediction
    with FlopCounterMode(display=False) as backward:
        prediction.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def by_formula(config, grids, text_lengths, tread=None):
    """FLOPs of the same batch's forward pass by `forward_flops`."""
    routed = range(tread.start, tread.end + 1) if tread else range(0)
    total = 0.0
    for (rows, columns), text in zip(grids, text_lengths, strict=True):
        n = rows * columns
        kept = n - round(n * tread.drop) if tread else n
        total += forward_flops(config, n, text, routed, kept)
    return total


def gradients_of_inputs(config, grids, text_lengths):
    """FLOPs of the products that "twice forward" has too many: nothing needs the gradient of an input."""
    features = config.in_channels * config.patch_size**2
    image = sum(rows * columns for rows, columns in grids) * features * (config.bottleneck or config.width)
    text = sum(text_lengths) * config.context_dim * config.width
    vectors = len(grids) * 256 * config.width * (2 if config.resolution_embedding else 1)
    vectors += len(grids) * 2 * 128 * config.width if config.resolution_tokens else 0
    return 2 * (image + text + vectors)


@pytest.mark.parametrize("tread", [None, Tread(1, 2, 0.5)], ids=["dense", "tread"])
@pytest.mark.parametrize(
    ("grids", "text_lengths"),
    [(SQUARE, EVEN), (SQUARE, RAGGED), (MIXED, RAGGED)],
    ids=["uniform", "ragged-text", "mixed"],
)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_formula_is_what_pytorch_counts(backend, name, grids, text_lengths, tread, monkeypatch):
    """Exact in both directions where attention's products are spelled out, as SDPA's plain form does too.

    (The counter does not know SDPA's fused CPU kernel.)
    """
    monkeypatch.setattr(backends, "_SMALL", 0)  # small samples would be padded to one call
    config = MODELS[name].model_copy(update={"attention_backend": backend})
    with sdpa_kernel(SDPBackend.MATH):
        forward, backward = counted(config, grids, text_lengths, tread)
    assert forward == by_formula(config, grids, text_lengths, tread)
    assert backward == 2 * forward - gradients_of_inputs(config, grids, text_lengths)


@pytest.mark.parametrize("grids", [SQUARE, MIXED], ids=["uniform", "mixed"])
def test_sprint_is_counted_as_defined_and_computed_with_less(grids):
    """PyTorch counts what `gather_fuse` multiplies: the deep half of the layer meets K rows instead of T."""
    routing = Routing(policy="sprint", start=1, end=3)
    config = LATENT.model_copy(update={"attention_backend": "reference"})
    forward, backward = counted(config, grids, RAGGED, Sprint(1, 3, 0.75), routing)
    images = [rows * columns for rows, columns in grids]
    kept = [n - round(0.75 * n) for n in images]
    defined = sum(
        forward_flops(config, n, text, range(1, 4), k, fused=True)
        for n, text, k in zip(images, RAGGED, kept, strict=True)
    )
    assert forward == defined - 2 * (sum(images) - sum(kept)) * 64 * 64
    assert backward == 2 * forward - gradients_of_inputs(config, grids, RAGGED)


@pytest.mark.parametrize("name", MODELS)
def test_products_add_up_to_the_forward_pass(name):
    """A training of everything, as the sum over products that a training of a part uses."""
    model = MODELS[name]
    config = Config(model=model, conditioning=PIXELS if model.in_channels == 3 else Conditioning())
    still = config.model_copy(update={"optimizer": Optimizer(frozen=("blocks.*.query_norm",))})
    assert training_flops(still, 16, 9) == training_flops(config, 16, 9)


def test_an_adapter_is_counted_as_pytorch_counts():
    """Exact but for block 0's first products, whose input needs no gradient: below lies nothing trained."""
    model = LATENT.model_copy(update={"attention_backend": "reference"})
    config = Config(model=model, adapter=Adapter(kind="lora", rank=4))
    denoiser = Denoiser(model)
    add_adapter(denoiser, config.adapter, 0)
    freeze(denoiser, config)
    n, text, width = 16, 9, model.width
    layout = denoiser.layouts.layout([(4, 4)], torch.tensor([0, text], dtype=torch.int32), text)
    inputs = torch.randn(n, 16), torch.rand(1), torch.randn(text, model.context_dim), layout
    with FlopCounterMode(display=False) as counter:
        denoiser(*inputs).prediction.sum().backward()
    unneeded = 2 * n * (3 * width * width + 4 * width)
    assert counter.get_total_flops() == training_flops(config, n, text) - unneeded


def test_frozen_blocks_at_the_start_have_no_backward():
    """With embeddings and modulation frozen too, half of the blocks cost a third."""
    outside = ("img_in.*", "txt_in.*", "time_in.*", "modulation.*", "text_kv.*", "final_layer.modulation.*")
    whole = Config(model=PRX, optimizer=Optimizer(frozen=outside))
    half = Config(model=PRX, optimizer=Optimizer(frozen=(*outside, *(f"blocks.{i}.*" for i in range(8)))))
    blocks = forward_flops(PRX, 256, 0, range(0), 256) - forward_flops(PRX, 256, 0, range(8), 0)
    saved = training_flops(whole, 256, 0) - training_flops(half, 256, 0)
    assert saved == pytest.approx(2 * blocks, rel=1e-12)


def test_bottleneck_and_resolution_are_counted():
    """The cases above would not notice a term that is missing on both sides."""
    plain = RESOLUTION.model_copy(update={"resolution_embedding": False})
    extra = forward_flops(RESOLUTION, 16, 9, range(0), 16) - forward_flops(plain, 16, 9, range(0), 16)
    assert extra == 2 * (256 * 48 + 48 * 48)
    direct = BOTTLENECK.model_copy(update={"bottleneck": None})
    saved = forward_flops(direct, 16, 9, range(0), 16) - forward_flops(BOTTLENECK, 16, 9, range(0), 16)
    assert saved == 2 * 16 * (48 * 48 - (48 * 10 + 10 * 48))


def test_mean_text_length_is_exact_for_equal_images():
    lengths = [5, 1, 18]
    each = sum(forward_flops(LATENT, 16, n, range(2, 4), 8) for n in lengths)
    assert 3 * forward_flops(LATENT, 16, sum(lengths) / 3, range(2, 4), 8) == pytest.approx(each, rel=1e-12)


@pytest.mark.parametrize(
    ("model", "tokens", "gmac", "tread", "sprint", "longer"),
    [
        (PRX, 256, 226.0, 0.696, 0.553, 0.613),
        (PRX_JIT, 256, 227.6, 0.698, 0.556, 0.615),
        (PRX_JIT, 1024, 872.6, 0.658, 0.503, 0.565),
        (PRX, 4096, 4102, 0.618, 0.464, 0.514),
    ],
    ids=["latents-256px", "pixels-512px", "pixels-1024px", "latents-1024px"],
)
def test_sizes_of_prx(model, tokens, gmac, tread, sprint, longer):
    """Multiply-adds of PRX-1.2B with 256 text tokens, and the shares that routing leaves of them.

    TREAD drops 50 % and SPRINT 75 % in blocks 2..12; the last figure is of TREAD in blocks 1..14.
    """
    dense = forward_flops(model, tokens, 256, range(0), tokens)
    assert dense / 2e9 == pytest.approx(gmac, rel=3e-4)
    routed = forward_flops(model, tokens, 256, range(2, 13), tokens // 2)
    assert routed / dense == pytest.approx(tread, abs=5e-4)
    routed = forward_flops(model, tokens, 256, range(1, 15), tokens // 2)
    assert routed / dense == pytest.approx(longer, abs=5e-4)
    config = Config(model=model, routing=Routing(policy="sprint"))
    share = training_flops(config, tokens, 256) / dense_training_flops(config, tokens, 256)
    assert share == pytest.approx(sprint, abs=5e-4)


def test_training_is_three_forward_passes_of_the_route():
    config = Config(model=PRX, routing=Routing(policy="tread", drop=0.25))
    routed = forward_flops(PRX, 256, 100, range(2, 13), 192)
    assert training_flops(config, 256, 100) == 3 * routed
    assert training_flops(Config(model=PRX), 256, 100) == 3 * forward_flops(PRX, 256, 100, range(0), 256)
    every = forward_flops(PRX, 256, 100, range(0), 256)
    assert math.isclose(forward_flops(PRX, 256, 100, range(2, 13), 256), every)


def test_nothing_dropped_costs_what_the_dense_model_does():
    """And, of SPRINT, the fusion layer on every token."""
    dense = training_flops(Config(model=PRX), 256, 100)
    assert training_flops(Config(model=PRX, routing=Routing(policy="tread", drop=0)), 256, 100) == dense
    fused = training_flops(Config(model=PRX, routing=Routing(policy="sprint", drop=0)), 256, 100)
    assert fused == dense + 3 * 2 * 256 * 2 * 1792**2
