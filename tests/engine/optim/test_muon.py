"""Muon against the formulas of its sources, written out here in float64, and against torch.optim.Muon."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from millrace.engine.config import Model, Muon, Optimizer, Schedule
from millrace.engine.distributed.zero_shards import local_shards
from millrace.engine.model.conversion import prx_state
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.optim import muon as muon_module
from millrace.engine.optim.build_optimizer import build_optimizer, set_learning_rates
from millrace.engine.optim.muon import update_scale

CPU = torch.device("cpu")
MODEL = Model(width=16, depth=2, heads=2, patch_size=1, in_channels=4, context_dim=8, mlp_ratio=2)
STEPS = 4


def orthogonal(x, steps=5, coefficients=(3.4445, -4.7750, 2.0315)):
    """Newton-Schulz on one float64 matrix, as in Jordan's post."""
    a, b, c = coefficients
    x = x / x.norm()
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + b * (gram @ x) + c * (gram @ gram @ x)
    return x


def reference(weight, gradients, rates, config: Muon):
    """The weight (m, n) after the gradients, in float64."""
    w, buffer = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    mu = config.momentum
    for g, lr in zip(gradients, rates, strict=True):
        g = g.double()
        buffer = mu * buffer + (g if config.form == "sum" else (1 - mu) * g)
        mixed = mu * buffer + (g if config.form == "sum" else (1 - mu) * g)
        update = orthogonal(mixed if config.nesterov else buffer, config.steps, config.coefficients)
        m, n = w.shape
        size = 0.2 * math.sqrt(max(m, n)) if config.scale == "rms" else math.sqrt(max(1, m / n))
        w = w - lr * config.weight_decay * w - lr * size * update
    return w


def trained(config: Muon, seed=0, steps=STEPS, model=MODEL):
    """(parameters before, gradients, parameters after) by name, of a denoiser under random gradients."""
    torch.manual_seed(seed)
    denoiser = Denoiser(model)
    denoiser.init_weights(seed)
    settings = Optimizer(kind="muon", lr=0.01, eps=1e-8, muon=config)
    optimizer = build_optimizer(denoiser.named_parameters(), settings, CPU, model)
    optimizer.attach(local_shards(denoiser, optimizer, 0), 0)
    before = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    gradients = {name: [torch.randn_like(p) for _ in range(steps)] for name, p in before.items()}
    for step in range(steps):
        for name, p in denoiser.named_parameters():
            p.grad = gradients[name][step].clone()
        optimizer.step()
    return before, gradients, {name: p.detach() for name, p in denoiser.named_parameters()}, optimizer


SETTINGS = [
    Muon(dtype="float32", form=form, nesterov=nesterov, scale=scale, weight_decay=decay)
    for form, nesterov, scale, decay in itertools.product(
        ("lerp", "sum"), (True, False), ("rms", "spectral"), (0.0, 0.3)
    )
] + [Muon(dtype="float32", steps=3, momentum=0.8, coefficients=(2.0, -1.5, 0.5), lr=0.003)]


@pytest.mark.parametrize(
    "config", SETTINGS, ids=lambda c: f"{c.form}-{c.nesterov}-{c.scale}-{c.weight_decay}"
)
def test_the_published_update(config):
    before, gradients, after, _ = trained(config)
    rates = [config.lr or 0.01] * STEPS
    for name, rows in (
        ("blocks.1.attn_out.weight", 16),
        ("blocks.0.down.weight", 16),
        ("blocks.0.qkv.weight", 48),
    ):
        assert len(before[name]) == rows
        wanted = reference(before[name], gradients[name], rates, config)
        moved = (wanted - before[name].double()).abs().max()
        assert moved > 0.01 * (config.lr or 0.01)
        assert (after[name].double() - wanted).abs().max() < 1e-4 * moved


