"""Memory check at the start, and what is held against bytes that PyTorch and the optimizer hold."""

from types import SimpleNamespace

import pytest
import torch

from millrace.engine.distributed.zero_shards import local_shards
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.optim.build_optimizer import build_optimizer
from millrace.engine.planning import fit_check
from millrace.engine.planning.activations import Traced, trace
from millrace.engine.planning.fit_check import check_fits
from millrace.engine.planning.step_memory import held_bytes, memory_of, shape_of
from millrace.engine.util.errors import UserError

CPU = torch.device("cpu")


def small(runs, tmp_path, *changes):
    wide = {"model": {"width": 64, "heads": 2, "depth": 3}, "data": {"resolution": 64}}
    return runs.config(tmp_path, wide, *changes)


def held(config, stage, ranks):
    return held_bytes(config, stage, ranks, shape_of(config))


def stored_bytes(config):
    """Bytes of weights, and of the optimizer's state by name, after one step of the real optimizer."""
    denoiser = Denoiser(config.model)
    optimizer = build_optimizer(denoiser.named_parameters(), config.optimizer, CPU, config.model)
    optimizer.attach(local_shards(denoiser, optimizer, 0), 0)
    for p in denoiser.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    found = {"weights": sum(p.nbytes for p in denoiser.parameters())}
    for p in denoiser.parameters():
        for name, value in optimizer.state[p].items():
            if value.dim():
                found[name] = found.get(name, 0) + value.nbytes
    return found


def test_stage_0_is_what_pytorch_holds(runs, tmp_path):
    config = small(runs, tmp_path)
    stored, found = stored_bytes(config), held(config, 0, 1)
    assert found["weights"] == stored["weights"] == found["EMA"]
    assert found["Adam moments"] == stored["exp_avg"] + stored["exp_avg_sq"]
    assert "master weights" not in found


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
        memory = memory_of(config, stage, 4, Traced(0, 0, 0, 0), shape_of(config))
        # At stage 3 they are held all the time, elsewhere in the phases of a step.
        found = {"gradients": memory.gradients} | memory.parts
        assert [found.get(name, 0) for name in names] == [4 * n * share for share in shares]


@pytest.mark.parametrize("parameters", [None, ["blocks.*.weight"]])
def test_muon_stores_half_of_adams_moments(runs, tmp_path, parameters):
    """Against the optimizer's state after a step."""
    muon = {"optimizer": {"kind": "muon", "muon": {"parameters": parameters}}}
    config = small(runs, tmp_path, muon)
    stored = stored_bytes(config)
    for ranks, stage in ((1, 0), (4, 2)):
        found = held(config, stage, ranks)
        assert found["Muon momentum"] == stored["momentum"] / ranks > 0
        assert found["Adam moments"] == (stored["exp_avg"] + stored["exp_avg_sq"]) / ranks
    plain = held(small(runs, tmp_path), 0, 1)
    assert "Muon momentum" not in plain
    assert plain["Adam moments"] == 2 * stored["momentum"] + stored["exp_avg"] + stored["exp_avg_sq"]


def test_a_second_average_is_counted(runs, tmp_path):
    one = small(runs, tmp_path)
    two = small(runs, tmp_path, {"ema": {"second_decay": 0.99}})
    off = small(runs, tmp_path, {"ema": {"enabled": False}})
    found = [held(config, 1, 4).get("EMA", 0) for config in (off, one, two)]
    assert found == [0, found[1], 2 * found[1]]


