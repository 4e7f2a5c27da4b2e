"""Stopping a run from outside: it ends at a step boundary with a checkpoint, and leaves nothing running."""

import os
import signal
import subprocess
import time

import psutil
import pytest

from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader

pytestmark = pytest.mark.slow

# Never finishes by itself: what ends it is the test.
ENDLESS = {
    "run": {"steps": 100_000},
    "schedule": {"kind": "constant"},
    "checkpoint": {"every_steps": 100_000},
}
PATIENCE = 120


def wait_until(condition, process=None):
    """Poll; fail after PATIENCE seconds, or when `process` ends meanwhile."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps_logged(output):
    path = output / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def tree(process):
    """The process and all below it."""
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def is_running(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def end(process):
    """Make sure that a failed test leaves nothing behind either."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


class Ending:
    """What a run left when it was stopped by `stop(processes)` after a few steps."""

    def __init__(self, runs, output, ranks, stop):
        process = runs.start(runs.command(output, ENDLESS, ranks=ranks))
        try:
            wait_until(lambda: steps_logged(output) >= 3, process)
            family = tree(process)
            stop(family)
            # Readers until the end of the pipes: until every process that held them is gone.
            self.out, self.err = process.communicate(timeout=PATIENCE)
            wait_until(lambda: not any(map(is_running, family)))
            self.code = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            end(process)
        self.steps = steps_logged(output)
        self.said = [line for line in self.err.splitlines() if line.startswith("stopped at step")]


def assert_saved_and_continues(runs, output, ending, ranks, reason):
    """One checkpoint, of the last logged step, written by all ranks; --resume auto goes on from there."""
    assert ending.said == [f"stopped at step {ending.steps} ({reason}); continue with --resume auto"]
    assert "Traceback" not in ending.err
    ((step, folder),) = list_checkpoints(output / "checkpoints")
    assert step == ending.steps
    reader = CheckpointReader(folder)
    assert (reader.meta["step"], reader.meta["samples"]) == (step, 8 * step)
    assert len(list(folder.glob(f"shard-*-of-{ranks:05d}.safetensors"))) == ranks
    more = {"run": {"steps": step + 2}, "sampling": {"every_steps": 0}}
    assert runs.here(output, ENDLESS, more, resume="auto").error is None
    assert [record["step"] for record in runs.log(output)] == list(range(1, step + 3))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_a_plain_run(runs, tmp_path, number):
    ending = Ending(runs, tmp_path / "run", 1, lambda family: family[0].send_signal(number))
    assert ending.code == 0
    assert_saved_and_continues(runs, tmp_path / "run", ending, 1, number.name)


def deepspeed_family(family):
    """(runner, launcher, ranks) of a run under `deepspeed`."""
    runner, launcher = family[:2]
    assert "deepspeed.launcher.launch" in launcher.cmdline()
    ranks = [process for process in family[2:] if any("train.py" in word for word in process.cmdline())]
    assert len(ranks) == 2
    return runner, launcher, ranks


def test_sigterm_to_the_launcher(runs, tmp_path):
    """The launcher passes it to the ranks. Its exit code, 1, is DeepSpeed's and says that it was stopped."""
    ending = Ending(runs, tmp_path / "run", 2, lambda family: deepspeed_family(family)[1].terminate())
    assert_saved_and_continues(runs, tmp_path / "run", ending, 2, "SIGTERM")
    assert ending.code == 1


def test_sigterm_to_the_runner(runs, tmp_path):
    """The runner dies at once and tells nobody; its exit code is that of the signal."""
    ending = Ending(runs, tmp_path / "run", 2, lambda family: deepspeed_family(family)[0].terminate())
    assert_saved_and_continues(runs, tmp_path / "run", ending, 2, "the launcher is gone")
    assert ending.code == -signal.SIGTERM


def test_sigterm_to_one_rank(runs, tmp_path):
    """What one rank was told all obey, so the launcher sees two ranks that finished."""
    ending = Ending(runs, tmp_path / "run", 2, lambda family: deepspeed_family(family)[2][1].terminate())
    assert_saved_and_continues(runs, tmp_path / "run", ending, 2, "SIGTERM")
    assert ending.code == 0


def test_the_files_save_and_stop(runs, tmp_path):
    output = tmp_path / "run"
    seen = []

    def stop(_family):
        (output / "save").touch()
        wait_until(lambda: list_checkpoints(output / "checkpoints"))
        wait_until(lambda: not (output / "save").exists())
        seen.extend(list_checkpoints(output / "checkpoints"))
        steps = steps_logged(output)
        wait_until(lambda: steps_logged(output) > steps + 2)  # it went on
        assert len(list_checkpoints(output / "checkpoints")) == 1
        (output / "stop").touch()

    ending = Ending(runs, output, 1, stop)
    assert ending.code == 0
    assert ending.said == [f"stopped at step {ending.steps} (the file 'stop'); continue with --resume auto"]
    assert not (output / "stop").exists()
    steps = [step for step, _ in list_checkpoints(output / "checkpoints")]
    assert steps == [seen[0][0], ending.steps]


def test_a_second_ctrl_c_interrupts_at_once(runs, tmp_path):
    """For a user who does not want to wait for the step and the checkpoint."""

    # Steps of 500 micro-batches, so that both signals come in one of them.
    process = runs.start(runs.command(tmp_path / "run", ENDLESS, {"data": {"global_batch": 1000}}))
    try:
        wait_until(lambda: steps_logged(tmp_path / "run") > 0, process)
        time.sleep(0.5)  # the step is logged before its boundary, which would stop the run
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    finally:
        end(process)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []
