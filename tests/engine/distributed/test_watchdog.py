"""Who is behind, said before the timeout, and nothing said of a healthy run."""

import time

import pytest
import torch.distributed as dist

from millrace.engine.distributed import watchdog
from millrace.engine.distributed.watchdog import Report, Watchdog, describe


def report(count, phase, seconds=130.0):
    return Report(count, phase, seconds, "gpu07")


def test_a_straggler_is_named():
    found = {0: report(41, "update"), 1: report(39, "data", 129.4), 2: report(41, "update")}
    assert describe(5, 131.2, found, 3) == (
        "step 5 has not ended for 131 s: rank 1 (gpu07) is in 'data' for 129 s; 2 rank(s) wait"
    )


def test_a_rank_without_a_sign_is_named():
    found = {0: report(41, "update"), 2: report(41, "update")}
    assert "no sign of rank 1: stopped, or the machine or its network is gone" in describe(5, 131, found, 3)


def test_all_ranks_in_one_phase():
    assert "2 of 2 ranks are in 'data'" in describe(5, 131, {0: report(4, "data"), 1: report(4, "data")}, 2)
    assert "a collective or a device hangs" in describe(5, 131, {0: report(4, "update")}, 1)


@pytest.fixture
def job(monkeypatch):
    """A watchdog as on rank 0 of two, with a store of its own and small times; lines that it says."""
    store = dist.HashStore()
    for name, value in {"LOOK": 0.02, "QUIET": 0.5, "LIMIT": 1.0, "LONG": 60.0}.items():
        monkeypatch.setattr(watchdog, name, value)
    monkeypatch.setattr(watchdog, "world_size", lambda: 2)
    monkeypatch.setattr(watchdog, "rank", lambda: 0)
    monkeypatch.setattr(watchdog, "_job_store", lambda: store)
    said, stalls = [], []
    with Watchdog(lambda given: stalls.append(given), said.append) as found:
        yield found, said, stalls


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_steps_that_end_say_nothing(job):
    found, said, stalls = job
    for step in range(100):
        found.enter(step, "data")
        found.enter(step, "update")
        time.sleep(0.002)
    assert (said, stalls) == ([], [])


def test_a_stall_is_said_and_its_end(job):
    found, said, stalls = job
    found.enter(6, "data")
    found.enter(7, "data")
    wait_for(lambda: said)
    assert said[0].startswith("step 8 has not ended for 1 s: no sign of rank 1")
    assert stalls
    found.enter(8, "data")
    wait_for(lambda: said[-1] == "step 8: the run goes on")
    assert found.place() == "after step 8"


@pytest.mark.parametrize("phases", [["data", "save"], ["data", "samples"], ["start", "data", "compute"]])
def test_a_save_and_a_first_step_take_long(job, phases):
    found, said, _ = job
    found.enter(6, "data")
    for phase in phases:
        found.enter(7, phase)
    time.sleep(1.5)
    assert said == []


def test_the_limit_follows_the_steps(job):
    """Where steps take long, a step that does is none to report."""
    found, said, _ = job
    found.enter(6, "data")
    found.enter(7, "data")
    time.sleep(0.5)
    found.enter(8, "data")
    time.sleep(1.5)
    assert said == []
    wait_for(lambda: said)
