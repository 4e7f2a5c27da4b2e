"""The estimate against bytes that are counted."""

import pytest
import torch

from millrace.engine.config import Config
from millrace.engine.distributed.zero_shards import local_shards
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.routing import routing_policy
from millrace.engine.optim.build_optimizer import build_optimizer
from millrace.engine.planning import fit_check
from millrace.engine.planning.fit_check import (
    check_fits,
    estimate_bytes,
)
from millrace.engine.util.errors import UserError

CPU = torch.device("cpu")


def small(runs, tmp_path, *changes):
    wide = {"model": {"width": 64, "heads": 2, "depth": 3}, "data": {"resolution": 64}}
    return runs.config(tmp_path, wide, *changes)


class Counted:
    """Bytes of one training step of the denoiser, counted in PyTorch."""

    def __init__(self, config: Config) -> None:
        denoiser = Denoiser(config.model, config.routing)
        denoiser.init_weights(0)
        denoiser.checkpoint_activations(config.run.activation_checkpointing)
        own = {p.untyped_storage().data_ptr() for p in denoiser.parameters()}
        edge = config.data.resolution // config.model.patch_size
        batch = config.data.micro_batch
        text = torch.randn(batch, config.model.context_dim)
        layout = denoiser.layouts.layout(
            [(edge, edge)] * batch, torch.arange(batch + 1, dtype=torch.int32), 1
        )
        span = routing_policy(config).draw(layout, 0, torch.arange(batch))
        saved = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        tokens = torch.randn(batch * edge * edge, 3 * config.model.patch_size**2)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            (out,) = denoiser(tokens, torch.rand(batch), text, layout, span)
        self.activations = sum(size for size, _ in saved.values())
        out.square().mean().backward()
        optimizer = build_optimizer(denoiser.named_parameters(), config.optimizer, CPU)
        optimizer.step()
        parameters = list(denoiser.parameters())
        self.weights = sum(p.nbytes for p in parameters)
        self.gradients = sum(p.grad.nbytes for p in parameters)
        self.moments = sum(
            value.nbytes for p in parameters for value in optimizer.state[p].values() if value.dim()
        )


def test_stage_0_is_what_pytorch_holds(runs, tmp_path):
    config = small(runs, tmp_path)
    counted, estimate = Counted(config), estimate_bytes(config, 0, 1, 1)
    assert estimate["weights"] == counted.weights == estimate["EMA"]
    assert estimate["gradients"] == counted.gradients
    assert estimate["Adam moments"] == counted.moments
    assert estimate["master weights"] == 0
    assert counted.activations / 2 < estimate["activations"] < counted.activations * 2


@pytest.mark.parametrize("policy", ["tread", "sprint"])
def test_routing_is_counted(runs, tmp_path, policy):
    deep = {"model": {"depth": 8}}
    routing = {"routing": {"policy": policy, "start": 1, "end": 6}}
    dense, routed = small(runs, tmp_path, deep), small(runs, tmp_path, deep, routing)
    counted, estimate = Counted(routed), estimate_bytes(routed, 0, 1, 1)
    assert estimate["weights"] == counted.weights
    assert counted.activations / 2 < estimate["activations"] < counted.activations * 2
    saving = estimate["activations"] / estimate_bytes(dense, 0, 1, 1)["activations"]
    assert saving == pytest.approx(counted.activations / Counted(dense).activations, rel=0.1)


def test_nothing_dropped_takes_the_dense_model_s_memory(runs, tmp_path):
    deep = {"model": {"depth": 8}}
    routing = {"routing": {"policy": "tread", "start": 1, "end": 6, "drop": 0}}
    whole, dense = small(runs, tmp_path, deep, routing), small(runs, tmp_path, deep)
    assert estimate_bytes(whole, 0, 1, 1) == estimate_bytes(dense, 0, 1, 1)


@pytest.mark.parametrize("every", [1, 3])
def test_recomputation_is_counted(runs, tmp_path, every):
    change = {"run": {"activation_checkpointing": {"policy": "full", "every": every}}}
    config = small(runs, tmp_path, change)
    counted, estimate = Counted(config), estimate_bytes(config, 0, 1, 1)
    dense = estimate_bytes(small(runs, tmp_path), 0, 1, 1)["activations"]
    assert estimate["activations"] < dense
    if every == 3:  # with every block recomputed, what lies outside the blocks outweighs this tiny model
        assert counted.activations / 2 < estimate["activations"] < counted.activations * 2


