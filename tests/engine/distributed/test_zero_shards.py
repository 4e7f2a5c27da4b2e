"""Shards find every element of every parameter once, at each ZeRO stage; two ranks run in test_trainer.py."""

import pytest
import torch

from millrace.engine.distributed import deepspeed_engine, process_group
from millrace.engine.distributed.zero_shards import Shard, gather_parameters, local_shards, masters
from millrace.engine.optim.build_optimizer import build_optimizer

CPU = torch.device("cpu")


def small_module():
    """Sizes that align to nothing, and one frozen parameter."""
    module = torch.nn.Sequential(
        torch.nn.Linear(3, 5), torch.nn.Linear(5, 7, bias=False), torch.nn.Linear(7, 1)
    )
    module[2].bias.requires_grad_(False)
    return module


@pytest.fixture(params=[0, 1, 2, 3])
def sharded(request, runs, tmp_path):
    process_group.initialize(CPU)
    stage = request.param
    section = {"stage": stage}
    if stage == 3:
        section["stage3_param_persistence_threshold"] = 0
    config = runs.config(tmp_path, {"data": {"global_batch": 2}, "deepspeed": {"zero_optimization": section}})
    module = small_module()
    values = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(module.named_parameters(), config.optimizer, CPU)
    engine, wrapped = deepspeed_engine.initialize_engine(config, module, optimizer)
    return stage, values, local_shards(module, wrapped, stage), optimizer, engine


def test_each_shard_holds_its_elements(sharded):
    _, values, shards, *_ = sharded
    assert [shard.name for shard in shards] == list(values)
    for shard in shards:
        whole = values[shard.name]
        assert shard.shape == tuple(whole.shape)
        assert (shard.start, shard.count) == (0, whole.numel())
        assert (shard.to_write, shard.copies) == (shard, [])
        assert torch.equal(shard.of(shard.master), whole.flatten())


def test_names_may_be_given_with_the_parameters(sharded):
    stage, values, shards, _, engine = sharded
    named = [(f"x.{name}", p) for name, p in engine.module.named_parameters()]
    again = local_shards(iter(named), engine.optimizer, stage)
    assert [(s.name, s.start, s.count, s.offset) for s in again] == [
        (f"x.{s.name}", s.start, s.count, s.offset) for s in shards
    ]
    assert [id(s.master) for s in again] == [id(s.master) for s in shards]
    assert len(again) == len(values)


def test_masters_are_what_the_optimizer_updates(sharded):
    """After a step its moments are found under them, and they hold other weights."""
    _, values, shards, optimizer, engine = sharded
    engine.backward(engine(torch.ones(2, 3)).sum())
    engine.step()
    assert len(masters(shards)) == len({id(master) for master in masters(shards)})
    for master in masters(shards):
        assert optimizer.state[master]["exp_avg"].shape == master.shape
    for shard in shards:
        assert not torch.equal(shard.of(shard.master), values[shard.name].flatten())
        assert bool(shard.of(optimizer.state[shard.master]["exp_avg_sq"]).any())


def test_gathered_parameters_are_whole(sharded):
    stage, values, shards, *_ = sharded
    shapes = [(name, tuple(value.shape)) for name, value in values.items()]
    doubled = dict(gather_parameters(shapes, shards, stage, lambda master: master * 2))
    assert list(doubled) == list(values)
    for name, value in values.items():
        assert torch.equal(doubled[name], 2 * value)


def test_of_is_a_view_of_its_range():
    master = torch.arange(12.0).view(3, 4)
    shard = Shard("w", (5,), 0, 5, master, 6)
    shard.of(master).zero_()
    assert master.flatten().tolist() == [0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 0, 11]
    assert shard.of(torch.ones(3, 4)).tolist() == [1] * 5
