"""Tuning of the autoencoder on tiny networks: who learns from what, against plain autograd."""

import copy
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from millrace.engine.config.loading import merge, parse_config
from millrace.engine.data import Batch, SampleStream, open_source
from millrace.engine.encoders.autoencoder import open_autoencoder
from millrace.engine.encoders.batch_encoder import BatchEncoder
from millrace.engine.encoders.small_classifier import SmallClassifier, save_classifier
from millrace.engine.encoders.teacher import open_teacher
from millrace.engine.encoders.text_encoder import open_text_encoder
from millrace.engine.losses.flow_matching import FlowMatching
from millrace.engine.losses.loss_term import LossInputs
from millrace.engine.losses.total import build_loss
from millrace.engine.losses.training_model import TrainingModel
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.layout import patchify
from millrace.engine.repa_e import tuner
from millrace.engine.repa_e.tuner import frozen, open_repa_e
from millrace.engine.util.errors import UserError

pytest.importorskip("diffusers")
CPU = torch.device("cpu")
OFF = {
    "reconstruction_weight": 0.0,
    "perceptual_weight": 0.0,
    "kl_weight": 0.0,
    "gan_weight": 0.0,
    "alignment_weight": 0.0,
}
"""Every term of the autoencoder's loss without weight."""


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    from millrace.engine.encoders.autoencoder import autoencoder_entry
    from millrace.engine.encoders.lpips import tiny_lpips

    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    save_classifier(SmallClassifier(classes=2, width=8), folder / "classifier")
    return {
        "autoencoder": str(autoencoder_entry("flux1").tiny(folder / "flux1")),
        "classifier": str(folder / "classifier"),
        "lpips": str(tiny_lpips(folder / "lpips")),
    }


@pytest.fixture
def tuned(networks):
    """Settings of a tuned run of 32 pixel pictures, 2 x 2 tokens."""
    return {
        "run": {"seed": 7},
        "model": {"width": 32, "depth": 3, "heads": 1, "patch_size": 2, "in_channels": 16, "context_dim": 16},
        "objective": {"lpips": {"path": networks["lpips"]}},
        "alignment": {
            "kind": "repa",
            "block": 1,
            "teacher": {"kind": "classifier", "path": networks["classifier"], "dtype": "float32"},
        },
        "conditioning": {
            "text": {"kind": "hash"},
            "autoencoder": {
                "kind": "flux1",
                "path": networks["autoencoder"],
                "dtype": "float32",
                "tuning": {"enabled": True, "discriminator_width": 4, "norm_samples": 8},
            },
        },
        "precision": {"compute": "float32"},
        "data": {"resolution": 32, "global_batch": 4, "micro_batch": 2, "workers": 0},
        "ema": {"enabled": False},
        "logging": {"every_steps": 1, "tensorboard": False},
    }


def tuning(**values):
    return {"conditioning": {"autoencoder": {"tuning": values}}}


def build(settings, *changes):
    """A RepaE and what a trainer would build around it, with a denoiser that does not answer zero."""
    for change in changes:
        settings = merge(settings, change)
    config = parse_config(settings, "test")
    section = config.conditioning
    denoiser = Denoiser(config.model, config.routing)
    teacher = open_teacher(config.alignment.teacher, CPU, config.alignment.attention, "data")
    model = TrainingModel(denoiser, config.alignment, teacher.dim)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    flow = FlowMatching(config.objective, 7, config.model.patch_size * 8)
    source = open_source(config.data)
    prepare = BatchEncoder(
        open_autoencoder(section.autoencoder, CPU),
        open_text_encoder(section.text, config.model.context_dim, CPU, torch.float32),
        denoiser.layouts,
        config.model.patch_size,
        7,
        CPU,
        teacher=teacher,
    )
    accumulate = config.data.global_batch // config.data.micro_batch
    made = open_repa_e(config, prepare, model, flow, accumulate, source, None)
    return SimpleNamespace(
        config=config, tuning=made, model=model, flow=flow, prepare=prepare, source=source, stream=stream
    )


