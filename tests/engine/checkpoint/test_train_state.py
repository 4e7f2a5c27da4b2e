"""Training state to a checkpoint and back; whole runs do it across stages and ranks in test_resume.py."""

import pytest
import torch

from millrace.engine.checkpoint import train_state
from millrace.engine.checkpoint.checkpoints import save_checkpoint
from millrace.engine.checkpoint.model_weights import read_weights
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from millrace.engine.config import Ema, Model, Optimizer
from millrace.engine.distributed.zero_shards import local_shards
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.optim.build_optimizer import build_optimizer
from millrace.engine.optim.ema import EmaWeights
from millrace.engine.optim.training_optimizer import TrainingOptimizer, parameter_group
from millrace.engine.util.errors import UserError


def parts(seed):
    torch.manual_seed(seed)
    module = torch.nn.Linear(3, 5)
    optimizer = build_optimizer(module.named_parameters(), Optimizer(lr=0.1, eps=1e-8), torch.device("cpu"))
    shards = local_shards(module, optimizer, 0)
    return module, optimizer, shards, EmaWeights(Ema(enabled=True, decay=0.5, every=1), shards)


def train(module, optimizer, ema, steps):
    for step in range(steps):
        module(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step + 1)


def saved(tmp_path, shards, optimizer, ema):
    folder = save_checkpoint(tmp_path, 1, train_state.state_pieces(shards, optimizer, ema), {}, keep=1)
    return CheckpointReader(folder)


def test_round_trip(tmp_path):
    module, optimizer, shards, ema = parts(1)
    train(module, optimizer, ema, 3)
    assert train_state.optimizer_steps(shards, optimizer) == 3
    reader = saved(tmp_path, shards, optimizer, ema)
    kinds = ("ema", "exp_avg", "exp_avg_sq", "master")
    assert reader.names() == sorted(f"{kind}/{name}" for kind in kinds for name in ("weight", "bias"))

    other, fresh, held, average = parts(2)
    train_state.load_weights(other, reader, "x")
    train_state.load_optimizer(held, fresh, reader, 3)
    train_state.load_ema(held, average, reader)
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(ema.of(one), average.of(two))
        for key, value in optimizer.state[one].items():
            assert torch.equal(fresh.state[two][key], value)
            assert fresh.state[two][key].dtype == value.dtype
    train(module, optimizer, ema, 2)
    train(other, fresh, average, 2)
    assert torch.equal(module.weight, other.weight)


def test_before_the_first_update_there_are_no_moments(tmp_path):
    _, optimizer, shards, _ = parts(1)
    assert train_state.optimizer_steps(shards, optimizer) == 0
    reader = saved(tmp_path, shards, optimizer, None)
    assert reader.names() == ["master/bias", "master/weight"]
    _, fresh, held, average = parts(2)
    train_state.load_optimizer(held, fresh, reader, 0)
    assert not fresh.state
    before = average.of(held[0].master).clone()
    train_state.load_ema(held, average, reader)
    assert torch.equal(average.of(held[0].master), before)


