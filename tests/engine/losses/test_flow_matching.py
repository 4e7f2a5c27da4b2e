"""Times against rejection sampling as PRX does it, keys by sample, and the loss against its formula."""

import numpy as np
import pytest
import torch

from millrace.engine.config import Objective
from millrace.engine.losses.flow_matching import FlowMatching, shift_time
from millrace.engine.model.layout import LayoutCache

DRAWS = 100_000


def layout_of(grids):
    text = torch.arange(len(grids) + 1, dtype=torch.int32)
    return LayoutCache((4, 4), 10_000.0).layout(grids, text, 1)


def rejection_sample(rng, count, shift, uniform_share, floor):
    """PRX: logit-normal times below the floor are drawn again; a share of the batch is uniform instead."""
    t = np.empty(0)
    while len(t) < count:
        normal = 1 / (1 + np.exp(-rng.standard_normal(count)))
        shifted = shift * normal / (1 + (shift - 1) * normal)
        t = np.concatenate([t, shifted[shifted >= floor]])
    t = t[:count]
    uniform = rng.random(count) < uniform_share
    t[uniform] = floor + (1 - floor) * rng.random(uniform.sum())
    return t


def largest_gap(a, b):
    """Two-sample Kolmogorov-Smirnov statistic."""
    grid = np.sort(np.concatenate([a, b]))
    below = [np.searchsorted(np.sort(x), grid, side="right") / len(x) for x in (a, b)]
    return np.abs(below[0] - below[1]).max()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("floor", [1e-3, 0.2])
def test_times_follow_rejection_sampling(shift, share, floor):
    config = Objective(time_shift=shift, time_uniform=share, time_floor=floor)
    found = FlowMatching(config, 5).time(torch.arange(DRAWS)).double().numpy()
    wanted = rejection_sample(np.random.default_rng(0), DRAWS, shift, share, floor)
    # 1.95 sqrt(2 / n) is exceeded by equal laws once in a thousand.
    assert largest_gap(found, wanted) < 1.95 * (2 / DRAWS) ** 0.5
    assert found.min() >= np.float32(floor)
    assert found.max() < 1


def test_the_statistic_tells_laws_apart():
    """What the test above can see: a share of 10 % uniform, a shift, a clamp in place of a redraw."""
    rng = np.random.default_rng(1)
    base = rejection_sample(rng, DRAWS, 1.0, 0.1, 0.2)
    clamped = np.maximum(rejection_sample(rng, DRAWS, 1.0, 0.1, 1e-9), 0.2)
    limit = 1.95 * (2 / DRAWS) ** 0.5
    assert largest_gap(base, rejection_sample(rng, DRAWS, 1.0, 0.0, 0.2)) > limit
    assert largest_gap(base, rejection_sample(rng, DRAWS, 1.1, 0.1, 0.2)) > limit
    assert largest_gap(base, clamped) > limit


def test_jits_law_in_its_own_words():
    """JiT's t runs from noise to data: sigmoid(N(-0.8, 0.8^2)), without a uniform share."""
    rng = np.random.default_rng(3)
    theirs = 1 / (1 + np.exp(-rng.normal(-0.8, 0.8, DRAWS)))
    config = Objective(time_mean=0.8, time_std=0.8, time_uniform=0.0, time_floor=1e-6)
    ours = FlowMatching(config, 5).time(torch.arange(DRAWS)).double().numpy()
    limit = 1.63 * (2 / DRAWS) ** 0.5
    assert largest_gap(ours, 1 - theirs) < limit
    assert largest_gap(ours, theirs) > 10 * limit