@pytest.mark.parametrize("chunked", [False, True])
def test_the_whole_denoiser_by_prxs_rule(chunked):
    """Under PRX's names and shapes: 2-D and "blocks" in the name gets muon_fsdp2's update with rms_scale, the
    rest Adam. Chunked: the same with qkv, kv and modulation cut into squares first."""
    config = Muon(dtype="float32", chunked=chunked)
    before, gradients, after, _ = trained(config)
    start, end = prx_state(before, MODEL), prx_state(after, MODEL)
    steps = [prx_state({name: g[i] for name, g in gradients.items()}, MODEL) for i in range(STEPS)]
    width = MODEL.width
    counted = 0
    for name, weight in start.items():
        gs = [step[name] for step in steps]
        if weight.dim() == 2 and "blocks" in name:
            fused = any(part in name for part in ("qkv", "kv", "modulation"))
            pieces = weight.split(width) if chunked and fused else [weight]
            cut = [g.split(width) if chunked and fused else [g] for g in gs]
            wanted = []
            for i, piece in enumerate(pieces):
                w, buffer = piece.double(), torch.zeros_like(piece, dtype=torch.float64)
                for g in cut:
                    buffer = torch.lerp(buffer, g[i].double(), 1 - 0.95)
                    update = orthogonal(torch.lerp(g[i].double(), buffer, 0.95))
                    w = w - 0.01 * 0.2 * math.sqrt(max(piece.shape)) * update
                wanted.append(w)
                counted += 1
            wanted = torch.cat(wanted)
        else:
            w, m, v = weight.double(), 0.0, 0.0
            for i, g in enumerate(gs, 1):
                g = g.double()
                m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
                w = w - 0.01 * (m / (1 - 0.9**i)) / ((v / (1 - 0.95**i)).sqrt() + 1e-8)
            wanted = w
        torch.testing.assert_close(end[name].double(), wanted, rtol=0, atol=2e-6, msg=name)
    assert counted == MODEL.depth * (3 + 1 + 2 + 1 + 2 + 6 if chunked else 7)


@pytest.mark.parametrize(("theirs", "ours"), [("original", "spectral"), ("match_rms_adamw", "rms")])
@pytest.mark.parametrize("name", ["blocks.0.qkv.weight", "blocks.0.down.weight"])
def test_torch_optim_muon(theirs, ours, name):
    """Both round to BF16, each in its own places: neither is further from float64 than twice the other."""
    config = Muon(scale=ours, weight_decay=0.1)
    before, gradients, after, _ = trained(config)
    weight = nn.Parameter(before[name].clone())
    optimizer = torch.optim.Muon([weight], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn=theirs)
    for g in gradients[name]:
        weight.grad = g.clone()
        optimizer.step()
    wanted = reference(before[name], gradients[name], [0.01] * STEPS, config)
    moved = (wanted - before[name]).norm()
    errors = [float((found.double() - wanted).norm() / moved) for found in (after[name], weight.detach())]
    assert max(errors) < 0.02
    assert errors[0] < 2 * errors[1]


def test_the_two_forms_of_momentum_are_one_update():
    """Nesterov or not, they differ by a constant factor, which the orthogonalisation divides out."""
    for nesterov in (True, False):
        *_, lerp, _ = trained(Muon(dtype="float32", form="lerp", nesterov=nesterov))
        *_, total, optimizer = trained(Muon(dtype="float32", form="sum", nesterov=nesterov))
        for name in optimizer.stacks:
            torch.testing.assert_close(lerp[name], total[name], rtol=0, atol=1e-6)


def test_scales():
    assert update_scale("rms", 6, 100) == update_scale("rms", 100, 6) == pytest.approx(2.0)
    assert update_scale("spectral", 4, 1) == 2.0
    assert update_scale("spectral", 1, 4) == 1.0


