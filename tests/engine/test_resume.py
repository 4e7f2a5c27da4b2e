"""A run that was killed and resumed is the run that was never stopped."""

import random
import shutil

import pytest
import torch

from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from tests.engine.run_states import copy_until

pytestmark = pytest.mark.slow

STEPS = 12
CHANGES = {
    "run": {"steps": STEPS},
    "optimizer": {"eps": 1e-6},
    "ema": {"start": 3, "every": 2},
    "checkpoint": {"every_steps": 2, "keep": 20},
    "model": {"depth": 3},
    "routing": {"policy": "tread", "start": 1, "end": 1},
}
KILLS = 10


def stage(number):
    return {"deepspeed": {"zero_optimization": {"stage": number}}}


def state_of(run):
    """Everything in the newest checkpoint of a run, and its counters."""
    reader = CheckpointReader(list_checkpoints(run / "checkpoints")[-1][1])
    counters = {name: reader.meta[name] for name in ("step", "samples", "skipped", "updates")}
    return counters, {name: reader.tensor(name) for name in reader.names()}


def assert_same_run(runs, run, whole):
    """Every logged number and every stored bit agree."""
    assert runs.log(run) == runs.log(whole)
    (counters, tensors), (wanted_counters, wanted) = state_of(run), state_of(whole)
    assert counters == wanted_counters
    kinds = {name.partition("/")[0] for name in wanted}
    assert kinds - {"buffer", "momentum"} == {"master", "exp_avg", "exp_avg_sq", "ema"}
    assert tensors.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(tensors[name], wanted[name])] == []


def assert_similar_run(runs, run, whole):
    """Losses within 1e-4; so are the weights, relative to the largest of their tensor."""
    for found, wanted in zip(runs.log(run), runs.log(whole), strict=True):
        assert found["step"] == wanted["step"]
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
    (counters, tensors), (wanted_counters, wanted) = state_of(run), state_of(whole)
    assert counters == wanted_counters
    for name in wanted:
        assert (tensors[name] - wanted[name]).abs().max() <= 1e-4 * wanted[name].abs().max(), name


@pytest.fixture(scope="module")
def killed(runs, tmp_path_factory):
    """(folder with whole-<stage> and killed-<i>, what each killed run left behind)."""
    root = tmp_path_factory.mktemp("killed")
    rng = random.Random(7)
    jobs = []
    for number in range(4):
        jobs.append(runs.job(root / f"whole-{number}", CHANGES, stage(number)))
    for i in range(KILLS):
        moment = (f"whole-{i % 4}", (i + rng.random()) / KILLS)
        jobs.append(runs.job(root / f"killed-{i}", CHANGES, stage(i % 4), killed=moment))
    runs.forked(jobs)
    left = {
        i: {path.relative_to(root / f"killed-{i}").as_posix() for path in (root / f"killed-{i}").rglob("*")}
        for i in range(KILLS)
    }
    resumed = [runs.job(root / f"killed-{i}", CHANGES, stage(i % 4), resume="auto") for i in range(KILLS)]
    results = runs.forked(resumed)
    assert [result.error for (result,) in results.values()] == [None] * KILLS
    return root, left


@pytest.mark.parametrize("i", range(KILLS))
def test_killed_and_resumed_is_bit_identical(runs, killed, i):
    root, _ = killed
    assert_same_run(runs, root / f"killed-{i}", root / f"whole-{i % 4}")


def test_kills_hit_training_and_saving(killed):
    """What the test above relies on: runs died at different places, some of them inside a save."""
    _, left = killed
    saving = [i for i in left if any("/.tmp-step-" in path for path in left[i])]
    assert 2 <= len(saving) <= KILLS - 2
    published = [sum(path.endswith("manifest.sha256") for path in left[i]) for i in left]
    assert published == sorted(published)
    assert len(set(published)) >= 5


@pytest.mark.parametrize(("before", "after"), [(0, 3), (1, 0), (3, 2)])
def test_another_stage_continues_the_run(runs, killed, tmp_path, before, after):
    root, _ = killed
    run = copy_until(root / f"whole-{before}", 6, tmp_path / "run")
    assert runs.here(run, CHANGES, stage(after), resume="auto").error is None
    assert_similar_run(runs, run, root / f"whole-{before}")


@pytest.mark.parametrize("number", [0, 3])
def test_sprint_continues_bit_identically(runs, tmp_path, number):
    """With the paper's routing, whose frozen mask token is no parameter and still the run's own."""
    sprint = {"policy": "sprint", "structured": True, "mask_token": "frozen", "path_drop": 0.4}
    changes = (CHANGES, {"routing": sprint, "run": {"steps": 6}}, stage(number))
    assert runs.here(tmp_path / "whole", *changes).error is None
    run = copy_until(tmp_path / "whole", 2, tmp_path / "run")
    first = CheckpointReader(list_checkpoints(run / "checkpoints")[-1][1]).tensor("buffer/fusion.mask_token")
    assert first.any()
    assert runs.here(run, *changes, resume="auto").error is None
    assert_same_run(runs, run, tmp_path / "whole")
    assert torch.equal(state_of(run)[1]["buffer/fusion.mask_token"], first)


