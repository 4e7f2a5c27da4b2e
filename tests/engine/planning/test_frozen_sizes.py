"""Sizes of the published frozen networks, counted again from their shapes."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from millrace.engine.config.loading import parse_config
from millrace.engine.encoders.pretrained import import_class
from millrace.engine.planning.frozen_sizes import (
    FROZEN,
    frozen_networks,
)

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
META = torch.device("meta")


@pytest.fixture(scope="module")
def networks():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("frozen_networks")
    finally:
        sys.path.remove(str(BENCHMARKS))


def parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("kind", ["flux1", "flux2", "dc_ae", "repa_e"])
def test_autoencoders(networks, kind):
    from torch.utils.flop_counter import FlopCounterMode

    name, values = networks.AUTOENCODERS[kind]
    make = import_class("diffusers", name, "test")
    network = networks.build(lambda: make(**values), META, torch.bfloat16)
    assert parameters(network) == FROZEN[kind].parameters
    with FlopCounterMode(display=False) as counter:
        network.encode(torch.empty(1, 3, 256, 256, device=META, dtype=torch.bfloat16))
    assert counter.get_total_flops() == FROZEN[kind].flops * 256**2


@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
def test_teachers(networks, kind):
    name, values = networks.DINOS[kind]
    shape = import_class("transformers", f"{name}Config", "test")(**values)
    make = import_class("transformers", f"{name}Model", "test")
    assert parameters(networks.build(lambda: make(shape), META, torch.bfloat16)) == FROZEN[kind].parameters


def test_text_tower(networks):
    side = networks.T5GEMMA
    shape = import_class("transformers", "T5GemmaConfig", "test")(
        encoder=side, decoder=side, vocab_size=side["vocab_size"], is_encoder_decoder=False
    )
    make = import_class("transformers", "T5GemmaEncoderModel", "test")
    network = networks.build(lambda: make(shape), META, torch.bfloat16)
    assert parameters(network) == FROZEN["t5gemma"].parameters


def test_what_a_run_loads():
    values = {"conditioning": {"text": {"kind": "t5gemma"}, "autoencoder": {"kind": "flux1"}}}
    live = frozen_networks(parse_config(values, "test"), 256, 100)
    assert [(load.role, load.kind) for load in live] == [("text", "t5gemma"), ("autoencoder", "flux1")]
    assert live.bytes == 2 * (FROZEN["t5gemma"].parameters + FROZEN["flux1"].parameters)
    assert live.flops == FROZEN["t5gemma"].flops * 100 + FROZEN["flux1"].flops * 256**2
    assert live.of("text").bytes == 2 * FROZEN["t5gemma"].parameters
    shards = {"source": "shards", "path": "x", "aspect": "bucket", "crop": "center"}
    cached = values | {"data": shards | {"cached": ["text", "latents"]}}
    assert frozen_networks(parse_config(cached, "test"), 256, 100).bytes == 0
    other = {"conditioning": {"text": {"kind": "qwen3vl"}, "autoencoder": {"kind": "flux1"}}}
    assert frozen_networks(parse_config(other, "test"), 256, 100).unknown == ("qwen3vl",)


def test_weights_in_a_folder_count_as_large_as_their_files(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    section = {"kind": "t5gemma", "path": str(tmp_path)}
    config = parse_config({"conditioning": {"text": section}}, "test")
    assert frozen_networks(config, 256, 100).of("text").bytes == 1000