def test_more_rounds_change_nothing(monkeypatch):
    *_, once, _ = trained(Muon(dtype="float32"))
    monkeypatch.setattr(muon_module, "ROUND_ELEMENTS", 700)
    *_, often, optimizer = trained(Muon(dtype="float32"))
    (plan,) = {id(p): p for p in optimizer._plans.values()}.values()
    assert len(plan.rounds) > 5
    assert all(len(r.mine) == 1 or sum(m.size for m in r.mine) <= 700 for r in plan.rounds)
    for name, weight in once.items():
        torch.testing.assert_close(often[name], weight, rtol=0, atol=1e-6)


def test_the_work_is_that_of_the_iteration():
    """Matrix products counted where they run, against the count that balances the processes."""
    with FlopCounterMode(display=False) as counter:
        *_, optimizer = trained(Muon(dtype="float32"), steps=3)
    per_step = sum(4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3 for s in optimizer.orthogonalised) * 5
    assert counter.get_total_flops() == 3 * per_step


def test_a_skipped_step_changes_nothing():
    _, _, after, optimizer = trained(Muon())
    before = {name: weight.clone() for name, weight in after.items()}
    state = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.full_like(p, float("nan"))
    optimizer.skip = True
    optimizer.step()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert all(torch.equal(optimizer.state[p][k], v) for p, s in state.items() for k, v in s.items())


def test_a_missing_gradient_is_zero():
    """All processes must agree on the matrices that they exchange."""
    _, _, after, optimizer = trained(Muon(dtype="float32"), steps=1)
    (group,) = [group for group in optimizer.param_groups if group["rate"] == "muon_lr"]
    momentum = optimizer.state[group["params"][0]]["momentum"].clone()
    for p in group["params"]:
        p.grad = None
    optimizer.step()
    assert torch.equal(
        optimizer.state[group["params"][0]]["momentum"], momentum.lerp(torch.zeros(1), 1 - 0.95)
    )
    assert all(torch.isfinite(weight).all() for weight in after.values())


def test_zero_gradients_leave_the_weights():
    denoiser = Denoiser(MODEL)
    denoiser.init_weights(0)
    optimizer = build_optimizer(denoiser.named_parameters(), Optimizer(kind="muon", lr=0.1), CPU, MODEL)
    optimizer.attach(local_shards(denoiser, optimizer, 0), 0)
    before = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    for p in denoiser.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in denoiser.named_parameters())


def test_state_is_stored_like_the_weights():
    *_, optimizer = trained(Muon())
    for group in optimizer.param_groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            kinds = {key for key, value in optimizer.state[p].items() if value.dim()}
            assert kinds == set(optimizer.state_names(name))
            assert all(optimizer.state[p][kind].dtype == torch.float32 for kind in kinds)
            assert all(optimizer.state[p][kind].shape == p.shape for kind in kinds)


def test_it_must_know_the_shards():
    denoiser = Denoiser(MODEL)
    optimizer = build_optimizer(denoiser.named_parameters(), Optimizer(kind="muon"), CPU, MODEL)
    for p in denoiser.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match="attach"):
        optimizer.step()


def test_each_group_has_its_learning_rate():
    denoiser, schedule = Denoiser(MODEL), Schedule(kind="linear", warmup=10)
    for muon, wanted in ((Muon(), {"lr": 0.05}), (Muon(lr=0.2), {"lr": 0.05, "muon_lr": 0.1})):
        settings = Optimizer(kind="muon", lr=0.1, muon=muon)
        optimizer = build_optimizer(denoiser.named_parameters(), settings, CPU, MODEL)
        assert set_learning_rates(optimizer, 4, schedule, 100) == pytest.approx(wanted)
        rates = {group["rate"]: group["lr"] for group in optimizer.param_groups}
        assert rates == pytest.approx({"muon_lr": 0.05, "lr": 0.05} | wanted)
    optimizer = build_optimizer(denoiser.named_parameters(), Optimizer(lr=0.1), CPU)
    assert set_learning_rates(optimizer, 4, schedule, 100) == pytest.approx({"lr": 0.05})
