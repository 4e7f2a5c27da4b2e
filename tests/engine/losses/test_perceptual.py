"""Perceptual losses against loops over single pictures in float64, and what they ask of a configuration."""

import pytest
import torch
import torch.nn.functional as F

from millrace.engine.config import Config, Lpips, Objective, PerceptualDino
from millrace.engine.config.loading import parse_config
from millrace.engine.encoders.lpips import tiny_lpips
from millrace.engine.encoders.teacher import vision_entry
from millrace.engine.losses.perceptual import open_perceptual, perceptual_losses, perceptual_terms
from millrace.engine.model.layout import LayoutCache, patchify
from millrace.engine.util.errors import UserError

CPU = torch.device("cpu")
PATCH = 4
UNIFORM, MIXED = [(8, 8)] * 3, [(8, 8), (8, 10), (8, 8)]


def layout_of(grids):
    text = torch.arange(len(grids) + 1, dtype=torch.int32)
    return LayoutCache((4, 4), 10_000.0).layout(grids, text, 1)


def distance(x, y):
    """A stand-in for LPIPS with different numbers everywhere: a weighted sum of squares, by picture."""
    ramp = torch.arange(x[0].numel(), dtype=x.dtype).view(x[0].shape) / x[0].numel()
    return ((x - y).square() * ramp).sum((1, 2, 3)) + (x - y).sum((1, 2, 3)).sin()


def features(x):
    """A stand-in for DINO: two features of each 7 x 7 square."""
    squares = F.unfold(x, 7, stride=7)
    ramp = torch.arange(squares.shape[1], dtype=x.dtype)[:, None] / squares.shape[1]
    return torch.stack(((squares * ramp).sum(1), squares.square().sum(1) + 1), dim=-1)


def batch(grids, beyond=1.5):
    """Predictions, which may leave [-1, 1], and true pictures."""
    generator = torch.Generator().manual_seed(0)
    total = sum(rows * columns for rows, columns in grids)
    prediction = torch.randn(total, 3 * PATCH**2, generator=generator) * beyond
    images = [torch.rand(3, r * PATCH, c * PATCH, generator=generator) * 2 - 1 for r, c in grids]
    return prediction.requires_grad_(), images


def picture_of(tokens, grid):
    """Patch by patch: token r * columns + c, features in the order channel, row, column."""
    rows, columns = grid
    out = torch.zeros(3, rows * PATCH, columns * PATCH, dtype=tokens.dtype)
    for r in range(rows):
        for c in range(columns):
            square = tokens[r * columns + c].view(3, PATCH, PATCH)
            out[:, r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH] = square
    return out


def resized(x, height, width):
    """Bilinear, half-pixel centres, without smoothing, from the definition; x (3, h, w)."""

    def weights(count, out):
        place = ((torch.arange(out, dtype=torch.float64) + 0.5) * count / out - 0.5).clamp_min(0)
        low = place.floor().long().clamp_max(count - 1)
        high = (low + 1).clamp_max(count - 1)
        table = torch.zeros(out, count, dtype=torch.float64)
        table[torch.arange(out), low] += 1 - (place - low)
        table[torch.arange(out), high] += place - low
        return table

    return weights(x.shape[1], height) @ x @ weights(x.shape[2], width).T


