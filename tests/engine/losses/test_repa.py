"""REPA and iREPA against formulas written out sample by sample in FP64."""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from millrace.engine.config import Alignment, Config, Model
from millrace.engine.config.loading import dict_from_overrides, parse_config
from millrace.engine.losses.repa import AlignmentHead, normalise_over_space, repa_loss, rows_of_block
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.layout import LayoutCache
from millrace.engine.model.routing import RoutedSpan, Sprint, Tread
from millrace.engine.util.errors import UserError

MODEL = Model(width=32, depth=6, heads=2, in_channels=4, context_dim=12)
BLOCK, DIM = 2, 10
UNIFORM, MIXED = [(4, 4)] * 3, [(4, 4), (2, 6), (3, 5)]
GRIDS = pytest.mark.parametrize("grids", [UNIFORM, MIXED], ids=["uniform", "mixed"])
INDEX = torch.tensor([11, 5, 900])
SPANS = {
    "dense": None,
    "tread": Tread(1, 3, 0.5),
    "sprint": Sprint(2, 4, 0.75),
    "outside": Tread(3, 4, 0.5),
}
ROUTES = pytest.mark.parametrize("route", SPANS)


def make_layout(grids):
    return LayoutCache((8, 8), 10_000.0).layout(grids, torch.tensor([0, 3, 4, 8], dtype=torch.int32), 4)


def draw(route, layout):
    policy = SPANS[route]
    return None if policy is None else policy.draw(layout, 42, INDEX)


def kept_of_each(layout, span):
    """By plain loops: (first row of a picture, its grid, indices within it that block BLOCK sees)."""
    found, start = [], 0
    for rows, columns in layout.grids:
        inside = range(rows * columns)
        if span is not None and span.start <= BLOCK <= span.end:
            index = span.route.index.tolist()
            inside = [i - start for i in index if start <= i < start + rows * columns]
        found.append((start, (rows, columns), list(inside)))
        start += rows * columns
    return found


def double(*shape, scale=1.0):
    return torch.randn(*shape, dtype=torch.float64) * scale


@GRIDS
@ROUTES
def test_repa_is_the_negative_mean_cosine_of_the_rows_that_the_block_sees(grids, route):
    layout = make_layout(grids)
    span = draw(route, layout)
    kept = kept_of_each(layout, span)
    teacher = double(sum(layout.lengths), DIM)
    projected = double(sum(len(inside) for *_, inside in kept), DIM).requires_grad_()

    expected, row = [], 0
    for start, _, inside in kept:
        total = 0.0
        for i in inside:
            a, b = projected[row], teacher[start + i]
            total = total + (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())
            row += 1
        expected.append(-total / len(inside))
    expected = torch.stack(expected)

    loss = repa_loss(projected, teacher, rows_of_block(BLOCK, layout, span))
    assert loss.shape == (3,)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(loss @ weights, projected)
    (wanted,) = torch.autograd.grad(expected @ weights, projected)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


def test_repa_is_formed_in_fp32():
    layout = make_layout(UNIFORM)
    exact = torch.randn(48, DIM), torch.randn(48, DIM)
    short = [x.bfloat16() for x in exact]
    loss = repa_loss(*short, rows_of_block(BLOCK, layout, None))
    assert loss.dtype == torch.float32
    wide = repa_loss(*(x.double() for x in short), rows_of_block(BLOCK, layout, None))
    torch.testing.assert_close(loss.double(), wide, rtol=1e-5, atol=1e-6)


def test_zero_features_have_a_finite_gradient():
    layout = make_layout(UNIFORM)
    projected = torch.zeros(48, DIM, requires_grad=True)
    loss = repa_loss(projected, torch.randn(48, DIM), rows_of_block(BLOCK, layout, None))
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(3))
    assert projected.grad.isfinite().all()


