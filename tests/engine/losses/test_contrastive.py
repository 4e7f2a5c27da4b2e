"""Negatives by their law, the loss with them in float64, and the mean target against what a model learns."""

from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from millrace.engine.config import Config, Model, Objective, Routing
from millrace.engine.losses.contrastive import (
    MeanTarget,
    mean_target,
    random_negatives,
    require_partners,
)
from millrace.engine.losses.flow_matching import FlowMatching
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.layout import LayoutCache, patchify
from millrace.engine.model.routing import routing_policy
from millrace.engine.util.errors import UserError

DRAWS = 1000


def layout_of(grids):
    text = torch.arange(len(grids) + 1, dtype=torch.int32)
    return LayoutCache((4, 4), 10_000.0).layout(grids, text, 1)


def test_a_random_negative_is_every_other_sample_equally_often():
    found = torch.stack([random_negatives(5, torch.arange(6) + 6 * i) for i in range(DRAWS)])
    for i in range(6):
        counts = Counter(found[:, i].tolist())
        assert set(counts) == set(range(6)) - {i}
        # Chi-squared of four degrees of freedom: above 23.5 in one of ten thousand.
        wanted = DRAWS / 5
        assert sum((count - wanted) ** 2 / wanted for count in counts.values()) < 23.5


def test_only_eligible_samples_are_partners():
    eligible = torch.tensor([True, False, True, True, False])
    found = torch.stack([random_negatives(5, torch.arange(5) + 5 * i, eligible) for i in range(DRAWS)])
    assert (found[:, ~eligible] == -1).all()
    for i in (0, 2, 3):
        counts = Counter(found[:, i].tolist())
        assert set(counts) == {0, 2, 3} - {i}
        assert abs(counts.most_common(1)[0][1] / DRAWS - 0.5) < 4 * 0.5 / DRAWS**0.5


@pytest.mark.parametrize("eligible", [[True], [False, True, False], [False, False]])
def test_who_is_alone_has_no_negative(eligible):
    found = random_negatives(5, torch.arange(len(eligible)), torch.tensor(eligible))
    assert found.tolist() == [-1] * len(eligible)


def test_the_draw_belongs_to_the_sample():
    """In a micro-batch of one size it is as many places on, whoever stands there."""
    one = random_negatives(5, torch.tensor([40, 7, 93, 11]))
    other = random_negatives(5, torch.tensor([8, 40, 12, 7]))
    assert (one[0] - 0) % 4 == (other[1] - 1) % 4
    assert (one[1] - 1) % 4 == (other[3] - 3) % 4
    keys = torch.arange(1000)
    assert not torch.equal(random_negatives(5, keys), random_negatives(6, keys))


GRIDS = [[(2, 2)] * 5, [(2, 2), (1, 3), (3, 2), (1, 1), (2, 3)]]
EMPTY = torch.tensor([False, True, False, False, True])


