"""A logged step made again: to the last bit, in a folder of its own."""

import json
import random
from pathlib import Path

import pytest

from millrace.engine import replay as command
from millrace.engine.config.loading import parse_config
from millrace.engine.distributed import process_group
from millrace.engine.replay_trainer import replay
from millrace.engine.util.errors import UserError

TWO = {
    "run": {"steps": 24},
    "precision": {"compute": "bfloat16"},
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "checkpoint": {"every_steps": 6},
    "logging": {"every_steps": 5, "sample_keys": True},
}
STEPS = sorted(random.Random(17).sample(range(1, 25), 10))


def replay_all(run, steps):
    process_group.join("cpu")
    return [replay(Path(run), step, most=10) for step in steps]


def logged(run):
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {record["step"]: record for record in records}


def listing(run):
    return {str(path): path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def of_two(runs, tmp_path_factory):
    """A run of two processes at ZeRO 2."""
    job = runs.job(tmp_path_factory.mktemp("replayed") / "two", TWO)
    assert [result.error for result in runs.forked([job], ranks=2)["two"]] == [None, None]
    return Path(job.config["run"]["output_dir"])


def test_ten_random_steps_to_the_last_bit(of_two, runs):
    before, wanted = listing(of_two), logged(of_two)
    found = runs.apart(replay_all, str(of_two), STEPS, ranks=2)
    assert [replayed.step for replayed in found] == STEPS
    for replayed in found:
        record = wanted[replayed.step]
        for name in ("loss", "losses", "loss_by_time", "grad_norm", "lr"):
            assert replayed.record[name] == record[name], (replayed.step, name)
        assert replayed.same_keys is True
        indices = [sample["index"] for sample in replayed.samples]
        assert indices == list(range(8 * (replayed.step - 1), 8 * replayed.step))
        losses = [sample["loss"] for sample in replayed.samples]
        assert sum(losses) / len(losses) == pytest.approx(record["loss"], rel=1e-6)
        for sample in replayed.samples:
            assert sample["loss_alone"] == pytest.approx(sample["loss"], rel=0.05)  # BF16, another batch
            assert sample["norm_alone"] > 0
    assert listing(of_two) == before


def test_another_number_of_processes_is_refused(of_two, runs):
    done = runs.script("replay", of_two, "--step", 8)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "step 8 was trained by 2 processes, this is 1; start it as torchrun --nproc-per-node 2" in line


@pytest.fixture(scope="module")
def staged(runs, tmp_path_factory):
    """A run of single samples in two stages, of which the last checkpoint alone is left."""
    output = tmp_path_factory.mktemp("replayed") / "staged"
    changes = {
        "run": {"steps": 6},
        "data": {"global_batch": 1, "micro_batch": 1},
        "checkpoint": {"keep": 1},
        "sampling": {"every_steps": 3, "steps": 1},
        "stages": [{"at": 3, "optimizer": {"lr": 5e-4}, "sampling": {"every_steps": 2}}],
    }
    assert runs.here(output, changes).error is None
    return output


def test_through_a_stage_from_the_first_weights(staged, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)  # training here joined a job
    path = tmp_path / "step.json"
    assert command.main([str(staged), "--step", "5", "--output", str(path)]) == 0
    out, record = capsys.readouterr().out, logged(staged)[5]
    assert f"step 5 of {staged}, from the weights that the run began with, 4 steps between" in out
    assert f"loss {record['loss']!r}: the logged one to the last bit" in out
    assert f"gradient norm {record['grad_norm']!r}: the logged one to the last bit" in out
    (sample,) = json.loads(path.read_text())["samples"]
    assert sample["key"] in out
    # The only sample of its step: its norm is the step's.
    assert sample["norm_alone"] == pytest.approx(record["grad_norm"], rel=1e-5)
    assert sample["loss_alone"] == pytest.approx(record["loss"], rel=1e-6)


def test_what_cannot_be_replayed(staged):
    with pytest.raises(UserError, match=r"step 9 is not in log\.jsonl, which has steps 1 to 6"):
        replay(staged, 9, most=10)
    with pytest.raises(UserError, match=r"at most 2 steps before it.*can be replayed: 1 to 3$"):
        replay(staged, 5, most=2)  # checkpoints of steps 0, so to speak, and 6


def test_a_difference_is_told(staged):
    found = replay(staged, 2, most=10)
    lines = command.table(found._replace(logged={"loss": 1.5}), show=0)
    assert any(line.startswith(f"loss {found.record['loss']!r}: NOT the logged 1.5; ") for line in lines)
    assert lines[-1] == "0 of 1 samples shown; --show has them"


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": {"contrastive_weight": 0.05}},
        {"routing": {"policy": "tread", "start": 1, "end": 1, "drop": 0.5}},
        {"data": {"aspect": "mixed"}, "validation": {"every_steps": 1, "share": 0.3, "times": 2}},
    ],
    ids=["contrastive", "tread", "mixed, some held out"],
)
def test_samples_alone_have_the_losses_of_the_step(changes, runs, tmp_path):
    output = tmp_path / "run"
    assert runs.here(output, {"run": {"steps": 2}}, changes).error is None
    found = replay(output, 2, most=10)
    assert found.record["loss"] == logged(output)[2]["loss"]
    if "objective" in changes:
        assert "norms without that term" in found.remarks[0]
        return
    for sample in found.samples:
        assert sample["loss_alone"] == pytest.approx(sample["loss"], rel=1e-4)


def test_configuration_of_a_replay_is_the_run_s(runs, tmp_path):
    from millrace.engine.replay_trainer import _in_folder

    config = runs.config(tmp_path, {"run": {"steps": 9}})
    quiet = _in_folder(config, "/elsewhere").model_dump(mode="json")
    values = config.model_dump(mode="json")
    values["run"]["output_dir"] = "/elsewhere"
    for name in ("logging", "sampling", "evaluation", "validation"):
        values[name] = quiet[name]
    assert parse_config(quiet, "quiet") == parse_config(values, "values")
