"""Guided pictures against integrals by hand: one picture at a time, branch by branch, from the parts of a
denoiser with random weights."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from millrace.engine.config import (
    Autoencoder,
    Config,
    Model,
    Objective,
    Routing,
    Sampling,
    TextTower,
    guidance_warnings,
)
from millrace.engine.config.loading import parse_config
from millrace.engine.encoders.autoencoder import open_autoencoder
from millrace.engine.encoders.autoencoders.pixels import Pixels
from millrace.engine.encoders.text_encoder import open_text_encoder
from millrace.engine.losses.contrastive import MeanTarget
from millrace.engine.losses.flow_matching import FlowMatching
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.flops import forward_flops, sampling_flops
from millrace.engine.model.guidance_branches import Branch, branches, describe, evaluations
from millrace.engine.model.layout import patchify, unpatchify
from millrace.engine.sampling.sampler import Sampler
from millrace.engine.util.errors import UserError
from millrace.kernels.support.keys import stream_key
from millrace.kernels.support.philox import normal, sample_keys, uniform

CPU = torch.device("cpu")
MODEL = Model(
    width=32,
    depth=5,
    heads=2,
    patch_size=4,
    in_channels=3,
    context_dim=8,
    attention_backend="reference",
)
TREAD = Routing(policy="tread", start=1, end=3)
SPRINT = Routing(policy="sprint", start=1, end=2)
PAPER = Routing(policy="sprint", start=1, end=3, fuse_order="deep_dense", mask_token="frozen", path_drop=0.1)
PROMPTS = ["a cat", "two dogs in the snow", "a red boat"]
GRID, SEED, SCALE = (4, 5), 11, 2.5

CASES = {
    "none": (Routing(), {"method": "none"}),
    "cfg": (Routing(), {"method": "cfg"}),
    "cfg, tread": (TREAD, {"method": "cfg"}),
    "cfg, sprint": (SPRINT, {"method": "cfg"}),
    "self, tread": (TREAD, {"method": "self"}),
    "self, both sparse": (TREAD, {"method": "self", "strong_drop": 0.25, "weak_drop": 0.7}),
    "self, fixed": (TREAD, {"method": "self", "weak_route": "fixed", "strong_drop": 0.25}),
    "self, no caption": (TREAD, {"method": "self", "weak_unconditional": True}),
    "self, sprint": (SPRINT, {"method": "self", "weak_drop": 0.5}),
    "path_drop": (SPRINT, {"method": "path_drop"}),
    "path_drop, paper": (PAPER, {"method": "path_drop"}),
    "interval": (TREAD, {"method": "self", "interval": (0.2, 0.7)}),
}
CASE = pytest.mark.parametrize(("routing", "given"), CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def _unclamped(monkeypatch):
    """Look at what the solver returns, before pixels are cut off."""
    monkeypatch.setattr(Pixels, "decode", lambda _self, latents: latents)


def random_denoiser(routing, model=MODEL):
    generator = torch.Generator().manual_seed(0)
    denoiser = Denoiser(model, routing).eval().requires_grad_(False)
    for tensor in denoiser.state_dict().values():
        tensor.copy_(torch.empty_like(tensor).normal_(std=0.15, generator=generator))
    return denoiser


def sampler_of(denoiser, objective=None):
    autoencoder = open_autoencoder(Autoencoder(kind="pixels"), CPU)
    tower = open_text_encoder(TextTower(kind="hash"), MODEL.context_dim, CPU, torch.float32)
    return Sampler(
        denoiser, FlowMatching(objective or Objective(), 0), autoencoder, tower, CPU, torch.float32
    )


def assert_near(found, wanted):
    """Up to what FP32 loses in a few steps; another route or branch would differ in the first digit."""
    assert (found - wanted).abs().max() < 2e-4 * wanted.abs().max()


def kept_rows(config, which, drop, step, picture, count):
    """Places of the tokens with the lowest scores, by a sort."""
    moment = "" if config.weak_route == "fixed" else f" {step}"
    seed = stream_key(SEED, f"{which} route{moment}")
    scores = uniform(sample_keys(seed, torch.tensor([picture]), "route"), count)[0]
    return scores.argsort(stable=True)[: count - round(count * drop)].sort().values


def evaluate(denoiser, tokens, t, text, grid, kept=None, skip=False):
    """The network's output (N, P) for one picture, of whose tokens `kept` (or none) run through the span.

    What the blocks get besides their tokens is recorded from a pass of the same network without routing.
    """
    routing, own = denoiser.routing, dict(denoiser.named_parameters())
    plain = Denoiser(denoiser.config)
    lengths = torch.tensor([0, len(text)], dtype=torch.int32)
    layout = plain.layouts.layout([grid], lengths, len(text))
    arguments, final = [], []
    handles = [
        block.register_forward_pre_hook(lambda _, args: arguments.append(args)) for block in plain.blocks
    ]
    handles.append(plain.final_layer.register_forward_pre_hook(lambda _, args: final.append(args)))
    shared = {name: own[name] for name, _ in plain.named_parameters()}
    dense = torch.func.functional_call(plain, shared, (tokens, torch.tensor([t]), text, layout)).prediction
    for handle in handles:
        handle.remove()
    if routing.policy == "none" or (routing.policy == "tread" and kept is None):
        return dense
    kept = torch.arange(len(tokens)) if kept is None else kept
    kept = kept[:0] if skip else kept
    before = arguments[routing.start][0]
    x = before[kept]
    for i in range(routing.start, routing.end + 1):
        if not skip:
            starts = torch.tensor([0, len(kept)], dtype=torch.int32)
            rows = {"positions": layout.positions[kept], "cu_seqlens": starts, "max_seqlen": len(kept)}
            x = denoiser.blocks[i](x, arguments[i][1]._replace(**rows))
    if routing.policy == "tread":
        after = before.clone()
        after[kept] = x
    else:
        fusion = denoiser.fusion
        deep = fusion.mask_token.repeat(len(tokens), 1)
        deep[kept] = x
        pair = (before, deep) if routing.fuse_order == "dense_deep" else (deep, before)
        after = torch.cat(pair, dim=1) @ fusion.weight.T + fusion.bias
    for i in range(routing.end + 1, denoiser.config.depth):
        after = denoiser.blocks[i](after, *arguments[i][1:])
    return denoiser.final_layer(after, *final[0][1:])


def by_hand(sampler, picture, grid, config, routing, mean=None):
    """The picture (3, h, w), integrated by itself. The network's outputs are combined, then converted; only
    with `mean` (N, P), the mean target of some branches, each is converted first."""
    objective, denoiser = sampler.flow.config, sampler.denoiser
    height, width = 4 * grid[0], 4 * grid[1]
    rows = 3 * height
    offsets = torch.tensor([0, rows], dtype=torch.int32)
    noise = normal(sample_keys(SEED, torch.tensor([picture]), "picture"), offsets, rows, width, rows)
    x = patchify(noise.view(3, height, width), 4)
    caption = sampler.text_encoder.encode([PROMPTS[picture]]).embeddings
    empty = sampler.text_encoder.encode([""]).embeddings
    count, weak_drop = len(x), routing.drop if config.weak_drop is None else config.weak_drop

    def velocity(x, t, step):
        def branch(text, which=None, drop=0.0, skip=False):
            kept = kept_rows(config, which, drop, step, picture, count) if drop else None
            out = evaluate(denoiser, x, t, text, grid, kept, skip)
            if mean is None:
                return out
            v = out if objective.prediction == "velocity" else (x - out) / max(t, objective.t_min)
            if text is empty and not objective.contrastive_empty:
                return v
            return (1 - config.contrastive) * v + config.contrastive * mean

        def converted(out):
            if mean is not None or objective.prediction == "velocity":
                return out
            return (x - out) / max(t, objective.t_min)

        strong = branch(caption, "strong", config.strong_drop)
        if config.method == "none" or not config.interval[0] <= t <= config.interval[1]:
            return converted(strong)
        if config.method == "cfg":
            weak = branch(empty)
        elif config.method == "self":
            weak = branch(empty if config.weak_unconditional else caption, "weak", weak_drop)
        else:
            weak = branch(empty, skip=True)
        return converted(weak + config.guidance * (strong - weak))

    shift = objective.time_shift
    times = [shift * t / (1 + (shift - 1) * t) for t in torch.linspace(1, 0, config.steps + 1).tolist()]
    for step in range(config.steps):
        t, after = times[step], times[step + 1]
        v = velocity(x, t, step)
        if config.solver == "heun" and step < config.steps - 1:
            v = (v + velocity(x + (after - t) * v, after, step)) / 2
        x = x + (after - t) * v
    return unpatchify(x, grid, 4)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@CASE
def test_pictures_are_the_definition(routing, given, solver):
    sampler = sampler_of(random_denoiser(routing))
    config = Sampling(steps=3, solver=solver, guidance=SCALE, **given)
    found = sampler(PROMPTS, (16, 20), config, SEED)
    for i in range(len(PROMPTS)):
        wanted = by_hand(sampler, i, GRID, config, routing)
        assert_near(found[i], wanted)


@pytest.mark.parametrize("name", ["cfg", "self, tread", "path_drop"])
def test_clean_patches_may_be_combined_before_their_conversion(name):
    """PRX's pixel pipeline guides x0, as this integral by hand does; ours converts first."""
    routing, given = CASES[name]
    objective = Objective(prediction="sample", time_shift=3.0, noise_scale=1.0)
    sampler = sampler_of(random_denoiser(routing), objective)
    config = Sampling(steps=4, guidance=SCALE, **given)
    found = sampler(PROMPTS[:1], (16, 20), config, SEED)[0]
    assert_near(found, by_hand(sampler, 0, GRID, config, routing))


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("prediction", ["velocity", "sample"])
@pytest.mark.parametrize("name", ["cfg", "self, tread", "path_drop", "none"])
def test_the_mean_target_corrects_the_branches_trained_with_it(tmp_path, name, prediction, empty):
    routing, given = CASES[name]
    objective = Objective(prediction=prediction, contrastive_weight=0.3, contrastive_empty=empty)
    sampler = sampler_of(random_denoiser(routing), objective)
    values = torch.randn(3, 16, 20, generator=torch.Generator().manual_seed(1))
    MeanTarget(values, 7, sampler.autoencoder.identity).save(tmp_path / "m.safetensors")
    plain = Sampling(steps=3, guidance=SCALE, **given)
    config = plain.model_copy(update={"contrastive": 0.3, "mean_target": str(tmp_path / "m.safetensors")})
    found = sampler(PROMPTS[:2], (16, 20), config, SEED)
    for i in (0, 1):
        assert_near(found[i], by_hand(sampler, i, GRID, config, routing, patchify(values, 4)))
    assert (found - sampler(PROMPTS[:2], (16, 20), plain, SEED)).abs().max() > 0.05


