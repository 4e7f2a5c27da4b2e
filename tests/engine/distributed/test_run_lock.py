"""One owner of a run's folder."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from millrace.engine.distributed import run_lock
from millrace.engine.distributed.run_lock import NAME, SILENCE, Owner, RunLock
from millrace.engine.util.errors import UserError
from tests.programs import ROOT, environment

HOLDER = """
import sys, time
from millrace.engine.distributed.run_lock import RunLock
lock = RunLock(sys.argv[1])
print("held", flush=True)
time.sleep(600)
"""


def left_by(path, owner, silent=0.0):
    """A lock that nobody holds, as its owner left it `silent` seconds ago."""
    path.write_text(json.dumps(vars(owner)))
    then = time.time() - silent
    os.utime(path, (then, then))


@pytest.fixture
def no_flock(monkeypatch):
    def refuse(_file, _how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_released_it_leaves_nothing(tmp_path):
    with RunLock(tmp_path) as lock:
        assert lock.taken_over is None
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []
    RunLock(tmp_path).release()


def test_a_second_owner_is_refused_with_the_first_ones_name(tmp_path):
    with RunLock(tmp_path), pytest.raises(UserError, match=f"writes here already: process {os.getpid()} on"):
        RunLock(tmp_path)


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, env=environment(), stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} on"):
        RunLock(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with RunLock(tmp_path) as lock:
        assert f"taken over from process {holder.pid} on" in lock.taken_over


@pytest.mark.usefixtures("no_flock")
def test_without_flock_the_process_of_the_text_decides(tmp_path):
    me = Owner.of_this_process()
    left_by(tmp_path / NAME, me)
    with pytest.raises(UserError, match="writes here already"):
        RunLock(tmp_path)
    left_by(tmp_path / NAME, replace(me, started="an earlier process with this id"))
    with RunLock(tmp_path) as lock:
        assert lock.taken_over


def test_a_lock_cut_off_while_it_was_written_is_nobodys(tmp_path):
    (tmp_path / NAME).write_text('{"host": "a", "p')
    RunLock(tmp_path).release()


def test_an_owner_on_another_host_counts_until_it_is_silent(tmp_path):
    other = replace(Owner.of_this_process(), host="gpu07")
    left_by(tmp_path / NAME, other, silent=40)
    with pytest.raises(UserError, match=r"on gpu07, .* sign of life is 4\d s old.*dead after 600 s.*delete"):
        RunLock(tmp_path)
    left_by(tmp_path / NAME, other, silent=SILENCE + 1)
    with RunLock(tmp_path) as lock:
        assert "on gpu07" in lock.taken_over


def test_a_requeued_job_takes_over_from_its_earlier_start(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    before = replace(Owner.of_this_process(), host="gpu07")
    left_by(tmp_path / NAME, before)
    with pytest.raises(UserError, match="gpu07"):  # another step of the job, say
        RunLock(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    RunLock(tmp_path).release()


def test_who_was_taken_for_dead_leaves_the_new_owners_lock(tmp_path):
    with RunLock(tmp_path):
        left_by(tmp_path / NAME, replace(Owner.of_this_process(), host="gpu07"))
    assert "gpu07" in (tmp_path / NAME).read_text()


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / NAME).mkdir()
    with pytest.raises(UserError, match=r"cannot be locked: Is a directory"):
        RunLock(tmp_path)


def test_the_owner_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "RENEWAL", 0.01)
    with RunLock(tmp_path) as lock:
        os.utime(lock.path, (0, 0))
        for _ in range(500):
            if lock.path.stat().st_mtime > 0:
                return
            time.sleep(0.01)
        pytest.fail("no sign of life")
