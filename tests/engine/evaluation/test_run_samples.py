"""Evaluation during training: it tells, and training does not notice."""

import json

import pytest
import torch

from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.evaluation.features import tiny_features, tiny_networks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """Changes that evaluate every second step, after a random number in between was drawn from torch."""
    folder = tmp_path_factory.mktemp("features")
    section = {"every_steps": 2, "samples": 5, "cache": str(folder / "cache")}
    return {"evaluation": section | {"features": tiny_features(tiny_networks(folder))}}


def assert_same_weights(runs, first, second):
    (counters, tensors), (wanted_counters, wanted) = runs.state_of(first), runs.state_of(second)
    assert counters == wanted_counters
    assert tensors.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(tensors[name], wanted[name])] == []


def lines(run):
    found = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in found if "evaluation" not in line], [x for x in found if "evaluation" in x]


CHANGES = {"run": {"steps": 5}, "sampling": {"steps": 2}, "logging": {"every_steps": 3}}


def test_same_bits_where_the_weights_themselves_are_sampled_from(runs, tmp_path, evaluation):
    """At stage 0 without averages, the sampler's tensors are those that are trained."""
    without = {"ema": {"enabled": False}}
    assert (
        runs.here(tmp_path / "on", CHANGES, evaluation, without, {"sampling": {"every_steps": 1}}).error
        is None
    )
    assert runs.here(tmp_path / "off", CHANGES, without).error is None
    assert_same_weights(runs, tmp_path / "on", tmp_path / "off")


def test_samples_are_drawn_after_the_checkpoint_of_their_step(runs, tmp_path, monkeypatch):
    """A stop is heard after them; an error of the drawing ends nothing."""
    seen, run = [], tmp_path / "run"
    drawn = {"sampling": {"every_steps": 1}, "checkpoint": {"every_steps": 2, "blocking": True}}

    def draw(_sampler, _config, _prompts, path, _origin):
        seen.append((path.stem, [step for step, _ in list_checkpoints(run / "checkpoints")]))
        path.parent.mkdir(exist_ok=True)
        path.touch()
        if path.stem == "step-00000002":
            (run / "stop").touch()
        if path.stem == "step-00000003":
            raise RuntimeError("out of memory")

    monkeypatch.setattr("millrace.engine.distributed.signals.LOOK_SECONDS", 0.0)
    monkeypatch.setattr("millrace.engine.evaluation.run_samples.draw_grid", draw)
    monkeypatch.setattr("millrace.engine.evaluation.run_samples.RunLog.grid", lambda *_: None)
    assert runs.here(run, CHANGES, drawn).error is None
    assert seen == [("step-00000001", []), ("step-00000002", [2])]
    assert runs.here(run, CHANGES, drawn, resume="auto").error is None
    assert seen[2:] == [("step-00000003", [2]), ("step-00000004", [2, 4]), ("step-00000005", [2, 4, 5])]


def test_same_bits_with_and_without(runs, tmp_path, evaluation):
    on, off = tmp_path / "on", tmp_path / "off"
    with_board = {"logging": {"tensorboard": True}}
    assert runs.here(on, CHANGES, evaluation, with_board).error is None
    assert runs.here(off, CHANGES).error is None
    assert_same_weights(runs, on, off)
    steps, evaluated = lines(on)
    without, none = lines(off)
    assert none == []
    assert [line["loss"] for line in steps] == [line["loss"] for line in without]
    assert [line["step"] for line in evaluated] == [2, 4, 5]
    assert all({"fid", "cmmd", "dino_mmd"} <= line["evaluation"].keys() for line in evaluated)
    assert len({line["evaluation"]["cmmd"] for line in evaluated}) == 3
    written = [json.loads(line)["step"] for line in (on / "log.jsonl").read_text().splitlines()]
    assert written == sorted(written)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(on / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("metrics/fid")] == [2, 4, 5]
    found = [event.value for event in events.Scalars("metrics/cmmd")]
    assert found == pytest.approx([line["evaluation"]["cmmd"] for line in evaluated])