@GRIDS
@pytest.mark.parametrize("variant", ["constant", "feature_mean"])
def test_normalisation_over_space(grids, variant):
    """`constant`: (f - alpha mean) / (std + 1e-6) of the authors; `feature_mean`: Photoroom/PRX's."""
    layout = make_layout(grids)
    teacher = double(sum(layout.lengths), DIM) + 3
    expected = []
    for f in teacher.split(layout.lengths):
        if variant == "constant":
            shifted = f - 0.8 * f.mean(dim=0)
            deviation = f.std(dim=0)
        else:
            shifted = f - f.mean(dim=1, keepdim=True) * f.mean(dim=0, keepdim=True)
            deviation = shifted.std(dim=0)
        expected.append(shifted / (deviation + 1e-6))
    config = Alignment(kind="irepa", spatial_norm=variant, spatial_gamma=0.8)
    found = normalise_over_space(teacher, layout, config)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-10, atol=1e-10)
    assert normalise_over_space(teacher.bfloat16(), layout, config).dtype == torch.float32


def test_normalisation_of_a_single_token_is_finite():
    layout = make_layout([(1, 1), (2, 2), (1, 1)])
    teacher = torch.randn(6, DIM)
    assert normalise_over_space(teacher, layout, Alignment(kind="irepa")).isfinite().all()


def head(projector, **changes):
    config = Alignment(kind="repa", block=BLOCK, projector=projector, **changes)
    made = AlignmentHead(config, MODEL, DIM)
    made.init_weights(torch.Generator().manual_seed(1))
    return made


def mlp_by_hand(weights, x, *_):
    for i in (0, 2, 4):
        x = x @ weights[f"projector.{i}.weight"].T + weights[f"projector.{i}.bias"]
        if i < 4:
            x = x / (1 + torch.exp(-x))
    return x


def conv_by_hand(weights, x, grid, inside):
    """Each output token is a sum over its neighbours on the grid, absent ones being zero."""
    rows, columns = grid
    kernel, outputs = weights["projector.weight"], []
    for i in inside:
        total = weights["projector.bias"]
        for dr in (-1, 0, 1):
            for dc in (-1, 0, 1):
                r, c = i // columns + dr, i % columns + dc
                if 0 <= r < rows and 0 <= c < columns:
                    total = total + kernel[:, :, dr + 1, dc + 1] @ x[r * columns + c]
        outputs.append(total)
    return torch.stack(outputs)


