"""Sizes of the published frozen networks, counted again from their shapes, and what a run loads."""

import pytest
import torch

from millrace.engine.config import Autoencoder
from millrace.engine.config.loading import parse_config
from millrace.engine.encoders.autoencoder import autoencoder_entry, open_autoencoder, open_random
from millrace.engine.encoders.pretrained import random_network
from millrace.engine.encoders.teacher import open_teacher, vision_entry
from millrace.engine.encoders.text_encoder import text_encoder_entry
from millrace.engine.encoders.text_encoders.t5gemma import T5Gemma
from millrace.engine.planning.devices import GPUS
from millrace.engine.planning.frozen_sizes import frozen_networks
from millrace.engine.planning.report import notes

META = torch.device("meta")
T5 = text_encoder_entry("t5gemma").size
FLUX1 = autoencoder_entry("flux1").network.size
TOWERS = {"conditioning": {"text": {"kind": "t5gemma"}, "autoencoder": {"kind": "flux1"}}}


def parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("kind", ["flux1", "flux2", "dc_ae", "repa_e"])
def test_autoencoders(kind):
    from torch.utils.flop_counter import FlopCounterMode

    autoencoder = open_random(Autoencoder(kind=kind), META)
    entry = autoencoder_entry(kind)
    assert parameters(autoencoder.network) == entry.network.size.parameters
    dtype = autoencoder.network.dtype
    with FlopCounterMode(display=False) as counter:
        coded = autoencoder.network.encode(torch.empty(1, 3, 256, 256, device=META, dtype=dtype))
    assert counter.get_total_flops() == entry.network.size.flops * 256**2
    latents = coded.latent_dist.mean if entry.network.stochastic else coded.latent
    assert latents.shape[1:] == (entry.channels, 256 // entry.factor, 256 // entry.factor)


@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
@pytest.mark.parametrize("weights", ["large", "base"])
def test_vision_networks(kind, weights):
    entry = vision_entry(kind)
    published = getattr(entry, weights)
    network = random_network(lambda: entry.new_network(published.shape), META, torch.bfloat16)
    assert parameters(network) == published.size.parameters
    assert network.config.patch_size == entry.patch


def test_text_encoder():
    network = random_network(lambda: T5Gemma.new_network(T5Gemma.shape), META, torch.bfloat16)
    assert parameters(network) == T5.parameters


def test_what_a_run_loads():
    live = frozen_networks(parse_config(TOWERS, "test"), 256, 100)
    assert [(load.role, load.kind) for load in live] == [("text", "t5gemma"), ("autoencoder", "flux1")]
    assert live.bytes == 2 * (T5.parameters + FLUX1.parameters)
    assert live.flops == T5.flops * 100 + FLUX1.flops * 256**2
    assert live.of("text").bytes == 2 * T5.parameters
    shards = {"source": "shards", "path": "x", "aspect": "bucket", "crop": "center"}
    cached = TOWERS | {"data": shards | {"cached": ["text", "latents"]}}
    assert frozen_networks(parse_config(cached, "test"), 256, 100).bytes == 0
    other = {"conditioning": {"text": {"kind": "qwen3vl"}, "autoencoder": {"kind": "flux1"}}}
    assert frozen_networks(parse_config(other, "test"), 256, 100).unknown == ("qwen3vl",)


def test_arithmetic_counts_as_it_is_stored():
    exact = TOWERS | {"precision": {"compute": "float32"}}
    exact["conditioning"] = {"text": {"kind": "t5gemma"}, "autoencoder": {"kind": "dc_ae"}}
    live = frozen_networks(parse_config(exact, "test"), 256, 100)
    assert live.of("text").bytes == 4 * T5.parameters
    assert live.of("autoencoder").bytes == 4 * autoencoder_entry("dc_ae").network.size.parameters


def test_perceptual_losses_take_the_base_network():
    values = {
        "model": {"in_channels": 3, "patch_size": 16},
        "conditioning": {"autoencoder": {"kind": "pixels"}},
        "objective": {"prediction": "sample", "dino": {"weight": 0.01, "size": 224}},
    }
    base = vision_entry("dinov2").base.size
    (load,) = frozen_networks(parse_config(values, "test"), 256, 100)
    assert (load.role, load.bytes) == ("perceptual", 2 * base.parameters)
    assert load.flops == 3 * 16 * 16 * base.flops  # two pictures forward, one backward


def test_a_network_of_its_own_counts_by_its_own_shape(tmp_path):
    """Towers of another size: no published size is charged, and no weights are read."""
    text = text_encoder_entry("t5gemma").tiny(32, tmp_path / "text")
    autoencoder = autoencoder_entry("flux1").tiny(tmp_path / "vae")
    teacher = vision_entry("dinov2").tiny(tmp_path / "teacher")
    alignment = {"kind": "repa", "teacher": {"path": str(teacher)}}
    values = {
        "conditioning": {
            "text": {"kind": "t5gemma", "path": str(text)},
            "autoencoder": {"kind": "flux1", "path": str(autoencoder)},
        },
        "alignment": alignment,
    }
    config = parse_config(values, "test")
    opened = (
        load_network_of("t5gemma", text),
        open_autoencoder(config.conditioning.autoencoder, torch.device("cpu")).network,
        open_teacher(config.alignment.teacher, torch.device("cpu")).dino.network,
    )
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    live = frozen_networks(config, 256, 100)
    assert [load.bytes for load in live] == [2 * parameters(network) for network in opened]
    embedded = opened[0].get_input_embeddings().weight.numel()
    assert live.of("text").flops == 2 * 100 * (parameters(opened[0]) - embedded)
    assert live.of("autoencoder").flops < FLUX1.flops * 256**2 / 30
    assert live.of("teacher").flops == 2 * 256 * parameters(opened[2])
    assert live.assumed == ()


def load_network_of(kind, folder):
    classes = {"t5gemma": T5Gemma}
    return classes[kind].read_network(str(folder), torch.device("cpu"), torch.bfloat16)


def test_what_cannot_be_read_counts_as_the_published_network(tmp_path):
    (tmp_path / "config.json").write_text("{")
    for path in ("nobody/nothing", str(tmp_path / "absent"), str(tmp_path)):
        values = {"conditioning": {"text": {"kind": "t5gemma", "path": path}}}
        live = frozen_networks(parse_config(values, "test"), 256, 100)
        assert live.of("text").bytes == 2 * T5.parameters
        assert live.assumed == (f"t5gemma {path}",)
        (line,) = notes([live, live], GPUS["h200"])[-1:]
        assert line == f"Counted as the published network, no config.json to read: t5gemma {path}."