def test_a_resumed_run_has_each_evaluation_once(runs, tmp_path, evaluation):
    whole, run = tmp_path / "whole", tmp_path / "run"
    often = {"checkpoint": {"every_steps": 2}}
    assert runs.here(whole, CHANGES, evaluation, often).error is None
    assert runs.here(run, CHANGES, evaluation, often).error is None
    before = lines(run)[1]
    assert runs.here(run, CHANGES, evaluation, often, resume="2").error is None
    assert [line["step"] for line in lines(run)[1]] == [2, 4, 5]
    metrics = ("fid", "cmmd", "dino_mmd")
    for old, new in zip(before, lines(run)[1], strict=True):
        assert all(old["evaluation"][name] == new["evaluation"][name] for name in metrics)
    assert_same_weights(runs, run, whole)


def test_what_a_killed_run_had_not_made_is_made_by_the_next(runs, tmp_path, evaluation, monkeypatch):
    """It died between a save and the samples of the same step; so does one that is asked to stop there."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    changes = (
        CHANGES,
        evaluation,
        {"checkpoint": {"every_steps": 2}, "sampling": {"every_steps": 2, "count": 2}},
    )
    assert runs.here(whole, *changes).error is None

    class Killed(BaseException):
        pass

    def die(samples, step, *_):
        raise Killed

    monkeypatch.setattr("millrace.engine.evaluation.run_samples.RunSamples._evaluate", die)
    with pytest.raises(Killed):
        runs.here(run, *changes)
    monkeypatch.undo()
    grid = run / "samples" / "step-00000002.png"
    drawn = grid.stat().st_mtime_ns
    assert runs.here(run, *changes, resume="auto").error is None
    assert grid.stat().st_mtime_ns == drawn  # which was there
    assert [line["step"] for line in lines(run)[1]] == [2, 4, 5]
    for old, new in zip(lines(whole)[1], lines(run)[1], strict=True):
        assert all(old["evaluation"][name] == new["evaluation"][name] for name in ("fid", "cmmd"))
    assert sorted(p.name for p in (run / "samples").iterdir()) == sorted(
        p.name for p in (whole / "samples").iterdir()
    )
    assert_same_weights(runs, run, whole)


def test_two_processes_and_zero(runs, tmp_path, evaluation):
    """Weights as without evaluation, at stage 3; metrics of two processes as of one, up to their weights."""
    zero = {"deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100}}}
    many = {"evaluation": {"samples": 40}}
    jobs = [
        runs.job(tmp_path / "on", CHANGES, evaluation, many, zero),
        runs.job(tmp_path / "off", CHANGES, zero),
    ]
    results = runs.forked(jobs, ranks=2)
    assert [result.error for name in results for result in results[name]] == [None] * 4
    assert_same_weights(runs, tmp_path / "on", tmp_path / "off")
    assert runs.here(tmp_path / "one", CHANGES, evaluation, many).error is None
    one, two = (lines(tmp_path / name)[1] for name in ("one", "on"))
    for ours, theirs in zip(one, two, strict=True):
        for metric in ("fid", "cmmd", "dino_mmd"):
            assert theirs["evaluation"][metric] == pytest.approx(ours["evaluation"][metric], rel=0.02)


def test_what_cannot_be_opened_ends_the_run_before_its_first_step(runs, tmp_path, evaluation):
    wrong = {"evaluation": {"features": {"cmmd": str(tmp_path / "nowhere")}}}
    error = runs.here(tmp_path / "run", CHANGES, evaluation, wrong).error
    assert "set evaluation.features.cmmd to" in error
    assert lines(tmp_path / "run")[0] == []


def test_a_run_goes_on_without_metrics_that_lack_something(runs, tmp_path, evaluation, capsys):
    """It says so in one line, and ends in the bits of a run that was never asked for them."""
    section = {**evaluation["evaluation"], "reference": "no/such", "missing": "skip"}
    done = runs.here(tmp_path / "on", CHANGES, {"evaluation": section})
    assert done.error is None
    told = [line for line in capsys.readouterr().err.splitlines() if "this run computes no" in line]
    assert len(told) == 1
    assert "warning: this run computes no FID, CMMD, DINO-MMD. Missing: no/such: no such folder" in told[0]
    assert runs.here(tmp_path / "off", CHANGES).error is None
    assert_same_weights(runs, tmp_path / "on", tmp_path / "off")
    assert lines(tmp_path / "on")[1] == []
