"""Runs under a cluster's conditions: Slurm's variables, a second start, stops at any moment, supervision."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.distributed.run_lock import NAME
from millrace.engine.run_log.failures import DEATHS
from tests.engine.forks import run_script, wait_for
from tests.engine.moments import MOMENTS, die_in, fetch, polls, run_slowly, run_until
from tests.engine.test_resume import assert_same_run
from tests.programs import environment

pytestmark = pytest.mark.slow

STOPPED = {
    "run": {"steps": 9},
    "checkpoint": {"every_steps": 4},
    "sampling": {"every_steps": 2, "count": 1, "steps": 1},
    "stages": [{"at": 5, "name": "second", "optimizer": {"lr": 5e-4}}],
}
ALONE = {"data": {"workers": 1}}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def slurm(number, tasks, per_machine):
    """Variables that srun gives task `number`."""
    machines = tasks // per_machine
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": str(tasks),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number % per_machine),
        "SLURM_NODEID": str(number // per_machine),
        "SLURM_STEP_NODELIST": f"127.0.0.[1-{machines}]",
        "SLURM_STEP_TASKS_PER_NODE": f"{per_machine}(x{machines})",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def srun(runs, words, tasks, per_machine, function=run_script, ranks=True):
    """A stand-in for srun: codes and error output of the tasks."""
    port, children = str(free_port()), []
    for number in range(tasks):
        given = slurm(number, tasks, per_machine) | {"MASTER_PORT": port}
        if not ranks:
            given = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": str(tasks)}
        children.append(runs.forks.start(function, *words, **given))
    codes = wait_for(children)
    return codes, [child.text("err") for child in children]


def training(runs, output, *changes, arguments=()):
    """Words of train.py for `run_script`."""
    command = runs.command(output, *changes, arguments=arguments)
    return Path(command[1]), command[2:]


def test_eight_tasks_of_srun_on_two_machines_are_one_job(runs, tmp_path):
    output = tmp_path / "run"
    script, words = training(runs, output, {"run": {"steps": 3}, "data": {"global_batch": 16}})
    codes, errors = srun(runs, (script, words), 8, 4)
    assert codes == [0] * 8, errors
    ((step, folder),) = list_checkpoints(output / "checkpoints")
    assert step == 3
    assert len(list(folder.glob("shard-*-of-00008.safetensors"))) == 8
    assert len(runs.log(output)) == 3
    assert not (output / NAME).exists()


def test_eight_tasks_without_ranks_are_refused_in_one_line_each(runs, tmp_path):
    output = tmp_path / "run"
    script, words = training(runs, output, {"run": {"steps": 3}})
    codes, errors = srun(runs, (script, words), 8, 4, ranks=False)
    assert 2 in codes
    said = [line for error in errors for line in error.splitlines()]
    assert set(said) == {said[0]}
    assert said[0].startswith("error: Slurm says 8 tasks, but SLURM_PROCID is not set")
    assert not output.exists()


def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_second_start_is_refused_and_the_first_goes_on(runs, tmp_path):
    output = tmp_path / "run"
    endless = {"run": {"steps": 100_000}, "checkpoint": {"every_steps": 100_000}}
    script, words = training(runs, output, endless)
    first = runs.forks.start(run_script, script, words)
    try:
        wait_until(lambda: (output / "log.jsonl").exists() and len(runs.log(output)) > 2)
        second = runs.script("train", *words, "--resume", "auto", ranks=2)
        assert second.returncode == 2
        (line,) = second.stderr.splitlines()
        assert line.startswith(f"error: {output}: a run writes here already: process {first.pid} on ")
        steps = len(runs.log(output))
        wait_until(lambda: len(runs.log(output)) > steps)
        # kill -9 leaves the lock; the next start takes it over.
        os.kill(first.pid, signal.SIGKILL)
        wait_until(lambda: first.poll() is not None)
    finally:
        first.kill()
    assert (output / NAME).exists()
    more = runs.train(output, endless, {"run": {"steps": 2}}, arguments=("--resume", "auto"))
    assert more.returncode == 0
    assert f"taken over from process {first.pid}" in more.stderr
    assert not (output / NAME).exists()


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """The run that nobody stops, on one rank and on two."""
    folder = tmp_path_factory.mktemp("whole")
    for ranks in (1, 2):
        runs.forked([runs.job(folder / str(ranks), STOPPED)], ranks)
    return folder


def stopped(runs, output, moment, ranks, asked=-1, stuck=-1):
    """Codes and the line that says where it stopped."""
    words = training(runs, output, STOPPED, ALONE if moment == "no data comes" else {})[1]
    children = runs._start(ranks, run_until, words, moment, asked % ranks, stuck % ranks)
    codes = wait_for(children)
    said = [line for child in children for line in child.text("err").splitlines()]
    return codes, [line for line in said if line.startswith(("stopped", "finished", "error"))]


def assert_goes_on(runs, output, ranks, whole):
    """--resume auto makes the run that was never stopped, bit for bit."""
    runs.forked([runs.job(output, STOPPED, resume="auto")], ranks)
    assert_same_run(runs, output, whole / str(ranks))


AT = {
    # moment: step of the checkpoint on one rank, and on two, where a poll is read one step later
    "it is built": (0, 0),
    "it waits for a batch": (3, 4),
    "it computes": (3, 4),
    "gradients are applied": (3, 4),
    "it draws samples": (2, 2),
    "it saves": (4, 4),
    "a stage ends": (5, 5),
    "the next stage is built": (5, 5),
    "the last step": (9, 9),
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("moment", MOMENTS)
def test_sigterm_at_any_moment(runs, tmp_path, whole, moment, ranks):
    output = tmp_path / "run"
    codes, said = stopped(runs, output, moment, ranks)
    assert codes == [0] * ranks
    step = AT[moment][ranks - 1]
    if step < 9:
        assert said == [f"stopped at step {step} (SIGTERM); continue with --resume auto"]
    else:
        assert said == ["finished: 9 steps, 72 samples, 0 steps skipped"]
    assert [found for found, _ in list_checkpoints(output / "checkpoints")][-1:] == ([step] if step else [])
    assert_goes_on(runs, output, ranks, whole)


@pytest.mark.parametrize(("ranks", "asked", "stuck"), [(1, 0, 0), (2, 1, 1), (2, 0, 1)])
def test_sigterm_while_no_data_comes(runs, tmp_path, whole, ranks, asked, stuck):
    """The step is given up on all ranks, also where the rank without data is not the one that was asked."""
    output = tmp_path / "run"
    codes, said = stopped(runs, output, "no data comes", ranks, asked, stuck)
    assert codes == [0] * ranks
    assert said == ["stopped at step 3 (SIGTERM); continue with --resume auto"]
    assert [found for found, _ in list_checkpoints(output / "checkpoints")] == [3]
    assert_goes_on(runs, output, ranks, whole)


@pytest.mark.parametrize("asked", [0, 1])
def test_a_poll_is_one_integer_and_read_one_step_later(runs, tmp_path, asked):
    children = runs._start(2, polls, tmp_path, asked, 3, 4)
    assert wait_for(children) == [0, 0]
    # Asked before the fourth poll; the fifth reads its own. Words travel once.
    assert [child.result() for child in children] == [([None, None, None, None, "SIGTERM"], 5, 1)] * 2


@pytest.mark.parametrize(
    ("failing", "found"),
    [
        (None, ["hub", "cache"]),
        (0, ["UserError: the hub does not answer", "FailedElsewhere: the hub does not answer"]),
        (1, ["FailedElsewhere: the hub does not answer", "UserError: the hub does not answer"]),
    ],
)
def test_one_rank_of_a_machine_fetches(runs, tmp_path, failing, found):
    children = runs._start(2, fetch, tmp_path, failing)
    assert wait_for(children) == [0, 0]
    assert [child.result() for child in children] == found
    assert (tmp_path / "file").exists() == (failing != 0)  # nobody tries again what the first could not


def test_networks_that_cannot_be_fetched_are_one_line(runs, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    changes = {
        "conditioning": {"autoencoder": {"kind": "flux1", "path": str(empty)}},
        "model": {"in_channels": 16},
    }
    done = runs.script("train", *training(runs, tmp_path / "run", changes)[1], ranks=2)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert line.startswith(f"error: cannot load '{empty}'")


def test_a_straggler_is_named(runs, tmp_path):
    words = training(runs, tmp_path / "run", {"run": {"steps": 5}})[1]
    children = runs._start(2, run_slowly, words, 1, 4.0)
    assert wait_for(children) == [0, 0]
    said = [line for line in children[0].text("err").splitlines() if "step 4" in line and "loss" not in line]
    assert len(said) >= 2
    assert f"rank 1 ({socket.gethostname()}) is in 'data' for " in said[0]
    assert said[0].endswith("; 1 rank(s) wait")
    assert said[-1].endswith("step 4: the run goes on")
    assert not [line for line in children[1].text("err").splitlines() if "wait" in line]


@pytest.mark.parametrize("zero", [2, 3])
def test_a_step_is_given_up_at_every_stage_of_zero(runs, tmp_path, zero):
    changes = {"deepspeed": {"zero_optimization": {"stage": zero}}}
    runs.forked([runs.job(tmp_path / "whole", STOPPED, changes)], ranks=2)
    words = training(runs, tmp_path / "run", STOPPED, ALONE, changes)[1]
    children = runs._start(2, run_until, words, "no data comes", 1, 1)
    assert wait_for(children) == [0, 0]
    assert [step for step, _ in list_checkpoints(tmp_path / "run" / "checkpoints")] == [3]
    runs.forked([runs.job(tmp_path / "run", STOPPED, changes, resume="auto")], ranks=2)
    assert_same_run(runs, tmp_path / "run", tmp_path / "whole")


FAILING = """
import sys
from millrace.engine import trainer
from millrace.engine.cli import run_command
from millrace.engine.train import main

