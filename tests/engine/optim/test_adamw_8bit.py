"""AdamW with 8-bit moments: torchao's update bit for bit, on whole parameters and on shards."""

import itertools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from millrace.engine.checkpoint import train_state
from millrace.engine.checkpoint.checkpoints import save_checkpoint
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from millrace.engine.config import Model, Optimizer
from millrace.engine.config.loading import parse_config
from millrace.engine.distributed.zero_shards import Shard, local_shards
from millrace.engine.optim import adamw_8bit
from millrace.engine.optim.adamw_8bit import BLOCK, CODES, SCALES, has_8bit_moments
from millrace.engine.optim.build_optimizer import build_optimizer
from millrace.engine.optim.training_optimizer import optimizer_entry
from millrace.engine.util.errors import UserError

pytest.importorskip("torchao")

CPU = torch.device("cpu")
SETTINGS = Optimizer(kind="adamw_8bit", lr=0.01, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.1)
SHAPES = {"matrix": (40, 256), "other": (64, 65), "norm": (256,), "long": (20 * BLOCK,)}
"""Two of them have 8-bit moments: one is too small, one no multiple of 256."""


def module_of(seed=0):
    torch.manual_seed(seed)
    module = torch.nn.ParameterDict()
    for name, shape in SHAPES.items():
        module[name] = torch.nn.Parameter(torch.randn(shape))
    return module


def whole(module, settings=SETTINGS):
    """(optimizer, shards) as at stage 0."""
    optimizer = build_optimizer(module.named_parameters(), settings, CPU)
    shards = local_shards(module, optimizer, 0)
    optimizer.attach(shards, 0)
    return optimizer, shards