def attention_by_hand(weights, x, grid, inside):
    """Photoroom/PRX: q, k, v with bias, half of a head's pairs turned by the row and half by the column."""

    def linear(name, x):
        return x @ weights[f"projector.{name}.weight"].T + weights[f"projector.{name}.bias"]

    def turn(x):
        size = x.shape[1]
        out = x.clone()
        for n, i in enumerate(inside):
            place = (i // grid[1], i % grid[1])
            for pair in range(size // 2):
                axis, j = divmod(pair, size // 4)
                angle = place[axis] * 10_000.0 ** (-2 * j / (size // 2))
                a, b = x[n, 2 * pair], x[n, 2 * pair + 1]
                out[n, 2 * pair] = math.cos(angle) * a - math.sin(angle) * b
                out[n, 2 * pair + 1] = math.sin(angle) * a + math.cos(angle) * b
        return out

    q, k, v = (linear(name, x).chunk(4, dim=1) for name in "qkv")
    heads = []
    for h in range(4):
        logits = turn(q[h]) @ turn(k[h]).T / q[h].shape[1] ** 0.5
        heads.append(logits.softmax(-1) @ v[h])
    return linear("output", linear("out", torch.cat(heads, dim=1)))


@GRIDS
@ROUTES
@pytest.mark.parametrize("kind", ["mlp", "conv", "attention"])
def test_projectors(kind, grids, route):
    layout = make_layout(grids)
    span = draw(route, layout)
    kept = kept_of_each(layout, span)
    counts = [len(inside) for *_, inside in kept]
    module = head(kind).double()
    features = double(sum(counts), MODEL.width).requires_grad_()
    if kind == "conv" and route in ("tread", "sprint"):
        with pytest.raises(ValueError, match=f"block {BLOCK} is inside the route"):
            module(features, layout, span)
        return
    by_hand = {"mlp": mlp_by_hand, "conv": conv_by_hand, "attention": attention_by_hand}[kind]
    weights = dict(module.named_parameters())
    parts = [
        by_hand(weights, x, grid, inside)
        for x, (_, grid, inside) in zip(features.split(counts), kept, strict=True)
    ]
    found, expected = module(features, layout, span), torch.cat(parts)
    assert found.shape == (sum(counts), DIM)
    # The layout's RoPE tables are FP32, made from FP64 angles.
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found, expected, **tolerance)
    probe = torch.randn_like(found)
    inputs = [features, *module.parameters()]
    gradients = torch.autograd.grad((found * probe).sum(), inputs)
    wanted = torch.autograd.grad((expected * probe).sum(), inputs)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, **tolerance)


def test_the_attention_projector_of_another_side_makes_its_table_anew():
    module = head("attention").double()
    for grids in (UNIFORM, [(6, 2)] * 3, MIXED):
        layout = make_layout(grids)
        features = double(sum(layout.lengths), MODEL.width)
        weights = dict(module.named_parameters())
        parts = zip(features.split(layout.lengths), grids, strict=True)
        expected = [attention_by_hand(weights, x, grid, range(grid[0] * grid[1])) for x, grid in parts]
        torch.testing.assert_close(module(features, layout, None), torch.cat(expected), rtol=1e-5, atol=1e-6)


def test_sprint_that_drops_nothing_aligns_all_tokens():
    layout = make_layout(UNIFORM)
    rows = rows_of_block(BLOCK, layout, RoutedSpan(None, 1, 4))
    assert rows.index is None
    assert rows.cu_seqlens is layout.cu_seqlens


@GRIDS
@ROUTES
def test_the_rows_are_those_of_the_denoisers_tap(grids, route):
    """`rows_of_block` promises what `Denoiser.forward` returns for a tap."""
    denoiser = Denoiser(MODEL)
    denoiser.init_weights(0)
    layout = make_layout(grids)
    span = draw(route, layout)
    tokens, text = torch.randn(sum(layout.lengths), 16), torch.randn(8, 12)
    (tapped,) = denoiser(tokens, torch.rand(3), text, layout, span, taps=(BLOCK,)).features
    # Modulation starts at zero, so that every block is the identity.
    everything = denoiser.img_in(tokens)
    torch.testing.assert_close(tapped, rows_of_block(BLOCK, layout, span).take(everything))


@pytest.mark.parametrize("kind", ["mlp", "conv", "attention"])
def test_initialisation_is_pytorchs_and_a_function_of_the_seed(kind):
    module, again = head(kind), head(kind)
    for (name, parameter), other in zip(module.named_parameters(), again.parameters(), strict=True):
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, other)
        layer = module.get_submodule(name.rpartition(".")[0])
        fan_in = layer.weight[0].numel()
        assert parameter.abs().max() <= fan_in**-0.5
        if parameter.numel() > 100:
            assert parameter.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.15)


def test_hidden_width_of_the_mlp():
    assert head("mlp").projector[0].out_features == DIM
    assert head("mlp", projector_width=24).projector[2].weight.shape == (24, 24)


class TestSettings:
    def parse(self, **changes) -> Config:
        """A configuration of 16 blocks that aligns, with values like `alignment__block=3` changed."""
        words = [f"{name.replace('__', '.')}={value}" for name, value in changes.items()]
        return parse_config(dict_from_overrides(words), "test")

    def refused(self, **changes) -> str:
        with pytest.raises(UserError) as caught:
            self.parse(**changes)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_default_projectors(self):
        assert Alignment(kind="repa").projector_kind == "mlp"
        assert Alignment(kind="irepa").projector_kind == "conv"
        assert Alignment(kind="irepa", projector="attention").projector_kind == "attention"

    def test_recipe_of_the_post_is_accepted(self):
        config = self.parse(alignment__kind="repa", routing__policy="tread", alignment__until=250)
        assert (config.alignment.block, config.alignment.weight) == (7, 0.5)

    @pytest.mark.parametrize("policy", ["tread", "sprint"])
    def test_convolution_inside_the_route(self, policy):
        message = self.refused(alignment__kind="irepa", routing__policy=policy)
        assert "block 7 lies inside the routed blocks 2..12" in message
        assert "alignment.projector attention" in message
        self.parse(alignment__kind="irepa", routing__policy=policy, alignment__projector="attention")
        self.parse(alignment__kind="irepa", routing__policy=policy, alignment__block=13)

    def test_blocks_outside_the_depth(self):
        assert "alignment.block is 16, but model.depth is 16" in self.refused(
            alignment__kind="repa", alignment__block=16
        )
        self.parse(alignment__block=16)
        assert "names block 16, but model.depth is 16" in self.refused(
            alignment__attention__weight=0.5, alignment__attention__blocks="[16]"
        )

    def test_heads(self):
        assert "alignment.attention.heads is 29, but model.heads is 28" in self.refused(
            alignment__attention__weight=0.5, alignment__attention__heads=29
        )

    def test_width_of_the_attention_projector(self):
        assert "multiples of 16, it is 1800" in self.refused(
            alignment__kind="irepa", alignment__projector="attention", model__width=1800, model__heads=15
        )

    @pytest.mark.parametrize("change", [{"data__crop": "random"}, {"data__flip": 0.5}])
    def test_cache_with_pictures_that_change(self, change):
        still = {"data__crop": "center", "alignment__kind": "repa", "alignment__teacher__cache": "folder"}
        self.parse(**still)
        assert "alignment.teacher.cache needs pictures that always look the same" in self.refused(
            **(still | change)
        )

    def test_until_without_alignment(self):
        assert "until ends an alignment, but there is none" in self.refused(alignment__until=10)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"attention__blocks": "[1,2]", "attention__teacher_layers": "[3]"},
                "names 2 blocks, .* 1 layer",
            ),
            ({"attention__blocks": "[]"}, "name each aligned block once"),
            ({"attention__blocks": "[1,1]"}, "name each aligned block once"),
            ({"attention__blocks": "[0]", "attention__teacher_layers": "[-1]"}, "layers count from 0"),
            ({"kind": "repa", "weight": 0}, "kind is repa but weight is 0"),
            ({"teacher__kind": "classifier", "attention__weight": 1}, "a classifier has no attention"),
            ({"teacher__cache": "folder", "attention__weight": 1}, "cache keeps no attention"),
        ],
    )
    def test_values_that_contradict_each_other(self, change, message):
        found = self.refused(**{f"alignment__{name}": value for name, value in change.items()})
        assert re.search(message, found)