@pytest.mark.parametrize(("mean", "std"), [(-1.0, 0.5), (0.8, 0.8), (0.5, 2.0)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_floor_cuts_any_normal_where_redrawing_would(mean, std, shift):
    """Exactly, by the distribution function of the normal above its cut, on a grid of times."""
    floor = 0.15
    config = Objective(time_mean=mean, time_std=std, time_shift=shift, time_uniform=0.0, time_floor=floor)
    found = np.sort(FlowMatching(config, 5).time(torch.arange(DRAWS)).double().numpy())
    times = np.linspace(floor, 0.999, 200)
    unshifted = times / (shift - (shift - 1) * times)
    below = torch.special.ndtr(torch.from_numpy((np.log(unshifted / (1 - unshifted)) - mean) / std)).numpy()
    law = (below - below[0]) / (1 - below[0])
    share = np.searchsorted(found, times, side="right") / DRAWS
    assert np.abs(share - law).max() < 1.63 / DRAWS**0.5
    assert found.min() >= np.float32(floor)


def test_a_law_below_its_floor_is_refused():
    with pytest.raises(ValueError, match=r"time_mean -2\.0 .* 99\.6% .* time_floor 0\.4"):
        Objective(time_mean=-2.0, time_std=0.6, time_floor=0.4)


def test_a_time_belongs_to_its_sample():
    flow = FlowMatching(Objective(), 7)
    together = flow.time(torch.arange(1000))
    assert torch.equal(flow.time(torch.tensor([900, 3])), together[[900, 3]])
    assert torch.equal(flow.time(torch.tensor([42])), together[42:43])
    assert together.dtype == torch.float32
    assert len(together.unique()) > 990
    assert not torch.equal(FlowMatching(Objective(), 8).time(torch.arange(1000)), together)
    # Far into a long run the index still tells samples apart.
    assert len(flow.time(10**12 + torch.arange(1000)).unique()) > 990


def draw(flow, sample_index, grids, features):
    """x_t and noise of samples whose data are zero, at time 1."""
    layout = layout_of(grids)
    clean = torch.zeros(sum(layout.lengths), features)
    return flow.noisy(clean, torch.as_tensor(sample_index), torch.ones(len(grids)), layout)


def test_noise_belongs_to_its_sample():
    flow = FlowMatching(Objective(), 7)
    _, whole = draw(flow, [5, 9], [(2, 2), (3, 2)], 12)
    _, alone = draw(flow, [9], [(3, 2)], 12)
    assert whole.shape == (10, 12)
    assert torch.equal(whole[4:], alone)
    assert not torch.equal(whole[:4], alone[:4])


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_noise_is_normal_with_the_scale_as_deviation(scale):
    noisy, noise = draw(FlowMatching(Objective(noise_scale=scale), 7), range(16), [(8, 8)] * 16, 48)
    n = noise.numel()
    assert noise.dtype == torch.float32
    assert abs(float(noise.mean())) < 4 * scale / n**0.5
    assert float(noise.std()) == pytest.approx(scale, rel=4 / (2 * n) ** 0.5)
    assert torch.equal(noisy, noise)


@pytest.mark.parametrize(
    ("edge", "grid", "wanted"), [(16, (16, 16), 1.0), (32, (16, 16), 2.0), (32, (32, 32), 4)]
)
def test_jits_rule_for_the_noise(edge, grid, wanted):
    """1 at 256 pixels, 2 at 512."""
    flow = FlowMatching(Objective(noise_scale="resolution"), 7, edge)
    assert flow.noise_scale(grid) == wanted
    assert FlowMatching(Objective(noise_scale=3.0), 7, edge).noise_scale(grid) == 3.0
    with pytest.raises(ValueError, match="edge of a token"):
        FlowMatching(Objective(noise_scale="resolution"), 7)


@pytest.mark.parametrize("grids", [[(2, 8), (4, 4)], [(2, 8), (3, 5), (4, 4)]], ids=["one area", "mixed"])
def test_each_picture_has_the_noise_of_its_area(grids):
    """The root of rows x columns counts, and a sample's noise is the same in any company."""
    index, edge = torch.arange(len(grids)) + 5, 56
    follows = FlowMatching(Objective(noise_scale="resolution"), 7, edge)
    noisy, noise = draw(follows, index, grids, 12)
    _, unit = draw(FlowMatching(Objective(), 7), index, grids, 12)
    lengths = [rows * columns for rows, columns in grids]
    assert torch.equal(noisy, noise)
    for i, (found, one) in enumerate(zip(noise.split(lengths), unit.split(lengths), strict=True)):
        torch.testing.assert_close(found, one * (lengths[i] ** 0.5 * edge / 256), rtol=1e-6, atol=0)
        assert torch.equal(found, draw(follows, index[i : i + 1], grids[i : i + 1], 12)[1])


def test_scaled_noise_goes_into_the_path():
    flow, layout = FlowMatching(Objective(noise_scale="resolution"), 0, 128), layout_of([(2, 2), (1, 3)])
    clean, t = torch.randn(7, 6), torch.tensor([0.25, 0.5])
    noisy, noise = flow.noisy(clean, torch.arange(2), t, layout)
    torch.testing.assert_close(noisy[:4], 0.75 * clean[:4] + 0.25 * noise[:4])
    torch.testing.assert_close(noisy[4:], 0.5 * clean[4:] + 0.5 * noise[4:])


@pytest.mark.parametrize("scale", [0, -1, "half", True])
def test_a_noise_scale_that_is_none_is_refused(scale):
    with pytest.raises(ValueError, match='expected a positive number or "resolution"'):
        Objective(noise_scale=scale)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_shift(shift):
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    odds = shift * t / (1 - t)  # the shift multiplies the odds of noise
    wanted = torch.where(t < 1, odds / (1 + odds), 1.0)
    torch.testing.assert_close(shift_time(t, shift), wanted)


@pytest.mark.parametrize("prediction", ["velocity", "sample"])
@pytest.mark.parametrize("weight", [0.0, 0.05])
def test_loss_is_the_formula(prediction, weight):
    """Per sample, in float64, for samples of one size and of two."""
    for grids in ([(2, 2)] * 3, [(2, 2), (1, 3), (3, 2)]):
        generator = torch.Generator().manual_seed(3)
        layout = layout_of(grids)
        total = sum(layout.lengths)
        guess, clean, noise = (torch.randn(total, 12, generator=generator) for _ in range(3))
        t = torch.tensor([0.01, 0.4, 0.97])
        config = Objective(prediction=prediction, contrastive_weight=weight)
        found = FlowMatching(config, 0).loss(guess, clean, noise, t, layout)

        parts = [part.double() for part in (guess, clean, noise)]
        samples = list(zip(*(part.split(layout.lengths) for part in parts), t.double(), strict=True))
        outputs, targets = [], []
        for g, x, n, time in samples:
            noisy = (1 - time) * x + time * n
            divisor = max(float(time), 0.05)
            outputs.append(g if prediction == "velocity" else (noisy - g) / divisor)
            targets.append(n - x if prediction == "velocity" else (noisy - x) / divisor)
        for i, output in enumerate(outputs):
            other = targets[i - 1]
            away = other[torch.arange(len(output)) % len(other)]
            wanted = (output - targets[i]).square().mean() - weight * (output - away).square().mean()
            assert float(found[i]) == pytest.approx(float(wanted), rel=1e-5)


def test_perfect_predictions_have_no_loss():
    layout = layout_of([(2, 2)] * 2)
    clean, noise = torch.randn(8, 12), torch.randn(8, 12)
    t = torch.tensor([0.3, 0.8])
    for prediction, guess in (("velocity", noise - clean), ("sample", clean)):
        flow = FlowMatching(Objective(prediction=prediction), 0)
        assert float(flow.loss(guess, clean, noise, t, layout).abs().max()) == 0


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_path_runs_from_data_to_noise(scale):
    """The noise that comes back is the noise that went in."""
    flow, layout = FlowMatching(Objective(noise_scale=scale), 0), layout_of([(2, 2)] * 3)
    clean = torch.randn(12, 6)
    noisy, noise = flow.noisy(clean, torch.arange(3), torch.tensor([0.0, 1.0, 0.25]), layout)
    torch.testing.assert_close(noisy[:4], clean[:4])
    torch.testing.assert_close(noisy[4:8], noise[4:8])
    torch.testing.assert_close(noisy[8:], 0.75 * clean[8:] + 0.25 * noise[8:])


def test_velocity_of_either_prediction():
    noisy, clean, noise = torch.randn(3, 4, 6)
    t = 0.4
    noisy = (1 - t) * clean + t * noise
    from_sample = FlowMatching(Objective(prediction="sample"), 0).velocity(clean, noisy, t)
    torch.testing.assert_close(from_sample, noise - clean)
    assert FlowMatching(Objective(), 0).velocity(clean, noisy, t) is clean
    below = FlowMatching(Objective(prediction="sample"), 0).velocity(clean, noisy, 0.01)
    torch.testing.assert_close(below, (noisy - clean) / 0.05)