@pytest.mark.parametrize("number", [0, 2, 3])
def test_muon_killed_and_resumed_is_bit_identical(runs, tmp_path, number):
    changes = (CHANGES, {"optimizer": {"kind": "muon"}}, stage(number))
    killed = runs.job(tmp_path / "killed", *changes, killed=("whole", 0.55))
    runs.forked([runs.job(tmp_path / "whole", *changes), killed])
    reached = [step for step, _ in list_checkpoints(tmp_path / "killed" / "checkpoints")]
    assert 0 < len(reached) < STEPS // 2
    assert runs.here(tmp_path / "killed", *changes, resume="auto").error is None
    assert_same_run(runs, tmp_path / "killed", tmp_path / "whole")
    assert (
        len([name for name in state_of(tmp_path / "whole")[1] if name.startswith("momentum/")]) == 3 * 4 + 2
    )


def test_muon_goes_on_at_another_stage_and_not_with_adamw(runs, tmp_path):
    muon = {"optimizer": {"kind": "muon", "muon": {"dtype": "float32"}}, "run": {"steps": 6}}
    assert runs.here(tmp_path / "whole", CHANGES, muon, stage(2)).error is None
    run = copy_until(tmp_path / "whole", 2, tmp_path / "run")
    refused = runs.here(run, CHANGES, stage(0), resume="auto").error
    assert "not the optimizer state of this configuration: 28 missing" in refused
    assert "14 unknown (momentum/blocks.0.attn_out.weight, " in refused
    assert runs.here(run, CHANGES, muon, stage(0), resume="auto").error is None
    assert_similar_run(runs, run, tmp_path / "whole")


@pytest.fixture(scope="module")
def on_two(runs, killed, tmp_path_factory):
    """Runs of one process at ZeRO 0, continued on two from step 6 at each stage."""
    root = tmp_path_factory.mktemp("on_two")
    jobs = []
    for number in range(4):
        run = copy_until(killed[0] / "whole-0", 6, root / f"zero{number}")
        jobs.append(runs.job(run, CHANGES, stage(number), resume="auto"))
    for name, results in runs.forked(jobs, ranks=2).items():
        assert [result.error for result in results] == [None, None], name
    return root


@pytest.mark.parametrize("number", range(4))
def test_two_processes_continue_the_run_of_one(runs, killed, on_two, number):
    assert_similar_run(runs, on_two / f"zero{number}", killed[0] / "whole-0")


@pytest.mark.parametrize(("before", "after"), [(0, 1), (3, 3)])
def test_one_process_continues_the_run_of_two(runs, killed, on_two, tmp_path, before, after):
    run = copy_until(on_two / f"zero{before}", 8, tmp_path / "run")
    assert runs.here(run, CHANGES, stage(after), resume="auto").error is None
    assert_similar_run(runs, run, killed[0] / "whole-0")


def test_a_flipped_bit_in_the_newest_checkpoint(runs, killed, tmp_path):
    """`auto` names the file, takes the checkpoint before and ends the same; a step asked for is refused."""
    root, _ = killed
    run = copy_until(root / "whole-0", 8, tmp_path / "run")
    shard = run / "checkpoints" / "step-00000008" / "shard-00000-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)

    refused = runs.train(run, CHANGES, arguments=("--resume", "8"))
    assert refused.returncode == 2
    (error,) = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert shard.name in error
    assert "sha256" in error
    assert "Traceback" not in refused.stderr

    done = runs.train(run, CHANGES, arguments=("--resume", "auto"))
    assert done.returncode == 0
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("not resuming from")]
    assert "step-00000008" in said
    assert shard.name in said
    assert "resumed at step 6, sample 48" in done.stderr
    assert_same_run(runs, run, root / "whole-0")


def test_a_step_asked_for_drops_what_came_after(runs, killed, tmp_path, capsys):
    root, _ = killed
    run = shutil.copytree(root / "whole-0", tmp_path / "run")
    assert runs.here(run, CHANGES, resume="4").error is None
    said = capsys.readouterr().err
    assert "also holds checkpoints of later steps (6, 8, 10, 12)" in said
    assert_same_run(runs, run, root / "whole-0")


def test_a_finished_run_stays_as_it_is(runs, killed, tmp_path):
    root, _ = killed
    run = shutil.copytree(root / "whole-0", tmp_path / "run")
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert runs.here(run, CHANGES, resume="auto").error is None
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names
    assert_same_run(runs, run, root / "whole-0")


def test_what_a_setting_cannot_change_is_named(runs, tmp_path):
    """SPRINT's fusion is part of the model; other routing may come and go."""
    sprint, dense = {"routing": {"policy": "sprint"}}, {"routing": {"policy": "none"}}
    two, four = {"run": {"steps": 2}}, {"run": {"steps": 4}}
    assert runs.here(tmp_path / "a", CHANGES, sprint, two).error is None
    refused = runs.here(tmp_path / "a", CHANGES, dense, four, resume="auto").error
    assert "was trained with routing.policy sprint, not none" in refused
    assert "set routing.drop to 0 to train on all tokens" in refused
    assert runs.here(tmp_path / "b", CHANGES, two).error is None
    assert (
        "start another run with run.init_from"
        in runs.here(tmp_path / "b", CHANGES, sprint, four, resume="auto").error
    )
    assert runs.here(tmp_path / "b", CHANGES, dense, four, resume="auto").error is None