def stream(made):
    config = made.config
    return SampleStream(
        made.source,
        config.data,
        seed=7,
        patch=config.model.patch_size * 8,
        caption_drop=0.1,
        rank=0,
        world_size=1,
        first_sample=0,
    )


def batches_of(made):
    """The micro-batches of the first step, undecoded."""
    decoded = stream(made)
    found = [next(decoded) for _ in range(made.tuning.accumulate)]
    decoded.close()
    return found


def plain_terms(made, network, judge, batch):
    """The weighted terms of one micro-batch (B,), its raw latents and reconstruction, by plain PyTorch."""
    config = made.config.conditioning.autoencoder.tuning
    ((_, images, noise),) = made.prepare.stacks(batch)
    posterior = network.encode(images).latent_dist
    raw = posterior.mean + posterior.std * noise
    fake = network.decode(raw).sample

    norm = torch.nn.BatchNorm2d(16, eps=config.norm_eps, affine=False).eval()
    norm.running_mean, norm.running_var = made.tuning.norm.mean, made.tuning.norm.variance
    packed = made.prepare.pack(batch, list(raw), list(images))
    clean = patchify(norm(raw), 2).flatten(0, 1)
    t = made.flow.time(packed.sample_index)
    _, n = made.flow.noisy(clean.detach(), packed.sample_index, t, packed.layout)
    at = t.repeat_interleave(4)[:, None]
    outputs = made.model((1 - at) * clean + at * n, t, packed.text, packed.layout, None)
    cosine = F.cosine_similarity(outputs.projected, packed.teacher.tokens, dim=1).unflatten(0, (-1, 4))

    terms = {
        "reconstruction": config.reconstruction_weight * (fake - images).abs().mean((1, 2, 3)),
        "perceptual": config.perceptual_weight * made.tuning.lpips(fake, images),
        "kl": config.kl_weight * posterior.kl(),
        "adversarial": -config.gan_weight * judge(fake).mean((1, 2, 3)),
        "alignment": -config.alignment_weight * cosine.mean(1),
    }
    hinge = (F.relu(1 - judge(images)) + F.relu(1 + judge(fake.detach()))).mean((1, 2, 3)) / 2
    return terms, hinge, raw


def gradient(part):
    """Flat gradient of all parameters of a module, zero where there is none."""
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in part.parameters()]
    )


def test_gradients_are_those_of_plain_autograd(tuned):
    made = build(tuned, tuning(kl_weight=1e-3))
    network, judge = made.prepare.autoencoder.network, made.tuning.discriminator.module
    plain_network, plain_judge = copy.deepcopy(network), copy.deepcopy(judge)
    for part in (plain_network, plain_judge):
        part.zero_grad()  # a copy does not share the flat gradient
    for batch in batches_of(made):
        terms, hinge, _ = plain_terms(made, plain_network, plain_judge, batch)
        (sum(terms.values()).mean() / 2).backward(inputs=list(plain_network.parameters()))
        (hinge.mean() / 2).backward(inputs=list(plain_judge.parameters()))
    made.tuning.next_batch(iter(batches_of(made)), 0)
    for ours, theirs in ((network, plain_network), (judge, plain_judge)):
        wanted = gradient(theirs)
        assert wanted.norm() > 0
        assert (gradient(ours) - wanted).norm() < 1e-4 * wanted.norm()
    norms = [float(norm) for norm in made.tuning._norms]
    assert norms == pytest.approx([float(gradient(p).norm()) for p in (plain_network, plain_judge)], rel=1e-3)


@pytest.mark.parametrize(
    ("term", "encoder", "decoder"),
    [
        ("reconstruction_weight", True, True),
        ("perceptual_weight", True, True),
        ("kl_weight", True, False),
        ("gan_weight", True, True),
        ("alignment_weight", True, False),
    ],
)
def test_each_term_reaches_its_own_part(tuned, term, encoder, decoder):
    made = build(tuned, tuning(**OFF), tuning(**{term: 1.0}))
    made.tuning.next_batch(iter(batches_of(made)), 0)
    network = made.prepare.autoencoder.network
    assert bool(gradient(network.encoder).any()) == encoder
    assert bool(gradient(network.decoder).any()) == decoder
    assert bool(gradient(made.tuning.discriminator.module).any()) == (term == "gan_weight")


