"""Whole runs at every ZeRO stage, on one process and on two, against a training loop in plain PyTorch."""

import math
import re

import pytest
import torch

from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.checkpoint.model_weights import checkpoint_state
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from millrace.engine.data import SampleStream, open_source
from millrace.engine.encoders.autoencoder import open_autoencoder
from millrace.engine.encoders.batch_encoder import BatchEncoder
from millrace.engine.encoders.text_encoder import open_text_encoder
from millrace.engine.losses.flow_matching import FlowMatching
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.routing import routing_policy
from tests.engine.jobs import run

pytestmark = pytest.mark.slow

STEPS = 20
PARITY = {
    "run": {"steps": STEPS},
    "optimizer": {"eps": 1e-6, "weight_decay": 0.1, "clip": 0.5},
    "ema": {"decay": 0.8, "start": 3, "every": 4},
}
BF16 = {"run": {"steps": 2}, "precision": {"compute": "bfloat16"}}
BAD = {"run": {"steps": 5}}


def stage(number):
    # Buckets smaller than the model, so that partitioning and gathering have several parts to get right.
    section = {"stage": number}
    if number:
        section |= {"reduce_bucket_size": 20_000}
    if number == 3:
        section |= {"stage3_param_persistence_threshold": 100}
    return {"deepspeed": {"zero_optimization": section}}


def variants():
    """Configuration changes of the parity runs by name."""
    plain = {f"zero{number}": [PARITY, stage(number)] for number in range(4)}
    mixed = {"data": {"aspect": "mixed", "resolution": 24}}
    tread = {"model": {"depth": 3}, "routing": {"policy": "tread", "start": 1, "end": 1}}
    sprint = {"model": {"depth": 3}, "routing": {"policy": "sprint", "start": 1, "end": 1, "path_drop": 0.3}}
    full = {"run": {"activation_checkpointing": {"policy": "full"}}}
    return plain | {
        "mixed": [PARITY, stage(2), mixed],
        "tread": [PARITY, stage(3), tread],
        "sprint": [PARITY, stage(3), sprint],
        "recomputed": [PARITY, stage(3), full],
    }


def job_list(runs, root):
    """Everything that is trained on one process and on two."""
    jobs = [runs.job(root / name, *changes) for name, changes in variants().items()]
    for number in range(4):
        jobs.append(runs.job(root / f"bf16-{number}", BF16, stage(number)))
        spoiled = {"spoiled_losses": (2,), "spoiled_gradients": (3,)}
        jobs.append(runs.job(root / f"bad-{number}", BAD, stage(number), **spoiled))
    reduced = {"precision": {"reduce": "bfloat16"}}
    jobs.append(runs.job(root / "bf16-reduce", BF16, reduced, stage(2)))
    return jobs


@pytest.fixture(scope="module")
def one(runs, tmp_path_factory):
    root = tmp_path_factory.mktemp("one")
    return root, {job.name: [run(job)] for job in job_list(runs, root)}


@pytest.fixture(scope="module")
def two(runs, tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    return root, runs.forked(job_list(runs, root), ranks=2)


@pytest.fixture(params=["one", "two"])
def trained(request):
    """(folder of the runs, results of each run by rank)."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def plain(runs, tmp_path_factory):
    """The plain loop's (losses, weights, averages) for a parity run's name, computed once."""
    known = {}
    root = tmp_path_factory.mktemp("plain")

    def get(name):
        changes = variants()[name]
        key = name if name in ("mixed", "tread", "sprint") else "dense"
        if key not in known:
            known[key] = plain_run(runs.config(root, *changes))
        return known[key]

    return get


def plain_run(config):
    """The same training without DeepSpeed, written out."""
    cpu, seed = torch.device("cpu"), config.run.seed
    denoiser = Denoiser(config.model, config.routing)
    denoiser.init_weights(seed)
    averages = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        denoiser.parameters(), betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )
    autoencoder = open_autoencoder(config.conditioning.autoencoder, cpu)
    tower = open_text_encoder(config.conditioning.text, config.model.context_dim, cpu, torch.float32)
    patch = config.model.patch_size
    prepare = BatchEncoder(autoencoder, tower, denoiser.layouts, patch, seed, cpu)
    flow, routing = FlowMatching(config.objective, seed), routing_policy(config)
    stream = SampleStream(
        open_source(config.data),
        config.data,
        seed=seed,
        patch=patch,
        caption_drop=config.conditioning.caption_drop,
        rank=0,
        world_size=1,
    )
    losses = []
    for step in range(config.run.steps):
        total = 0.0
        for _ in range(config.data.global_batch // config.data.micro_batch):
            batch = prepare(next(stream))
            t = flow.time(batch.sample_index)
            _, noise = flow.noisy(batch.clean, batch.sample_index, t, batch.layout)
            time = t.repeat_interleave(torch.tensor(batch.layout.lengths))[:, None]
            noisy = (1 - time) * batch.clean + time * noise
            span = routing.draw(batch.layout, seed, batch.sample_index)
            prediction = denoiser(noisy, t, batch.text, batch.layout, span).prediction
            error = ((batch.clean - prediction) / time.clamp_min(0.05)).square().mean(1)
            samples = torch.stack([part.mean() for part in error.split(batch.layout.lengths)])
            (samples.sum() / config.data.global_batch).backward()
            total += float(samples.detach().double().sum())
        losses.append(total / config.data.global_batch)
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), settings.clip)
        warmup, final = config.schedule.warmup, config.schedule.final
        progress = (step + 1 - warmup) / (config.run.steps - warmup)
        cosine = final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
        rate = settings.lr * ((step + 1) / warmup if step < warmup else cosine)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in denoiser.named_parameters():
            if step + 1 <= config.ema.start:
                averages[name] = parameter.detach().clone()
            elif (step + 1) % config.ema.every == 0:
                old, decay = averages[name], config.ema.decay
                averages[name] = decay * old + (1 - decay) * parameter.detach()
    return losses, {name: p.detach() for name, p in denoiser.named_parameters()}, averages


def largest_difference(found, expected):
    """Largest difference of an element, relative to the largest element of its tensor."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - value).detach().abs().max() / value.abs().max())
        for name, value in expected.items()
    )


