"""Held-out loss: what it is, that nothing but the weights changes it, and that it ranks models."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from millrace.engine.config.loading import parse_config
from millrace.engine.data import open_source
from millrace.engine.data.sources.held_out_split import split
from millrace.engine.encoders.autoencoders.pixels import Pixels
from millrace.engine.encoders.batch_encoder import BatchEncoder
from millrace.engine.encoders.text_encoder import open_text_encoder
from millrace.engine.evaluation.evaluator import Evaluation
from millrace.engine.evaluation.held_out import HeldOutLoss
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.run_log.sample_log import keys_of_steps
from millrace.engine.trainer import train
from millrace.engine.util.errors import UserError
from millrace.kernels.support.philox import normal, sample_keys

SHARE = {"validation": {"share": 0.5}}
LOSS = {"validation": {"share": 0.5, "every_steps": 2, "samples": 6, "times": 3}}
KEYS = {"logging": {"sample_keys": True}}


def lines(run):
    return [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]


def held_keys(config):
    held = split(open_source(config.data), config.validation, config.data).held_out.source
    return {held.key(i) for i in range(len(held))}


@pytest.fixture
def scored(runs, tmp_path):
    """`scored(*changes)` -> the losses of a Denoiser with random weights, or of `network`."""

    def score(*changes, network=None, source=None):
        config = runs.config(tmp_path, LOSS, *changes)
        denoiser = Denoiser(config.model, config.routing).eval()
        denoiser.init_weights(1)
        # Weights that begin at zero would hide the captions and the times.
        for i, p in enumerate(denoiser.parameters()):
            torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(i))
        cpu = torch.device("cpu")
        text = open_text_encoder(config.conditioning.text, config.model.context_dim, cpu, torch.float32)
        prepare = BatchEncoder(Pixels(), text, denoiser.layouts, 4, config.run.seed, cpu)
        source = source or open_source(config.data)
        loss = HeldOutLoss(config, split(source, config.validation, config.data).held_out, prepare)
        return loss, loss(network or denoiser)

    return score


def test_the_loss_is_that_of_the_velocity_at_the_middles_of_equal_intervals(scored):
    """Of a network that says 0, against noise and pictures taken by hand."""
    layouts = Denoiser(parse_config({"model": {"width": 32, "heads": 1}}, "test").model).layouts

    class Zero:
        def __init__(self):
            self.layouts, self.seen = layouts, []

        def __call__(self, noisy, t, text, layout, span):
            assert span is None
            assert noisy.dtype == text.dtype == torch.float32
            self.seen.append(t.tolist())
            return SimpleNamespace(prediction=torch.zeros_like(noisy))

    zero = Zero()
    loss, found = scored({"objective": {"prediction": "velocity"}}, network=zero)
    assert found.times == pytest.approx((1 / 6, 3 / 6, 5 / 6))
    assert zero.seen == [[pytest.approx(t)] * 6 for t in found.times]
    assert loss.keys == sorted(loss.keys)
    source, wanted = loss.source, []
    from millrace.engine.data import evaluation_view
    from millrace.engine.model.layout import patchify
    from millrace.engine.util.randomness import Purpose
    from millrace.kernels.support.keys import stream_key

    hashes = split(open_source(loss.config.data), loss.config.validation, loss.config.data).held_out.hashes
    of = {source.key(i): i for i in range(len(source))}
    for key in loss.keys:
        clean = patchify(evaluation_view(source.image(of[key]), loss.config.data, 4), 4)
        number = torch.from_numpy(hashes[[of[key]]].view(np.int64))
        row = []
        for i in range(3):
            keys = sample_keys(stream_key(1138, Purpose.NOISE.at(i)), number, Purpose.NOISE)
            noise = normal(keys, torch.tensor([0, len(clean)], dtype=torch.int32), *clean.shape)
            row.append(float(((noise - clean) ** 2).double().mean()))
        wanted.append(row)
    assert found.losses == pytest.approx([np.mean(row) for row in wanted], rel=1e-5)
    assert found.by_time == pytest.approx(np.mean(wanted, 0).tolist(), rel=1e-5)
    assert found.loss == pytest.approx(np.mean(wanted), rel=1e-5)
    assert len({round(float(x), 6) for row in wanted for x in row}) == 18  # no two share their noise


def test_what_only_training_has_does_not_count(scored):
    _, wanted = scored()
    for changes in (
        {"routing": {"policy": "tread", "start": 0, "end": 1, "drop": 0.5}},
        {"objective": {"contrastive_weight": 0.5}},
        {"conditioning": {"caption_drop": 0.9}},
        {"data": {"micro_batch": 8, "flip": 1.0, "crop": "random", "crop_scale": 0.1}},
        {"objective": {"time_shift": 3.0}},
        {"precision": {"compute": "bfloat16"}},
    ):
        assert scored(changes)[1].losses == wanted.losses, changes
    for changes in (
        {"validation": {"seed": 2, "share": 0.7}},
        {"validation": {"caption": "short"}},
        {"validation": {"times": 4}},
        {"data": {"resolution": 20}},
    ):
        assert scored(changes)[1].set != wanted.set, changes
    assert scored({"validation": {"caption": "short"}})[1].losses != wanted.losses


def test_fewer_samples_are_a_part_of_more(scored):
    many, found = scored({"validation": {"samples": 100}})
    few, less = scored({"validation": {"samples": 3}})
    of = dict(zip(many.keys, found.losses, strict=True))
    assert set(few.keys) < set(many.keys)
    assert less.losses == pytest.approx([of[key] for key in few.keys], rel=1e-5)


def test_a_picture_that_cannot_be_read_does_not_count(scored, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    from PIL import Image

    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"caption {i}")
    data = {"data": {"source": "folder", "path": str(folder)}}
    loss, whole = scored(data)
    bad = loss.keys[1]
    (folder / bad).write_bytes(b"\x89PNG\r\n\x1a\n" + b"broken" * 9)
    again, found = scored(data)
    assert again.keys == loss.keys
    assert list(found.unreadable) == [bad]
    assert found.losses == pytest.approx(whole.losses[:1] + whole.losses[2:], rel=1e-6)
    assert found.set != whole.set
    for path in folder.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of . held-out pictures can be read; .*: the file has no"):
        scored(data)


def test_a_data_set_of_its_own(scored, tmp_path):
    from PIL import Image

    for i in range(3):
        Image.new("RGB", (20, 20), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a caption")
    loss, found = scored({"validation": {"share": 0.0, "path": str(tmp_path)}})
    assert loss.keys == ["0.png", "1.png", "2.png"]
    assert len(found.losses) == 3
    assert str(tmp_path) in loss.describe()


CHANGES = {"run": {"steps": 5}, "logging": {"every_steps": 3}}


def test_a_run_writes_it_and_trains_as_without(runs, tmp_path):
    on, off = tmp_path / "on", tmp_path / "off"
    more = {"logging": {"tensorboard": True}}
    assert runs.here(on, CHANGES, LOSS, KEYS, more).error is None
    assert runs.here(off, CHANGES, SHARE).error is None
    runs.assert_same_bits(on, off)
    assert not (off / "validation.jsonl").exists()
    found = lines(on)
    assert [(x["step"], x["samples_seen"], x["weights"]) for x in found] == [
        (step, 8 * step, weights) for step in (2, 4, 5) for weights in ("model", "ema")
    ]
    for record in found:
        assert list(record) == [
            *("step", "samples_seen", "stage", "weights", "loss", "by_time", "set", "losses")
        ]
        assert record["loss"] == pytest.approx(np.mean(record["losses"]), rel=1e-12)
        assert record["loss"] == pytest.approx(np.mean(record["by_time"]), rel=1e-12)
    assert len({record["set"] for record in found}) == 1
    assert len({record["loss"] for record in found}) == 6
    trained = {key for keys in keys_of_steps(on).values() for key in keys}
    held = held_keys(runs.config(on, LOSS))
    assert len(held) >= len(found[0]["losses"]) == 6
    assert not trained & held

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(on / "tensorboard")).Reload()
    for name, weights in (("validation/loss", "model"), ("validation/ema_loss", "ema")):
        wanted = [record for record in found if record["weights"] == weights]
        assert [x.step for x in events.Scalars(name)] == [2, 4, 5]
        assert [x.value for x in events.Scalars(name)] == pytest.approx([x["loss"] for x in wanted])
        for i, t in enumerate(("0.167", "0.500", "0.833")):
            values = [x.value for x in events.Scalars(f"{name}_by_time/{t}")]
            assert values == pytest.approx([x["by_time"][i] for x in wanted])


def test_after_a_resume_each_loss_is_there_once(runs, tmp_path):
    run, often = tmp_path / "run", {"checkpoint": {"every_steps": 2}}
    assert runs.here(run, CHANGES, LOSS, often).error is None
    before = lines(run)
    assert runs.here(run, CHANGES, LOSS, often, resume="2").error is None
    assert lines(run) == before


def test_a_loss_that_was_not_taken_before_the_end_is_taken_by_the_next_run(runs, tmp_path):
    """Its second record is missing, as of a run that was killed between the two."""
    run, often = tmp_path / "run", {"checkpoint": {"every_steps": 2}}
    assert runs.here(run, CHANGES, LOSS, often).error is None
    before = lines(run)
    (run / "validation.jsonl").write_text("".join(json.dumps(x) + "\n" for x in before[:3]))
    assert runs.here(run, CHANGES, LOSS, often, resume="4").error is None
    found = lines(run)
    assert [x for x in found if x["step"] > 2][-4:] == before[2:]


def test_save_then_sample_then_evaluate_then_validate(runs, tmp_path, monkeypatch):
    seen, run = [], tmp_path / "run"

    def note(what):
        def call(*_):
            saved = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
            seen.append((what, saved))
            raise UserError(what)

        return call

    monkeypatch.setattr("millrace.engine.evaluation.run_samples.draw_grid", note("grid"))
    monkeypatch.setattr(Evaluation, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(Evaluation, "agree", lambda _: None)
    monkeypatch.setattr(Evaluation, "lacking", {}, raising=False)
    monkeypatch.setattr(Evaluation, "networks", {"fid": None}, raising=False)
    monkeypatch.setattr(Evaluation, "describe", lambda _: [])
    monkeypatch.setattr(Evaluation, "prepare", lambda *_: None)
    monkeypatch.setattr(Evaluation, "__call__", note("evaluation"))
    monkeypatch.setattr(HeldOutLoss, "__call__", note("held-out loss"))
    due = {"run": {"steps": 2}, "sampling": {"every_steps": 2}, "evaluation": {"every_steps": 2}}
    assert runs.here(run, CHANGES, LOSS, due, {"checkpoint": {"blocking": True}}).error is None
    saved = ["step-00000002"]
    assert seen == [(what, saved) for what in ("grid", "evaluation", "held-out loss")]


def test_stages_are_measured_at_their_ends_and_hold_out_the_same(runs, tmp_path):
    run, part = tmp_path / "run", {"name": "a", "source": "builtin"}
    stages = {
        "validation": {"every_steps": 100},
        "stages": [
            {"at": 3, "name": "mixed", "data": {"source": "mixture", "mixture": [part]}},
        ],
    }
    assert runs.here(run, CHANGES, LOSS, KEYS, stages).error is None
    assert [(x["step"], x["stage"], x["weights"]) for x in lines(run)] == [
        (step, stage, weights) for step, stage in ((3, ""), (5, "mixed")) for weights in ("model", "ema")
    ]
    trained = {key.removeprefix("a/") for keys in keys_of_steps(run).values() for key in keys}
    assert trained
    assert not trained & held_keys(runs.config(run, LOSS))
    changed = {"stages": [{"at": 3, "name": "other", "validation": {"share": 0.1}}]}
    error = runs.here(tmp_path / "other", CHANGES, LOSS, changed).error
    assert error == "stage 'other' changes validation.share, which holds for the whole run; remove it there"


@pytest.mark.parametrize("given", [{"every_steps": 5}, {"share": 0.1, "path": "x"}])
def test_settings_that_do_not_go_together(runs, tmp_path, given):
    with pytest.raises(UserError, match="validation") as caught:
        runs.config(tmp_path, {"validation": given})
    assert "\n" not in str(caught.value)


ZERO = {
    stage: {"deepspeed": {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100}}}
    for stage in (0, 2, 3)
}


@pytest.mark.slow
def test_the_same_weights_have_the_same_bits_anywhere(runs, tmp_path):
    """A finished run whose losses are gone takes them again: by other processes, stages and micro-batches."""
    many = {"validation": {"samples": 50, "share": 0.5}, "data": {"source": "digits"}}
    first = tmp_path / "first"
    assert runs.here(first, CHANGES, LOSS, many).error is None
    wanted = [record for record in lines(first) if record["step"] == 5]
    assert len(wanted[0]["losses"]) == 50
    for ranks, micro, stage in ((1, 8, 2), (1, 1, 0), (2, 4, 0), (2, 1, 2), (2, 2, 3)):
        run = tmp_path / f"{ranks}-{micro}-{stage}"
        shutil.copytree(first, run)
        (run / "validation.jsonl").unlink()
        job = runs.job(run, CHANGES, LOSS, many, ZERO[stage], {"data": {"micro_batch": micro}}, resume="auto")
        results = runs.forked([job], ranks=ranks)[run.name]
        assert [result.error for result in results] == [None] * ranks
        assert lines(run) == wanted


@pytest.mark.slow
def test_runs_of_one_and_two_processes(runs, tmp_path):
    """From the first step on: equal up to the order in which gradients are added."""
    jobs = {(ranks, stage): tmp_path / f"{ranks}-{stage}" for ranks in (1, 2) for stage in (0, 2, 3)}
    for ranks in (1, 2):
        mine = [runs.job(jobs[ranks, stage], CHANGES, LOSS, KEYS, ZERO[stage]) for stage in (0, 2, 3)]
        results = runs.forked(mine, ranks=ranks)
        assert {result.error for name in results for result in results[name]} == {None}
    wanted = lines(jobs[1, 0])
    held = held_keys(runs.config(tmp_path, LOSS))
    for run in jobs.values():
        for record, one in zip(lines(run), wanted, strict=True):
            assert record["losses"] == pytest.approx(one["losses"], rel=1e-6)
            assert record["set"] == one["set"]
        assert not {key for keys in keys_of_steps(run).values() for key in keys} & held


BASE = {
    "run": {"steps": 40},
    "model": {"width": 48, "heads": 2},
    "objective": {"prediction": "velocity"},
    "data": {"source": "digits", "global_batch": 16, "micro_batch": 16},
    "optimizer": {"lr": 6e-3},
    "schedule": {"kind": "constant"},
    "ema": {"enabled": False},
    "validation": {"every_steps": 1000, "share": 0.05, "samples": 32, "times": 4},
}
BETTER = {"base": {}, "wide": {"model": {"width": 96}}, "deep": {"model": {"depth": 4}}}
WORSE = {
    "a hundredth of the learning rate": {"optimizer": {"lr": 6e-5}},
    "narrow": {"model": {"width": 8, "heads": 1}},
    "a quarter of the steps": {"run": {"steps": 10}},
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_ranks_better_settings_over_worse_ones(runs, tmp_path, seed):
    def loss(name, changes):
        run = tmp_path / name
        train(parse_config(runs.values(run, BASE, changes, {"run": {"seed": seed}}), name))
        (record,) = lines(run)
        assert len(record["losses"]) == 32
        return record["loss"], record["set"]

    better = {name: loss(name, changes) for name, changes in BETTER.items()}
    worse = {name: loss(name, changes) for name, changes in WORSE.items()}
    assert max(value for value, _ in better.values()) < min(value for value, _ in worse.values())
    assert len({looked_at for _, looked_at in (better | worse).values()}) == 1
    assert all(map(math.isfinite, (value for value, _ in worse.values())))
