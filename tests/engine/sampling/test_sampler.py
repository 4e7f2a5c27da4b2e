"""The sampler against integrals that are known, with denoisers whose velocity is written down."""

import math

import pytest
import torch

from millrace.engine.config import Autoencoder, Model, Objective, Routing, Sampling, TextTower
from millrace.engine.encoders.autoencoder import open_autoencoder
from millrace.engine.encoders.autoencoders.pixels import Pixels
from millrace.engine.encoders.text_encoder import open_text_encoder
from millrace.engine.losses.flow_matching import FlowMatching
from millrace.engine.model.denoiser import Denoiser, DenoiserOutput
from millrace.engine.model.layout import LayoutCache
from millrace.engine.sampling.sampler import Sampler
from millrace.engine.util.errors import UserError

CPU = torch.device("cpu")
MODEL = Model(width=16, depth=1, heads=1, patch_size=4, in_channels=3, context_dim=8)
ONCE = Sampling(steps=1, guidance=1.0)


class Known:
    """A denoiser that returns `field(tokens, t, text)`; text is 1 for captions, 0 for the empty one."""

    def __init__(self, field):
        self.config, self.routing, self.field, self.calls = MODEL, Routing(), field, []
        self.layouts = LayoutCache((8, 8), 10_000.0)

    def __call__(self, tokens, t, text, layout, span=None):
        assert t.unique().numel() == 1
        self.calls.append(float(t[0]))
        captioned = layout.cu_seqlens_text.diff() > 1
        rows = captioned.repeat_interleave(torch.tensor(layout.lengths))[:, None].float()
        return DenoiserOutput(self.field(tokens, float(t[0]), rows), (), ())


def sampler(denoiser, objective=None, compute=torch.float32):
    autoencoder = open_autoencoder(Autoencoder(kind="pixels"), CPU)
    tower = open_text_encoder(TextTower(kind="hash"), MODEL.context_dim, CPU, torch.float32)
    flow = FlowMatching(objective or Objective(), 0)
    return Sampler(denoiser, flow, autoencoder, tower, CPU, compute)


def draw(field, config, objective=None, prompts=("a cat",), seed=3):
    known = Known(field)
    return sampler(known, objective)(list(prompts), (8, 8), config, seed), known


def start(**more):
    """The noise that pictures start from: what a velocity of zero leaves."""
    return draw(lambda x, t, text: torch.zeros_like(x), ONCE, **more)[0]


@pytest.fixture(autouse=True)
def _unclamped(monkeypatch):
    """Look at what the solver returns, before pixels are cut off."""
    monkeypatch.setattr(Pixels, "decode", lambda _self, latents: latents)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_constant_velocity_is_integrated_exactly(steps, solver):
    config = Sampling(steps=steps, guidance=1.0, solver=solver)
    pictures, _ = draw(lambda x, t, text: torch.full_like(x, 0.25), config)
    torch.testing.assert_close(pictures, start() - 0.25)


@pytest.mark.parametrize(
    ("solver", "factor"), [("euler", lambda h: 1 - h), ("heun", lambda h: 1 - h + h * h / 2)]
)
def test_growth_is_the_solvers_polynomial(solver, factor):
    """dx/dt = x from t = 1 to 0: each step multiplies by 1 - h, or by Heun's second-order polynomial.

    Heun takes the last step, which would look at t = 0, as Euler does.
    """
    steps = 5
    pictures, known = draw(lambda x, t, text: x, Sampling(steps=steps, guidance=1.0, solver=solver))
    wanted = factor(1 / steps) ** (steps - 1) * (1 - 1 / steps)
    torch.testing.assert_close(pictures, wanted * start())
    assert len(known.calls) == (steps if solver == "euler" else 2 * steps - 1)
    assert min(known.calls) == pytest.approx(1 / steps)


def test_both_solvers_approach_the_exact_answer():
    """e^-1, at first order and at second (with an Euler step at the end)."""
    errors = {}
    for solver in ("euler", "heun"):
        for steps in (20, 40):
            pictures, _ = draw(lambda x, t, text: x, Sampling(steps=steps, guidance=1.0, solver=solver))
            errors[solver, steps] = float((pictures - math.exp(-1) * start()).abs().max())
    assert errors["euler", 20] / errors["euler", 40] == pytest.approx(2, rel=0.1)
    assert errors["heun", 20] / errors["heun", 40] == pytest.approx(4, rel=0.15)
    assert errors["heun", 20] < errors["euler", 20] / 5


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_are_shifted_as_in_training(shift):
    _, known = draw(lambda x, t, text: x, Sampling(steps=4, guidance=1.0), Objective(time_shift=shift))
    plain = [1, 0.75, 0.5, 0.25]
    assert known.calls == pytest.approx([shift * t / (1 + (shift - 1) * t) for t in plain])


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_guidance(scale):
    """v = without + scale (with - without); at 1 the model runs on the captions alone."""
    shapes = []

    def field(x, t, text):
        shapes.append(len(x))
        return 0.2 + 0.3 * text * torch.ones_like(x)

    pictures, _ = draw(field, Sampling(steps=2, guidance=scale))
    torch.testing.assert_close(pictures, start() - (0.2 + scale * 0.3))
    assert set(shapes) == {4 if scale == 1 else 8}


def test_x_prediction_is_converted():
    """A network that always says `clean` is followed to it on a straight line, in any number of steps."""
    for steps in (1, 7):
        pictures, _ = draw(
            lambda x, t, text: torch.full_like(x, 0.5),
            Sampling(steps=steps, guidance=1.0),
            Objective(prediction="sample"),
        )
        torch.testing.assert_close(pictures, torch.full((1, 3, 8, 8), 0.5))


def test_guided_x_prediction():
    pictures, _ = draw(
        lambda x, t, text: 0.1 + 0.2 * text.expand_as(x),
        Sampling(steps=1, guidance=2.0),
        Objective(prediction="sample"),
    )
    torch.testing.assert_close(pictures, torch.full((1, 3, 8, 8), 0.5))


def test_noise_scale():
    torch.testing.assert_close(start(objective=Objective(noise_scale=2.0)), 2 * start())


def test_a_picture_depends_on_its_seed_and_place_alone(monkeypatch):
    torch.manual_seed(0)
    denoiser = Denoiser(MODEL).eval()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    make = sampler(denoiser)
    prompts, config = ["a cat", "two dogs", "a long red boat", "", "a cat"], Sampling(steps=3, guidance=3.0)
    together = make(prompts, (8, 12), config, 5)
    assert together.shape == (5, 3, 8, 12)
    monkeypatch.setattr(Sampler, "CHUNK", 2)
    torch.testing.assert_close(make(prompts, (8, 12), config, 5), together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(make(prompts[:1], (8, 12), config, 5), together[:1], rtol=1e-4, atol=1e-5)
    assert (together[0] - together[4]).abs().max() > 0.1  # the same words in another place: other noise
    assert (make(prompts, (8, 12), config, 6) - together).abs().max() > 0.1


def test_start_is_standard_normal():
    noise = start(prompts=["x"] * 64)
    n = noise.numel()
    assert abs(float(noise.mean())) < 4 / n**0.5
    assert float(noise.var()) == pytest.approx(1, abs=4 * (2 / n) ** 0.5)


def test_sizes_that_tokens_do_not_cover():
    with pytest.raises(UserError, match="8 x 10 pixels cannot be cut in tokens of 4"):
        sampler(Known(None))(["a"], (8, 10), ONCE, 0)