@pytest.mark.parametrize("grids", GRIDS, ids=["one size", "mixed sizes"])
@pytest.mark.parametrize("prediction", ["velocity", "sample"])
@pytest.mark.parametrize("negatives", ["roll", "random"])
@pytest.mark.parametrize("empty", [True, False])
def test_loss_and_gradient_are_the_formula(grids, prediction, negatives, empty):
    """Whole, in float64, with the negatives chosen by hand."""
    generator = torch.Generator().manual_seed(3)
    layout, index, weight = layout_of(grids), torch.arange(5) + 70, 0.05
    total = sum(layout.lengths)
    guess, clean, noise = (torch.randn(total, 12, generator=generator) for _ in range(3))
    guess.requires_grad_()
    t = torch.tensor([0.01, 0.4, 0.97, 0.2, 0.6])
    config = Objective(
        prediction=prediction,
        contrastive_weight=weight,
        contrastive_negatives=negatives,
        contrastive_empty=empty,
    )
    found = FlowMatching(config, 9).loss(guess, clean, noise, t, layout, EMPTY, index)
    assert found.dtype == torch.float32
    (gradient,) = torch.autograd.grad(found.mean(), guess)

    part = [i for i in range(5) if empty or not EMPTY[i]]
    if negatives == "roll":
        partner = {i: part[k - 1] for k, i in enumerate(part)}
    else:
        drawn = random_negatives(9, index, None if empty else ~EMPTY).tolist()
        partner = {i: drawn[i] for i in part}
        assert all(j in part and j != i for i, j in partner.items())
    exact = guess.detach().double().requires_grad_()
    losses, targets, outputs = [], [], []
    samples = zip(
        *(x.split(layout.lengths) for x in (exact, clean.double(), noise.double())), t.double(), strict=True
    )
    for g, x, n, time in samples:
        divisor = time.clamp_min(0.05)
        outputs.append(g if prediction == "velocity" else ((1 - time) * x + time * n - g) / divisor)
        targets.append(n - x if prediction == "velocity" else time * (n - x) / divisor)
    for i, output in enumerate(outputs):
        loss = (output - targets[i]).square().mean()
        if i in partner:
            other = targets[partner[i]]
            loss = loss - weight * (output - other[torch.arange(len(output)) % len(other)]).square().mean()
        losses.append(loss)
    wanted = torch.stack(losses)
    (exact_gradient,) = torch.autograd.grad(wanted.mean(), exact)
    torch.testing.assert_close(found.detach(), wanted.detach().float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, exact_gradient.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pixels", [False, True], ids=["latents", "pixels"])
@pytest.mark.parametrize("policy", ["tread", "sprint"])
def test_x_prediction_under_routing_and_contrast(policy, pixels):
    """The gradient that reaches the denoiser's weights through a route, against the formula in float64."""
    patch, channels = (4, 3) if pixels else (2, 4)
    model = Model(
        width=32, depth=4, heads=2, patch_size=patch, in_channels=channels, context_dim=8,
        bottleneck=6 if pixels else None, attention_backend="reference",
    )  # fmt: skip
    routing = Routing(policy=policy, start=1, end=2)
    denoiser = Denoiser(model, routing).double()
    denoiser.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    for parameter in denoiser.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    grids, index = [(4, 4), (3, 4), (4, 4)], torch.arange(3) + 11
    layout = denoiser.layouts.layout(grids, torch.arange(4, dtype=torch.int32) * 2, 2)
    config = Objective(prediction="sample", contrastive_weight=0.05, time_mean=0.8, noise_scale=2.0)
    flow = FlowMatching(config, 3)
    clean = torch.randn(44, channels * patch**2, generator=generator)
    t, text = flow.time(index), torch.randn(6, 8, generator=generator).double()
    noisy, noise = flow.noisy(clean, index, t, layout)
    span = routing_policy(Config(model=model, routing=routing)).draw(layout, 3, index)

    guess = denoiser(noisy.double(), t, text, layout, span).prediction
    flow.loss(guess.float(), clean, noise, t, layout).mean().backward()
    found = {name: parameter.grad.clone() for name, parameter in denoiser.named_parameters()}
    denoiser.zero_grad()
    guess = denoiser(noisy.double(), t, text, layout, span).prediction
    parts = [x.double().split(layout.lengths) for x in (guess, noisy, clean, noise)]
    floored = t.double().clamp_min(0.05)
    outputs = [(x_t - g) / s for g, x_t, s in zip(parts[0], parts[1], floored, strict=True)]
    targets = [
        time * (n - x) / s for x, n, time, s in zip(parts[2], parts[3], t.double(), floored, strict=True)
    ]
    losses = []
    for i, output in enumerate(outputs):
        away = targets[i - 1][torch.arange(len(output)) % len(targets[i - 1])]
        losses.append((output - targets[i]).square().mean() - 0.05 * (output - away).square().mean())
    torch.stack(losses).mean().backward()
    reached = 0
    for name, parameter in denoiser.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
        reached += bool(parameter.grad.abs().max() > 1e-4)
    assert reached > 0.8 * len(found)


def test_what_the_term_needs_is_asked_for():
    layout, x = layout_of([(2, 2)] * 2), torch.zeros(8, 12)
    for changes, name in (
        ({"contrastive_empty": False}, "unconditional"),
        ({"contrastive_negatives": "random"}, "ind"),
    ):
        flow = FlowMatching(Objective(contrastive_weight=0.05, **changes), 0)
        with pytest.raises(ValueError, match=name):
            flow.loss(x, x, x, torch.ones(2), layout)


def test_mean_of_the_velocity_target():
    """Of noise minus data, with the noise's mean of zero taken for granted."""
    rng = np.random.default_rng(0)
    data = rng.standard_normal((10, 3, 4, 6)) + rng.standard_normal((1, 3, 4, 6))
    batches = [torch.from_numpy(data[i : i + 4]).float() for i in range(0, 10, 4)]
    place, channel = mean_target(batches, autoencoder="a"), mean_target(batches, per="channel")
    assert (place.count, place.autoencoder, channel.count) == (10, "a", 10)
    np.testing.assert_allclose(place.values.numpy(), -data.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        channel.values.numpy(), -data.mean((0, 2, 3))[:, None, None], rtol=1e-5, atol=1e-6
    )


def test_pictures_count_alike_per_channel_whatever_their_size():
    sizes = [torch.full((1, 2, 2, 2), 1.0), torch.full((1, 2, 4, 8), 4.0)]
    assert mean_target(sizes, per="channel").values.flatten().tolist() == [-2.5, -2.5]
    with pytest.raises(UserError, match=r"2 x 4 x 8 and 2 x 2 x 2.*data\.aspect to square"):
        mean_target(sizes)
    with pytest.raises(UserError, match="at least one"):
        mean_target([])


def test_the_correction_gives_back_what_flow_matching_learns():
    """The least contrastive loss over constants of one condition, by Newton's step, then corrected."""
    generator = torch.Generator().manual_seed(1)
    weight, patch, grid = 0.3, 2, (2, 3)
    noise = torch.randn(400, 3, 4, 6, generator=generator, dtype=torch.float64)
    clean = torch.randn(400, 3, 4, 6, generator=generator, dtype=torch.float64)
    clean[::4] += 2.0  # the condition: every fourth
    target = noise - clean
    # Every sample meets every other one, which is what the mean over many steps amounts to.
    own, everyone = target[::4].mean(0), target.mean(0)
    v = torch.zeros_like(own, requires_grad=True)
    loss = (v - target[::4]).square().mean(0) - weight * (v - target).square().mean(0)
    (slope,) = torch.autograd.grad(loss.sum(), v)
    learned = -slope / (2 * (1 - weight))  # the curvature is 2 (1 - weight) everywhere
    mean = MeanTarget(everyone, 400)
    corrected = mean.apply(patchify(learned, patch), weight, [grid], patch)
    torch.testing.assert_close(corrected, patchify(own, patch))
    assert (learned - own).abs().mean() > 0.1


def test_the_correction_of_a_packed_batch():
    v = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    channel = MeanTarget(torch.tensor([1.0, -2.0])[:, None, None], 1)
    found = channel.apply(v, 0.25, [(2, 3), (2, 2)], 2)
    mean = torch.tensor([1.0] * 4 + [-2.0] * 4)
    torch.testing.assert_close(found, 0.75 * v + 0.25 * mean)
    assert torch.equal(channel.apply(v, 0.0, [(2, 3), (2, 2)], 2), v)
    place = MeanTarget(torch.randn(2, 4, 6), 1)
    found = place.apply(torch.cat((v[:6], v[:6])), 0.5, [(2, 3)] * 2, 2)
    torch.testing.assert_close(found[6:], 0.5 * v[:6] + 0.5 * patchify(place.values, 2))
    with pytest.raises(UserError, match="4 x 6, these have 4 x 4"):
        place.apply(v[:4], 0.5, [(2, 2)], 2)


def test_the_file_holds_all_of_it(tmp_path):
    saved = MeanTarget(torch.randn(4, 2, 3), 77, "flux1 somewhere")
    saved.save(tmp_path / "new" / "mean.safetensors")
    read = MeanTarget.load(tmp_path / "new" / "mean.safetensors")
    assert torch.equal(read.values, saved.values)
    assert (read.count, read.autoencoder) == (77, "flux1 somewhere")


def test_files_that_are_no_mean_target_are_refused_in_one_line(tmp_path):
    (tmp_path / "damaged").write_bytes(b"no safetensors")
    save_file({"weights": torch.zeros(3)}, tmp_path / "other")
    save_file({"mean_target": torch.zeros(3)}, tmp_path / "flat")
    for name in ("absent", "damaged", "other", "flat"):
        with pytest.raises(UserError, match=rf"{name}.*--compute-mean-target") as caught:
            MeanTarget.load(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be written"):
        MeanTarget(torch.zeros(1, 1, 1), 1).save(tmp_path / "damaged" / "mean")


def test_a_micro_batch_of_one_sample_is_refused(runs, tmp_path):
    pushed = {"objective": {"contrastive_weight": 0.05}}
    require_partners(runs.config(tmp_path, pushed, {"data": {"micro_batch": 2}}))
    require_partners(runs.config(tmp_path, {"data": {"micro_batch": 1}}))
    alone = runs.here(tmp_path / "run", pushed, {"data": {"micro_batch": 1}})
    assert alone.error.startswith("objective.contrastive_weight pushes each sample away from another")
    assert not list((tmp_path / "run").glob("checkpoints/*"))