def gradients(steps, seed=1):
    """Of all parameters, over nine orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield {
            n: torch.randn(s, generator=generator) * 10 ** torch.empty(s).uniform_(-9, 0, generator=generator)
            for n, s in SHAPES.items()
        }


def train(module, optimizer, steps, seed=1):
    for each in gradients(steps, seed):
        for name, p in module.items():
            p.grad = each[name].clone()
        optimizer.step()


def test_the_update_is_torchaos(monkeypatch):
    """Its own optimizer, not compiled: weights, codes and scales have the same bits after five updates."""
    from torchao.optim import AdamW8bit

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(adamw_8bit, "LOOP_BLOCKS", 7)  # several rounds
    mine, theirs = module_of(), module_of()
    optimizer, shards = whole(mine)
    reference = AdamW8bit(
        theirs.parameters(), lr=torch.tensor(0.01), betas=(0.8, 0.9), eps=1e-8, weight_decay=0.1
    )
    train(mine, optimizer, 5)
    train(theirs, reference, 5)
    for shard in shards:
        p, q = mine[shard.name], theirs[shard.name]
        assert torch.equal(p, q), shard.name
        stored = {piece.kind: piece.data for piece in optimizer.stored(shard)}
        for moment in ("exp_avg", "exp_avg_sq"):
            wanted = reference.state[q][moment]
            if has_8bit_moments(SHAPES[shard.name]):
                assert torch.equal(stored[f"{moment}_8bit"], wanted.codes.flatten())
                assert torch.equal(stored[f"{moment}_scale"], wanted.scale)
            else:
                assert torch.equal(stored[moment], wanted.flatten())
    assert [has_8bit_moments(shape) for shape in SHAPES.values()] == [True, False, False, True]


def test_gradients_are_scaled_and_steps_skipped():
    found = []
    for scale in (0.25, 1.0):
        module = module_of()
        optimizer, shards = whole(module)
        for each in gradients(3):
            for name, p in module.items():
                p.grad = each[name] * (0.25 / scale)
            optimizer.gradient_scale = scale
            optimizer.step()
        optimizer.skip = True
        before = {name: p.detach().clone() for name, p in module.items()}
        module["norm"].grad.fill_(float("nan"))
        optimizer.step()
        assert all(torch.equal(p, before[name]) for name, p in module.items())
        assert train_state.optimizer_steps(shards, optimizer) == 3
        found.append(before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in SHAPES)


def cut(module, cuts):
    """Shards of each of `len(cuts) - 1` ranks: all parameters end to end, cut there, as ZeRO does."""
    flat = torch.cat([p.detach().flatten() for p in module.values()])
    ranks = []
    for first, stop in itertools.pairwise(cuts):
        master = torch.nn.Parameter(flat[first:stop].clone())
        shards, before = [], 0
        for name, p in module.items():
            low, high = (min(max(bound - before, 0), p.numel()) for bound in (first, stop))
            shards.append(Shard(name, tuple(p.shape), low, high - low, master, max(before - first, 0)))
            before += p.numel()
        ranks.append((master, shards))
    return ranks


class Ranks:
    """Processes of a job as threads, with the two collectives that the optimizer uses."""

    def __init__(self, monkeypatch, count):
        self.count, self.barrier, self.given = count, threading.Barrier(count, timeout=30), {}
        self.local = threading.local()
        monkeypatch.setattr(adamw_8bit, "gather_objects", self.gather)
        monkeypatch.setattr(adamw_8bit, "world_size", lambda: count)
        monkeypatch.setattr(adamw_8bit.dist, "all_reduce", self.largest)

    def gather(self, value):
        self.given[self.local.rank] = value
        self.barrier.wait()
        found = [self.given[rank] for rank in range(self.count)]
        self.barrier.wait()
        return found

    def largest(self, tensor, op):
        assert op == torch.distributed.ReduceOp.MAX
        tensor.copy_(torch.stack(self.gather(tensor.clone())).amax(0))

    def run(self, function):
        def enter(rank):
            self.local.rank = rank
            return function(rank)

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(enter, range(self.count)))


TOTAL = sum(torch.Size(shape).numel() for shape in SHAPES.values())
CUTS = [
    pytest.param([0, 1000, 17000, TOTAL], id="in-blocks"),
    pytest.param([0, 5 * BLOCK, 10240 + 4160 + 256 + 2 * BLOCK, TOTAL], id="between-blocks"),
    pytest.param([0, 3 * BLOCK + 5, 3 * BLOCK + 9, TOTAL], id="one-block-on-three"),
    pytest.param([0, 10240, 10240 + 4160 + 3, TOTAL], id="in-what-is-not-quantized"),
]


def sharded(ranks, module, cuts, load=None):
    """(master, shards, optimizer) of each rank; with `load`, the folder of a checkpoint, its state."""
    parts = cut(module, cuts)

    def build(rank):
        master, shards = parts[rank]
        optimizer = build_optimizer([("all", master)], SETTINGS, CPU)
        optimizer.attach(shards, 1)
        if load is not None:
            assert train_state.load_optimizer(shards, optimizer, CheckpointReader(load), 3) == []
        return master, shards, optimizer

    return ranks.run(build)


def update_shards(ranks, parts, steps, cuts, seed=1):
    def update(rank):
        master, _, optimizer = parts[rank]
        for each in gradients(steps, seed):
            flat = torch.cat([gradient.flatten() for gradient in each.values()])
            master.grad = flat[cuts[rank] : cuts[rank + 1]].clone()
            optimizer.step()

    ranks.run(update)


def written(parts):
    """What the ranks write to a checkpoint, whole; every element is written once."""
    found = {}
    for _, shards, optimizer in parts:
        for shard in shards:
            for kind, shape, start, data in optimizer.stored(shard):
                whole = found.setdefault(
                    f"{kind}/{shard.name}", torch.full((torch.Size(shape).numel(),), -99.0)
                )
                assert (whole[start : start + len(data)] == -99).all()
                whole[start : start + len(data)] = data.float()
    return found


def assert_written(parts, reader):
    found = written(parts)
    assert found.keys() == {name for name in reader.names() if not name.startswith("master/")}
    assert [n for n, whole in found.items() if not torch.equal(whole, reader.read(n).float())] == []


def saved(tmp_path, shards, optimizer):
    return CheckpointReader(
        save_checkpoint(tmp_path, 1, train_state.state_pieces(shards, optimizer, None), {}, keep=1)
    )


@pytest.mark.parametrize("cuts", CUTS)
def test_shards_have_the_state_of_the_whole(tmp_path, monkeypatch, cuts):
    """On three ranks, wherever they are cut: the same weights, codes and scales, and so after a resumption on
    three ranks of what one process wrote."""
    module = module_of()
    start = module_of()
    optimizer, shards = whole(module)
    train(module, optimizer, 3)
    reader = saved(tmp_path / "3", shards, optimizer)
    weights = torch.cat([p.detach().flatten() for p in module.values()])
    ranks = Ranks(monkeypatch, len(cuts) - 1)
    parts = sharded(ranks, start, cuts)
    update_shards(ranks, parts, 3, cuts)
    assert torch.equal(torch.cat([master.detach() for master, *_ in parts]), weights)
    assert_written(parts, reader)

    resumed = sharded(ranks, module, cuts, load=reader.folder)
    assert_written(resumed, reader)
    update_shards(ranks, resumed, 2, cuts, seed=2)
    train(module, optimizer, 2, seed=2)
    assert_written(resumed, saved(tmp_path / "5", shards, optimizer))
    weights = torch.cat([p.detach().flatten() for p in module.values()])
    assert torch.equal(torch.cat([master.detach() for master, *_ in resumed]), weights)


def test_a_checkpoint_is_exact(tmp_path):
    module = module_of()
    optimizer, shards = whole(module)
    train(module, optimizer, 3)
    reader = saved(tmp_path, shards, optimizer)
    kinds = {name: {n.partition("/")[0] for n in reader.names() if n.endswith(f"/{name}")} for name in SHAPES}
    assert kinds["matrix"] == {"master", *CODES, *SCALES}
    assert kinds["norm"] == kinds["other"] == {"master", "exp_avg", "exp_avg_sq"}
    assert reader.dtype("exp_avg_8bit/matrix") == torch.uint8
    assert reader.shape("exp_avg_8bit/matrix") == (40, 256)
    assert reader.shape("exp_avg_scale/matrix") == (40,)
    assert train_state.written_bytes(shards, optimizer, None) == sum(
        reader.read(name).numel() * reader.dtype(name).itemsize for name in reader.names()
    )
    named = list(module.named_parameters())
    (planned,) = optimizer_entry("adamw_8bit").state_bytes(named, SETTINGS, Model(), 4).values()
    state = [value for p in module.values() for value in optimizer.state[p].values() if value.dim()]
    assert planned == sum(value.numel() * value.element_size() for value in state)
    assert planned < 0.45 * 2 * 4 * TOTAL

    other = module_of(seed=9)
    fresh, held = whole(other)
    train_state.load_weights(other, reader, "x")
    assert train_state.load_optimizer(held, fresh, reader, 3) == []
    train(module, optimizer, 2, seed=2)
    train(other, fresh, 2, seed=2)
    assert all(torch.equal(module[name], other[name]) for name in SHAPES)


@pytest.mark.parametrize("at", [0, 255, 256, 1000, 5119])
def test_processes_that_hold_all_write_a_part_each(at):
    """As at stage 0: two parts of a parameter, cut anywhere, are the whole, codes and scales alike."""
    module = module_of()
    optimizer, shards = whole(module)
    train(module, optimizer, 2)
    for shard in shards:
        stop = min(at, shard.count)
        halves = [shard.part(range(stop)), shard.part(range(stop, shard.count))]
        found = [list(optimizer.stored(half)) for half in halves]
        for (kind, shape, start, data), low, high in zip(optimizer.stored(shard), *found, strict=True):
            assert (low.kind, high.kind, low.shape, high.shape) == (kind, kind, shape, shape)
            assert (low.start, high.start) == (start, start + len(low.data))
            assert torch.equal(torch.cat([low.data, high.data]), data)
        assert sum(map(optimizer.stored_bytes, halves)) == optimizer.stored_bytes(shard)


def test_moments_of_another_kind_are_refused_or_begin_anew(tmp_path):
    module = module_of()
    adamw = SETTINGS.model_copy(update={"kind": "adamw"})
    optimizer, shards = whole(module, adamw)
    train(module, optimizer, 3)
    reader = saved(tmp_path, shards, optimizer)
    fresh, held = whole(module)
    with pytest.raises(
        UserError, match=r"not the optimizer state of this configuration: 8 missing .*, 4 unk"
    ):
        train_state.load_optimizer(held, fresh, reader, 3)
    said = train_state.load_optimizer(held, fresh, reader, 3, allow_changes=True)
    assert said[0].startswith("optimizer state that starts at zero: exp_avg_8bit of 2 parameters")
    assert said[1] == "optimizer state dropped: exp_avg of 2 parameters, exp_avg_sq of 2 parameters"
    assert "matrix" not in {s.name for s in held if fresh.state.get(s.master)}
    assert torch.equal(fresh.state[module["norm"]]["exp_avg"], optimizer.state[module["norm"]]["exp_avg"])


def test_what_is_missing_is_said(monkeypatch):
    adamw_8bit._torchao.cache_clear()
    monkeypatch.setitem(sys.modules, "torchao.optim.adam", None)
    with pytest.raises(
        UserError, match=r"optimizer.kind adamw_8bit needs torchao.*pip install torchao==\S+, or"
    ):
        whole(module_of())
    monkeypatch.undo()
    values = {
        "data": {"path": "x"},
        "optimizer": {"kind": "adamw_8bit"},
        "precision": {"master": "bfloat16", "compute": "bfloat16"},
    }
    with pytest.raises(UserError, match="adamw_8bit updates FP32 weights, but precision"):
        parse_config(values, "test")


def test_damage_is_found_in_scales():
    """A code has no bad value; what is not finite shows in the scale of its block."""
    module = module_of()
    optimizer, shards = whole(module)
    train(module, optimizer, 1)
    assert train_state.bad_state(shards, optimizer, None) == {}
    optimizer.state[module["matrix"]]["exp_avg_sq_scale"][3] = float("nan")
    optimizer.state[module["norm"]]["exp_avg_sq"][0] = -1.0
    found = train_state.bad_state(shards, optimizer, None)
    assert {name: str(bad) for name, bad in found.items()} == {
        "exp_avg_sq/norm": "1 element negative",
        "exp_avg_sq_scale/matrix": "1 element not finite",
    }


@pytest.mark.cuda
def test_the_kernel_of_a_gpu_computes_the_same():
    """Compiled, on a GPU: moments that round the other way now and then, and no other difference."""
    device = torch.device("cuda")
    one, two = module_of(), module_of().to(device)
    optimizer, _ = whole(one)
    fused = build_optimizer(two.named_parameters(), SETTINGS, device)
    fused.attach(local_shards(two, fused, 0), 0)
    for each in gradients(5):
        for name in SHAPES:
            one[name].grad, two[name].grad = each[name].clone(), each[name].to(device)
        optimizer.step()
        fused.step()
    for name in SHAPES:
        torch.testing.assert_close(two[name].cpu(), one[name], rtol=1e-3, atol=1e-3)
