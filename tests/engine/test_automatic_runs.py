"""Runs whose settings choose themselves: stored as numbers, the same on every rank, and when resumed."""

import json

import pytest

from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from millrace.engine.config.loading import merge, parse_config
from millrace.engine.config.stages import resolve_stages
from millrace.engine.planning.automatic import automatic
from tests.engine.test_resume import copy_until

AUTOMATIC = {
    "data": {"micro_batch": "auto"},
    "run": {"activation_checkpointing": {"policy": "auto"}},
    "deepspeed": {"zero_optimization": "auto"},
    "checkpoint": {"every_steps": 2},
}
STAGES = {"stages": [{"at": 3, "name": "larger", "data": {"resolution": 32}}]}


def recorded(output):
    """The configuration in the run's folder and that of its newest checkpoint, which agree."""
    values = json.loads((output / "config.json").read_text())
    reader = CheckpointReader(list_checkpoints(output / "checkpoints")[-1][1])
    assert reader.meta["config"] == values
    return parse_config(values, "config.json")


@pytest.fixture(scope="module", params=[1, 2])
def trained(request, runs, tmp_path_factory):
    """Processes, a whole run, and one that goes on from its second step."""
    folder, ranks = tmp_path_factory.mktemp("automatic"), request.param
    whole, part = folder / "whole", folder / "part"
    found = runs.forked([runs.job(whole, AUTOMATIC, STAGES)], ranks=ranks)
    copy_until(whole, 2, part)
    found |= runs.forked([runs.job(part, AUTOMATIC, STAGES, resume="auto")], ranks=ranks)
    assert {name: [rank.error for rank in results] for name, results in found.items()} == {
        name: [None] * ranks for name in ("whole", "part")
    }
    return ranks, whole, part


def test_what_was_chosen_is_recorded(trained):
    ranks, whole, _ = trained
    config = recorded(whole)
    assert config.data.micro_batch == 8 // ranks
    for stage in resolve_stages(config):
        assert automatic(stage.config) == []
        assert config.data.global_batch % (stage.config.data.micro_batch * ranks) == 0


def test_a_resumed_run_ends_in_the_same_bits(runs, trained):
    _, whole, part = trained
    runs.assert_same_bits(part, whole)
    folder = {"run": {"output_dir": ""}}
    one, other = (recorded(run).model_dump(mode="json") for run in (part, whole))
    assert merge(one, folder) == merge(other, folder)


def test_a_run_says_why_and_resumes_as_it_was(runs, tmp_path):
    output = tmp_path / "run"
    first = runs.train(output, AUTOMATIC, {"run": {"steps": 2}})
    assert first.returncode == 0, first.stderr
    assert "auto: micro-batch 8, ZeRO 0, no checkpointing: " in first.stderr
    assert "by the planner on 1 x processor of this machine" in first.stderr
    again = runs.train(output, AUTOMATIC, {"run": {"steps": 3}}, arguments=("--resume", "auto"))
    assert again.returncode == 0, again.stderr
    assert "auto: as in the checkpoint: micro-batch 8, ZeRO 0" in again.stderr
    assert "changed since the checkpoint: run.steps\n" in again.stderr


def test_what_cannot_go_is_refused_in_one_line(runs, tmp_path):
    done = runs.train(tmp_path / "run", AUTOMATIC, {"data": {"global_batch": 9, "micro_batch": 2}})
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "data.global_batch 9 is not a multiple of data.micro_batch 2 x 1 process(es)" in done.stderr


def test_a_configuration_is_printed_as_it_is_given(runs, tmp_path):
    done = runs.train(tmp_path / "run", AUTOMATIC, arguments=("--print-config",))
    assert json.loads(done.stdout)["data"]["micro_batch"] == "auto"


def test_a_smoke_run_begins_anew(runs, tmp_path):
    """Though its record holds numbers where its configuration says `auto`."""
    for _ in range(2):
        done = runs.train(
            tmp_path / "run",
            AUTOMATIC,
            arguments=("--smoke", "--set", f"run.output_dir={tmp_path / 'elsewhere'}"),
        )
        assert done.returncode == 0, done.stderr