def test_the_denoiser_gets_nothing_from_the_autoencoders_step(tuned):
    made = build(tuned)
    made.tuning.next_batch(iter(batches_of(made)), 0)
    assert all(p.grad is None and p.requires_grad for p in made.model.parameters())


def test_the_denoisers_losses_do_not_reach_the_autoencoder(tuned):
    made = build(tuned)
    source = iter(batches_of(made))
    batch = made.tuning.next_batch(source, 0)
    assert not batch.clean.requires_grad
    before = made.tuning.autoencoder.flat.clone(), made.tuning.discriminator.flat.clone()
    t = made.flow.time(batch.sample_index)
    noisy, noise = made.flow.noisy(batch.clean, batch.sample_index, t, batch.layout)
    score = build_loss(made.config, made.flow, CPU)
    outputs = made.model(noisy, t, batch.text, batch.layout, None)
    terms = score(LossInputs(outputs, batch, noise, t, None))
    assert terms.keys() == {"flow", "repa"}
    sum(terms.values()).mean().backward()
    assert all(p.grad is not None for p in made.model.parameters())
    assert torch.equal(before[0], made.tuning.autoencoder.flat)
    assert torch.equal(before[1], made.tuning.discriminator.flat)


def test_both_passes_see_the_same_noise_and_times(tuned, monkeypatch):
    made = build(tuned, {"data": {"micro_batch": 4}})
    seen = []
    plain = made.model.denoiser.forward

    def watched(noisy, t, *rest, **options):
        seen.append((noisy.detach().clone(), t))
        return plain(noisy, t, *rest, **options)

    monkeypatch.setattr(made.model.denoiser, "forward", watched)
    batch = made.tuning.next_batch(iter(batches_of(made)), 0)
    ((noisy, t),) = seen
    assert torch.equal(t, made.flow.time(batch.sample_index))
    _, noise = made.flow.noisy(batch.clean, batch.sample_index, t, batch.layout)
    at = t.repeat_interleave(4)[:, None]
    clean = (noisy - at * noise) / (1 - at)
    (raw,) = [plain_terms(made, *parts_of(made), b)[2] for b in batches_of(made)]
    wanted = made.tuning.norm.evaluate(patchify(raw, 2).flatten(0, 1))
    torch.testing.assert_close((1 - at) * clean, (1 - at) * wanted, rtol=1e-4, atol=1e-5)


def parts_of(made):
    return made.prepare.autoencoder.network, made.tuning.discriminator.module