@pytest.mark.parametrize("name", variants())
def test_training_equals_a_plain_loop(runs, trained, plain, name):
    root, results = trained
    assert [result.error for result in results[name]] == [None] * len(results[name])
    losses, weights, averages = plain(name)
    records = runs.log(root / name)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=1e-5)
    assert largest_difference(checkpoint_state(root / name, "model")[0], weights) < 1e-5
    assert largest_difference(checkpoint_state(root / name, "ema")[0], averages) < 1e-5
    # The comparison is worth something: the run moved the weights a thousand times the tolerance.
    config = runs.config(root, *variants()[name])
    start = Denoiser(config.model, config.routing)
    start.init_weights(42)
    assert largest_difference(dict(start.named_parameters()), weights) > 1e-2


@pytest.mark.parametrize("name", variants())
def test_two_processes_equal_one(runs, one, two, name):
    first, second = (runs.log(root / name) for root, _ in (one, two))
    for a, b in zip(first, second, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    for kind in ("model", "ema"):
        a, b = (checkpoint_state(root / name, kind)[0] for root, _ in (one, two))
        assert largest_difference(b, a) < 1e-5


@pytest.mark.parametrize("number", range(4))
def test_bfloat16_arithmetic_keeps_every_store_in_float32(trained, number):
    _, results = trained
    for result in results[f"bf16-{number}"]:
        assert result.error is None
        stores = ("parameters", "masters", "moments", "ema")
        assert result.dtypes == {store: {torch.float32} for store in stores}


@pytest.mark.parametrize("number", range(4))
def test_bfloat16_arithmetic_is_used_and_gradients_are_reduced_in_float32(runs, two, number):
    root, results = two
    for result in results[f"bf16-{number}"]:
        assert result.reduced == {torch.float32}
        assert result.largest_bucket > 1000
    # From step 2 on: at step 1 the last layer is zero and so is every prediction.
    low = runs.log(root / f"bf16-{number}")[1]["loss"]
    full = runs.log(root / f"bad-{number}")[1]["loss"]
    assert low != full
    assert low == pytest.approx(full, rel=0.02)


def test_bfloat16_reduction_where_asked_for(two):
    _, results = two
    for result in results["bf16-reduce"]:
        assert torch.bfloat16 in result.reduced
        assert result.dtypes["masters"] == {torch.float32}


@pytest.mark.parametrize("number", range(4))
def test_a_bad_batch_changes_nothing(runs, trained, number):
    """NaN in one sample of one rank (step 3), then a finite loss with an infinite gradient (step 4)."""
    root, results = trained
    name = f"bad-{number}"
    for result in results[name]:
        assert result.error is None
        assert result.unchanged == {0: False, 1: False, 2: True, 3: True, 4: False}
        assert result.skipped == 2
    records = runs.log(root / name)
    assert [record["applied"] for record in records] == [True, True, False, False, True]
    assert records[2]["loss"] is None
    assert math.isfinite(records[3]["loss"])
    assert records[3]["grad_norm"] is None
    assert records[4]["grad_norm"] > 0
    meta = CheckpointReader(list_checkpoints(root / name / "checkpoints")[-1][1]).meta
    assert (meta["step"], meta["skipped"], meta["updates"]) == (5, 2, 3)


@pytest.mark.parametrize("number", [0, 2])
def test_bad_samples_are_named(runs, tmp_path, capsys, number):
    result = runs.here(tmp_path, {"run": {"steps": 2}}, stage(number), spoiled_losses=(1,))
    assert len(result.spoiled) == 4  # the first sample of each micro-batch
    said = re.search(r"step 2 skipped, weights unchanged; .* not finite: (.*)", capsys.readouterr().err)
    assert said[1].split(", ") == result.spoiled


@pytest.mark.parametrize("number", [0, 3])
def test_too_many_bad_steps_in_a_row_stop_the_run(runs, tmp_path, number):
    changes = {"run": {"steps": 9, "max_bad_steps": 3}}
    result = runs.here(tmp_path, changes, stage(number), spoiled_losses=(1, 3, 4, 5))
    assert result.error.startswith("stopped: 3 steps in a row up to step 6 had no finite loss or gradient")
    assert "run.max_bad_steps" in result.error
    assert all(key in result.error for key in result.spoiled[-4:])
    assert [record["applied"] for record in runs.log(tmp_path)] == [True, False, True, False, False, False]
    # The weights are as they were after the last good step, and they are kept.
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [6]


def test_compiled_blocks_train_the_same(runs, tmp_path):
    # Three steps: block gradients are zero in the first. Empty captions, so that one shape is compiled.
    changes = {
        "run": {"steps": 3},
        "model": {"depth": 1},
        "data": {"global_batch": 2},
        "conditioning": {"caption_drop": 1 - 1e-9},
    }
    losses = {}
    for name, compiled in (("eager", False), ("compiled", True)):
        result = runs.here(tmp_path / name, changes, {"run": {"compile": compiled}})
        assert result.error is None
        losses[name] = [record["loss"] for record in runs.log(tmp_path / name)]
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-5)