def test_zero_shares_out(runs, tmp_path):
    config = small(runs, tmp_path)
    n = sum(p.numel() for p in Denoiser(config.model).parameters())
    wanted = {  # weights, gradients, separate masters, moments, EMA: in numbers per parameter, on 4 ranks
        0: (1, 1, 0, 2, 1),
        1: (1, 1, 1 / 4, 2 / 4, 1 / 4),
        2: (1, 1 / 4, 1 / 4, 2 / 4, 1 / 4),
        3: (1 / 4, 1 / 4, 1 / 4, 2 / 4, 1 / 4),
    }
    names = ("weights", "gradients", "master weights", "Adam moments", "EMA")
    for stage, shares in wanted.items():
        estimate = estimate_bytes(config, stage, 4, 1)
        assert [estimate[name] for name in names] == [4 * n * share for share in shares]


@pytest.mark.parametrize("parameters", [None, ["blocks.*.weight"]])
def test_muon_stores_half_of_adams_moments(runs, tmp_path, parameters):
    """Against the optimizer's state after a step."""
    muon = {"optimizer": {"kind": "muon", "muon": {"parameters": parameters}}}
    config = small(runs, tmp_path, muon)
    denoiser = Denoiser(config.model)
    optimizer = build_optimizer(denoiser.named_parameters(), config.optimizer, CPU, config.model)
    optimizer.attach(local_shards(denoiser, optimizer, 0), 0)
    for p in denoiser.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    stored = {"momentum": 0, "exp_avg": 0, "exp_avg_sq": 0}
    for p in denoiser.parameters():
        for name, value in optimizer.state[p].items():
            if value.dim():
                stored[name] += value.nbytes
    for ranks, stage in ((1, 0), (4, 2)):
        estimate = estimate_bytes(config, stage, ranks, 1)
        assert estimate["Muon momentum"] == stored["momentum"] / ranks > 0
        assert estimate["Adam moments"] == (stored["exp_avg"] + stored["exp_avg_sq"]) / ranks
    plain = estimate_bytes(small(runs, tmp_path), 0, 1, 1)
    assert plain["Muon momentum"] == 0
    assert plain["Adam moments"] == 2 * stored["momentum"] + stored["exp_avg"] + stored["exp_avg_sq"]


def test_a_second_average_is_counted(runs, tmp_path):
    one = small(runs, tmp_path)
    two = small(runs, tmp_path, {"ema": {"second_decay": 0.99}})
    off = small(runs, tmp_path, {"ema": {"enabled": False}})
    found = [estimate_bytes(config, 1, 4, 1)["EMA"] for config in (off, one, two)]
    assert found == [0, found[1], 2 * found[1]]


def test_an_autoencoder_shrinks_the_activations_only(runs, tmp_path):
    config = small(runs, tmp_path)
    pixels, latents = estimate_bytes(config, 0, 1, 1), estimate_bytes(config, 0, 1, 8)
    assert latents.pop("activations") == pixels.pop("activations") / 64
    assert latents == pixels


def test_refusal_names_the_parts(runs, tmp_path, monkeypatch):
    config = small(runs, tmp_path)
    parts = estimate_bytes(config, 0, 1, 1)
    need = sum(parts.values())
    state = need - parts["activations"]

    class Little:
        available = state - 1

    monkeypatch.setattr(fit_check.psutil, "virtual_memory", lambda: Little)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    with pytest.raises(UserError, match=r"the run needs about .* GiB per process") as raised:
        check_fits(config, 0, 1, 1, CPU)
    for part in ("weights", "gradients", "Adam moments", "EMA", "activations", "ZeRO stage"):
        assert part in str(raised.value)
    # Activations are a rough count: where only they go beyond, the run is warned and goes on.
    Little.available = need - 1
    assert check_fits(config, 0, 1, 1, CPU).startswith("warning: the run needs about")
    Little.available = need
    assert check_fits(config, 0, 1, 1, CPU) is None
    # Two processes on this machine share its memory.
    monkeypatch.setenv("LOCAL_SIZE", "2")
    Little.available = 2 * state - 1
    with pytest.raises(UserError):
        check_fits(config, 0, 2, 1, CPU)