def test_the_denoiser_sees_latents_normalised_over_the_global_batch(tuned):
    made = build(tuned)
    raw = torch.cat([plain_terms(made, *parts_of(made), batch)[2] for batch in batches_of(made)]).detach()
    norm = torch.nn.BatchNorm2d(16, eps=1e-4, momentum=0.1, affine=False)
    norm.running_mean = made.tuning.norm.mean.clone()
    norm.running_var = made.tuning.norm.variance.clone()
    wanted = patchify(norm(raw), 2).flatten(0, 1)
    source = iter(batches_of(made))
    found = torch.cat([made.tuning.next_batch(source, 0).clean for _ in range(2)])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    made.tuning.finish(True, 0, 10)
    torch.testing.assert_close(made.tuning.norm.mean, norm.running_mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(made.tuning.norm.variance, norm.running_var, rtol=1e-5, atol=1e-7)


def test_the_statistics_do_not_depend_on_the_micro_batches(tuned):
    found = []
    for micro in (4, 2, 1):
        made = build(tuned, {"data": {"micro_batch": micro}}, tuning(perceptual_weight=0.0, gan_weight=0.0))
        source = iter(batches_of(made))
        clean = torch.cat([made.tuning.next_batch(source, 0).clean for _ in range(made.tuning.accumulate)])
        found.append((clean, made.tuning.autoencoder.flat))
    for clean, flat in found[1:]:
        torch.testing.assert_close(clean, found[0][0], rtol=1e-4, atol=1e-5)
        assert (flat - found[0][1]).norm() < 1e-4 * flat.norm()


def test_pictures_of_several_sizes(tuned):
    whole = {"data": {"micro_batch": 4}}
    made, one_by_one = (build(tuned, {"data": {"micro_batch": n}}, tuning(gan_weight=0.0)) for n in (4, 1))
    (batch,) = batches_of(build(tuned, whole))
    images = [torch.cat([x, x.flip(2)], 2) if i % 2 else x for i, x in enumerate(batch.images)]
    alone = [
        Batch(
            **{
                field.name: getattr(batch, field.name)[i : i + 1]
                for field in fields(Batch)
                if field.name != "images"
            },
            images=images[i : i + 1],
        )
        for i in range(4)
    ]
    together = made.tuning.next_batch(iter([replace(batch, images=images)]), 0)
    assert together.layout.lengths == [4, 8, 4, 8]
    source = iter(alone)
    apart = torch.cat([one_by_one.tuning.next_batch(source, 0).clean for _ in range(4)])
    torch.testing.assert_close(together.clean, apart, rtol=1e-4, atol=1e-5)
    found, wanted = made.tuning.autoencoder.flat, one_by_one.tuning.autoencoder.flat
    assert (found - wanted).norm() < 1e-3 * wanted.norm()  # kinks of |x| and ReLU make more of rounding


def test_initial_statistics_are_of_the_data(tuned):
    made = build(tuned, tuning(norm_samples=6))  # two global batches
    decoded = stream(made)
    raw = []
    for _ in range(4):
        ((_, images, noise),) = made.prepare.stacks(next(decoded))
        posterior = made.prepare.autoencoder.network.encode(images).latent_dist
        raw.append((posterior.mean + posterior.std * noise).detach())
    decoded.close()
    channels = torch.cat(raw).transpose(0, 1).flatten(1)
    torch.testing.assert_close(made.tuning.norm.mean, channels.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made.tuning.norm.variance, channels.var(1), rtol=1e-5, atol=1e-6)


def test_encode_and_decode_follow_the_statistics(tuned):
    made = build(tuned)
    source = iter(batches_of(made))
    for _ in range(2):
        made.tuning.next_batch(source, 0)
    made.tuning.finish(True, 0, 10)
    latents, norm = made.prepare.autoencoder, made.tuning.norm
    ((_, images, noise),) = made.prepare.stacks(batches_of(made)[0])
    with torch.no_grad():
        posterior = latents.network.encode(images).latent_dist
        raw = posterior.mean + posterior.std * noise
        picture = latents.network.decode(raw).sample.clamp(-1, 1)
    found = latents.encode(images, noise)
    wanted = (raw - norm.mean[:, None, None]) / (norm.variance + 1e-4).sqrt()[:, None, None]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(latents.decode(found), picture, rtol=1e-3, atol=1e-4)


def test_the_discriminator_waits_for_its_step(tuned):
    made = build(tuned, tuning(gan_start=1), {"logging": {"every_steps": 2}})
    for step in range(2):
        source = iter(batches_of(made))
        before = copy.deepcopy(made.tuning.discriminator.module.state_dict())
        for _ in range(2):
            made.tuning.next_batch(source, step)
        made.tuning.finish(True, step, 10)
        after = made.tuning.discriminator.module.state_dict()
        changed = any(not torch.equal(before[name], after[name]) for name in before)
        assert changed == (step == 1)
    records = [{}, {}]
    made.tuning.flush(records)
    assert [record["autoencoder"]["discriminator"] != 0 for record in records] == [False, True]
    assert all(record["autoencoder"].keys() == set(tuner.TERMS) for record in records)


def test_a_step_that_is_skipped_changes_nothing(tuned):
    made = build(tuned, {"logging": {"every_steps": 2}})
    before = {name: tensor.clone() for name, tensor in made.tuning.named_state()}
    for applied in (False, True):
        source = iter(batches_of(made))
        for _ in range(2):
            made.tuning.next_batch(source, 0)
        made.tuning.finish(applied, 0, 10)
        same = {name for name, tensor in made.tuning.named_state() if torch.equal(before[name], tensor)}
        # A few parameters of a tiny network may have no gradient at all.
        assert len(same) < len(before) / 10 if applied else same == set(before)
        assert not made.tuning.autoencoder.flat.any()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_denoisers_step_is_spoiled_with_the_autoencoders(tuned, monkeypatch, what):
    made = build(tuned)
    plain = tuner.kl_divergence

    def spoiled(mean, logvar):
        losses = plain(mean, logvar)
        if what == "loss":
            return torch.where(torch.arange(len(losses)) == 0, float("nan"), losses)
        return losses + ((mean - mean.detach()).abs().sqrt().sum() * 0)  # gradient 0 * inf

    calls = []

    def once(mean, logvar):
        calls.append(None)
        return spoiled(mean, logvar) if len(calls) == 1 else plain(mean, logvar)

    monkeypatch.setattr(tuner, "kl_divergence", once)
    source = iter(batches_of(made))
    first, second = (made.tuning.next_batch(source, 0).clean.isnan() for _ in range(2))
    if what == "loss":
        assert first[:4].all()  # the four tokens of the sample that did it
        assert not first[4:].any()
        assert not second.any()
    else:
        assert first.all()
        assert second.all()


def test_it_learns(tuned):
    """All terms at their usual weights: four built-in pictures are reconstructed and aligned better."""
    steps = 60
    made = build(
        tuned,
        {"data": {"micro_batch": 4}, "logging": {"every_steps": steps}, "schedule": {"warmup": 1}},
        tuning(lr=3e-3),
    )
    batches = batches_of(made)
    for step in range(steps):
        made.tuning.next_batch(iter(batches), step)
        made.tuning.finish(True, step, steps)
    records = [{} for _ in range(steps)]
    made.tuning.flush(records)
    first, last = records[0]["autoencoder"], records[-1]["autoencoder"]
    assert last["reconstruction"] < 0.7 * first["reconstruction"]
    assert last["alignment"] < first["alignment"] - 0.3


def test_frozen_is_undone_by_an_error():
    module = torch.nn.Linear(2, 2)
    module.bias.requires_grad_(False)

    def fail():
        with frozen(module):
            assert not module.weight.requires_grad
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert (module.weight.requires_grad, module.bias.requires_grad) == (True, False)


def test_checkpointed_activations_change_nothing(tuned):
    found = []
    for on in (False, True):
        made = build(tuned, tuning(activation_checkpointing=on))
        made.tuning.next_batch(iter(batches_of(made)), 0)
        found.append(made.tuning.autoencoder.flat)
    assert made.prepare.autoencoder.network.encoder.gradient_checkpointing
    assert (found[1] - found[0]).norm() < 1e-5 * found[0].norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conditioning": {"autoencoder": {"kind": "pixels"}}, "model": {"in_channels": 3}}, "is pixels"),
        ({"conditioning": {"autoencoder": {"kind": "dc_ae"}}}, "posterior, which dc_ae has not"),
        ({"conditioning": {"autoencoder": {"kind": "flux2", "form": "patchified"}}}, "form raw"),
        ({"alignment": {"kind": "none"}}, "alignment.kind is none; set it to repa or irepa"),
        ({"alignment": {"until": 3}}, "alignment.until ends the alignment"),
        ({"objective": {"lpips": {"path": None}}}, "set objective.lpips.path"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "stage to 2"),
    ],
)
def test_settings_that_do_not_go_together(tuned, change, message):
    with pytest.raises(UserError, match=message) as error:
        parse_config(merge(tuned, change), "test")
    assert "\n" not in str(error.value)
    parse_config(merge(merge(tuned, change), tuning(enabled=False)), "test")