@pytest.mark.parametrize("grids", [UNIFORM, MIXED], ids=["one size", "mixed sizes"])
def test_value_and_gradient_are_the_definition(grids):
    config = Objective(
        prediction="sample",
        lpips=Lpips(weight=0.1, path="given", resize=0.5, t_max=0.7),
        dino=PerceptualDino(weight=0.01, size=28, t_max=0.4),
    )
    prediction, images = batch(grids)
    t = torch.tensor([0.3, 0.5, 0.9])
    layout = layout_of(grids)
    found = perceptual_losses(prediction, images, layout, t, PATCH, config, distance, features)
    assert tuple(found) == perceptual_terms(config) == ("lpips", "dino")

    exact = prediction.detach().double().requires_grad_()
    wanted = {"lpips": [], "dino": []}
    for i, tokens in enumerate(exact.split(layout.lengths)):
        x, y = picture_of(tokens, grids[i]), images[i].double()
        half = [resized(z, z.shape[1] // 2, z.shape[2] // 2)[None] for z in (x, y)]
        wanted["lpips"].append(0.1 * float(t[i] <= 0.7) * distance(*half)[0])
        a, b = (features(resized(z, 28, 28).clamp(-1, 1)[None])[0] for z in (x, y))
        cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
        wanted["dino"].append(0.01 * float(t[i] <= 0.4) * (1 - cosine).mean())
    for name, values in wanted.items():
        values = torch.stack(values)
        assert found[name].dtype == torch.float32
        assert (values == 0).tolist() == {"lpips": [False, False, True], "dino": [False, True, True]}[name]
        torch.testing.assert_close(found[name].detach(), values.detach().float(), rtol=1e-4, atol=1e-6)
        (gradient,) = torch.autograd.grad(found[name].sum(), prediction, retain_graph=True)
        (exact_gradient,) = torch.autograd.grad(values.sum(), exact, retain_graph=True)
        torch.testing.assert_close(gradient, exact_gradient.float(), rtol=1e-3, atol=1e-6)


def test_samples_above_t_max_get_no_gradient_and_t_of_one_counts():
    config = Objective(prediction="sample", lpips=Lpips(weight=1.0, path="given", t_max=0.5))
    prediction, images = batch(UNIFORM)
    t = torch.tensor([0.5, 0.51, 1.0])
    found = perceptual_losses(prediction, images, layout_of(UNIFORM), t, PATCH, config, distance)
    found["lpips"].sum().backward()
    reached = [bool(part.any()) for part in prediction.grad.split(64)]
    assert reached == [True, False, False]
    everything = config.model_copy(update={"lpips": Lpips(weight=1.0, path="given")})
    found = perceptual_losses(prediction, images, layout_of(UNIFORM), t, PATCH, everything, distance)
    assert (found["lpips"] != 0).all()


def test_a_sample_does_not_depend_on_its_batch(tmp_path):
    config = networks_config(tmp_path)
    networks = open_perceptual(config, CPU)
    judges = networks.lpips, networks.dino.patch_tokens
    prediction, images = batch(MIXED)
    t = torch.full((3,), 0.5)
    together = perceptual_losses(prediction, images, layout_of(MIXED), t, PATCH, config, *judges)
    for i, tokens in enumerate(prediction.split([64, 80, 64])):
        alone = perceptual_losses(
            tokens, images[i : i + 1], layout_of(MIXED[i : i + 1]), t[:1], PATCH, config, *judges
        )
        for name, value in alone.items():
            torch.testing.assert_close(together[name][i : i + 1], value, rtol=1e-4, atol=1e-7)


def networks_config(folder, **dino):
    return Objective(
        prediction="sample",
        lpips=Lpips(weight=0.1, path=str(tiny_lpips(folder / "lpips")), dtype="float32"),
        dino=PerceptualDino(
            weight=0.01,
            path=str(vision_entry("dinov2").tiny(folder / "dino")),
            **({"size": 28, "dtype": "float32"} | dino),
        ),
    )


def test_the_real_networks_teach_the_prediction(tmp_path):
    """A few steps of gradient descent on the prediction bring both losses down; bf16 predictions work too."""
    config = networks_config(tmp_path)
    networks = open_perceptual(config, CPU)
    assert not any(p.requires_grad for p in networks.dino.network.parameters())
    _, images = batch(UNIFORM)
    prediction = torch.randn(192, 48, generator=torch.Generator().manual_seed(2)).requires_grad_()
    optimizer = torch.optim.Adam([prediction], lr=0.03)
    layout, t = layout_of(UNIFORM), torch.full((3,), 0.5)
    course = []
    for _ in range(15):
        terms = perceptual_losses(
            prediction, images, layout, t, PATCH, config, networks.lpips, networks.dino.patch_tokens
        )
        course.append({name: float(value.sum().detach()) for name, value in terms.items()})
        optimizer.zero_grad()
        sum(value.sum() for value in terms.values()).backward()
        optimizer.step()
    assert course[-1]["lpips"] < 0.9 * course[0]["lpips"]
    assert course[-1]["dino"] < course[0]["dino"]
    exact, rounded = (
        perceptual_losses(x, images, layout, t, PATCH, config, networks.lpips, networks.dino.patch_tokens)
        for x in (prediction.detach(), prediction.detach().bfloat16())
    )
    for name, value in rounded.items():
        torch.testing.assert_close(value, exact[name], rtol=0.1, atol=1e-4)


def test_the_truth_has_no_loss(tmp_path):
    config = networks_config(tmp_path)
    networks = open_perceptual(config, CPU)
    _, images = batch(MIXED)
    truth = torch.cat([patchify(image, PATCH) for image in images])
    t = torch.full((3,), 0.5)
    found = perceptual_losses(
        truth, images, layout_of(MIXED), t, PATCH, config, networks.lpips, networks.dino.patch_tokens
    )
    assert float(found["lpips"].abs().max()) == 0
    assert float(found["dino"].abs().max()) < 1e-6


def test_no_weight_is_no_term_and_no_network():
    config = Objective()
    prediction, images = batch(UNIFORM)
    assert open_perceptual(config, CPU) == (None, None)
    assert perceptual_terms(config) == ()
    assert not config.perceptual
    assert perceptual_losses(prediction, images, layout_of(UNIFORM), torch.ones(3), PATCH, config) == {}


def test_a_size_that_patches_do_not_fill_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"objective\.dino\.size 30 is no multiple of the 14 .* set it to 28"):
        open_perceptual(networks_config(tmp_path, size=30), CPU)


PIXELS = {"model": {"in_channels": 3}, "conditioning": {"autoencoder": {"kind": "pixels"}}}


@pytest.mark.parametrize("term", ["lpips", "dino"])
def test_what_gives_no_pictures_is_refused(term):
    settings = {"weight": 0.1, **({"path": "here"} if term == "lpips" else {})}
    sample = {"prediction": "sample", term: settings}
    with pytest.raises(
        UserError, match=rf"objective\.{term} .*prediction velocity does .* to sample"
    ) as first:
        parse_config(PIXELS | {"objective": {term: settings}}, "f")
    with pytest.raises(UserError, match=rf"objective\.{term} .*kind flux1 trains on latents") as second:
        parse_config({"objective": sample}, "f")
    for caught in (first, second):
        assert "\n" not in str(caught.value)
    assert isinstance(parse_config(PIXELS | {"objective": sample}, "f"), Config)


def test_lpips_needs_weights_and_pictures_of_some_size():
    lpips = {"prediction": "sample", "lpips": {"weight": 0.1}}
    with pytest.raises(UserError, match=r"objective\.lpips\.path is not set"):
        parse_config(PIXELS | {"objective": lpips}, "f")
    lpips["lpips"]["path"] = "here"
    parse_config(PIXELS | {"objective": lpips, "data": {"resolution": 32}}, "f")
    for data, small in (({"resolution": 30}, 15), ({"resolution": 40, "aspect": "mixed"}, 14)):
        with pytest.raises(UserError, match=rf"{small} pixels small, LPIPS needs 16; raise resize"):
            parse_config(PIXELS | {"objective": lpips, "data": data}, "f")
