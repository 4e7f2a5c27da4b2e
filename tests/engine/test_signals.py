"""Stopping a run from outside: it ends at a step boundary with a checkpoint, and leaves nothing running."""

import os
import shlex
import signal
import socket
import subprocess
import sys
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


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_a_container(*words):
    """The words of a command that runs as the first process of a process namespace, which ends with it."""
    return ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *words]


def no_namespaces():
    try:
        return subprocess.run(in_a_container("true"), capture_output=True).returncode != 0
    except FileNotFoundError:
        return True


def torchrun(plain):
    """The same training under torchrun, in two processes."""
    _, *words = plain
    port = ["--master-port", str(free_port())]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *port, *words]


def shell(text):
    return ["sh", "-c", text]


CONTAINERS = {
    "python": (lambda plain, _: plain, 0),
    "torchrun": (lambda plain, _: torchrun(plain), 1),
    "sh -c exec": (lambda plain, _: shell(f"umask 022; exec {shlex.join(plain)}"), 0),
    "sh -c": (lambda plain, _: shell(f"umask 022; {shlex.join(plain)}; true"), None),
    "deepspeed": (lambda _, deepspeed: deepspeed, None),
}
"""First processes of a container, and their exit code after SIGTERM; None if they do not heed it."""
GRACE = 10.0
"""Seconds after which a container that does not end is killed, as by `docker stop`."""


@pytest.mark.skipif(no_namespaces(), reason="needs a process namespace of its own (unshare)")
@pytest.mark.parametrize("first", CONTAINERS)
def test_sigterm_to_a_containers_first_process(runs, tmp_path, first):
    """The kernel drops signals that the first process of a namespace has no handler for."""
    output = tmp_path / "run"
    command, code = CONTAINERS[first]
    plain, deepspeed = runs.command(output, ENDLESS), runs.command(output, ENDLESS, ranks=2)
    process = runs.start(in_a_container(*command(plain, deepspeed)))
    try:
        wait_until(lambda: steps_logged(output) >= 3, process)
        (inner,) = psutil.Process(process.pid).children()
        begun = time.monotonic()
        inner.terminate()
        if code is None:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(GRACE)
            inner.kill()
            assert process.wait(PATIENCE) != 0
            assert list_checkpoints(output / "checkpoints") == []
        else:
            assert process.wait(PATIENCE) == code
            ((step, folder),) = list_checkpoints(output / "checkpoints")
            assert step == CheckpointReader(folder).meta["step"] == steps_logged(output)
        print(f"{first}: ended after {time.monotonic() - begun:.1f} s with {process.returncode}")
    finally:
        end(process)


@pytest.mark.skipif(no_namespaces(), reason="needs a process namespace of its own (unshare)")
def test_sigterm_to_deepspeed_below_a_containers_init(runs, tmp_path):
    """An init that passes signals on and ends with its child, as `docker run --init` does: the container is
    gone before the orphans have saved."""
    output = tmp_path / "run"
    init = "deepspeed=; trap 'kill $deepspeed' TERM; " + shlex.join(runs.command(output, ENDLESS, ranks=2))
    process = runs.start(in_a_container("bash", "-c", f"{init} & deepspeed=$!; wait $deepspeed; exit 143"))
    try:
        wait_until(lambda: steps_logged(output) >= 3, process)
        (inner,) = psutil.Process(process.pid).children()
        begun = time.monotonic()
        inner.terminate()
        assert process.wait(PATIENCE) == 143
        print(f"deepspeed below init: {time.monotonic() - begun:.1f} s")
        assert list_checkpoints(output / "checkpoints") == []
    finally:
        end(process)


def test_sigterm_to_torchrun(runs, tmp_path):
    """It passes the signal on and waits for the save."""
    output = tmp_path / "run"
    process = runs.start(torchrun(runs.command(output, ENDLESS)))
    try:
        wait_until(lambda: steps_logged(output) >= 3, process)
        begun = time.monotonic()
        process.terminate()
        assert process.wait(PATIENCE) == 1
        print(f"torchrun: {time.monotonic() - begun:.1f} s")
        ((step, folder),) = list_checkpoints(output / "checkpoints")
        assert step == CheckpointReader(folder).meta["step"] == steps_logged(output)
    finally:
        end(process)