def spatial_mean_left(tokens, layout, **settings):
    """Share of the mean over positions that a form of the normalisation leaves, measured on its output."""
    forms = (dict(settings), {"spatial_norm": "constant", "spatial_gamma": 0.0})
    left, whole = (
        normalise_over_space(tokens, layout, Alignment(kind="irepa", **form)).mean(0) for form in forms
    )
    return float(left @ whole / (whole @ whole))


@pytest.mark.parametrize("affine", [False, True])
def test_share_of_the_spatial_mean_that_each_form_leaves(affine, capsys):
    """Of what a LayerNorm gives, as DINO's last one does. Its features have a mean near zero in each token,
    so PRX's form, which weighs the mean over positions by that, takes almost nothing away."""
    generator = torch.Generator().manual_seed(0)
    overlay = 2 * torch.randn(1024, generator=generator)
    tokens = F.layer_norm(overlay + torch.randn(256, 1024, generator=generator), (1024,))
    if affine:
        weight, bias = (torch.randn(1024, generator=generator) for _ in range(2))
        tokens = tokens * (1 + 0.3 * weight) + 0.3 * bias
    layout = LayoutCache((8, 8), 10_000.0).layout([(16, 16)], torch.tensor([0, 1], dtype=torch.int32), 1)
    found = {
        "feature_mean": spatial_mean_left(tokens, layout, spatial_norm="feature_mean"),
        "constant 0.6": spatial_mean_left(tokens, layout, spatial_norm="constant", spatial_gamma=0.6),
        "constant 1": spatial_mean_left(tokens, layout, spatial_norm="constant", spatial_gamma=1.0),
    }
    cells = " | ".join(f"{share:.3f}" for share in found.values()).replace("-0.000", "0.000")
    line = (
        f"| LayerNorm {'with a random scale and shift' if affine else 'without scale and shift'} | {cells} |"
    )
    with capsys.disabled():
        print(f"\n{line}")
    assert found["feature_mean"] > 0.9
    assert found["constant 0.6"] == pytest.approx(0.4, abs=1e-3)
    assert found["constant 1"] == pytest.approx(0.0, abs=1e-3)
    page = Path(__file__).resolve().parents[3] / "docs" / "alignment.md"
    assert line in page.read_text()