losses = trainer.Trainer.sample_losses

def failing(self, batch):
    if self.step == 3:
        raise RuntimeError(f"device-side assert at {id(self):#x}")
    return losses(self, batch)

trainer.Trainer.sample_losses = failing
run_command(lambda: main(sys.argv[1:]))
"""


def test_deaths_behind_one_checkpoint_end_in_a_crash_loop(runs, tmp_path):
    """Killed at its first save each time: no record of its own, and nothing published."""
    for _ in range(DEATHS):
        dying = runs._start(
            1, die_in, runs.job(tmp_path, {"run": {"steps": 2}}, resume="auto"), "it saves", 0
        )
        assert wait_for(dying) == [-signal.SIGKILL]
    result = runs.here(tmp_path, {"run": {"steps": 2}}, resume="auto")
    assert "5 starts in a row failed behind the checkpoint of step 0 in the same way (it died" in result.error


def test_supervised_restarts_end_in_a_crash_loop(runs, tmp_path):
    """torchrun starts the workers again; they resume by themselves, and stop trying at the third failure."""
    output, script = tmp_path / "run", tmp_path / "failing.py"
    script.write_text(FAILING)
    words = training(runs, output, {"checkpoint": {"every_steps": 2}}, arguments=("--resume", "auto"))[1]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--max-restarts",
        "4",
        "--monitor-interval",
        "0.1",
    ]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "--master-port", str(free_port()), str(script), *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    said = done.stderr.splitlines()
    assert done.returncode == 1
    assert sum("RuntimeError: device-side assert" in line for line in said) >= 3
    loops = [line for line in said if "3 starts in a row failed after step 3 in the same way" in line]
    assert len(loops) == 2  # at both restarts that torchrun had left
    assert sum(line.startswith("resumed at step 2") for line in said) == 2
