"""The peer that the benchmarks compare with is the same network: equal loss and gradients on equal inputs."""

from pathlib import Path

import pytest
import torch

from millrace.benchmarks.step import training_steps as steps
from millrace.engine.config.loading import merge, parse_config
from millrace.engine.model.conversion import diffusers_state
from millrace.engine.util.errors import UserError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


CONFIG = {
    "model": {"width": 48, "depth": 5, "heads": 3, "patch_size": 2, "in_channels": 4, "context_dim": 20},
    "routing": {"start": 1, "end": 3},
}
SAMPLES, GRID, TEXT, LENGTHS = 3, (4, 6), 8, (3, 8, 1)


def config_of(variant, **sections):
    return steps.variant_config(parse_config(merge(CONFIG, sections), "test"), variant)


def sides(config):
    """Both steps, in float64, on one batch and the same random weights."""
    denoiser = steps.build_denoiser(config, seed=1)
    batch = steps.random_batch(config, SAMPLES, GRID, TEXT, LENGTHS, torch.device("cpu"))
    denoiser.double()
    batch = steps.Batch(
        batch.clean.double(), batch.noise.double(), batch.t.double(), batch.text.double(), LENGTHS
    )
    return steps.OurStep(denoiser, config, batch), steps.PeerStep(
        steps.build_peer(denoiser, config), config, batch
    )


def kept_positions(ours):
    """The positions (B, K) that our route keeps of each sample, or None."""
    span = ours.policy.draw(ours.layout, ours.config.run.seed, ours.sample_index)
    if span is None:
        return None
    return span.route.index.view(SAMPLES, -1) - ours.layout.cu_seqlens[:-1, None]


@pytest.mark.parametrize("prediction", ["velocity", "sample"])
@pytest.mark.parametrize("variant", steps.VARIANTS)
def test_same_loss_and_gradients(variant, prediction):
    config = config_of(variant, objective={"prediction": prediction})
    ours, theirs = sides(config)
    loss = steps.run(ours.forward, list(ours.denoiser.parameters()))
    kept = kept_positions(ours)
    expected = steps.run(lambda: theirs.forward(kept), list(theirs.peer.parameters()))
    # The loss and the patches' rotation are FP32 on both sides, whatever the weights.
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=0)

    network = {name: p.grad for name, p in ours.denoiser.named_parameters() if not name.startswith("fusion.")}
    network = diffusers_state(network, config.model)
    fusion = {
        name: (ours.denoiser.get_parameter(our_name).grad, theirs.peer.get_parameter(name).grad)
        for name, our_name in (steps.FUSION.items() if variant == "sprint" else ())
    }
    assert len(fusion) == (3 if variant == "sprint" else 0)
    pairs = {name: (network.pop(name), p.grad) for name, p in theirs.peer.model.named_parameters()} | fusion
    assert not network, "parameters without a partner"
    for name, (mine, other) in pairs.items():
        assert other.norm() > 0, f"{name} has no gradient, so the comparison says nothing"
        error = (mine.reshape(other.shape) - other).norm() / other.norm()
        assert error < 2e-5, f"{name}: {error:.2e}"


def test_dense_peer_is_the_model_itself():
    _, theirs = sides(config_of("dense"))
    batch = theirs.batch
    arguments = (batch.clean, batch.t, batch.text, batch.mask)
    model = theirs.peer.model
    (expected,) = model(*arguments[:3], attention_mask=batch.mask, return_dict=False)
    assert torch.equal(theirs.peer(*arguments), expected)
    assert not torch.equal(model(*arguments[:3], return_dict=False)[0], expected), "the mask does nothing"


def test_padding_does_not_reach_the_peer():
    _, theirs = sides(config_of("dense"))
    loss = theirs.forward()
    for row, length in zip(theirs.batch.text, LENGTHS, strict=True):
        row[length:] = 7.0
    torch.testing.assert_close(theirs.forward(), loss)


def test_drawn_routes_are_ascending_complements():
    """12 of 24 positions run, no two samples alike, and together with the others they are all positions."""
    _, theirs = sides(config_of("tread"))
    kept, left = theirs.peer._draw(torch.zeros(SAMPLES, 24, 1))
    assert kept.shape == left.shape == (SAMPLES, 12)
    assert (kept.diff(dim=1) > 0).all()
    assert torch.equal(torch.cat((kept, left), 1).sort(1).values, torch.arange(24).expand(SAMPLES, -1))
    assert not torch.equal(kept[0], kept[1])


def test_a_route_changes_the_peer():
    """Otherwise a peer that ignored its route would pass for dense."""
    _, theirs = sides(config_of("tread"))
    first, second = torch.arange(12).repeat(SAMPLES, 1), torch.arange(12, 24).repeat(SAMPLES, 1)
    assert not torch.isclose(theirs.forward(first), theirs.forward(second))


def test_contrastive_configurations_are_refused():
    config = config_of("dense", objective={"contrastive_weight": 0.05})
    with pytest.raises(UserError, match="contrastive_weight"):
        steps.PeerStep(None, config, None)