def test_refusal_names_the_parts(runs, tmp_path, monkeypatch):
    # Many pictures, so that activations outweigh the copies of the gradients.
    config = small(runs, tmp_path, {"data": {"resolution": 64, "micro_batch": 64, "global_batch": 64}})
    edge = 64 // config.model.patch_size
    traced = trace(config, 64, edge, config.conditioning.text.max_tokens)
    memory = memory_of(config, 0, 1, traced, shape_of(config), fused=False)
    assert memory.worst == "backward"
    state = memory.held + memory.gradients

    class Little:
        available = state - 1

    monkeypatch.setattr(fit_check.psutil, "virtual_memory", lambda: Little)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    with pytest.raises(UserError, match=r"the run needs about .* GB per process") as raised:
        check_fits(config, 0, 1, 1, CPU)
    for part in ("weights", "activations and gradients", "Adam moments", "EMA", "ZeRO stage"):
        assert part in str(raised.value)
    # Operators allocate more than is traced: where only activations go beyond, the run is warned and goes on.
    Little.available = memory.peak - 1
    assert check_fits(config, 0, 1, 1, CPU).startswith("warning: the run needs about")
    Little.available = memory.peak
    assert check_fits(config, 0, 1, 1, CPU) is None
    # Two processes on this machine share its memory.
    monkeypatch.setenv("LOCAL_SIZE", "2")
    Little.available = 2 * state - 1
    with pytest.raises(UserError):
        check_fits(config, 0, 2, 1, CPU)


def test_what_the_allocator_keeps_counts_as_free(runs, tmp_path, monkeypatch):
    """As at the begin of a later stage, whose predecessor's memory the allocator has not given back."""
    config, cuda = small(runs, tmp_path), torch.device("cuda")
    certain = int(memory_of(config, 0, 1, Traced(0, 0, 0, 0), shape_of(config)).certain)  # whatever is traced
    numbers = {"mem_get_info": (certain - 1, 0), "memory_reserved": 8, "memory_allocated": 8}
    for name in numbers:
        monkeypatch.setattr(torch.cuda, name, lambda _device, name=name: numbers[name])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a card")
    with pytest.raises(UserError, match="a card has"):
        check_fits(config, 0, 1, 1, cuda)
    numbers["memory_reserved"] += 1
    check_fits(config, 0, 1, 1, cuda)


@pytest.mark.parametrize("backend", ["reference", "flash_attn", "xformers"])
def test_a_backend_that_cannot_be_traced_here_is_no_obstacle(runs, tmp_path, backend):
    assert check_fits(small(runs, tmp_path, {"model": {"attention_backend": backend}}), 0, 1, 1, CPU) is None


def test_an_autoencoder_shrinks_the_activations_only(runs, tmp_path, monkeypatch):
    """A factor of 8 leaves an eighth of the tokens along each edge."""
    traced = []
    monkeypatch.setattr(fit_check, "trace", lambda *given: traced.append(given[2]) or Traced(0, 0, 0, 0))
    for factor in (1, 8):
        check_fits(small(runs, tmp_path, {"data": {"resolution": 64}}), 0, 1, factor, CPU)
    assert traced[0] == 8 * traced[1] > 8


@pytest.mark.parametrize(("stage", "ranks"), [(0, 2), (1, 2)])
def test_the_host_has_room_for_its_moments(runs, tmp_path, monkeypatch, stage, ranks):
    """In its memory, not the device's; shared at stages 1 to 3."""
    config = small(runs, tmp_path, {"optimizer": {"kind": "adamw_offload"}})
    assert set(held(config, stage, ranks)) == set(held(small(runs, tmp_path), stage, ranks)) - {
        "Adam moments"
    }
    need = 8 * sum(p.numel() for p in Denoiser(config.model).parameters()) / (ranks if stage else 1)
    assert shape_of(config).host_state / (ranks if stage else 1) == need
    memory = SimpleNamespace(available=need - 1)
    monkeypatch.setattr(fit_check.psutil, "virtual_memory", lambda: memory)
    with pytest.raises(UserError, match=r"adamw_offload needs \S+ GB of the host's memory per process"):
        check_fits(config, stage, ranks, 1, CPU)
    memory.available = need + 1e9
    assert check_fits(config, stage, ranks, 1, CPU) is None