@pytest.mark.parametrize(
    ("channels", "identity", "message"),
    [(3, "other", "mean target of 3 channels of 'other'; the model has 3"), (4, None, "4 channels of ")],
)
def test_a_mean_target_of_other_latents_is_refused(tmp_path, channels, identity, message):
    sampler = sampler_of(random_denoiser(Routing()))
    path = tmp_path / "m.safetensors"
    MeanTarget(torch.zeros(channels, 1, 1), 7, identity or sampler.autoencoder.identity).save(path)
    with pytest.raises(UserError, match=message):
        sampler(PROMPTS, (16, 20), Sampling(contrastive=0.1, mean_target=str(path)), SEED)
    with pytest.raises(UserError, match="cannot load the mean target"):
        sampler(PROMPTS, (16, 20), Sampling(contrastive=0.1, mean_target=str(tmp_path / "none")), SEED)


@CASE
def test_every_picture_may_have_its_own_size(routing, given):
    sampler = sampler_of(random_denoiser(routing))
    config = Sampling(steps=2, guidance=SCALE, **given)
    sizes = [(16, 20), (12, 16), (16, 20)]
    found = sampler.mixed(PROMPTS, sizes, config, SEED)
    assert [tuple(picture.shape) for picture in found] == [(3, *size) for size in sizes]
    for i, (height, width) in enumerate(sizes):
        wanted = by_hand(sampler, i, (height // 4, width // 4), config, routing)
        assert_near(found[i], wanted)


@pytest.mark.parametrize("name", ["self, both sparse", "path_drop", "self, sprint"])
def test_a_picture_depends_on_its_seed_and_place_alone(name, monkeypatch):
    routing, given = CASES[name]
    sampler = sampler_of(random_denoiser(routing))
    config = Sampling(steps=3, guidance=SCALE, **given)
    together = sampler(PROMPTS, (16, 20), config, SEED)
    assert torch.equal(sampler(PROMPTS, (16, 20), config, SEED), together)
    monkeypatch.setattr(Sampler, "CHUNK", 2)
    torch.testing.assert_close(sampler(PROMPTS, (16, 20), config, SEED), together, rtol=1e-4, atol=1e-5)
    assert (sampler(PROMPTS, (16, 20), config, SEED + 1) - together).abs().max() > 0.1


def routes_of(sampler, config, prompts=PROMPTS):
    """The span of every evaluation."""
    spans, denoiser = [], sampler.denoiser
    handle = denoiser.register_forward_pre_hook(lambda _module, args: spans.append(args[4]))
    sampler(prompts, (16, 20), config, SEED)
    handle.remove()
    return spans


def test_routes_are_drawn_anew_in_every_step_or_once():
    sampler = sampler_of(random_denoiser(TREAD))
    given = {"method": "self", "steps": 4, "guidance": SCALE, "strong_drop": 0.2}
    anew, fixed = (
        [span.route.index.tolist() for span in routes_of(sampler, Sampling(**given, weak_route=kind))]
        for kind in ("step", "fixed")
    )
    assert len(anew) == len(fixed) == 8
    for branch in (0, 1):
        assert len(set(map(tuple, anew[branch::2]))) == 4
        assert len(set(map(tuple, fixed[branch::2]))) == 1
    assert not set(fixed[1]) <= set(fixed[0])  # a draw of its own, not a part of the strong branch's
    heun = routes_of(sampler, Sampling(**given, solver="heun"))
    assert torch.equal(heun[0].route.index, heun[2].route.index)
    assert not torch.equal(heun[0].route.index, heun[4].route.index)


def test_branches_of_one_layout_share_a_batch():
    for name, batches in {"cfg": [6], "self, tread": [3, 3], "path_drop": [3, 3], "none": [3]}.items():
        routing, given = CASES[name]
        sampler = sampler_of(random_denoiser(routing))
        sizes = []
        sampler.denoiser.register_forward_pre_hook(
            lambda _module, args, sizes=sizes: sizes.append(len(args[1]))
        )
        sampler(PROMPTS, (16, 20), Sampling(steps=1, guidance=SCALE, **given), SEED)
        assert sizes == batches, name


def test_path_drop_does_not_ask_the_skipped_blocks():
    sampler = sampler_of(random_denoiser(SPRINT))
    ran = []
    for i, block in enumerate(sampler.denoiser.blocks):
        block.register_forward_pre_hook(lambda _module, args, i=i: ran.append((i, len(args[0]))))
    sampler(PROMPTS, (16, 20), Sampling(steps=1, guidance=SCALE, method="path_drop"), SEED)
    assert ran == [(i, 60) for i in (0, 1, 2, 3, 4, 0, 3, 4)]


@pytest.mark.parametrize("solver", ["euler", "heun"])
@CASE
def test_flops_are_what_pytorch_counts(routing, given, solver):
    """Outside the interval less is evaluated. Of SPRINT's layer fewer products are made than its definition
    has: its deep half multiplies only rows that ran."""
    config = Config(
        model=MODEL,
        routing=routing,
        sampling=Sampling(steps=5, solver=solver, guidance=SCALE, **given),
        objective=Objective(time_shift=2.0),
    )
    sampler = sampler_of(random_denoiser(routing), config.objective)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sampler(PROMPTS, (16, 20), config.sampling, SEED)
    texts = [len(sampler.text_encoder.encode([prompt]).embeddings) for prompt in PROMPTS]
    assert sampler.caption_tokens == sum(texts)
    tokens, wanted = 20, 0.0
    for text in texts:
        wanted += sampling_flops(config, tokens, text, 1)
    for branch in evaluations(config) if routing.policy == "sprint" else ():
        missing = tokens if branch.skip else round(tokens * branch.drop)
        wanted -= len(PROMPTS) * 2 * missing * MODEL.width**2
    assert counter.get_total_flops() == wanted


def test_an_interval_saves_the_work():
    def config(**sampling):
        return Config(model=MODEL, sampling=Sampling(steps=10, guidance=SCALE, **sampling))

    assert [b.captioned for b in evaluations(config(interval=(0.25, 0.65)))].count(False) == 4
    assert len(evaluations(config(interval=(0.25, 0.65)))) == 14
    assert len(evaluations(config(interval=(0.3, 0.3)))) == 11  # the ends are inside
    alone, guided = sampling_flops(config(method="none"), 20, 3), sampling_flops(config(), 20, 3)
    some = sampling_flops(config(interval=(0.25, 0.65)), 20, 3)
    assert some == pytest.approx(alone + 0.4 * (guided - alone), rel=1e-12)
    assert sampling_flops(config(method="none"), 20, 3) == 10 * forward_flops(MODEL, 20, 3, range(0), 20)


@pytest.mark.parametrize(
    "given", [{"guidance": 1.0}, {"method": "none"}, {"guidance": 1.0, "method": "self"}]
)
def test_no_guidance_is_one_branch(given):
    assert branches(Sampling(**given), TREAD, 0.5) == (Branch(),)


def test_path_drop_costs_less_than_the_caption_alone_twice():
    routing = SPRINT.model_copy(update={"end": 3})
    cost = {}
    for method in ("none", "cfg", "path_drop"):
        config = Config(model=MODEL, routing=routing, sampling=Sampling(method=method))
        cost[method] = sampling_flops(config, 20, 3)
    assert cost["none"] < cost["path_drop"] < cost["cfg"]


REFUSED = {
    "self without routing": ({"method": "self"}, {}, "self needs a model trained with routing"),
    "path drop without routing": ({"method": "path_drop"}, {}, "path_drop needs a model of SPRINT"),
    "path drop of TREAD": ({"method": "path_drop"}, {"policy": "tread"}, "routing.policy is tread"),
    "equal drops": (
        {"method": "self", "strong_drop": 0.5},
        {"policy": "tread"},
        r"strong_drop 0.5 is not below the weak branch's drop 0.5 \(routing.drop\)",
    ),
    "drops in the wrong order": (
        {"method": "self", "strong_drop": 0.5, "weak_drop": 0.25},
        {"policy": "sprint"},
        r"drop 0.25 \(sampling.weak_drop\)",
    ),
    "after the fine-tune": (
        {"method": "self"},
        {"policy": "tread", "drop": 0.0},
        r"drop 0.0 \(routing.drop\); set sampling.weak_drop above",
    ),
    "no sixteenths": (
        {"method": "self", "weak_drop": 0.3},
        {"policy": "sprint", "structured": True},
        "sampling.weak_drop 0.3 is none",
    ),
    "interval": ({"interval": [0.8, 0.2]}, {}, r"interval is \[0.8, 0.2\], expected two times in order"),
    "interval beyond": ({"interval": [0.2, 1.2]}, {}, r"interval is \[0.2, 1.2\]"),
    "drop of another method": ({"weak_drop": 0.2}, {}, "weak_drop belongs to method self, but method is cfg"),
    "no mean target": ({"contrastive": 0.05}, {}, "contrastive is 0.05 but mean_target names no file"),
    "unknown": ({"method": "magic"}, {}, "sampling.method"),
}


@pytest.mark.parametrize(("sampling", "routing", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_are_one_line(sampling, routing, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_config({"sampling": sampling, "routing": routing}, "test")
    assert "\n" not in str(caught.value)


def test_structured_routes_need_grids_that_can_be_cut():
    routing = Routing(policy="sprint", start=1, end=2, structured=True)
    sampler = sampler_of(random_denoiser(routing))
    config = Sampling(steps=1, method="self")
    assert sampler(PROMPTS, (16, 24), config, SEED).shape == (3, 3, 16, 24)
    with pytest.raises(UserError, match="divisible by 2; sample other sizes"):
        sampler(PROMPTS, (16, 20), config, SEED)
    with pytest.raises(UserError, match="need one grid"):
        sampler.mixed(PROMPTS, [(16, 16), (8, 16), (16, 16)], config, SEED)


def test_path_drop_without_its_training_is_a_warning():
    dropping = Sampling(method="path_drop")
    (line,) = guidance_warnings(dropping, SPRINT, Objective())
    assert "routing.path_drop is 0" in line
    unguided = dropping.model_copy(update={"guidance": 1.0})
    for sampling, routing in ((dropping, PAPER), (unguided, SPRINT), (Sampling(), SPRINT)):
        assert guidance_warnings(sampling, routing, Objective()) == []


def test_a_correction_without_its_training_is_a_warning():
    correcting = Sampling(contrastive=0.05, mean_target="m.safetensors")
    (line,) = guidance_warnings(correcting, SPRINT, Objective())
    assert "objective.contrastive_weight is 0" in line
    assert guidance_warnings(correcting, SPRINT, Objective(contrastive_weight=0.05)) == []


def test_description():
    def said(routing=None, **sampling):
        return describe(Config(routing=routing or Routing(), sampling=Sampling(**sampling)))

    assert said(method="none", steps=7) == "7 steps of euler, 7 evaluations a picture, no guidance"
    assert said(steps=3, solver="heun") == (
        "3 steps of heun, 10 evaluations a picture, guidance cfg with scale 5"
    )
    assert said(TREAD, method="self", guidance=1.5, weak_unconditional=True, interval=(0, 0.7)) == (
        "28 steps of euler, 47 evaluations a picture, guidance self with scale 1.5 from drop 0.5 to 0 "
        "and from no caption to the caption for t in [0, 0.7]"
    )