def test_buffers_are_restored(tmp_path):
    """Only the first rank writes them; a checkpoint without one is refused by name."""
    module, optimizer, shards, ema = parts(1)
    module.register_buffer("fixed", torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    pieces = train_state.state_pieces(shards, optimizer, ema, module.named_buffers())
    reader = CheckpointReader(save_checkpoint(tmp_path / "a", 1, pieces, {}, keep=1))
    other, *_ = parts(2)
    other.register_buffer("fixed", torch.zeros(2, 2))
    train_state.load_weights(other, reader, "run")
    assert torch.equal(other.fixed, module.fixed)
    for weights in ("model", "ema"):
        found = read_weights(reader, weights)
        assert found.keys() == {"weight", "bias", "fixed"}
        assert torch.equal(found["fixed"], module.fixed)
    with pytest.raises(
        UserError, match=r"run: not the weights of this model: 1 missing \(buffer/fixed\), 0 unknown"
    ):
        train_state.load_weights(other, saved(tmp_path / "b", shards, optimizer, ema), "run")


def test_another_model_is_refused(tmp_path):
    _, optimizer, shards, _ = parts(1)
    reader = saved(tmp_path, shards, optimizer, None)
    with pytest.raises(UserError, match=r"run: weight is \(5, 3\) there and \(5, 4\) in this configuration"):
        train_state.load_weights(torch.nn.Linear(4, 5), reader, "run")
    with pytest.raises(UserError, match=r"run: .* 0 missing .*1 unknown \(bias\)"):
        train_state.load_weights(torch.nn.Linear(3, 5, bias=False), reader, "run")
    with pytest.raises(UserError, match=r"2 missing \(0.bias, 0.weight\), 2 unknown \(bias, weight\)"):
        train_state.load_weights(torch.nn.Sequential(torch.nn.Linear(3, 5)), reader, "run")


MODEL = Model(width=8, depth=1, heads=1, patch_size=1, in_channels=3, context_dim=4, mlp_ratio=2)


class WithHead(torch.nn.Module):
    """A denoiser, and a head that only training has if `head`."""

    def __init__(self, head):
        super().__init__()
        self.denoiser = Denoiser(MODEL)
        self.denoiser.init_weights(0)
        self.alignment = torch.nn.Linear(8, 2) if head else None

    def named_parameters(self, *args, **kwargs):
        for name, p in super().named_parameters(*args, **kwargs):
            yield name.removeprefix("denoiser."), p


def of_kind(kind, head=False):
    """(module, optimizer, shards) with state as after three updates."""
    torch.manual_seed(3)
    module = WithHead(head)
    settings = Optimizer(kind=kind, lr=0.01, eps=1e-8, muon={"dtype": "float32"})
    optimizer = build_optimizer(module.named_parameters(), settings, torch.device("cpu"), MODEL)
    shards = local_shards(module, optimizer, 0)
    if kind == "muon":
        optimizer.attach(shards, 0)
    return module, optimizer, shards


def update(module, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for _, p in module.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def stored(tmp_path, name, shards, optimizer):
    folder = save_checkpoint(
        tmp_path / name, 1, train_state.state_pieces(shards, optimizer, None), {}, keep=1
    )
    return CheckpointReader(folder)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_optimizer_goes_on_bit_for_bit(tmp_path, kind, head):
    module, optimizer, shards = of_kind(kind, head)
    update(module, optimizer, 3, seed=1)
    reader = stored(tmp_path, "a", shards, optimizer)
    kinds = {name.partition("/")[0] for name in reader.names()}
    assert kinds == {"master", "exp_avg", "exp_avg_sq"} | ({"momentum"} if kind == "muon" else set())
    names = {name.partition("/")[2] for name in reader.names() if name.startswith("momentum/")}
    assert names == (set(optimizer.stacks) if kind == "muon" else set())

    other, fresh, held = of_kind(kind, head)
    assert train_state.load_weights(other, reader, "x") == []
    assert (
        train_state.load_optimizer(held, fresh, reader, train_state.optimizer_steps(shards, optimizer)) == []
    )
    update(module, optimizer, 2, seed=2)
    update(other, fresh, 2, seed=2)
    for (name, one), (_, two) in zip(module.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(one, two), name
        assert all(torch.equal(v, fresh.state[two][k]) for k, v in optimizer.state[one].items()), name


class Heavy(TrainingOptimizer):
    """Momentum without a count of updates."""

    def __init__(self, named):
        super().__init__(parameter_group(named, 0.1, 0.0), {})

    def state_names(self, name):
        return ("momentum",)

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).mul_(0.9).add_(p.grad)
            p.sub_(momentum, alpha=0.1)


def test_an_optimizer_that_counts_no_updates_goes_on_too(tmp_path):
    pairs = []
    for _ in range(2):
        torch.manual_seed(3)
        module = WithHead(False)
        optimizer = Heavy(module.named_parameters())
        pairs.append((module, optimizer, local_shards(module, optimizer, 0)))
    (module, optimizer, shards), (other, fresh, held) = pairs
    update(module, optimizer, 3, seed=1)
    reader = stored(tmp_path, "a", shards, optimizer)
    assert train_state.optimizer_steps(shards, optimizer) == 0
    assert train_state.load_weights(other, reader, "x") == []
    assert train_state.load_optimizer(held, fresh, reader, 0) == []
    for one, two in ((module, optimizer), (other, fresh)):
        update(one, two, 2, seed=2)
    for (name, one), (_, two) in zip(module.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize(("before", "after"), [("adamw", "muon"), ("muon", "adamw")])
def test_another_optimizer_starts_what_it_needs_at_zero(tmp_path, before, after):
    module, optimizer, shards = of_kind(before)
    update(module, optimizer, 3, seed=1)
    reader = stored(tmp_path, "a", shards, optimizer)
    other, fresh, held = of_kind(after)
    matrices = 6
    missing, extra = (matrices, 2 * matrices) if after == "muon" else (2 * matrices, matrices)
    with pytest.raises(UserError) as raised:
        train_state.load_optimizer(held, fresh, reader, 3)
    assert f"not the optimizer state of this configuration: {missing} missing (" in str(raised.value)
    assert f"{extra} unknown (" in str(raised.value)
    assert "\n" not in str(raised.value)

    said = train_state.load_optimizer(held, fresh, reader, 3, allow_changes=True)
    adam = f"exp_avg of {matrices} parameters, exp_avg_sq of {matrices} parameters"
    momentum = f"momentum of {matrices} parameters"
    zero, dropped = (momentum, adam) if after == "muon" else (adam, momentum)
    assert said == [f"optimizer state that starts at zero: {zero}", f"optimizer state dropped: {dropped}"]
    train_state.load_weights(other, reader, "x")
    for (name, one), (_, two) in zip(module.named_parameters(), other.named_parameters(), strict=True):
        if "momentum" in optimizer.state[one] or "momentum" in fresh.state_names(name):
            assert not fresh.state[two]
        else:
            assert torch.equal(fresh.state[two]["exp_avg"], optimizer.state[one]["exp_avg"])
    # What starts anew equals an optimizer that never saw the first updates.
    update(other, fresh, 1, seed=5)
    alone, new, _ = of_kind(after)
    train_state.load_weights(alone, reader, "x")
    update(alone, new, 1, seed=5)
    shared = ("blocks.0.qkv.weight", "blocks.0.down.weight", "modulation.weight", "text_kv.weight")
    for name in shared:
        assert torch.equal(dict(other.named_parameters())[name], dict(alone.named_parameters())[name])


def test_a_head_comes_goes_and_counts_its_own_updates(tmp_path):
    module, optimizer, shards = of_kind("adamw")
    update(module, optimizer, 3, seed=1)
    reader = stored(tmp_path, "a", shards, optimizer)

    with_head, fresh, held = of_kind("adamw", head=True)
    assert train_state.lacks_heads(with_head, reader)
    before = with_head.alignment.weight.detach().clone()
    said = train_state.load_weights(with_head, reader, "run")
    assert said == ["new parameters since the checkpoint: 2 (alignment.bias, alignment.weight)"]
    assert torch.equal(with_head.alignment.weight, before)
    assert torch.equal(with_head.denoiser.modulation.weight, module.denoiser.modulation.weight)
    said = train_state.load_optimizer(held, fresh, reader, 3)
    assert said == [
        "optimizer state that starts at zero: exp_avg of 2 parameters, exp_avg_sq of 2 parameters"
    ]
    update(with_head, fresh, 2, seed=2)
    assert fresh.state[with_head.alignment.weight]["step"] == 2
    assert fresh.state[with_head.denoiser.modulation.weight]["step"] == 5
    assert train_state.optimizer_steps(held, fresh) == 5

    # Its own count is in the checkpoint, so that the run goes on bit for bit.
    reader = stored(tmp_path, "b", held, fresh)
    counts = {name: int(reader.tensor(name)) for name in reader.names() if name.startswith("updates/")}
    assert counts == {"updates/alignment.weight": 2, "updates/alignment.bias": 2}
    again, resumed, parts_of = of_kind("adamw", head=True)
    assert not train_state.lacks_heads(again, reader)
    train_state.load_weights(again, reader, "run")
    assert train_state.load_optimizer(parts_of, resumed, reader, 5) == []
    update(with_head, fresh, 2, seed=3)
    update(again, resumed, 2, seed=3)
    assert torch.equal(with_head.alignment.weight, again.alignment.weight)

    # Without it again.
    bare, last, rest = of_kind("adamw")
    assert train_state.load_weights(bare, reader, "run") == [
        "parameters dropped since the checkpoint: 2 (alignment.bias, alignment.weight)"
    ]
    assert train_state.load_optimizer(rest, last, reader, 5) == [
        "optimizer state dropped: exp_avg of 2 parameters, exp_avg_sq of 2 parameters"
    ]
    assert last.state[bare.denoiser.modulation.weight]["step"] == 5


def test_a_head_of_another_shape_begins_anew(tmp_path):
    module, optimizer, shards = of_kind("adamw", head=True)
    update(module, optimizer, 3, seed=1)
    reader = stored(tmp_path, "a", shards, optimizer)
    other, _, _ = of_kind("adamw", head=True)
    wider = torch.nn.Linear(other.alignment.in_features, other.alignment.out_features + 1)
    other.alignment = wider
    before = wider.weight.detach().clone()
    assert train_state.lacks_heads(other, reader)
    assert train_state.load_weights(other, reader, "run") == [
        "new parameters since the checkpoint: 2 (alignment.bias, alignment.weight)",
        "parameters dropped since the checkpoint: 2 (alignment.bias, alignment.weight)",
    ]
    assert torch.equal(wider.weight, before)
    assert torch.equal(other.denoiser.modulation.weight, module.denoiser.modulation.weight)


def test_a_changed_shape_is_refused_even_where_changes_are_allowed(tmp_path):
    _, optimizer, shards, _ = parts(1)
    reader = saved(tmp_path, shards, optimizer, None)
    with pytest.raises(UserError, match=r"run: weight is \(5, 3\) there and \(5, 4\)"):
        train_state.load_weights(torch.nn.Linear(4, 5), reader, "run", allow_changes=True)


def test_both_averages_come_back(tmp_path):
    module, optimizer, shards, _ = parts(1)
    config = Ema(enabled=True, decay=0.5, second_decay=0.9, every=1)
    ema = EmaWeights(config, shards)
    train(module, optimizer, ema, 3)
    reader = saved(tmp_path, shards, optimizer, ema)
    assert {"ema/weight", "ema2/weight", "ema2/bias"} <= set(reader.names())
    _, _, held, _ = parts(2)
    found = EmaWeights(config, held)
    train_state.load_ema(held, found, reader)
    for one, two in zip(shards, held, strict=True):
        for name in ("ema", "ema2"):
            assert torch.equal(found.of(two.master, name), ema.of(one.master, name))
    # A checkpoint without the second leaves it at the weights.
    _, _, held, _ = parts(2)
    later, first = EmaWeights(config, held), saved(tmp_path / "b", shards, optimizer, None)
    train_state.load_ema(held, later, first)
    assert all(torch.equal(later.of(s.master, "ema2"), s.master) for s in held)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_every_rank_reads_an_equal_share_of_the_weights(ranks):
    """However large the largest tensor is, every element is read by one rank, in order."""
    sizes = {"small": 3, "none": 0, "large": 1000, "one": 1, "last": 47}
    read, held = dict.fromkeys(sizes, 0), [0] * ranks
    for name, start, count, rank in train_state.shares(sizes, ranks):
        assert start == read[name]
        assert count > 0
        read[name] += count
        held[rank] += count
    assert read == sizes
    assert max(held) - min(held) <= 1
