"""Saves beside the training: killed in any phase, on either of two ranks; and thousands of steps of them."""

import os
import signal

import pytest

from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from tests.engine.forks import wait_for
from tests.engine.moments import OF_THE_FIRST, PHASES, die_in, watch_resources

pytestmark = pytest.mark.slow

STEPS = 8
CHANGES = {
    "run": {"steps": STEPS},
    "ema": {"start": 3, "every": 2},
    "checkpoint": {"every_steps": 2, "keep": 2},
    "deepspeed": {"zero_optimization": {"stage": 2}},
}
KILLS = [(phase, rank) for phase in PHASES for rank in (0, 1) if rank == 0 or phase not in OF_THE_FIRST]


def published(run):
    return [step for step, _ in list_checkpoints(run / "checkpoints")]


@pytest.fixture(scope="module")
def killed(runs, tmp_path_factory):
    """(folder with `whole` and a run for each of KILLS, steps that each of these had published)."""
    root = tmp_path_factory.mktemp("phases")
    left, jobs = {}, [runs.job(root / "whole", CHANGES)]
    for phase, rank in KILLS:
        run = root / f"{phase}, {rank}"
        codes = wait_for(runs._start(2, die_in, runs.job(run, CHANGES), phase, rank))
        assert codes[rank] == -signal.SIGKILL, phase
        assert codes[1 - rank] in (-signal.SIGKILL, 1), phase  # with it, or of the lost connection
        for _, folder in list_checkpoints(run / "checkpoints"):
            CheckpointReader(folder, verify=True)
        left[phase, rank] = published(run)
        jobs.append(runs.job(run, CHANGES, resume="auto"))
    results = runs.forked(jobs, ranks=2)
    assert [rank.error for ranks in results.values() for rank in ranks] == [None] * 2 * len(jobs)
    return root, left


@pytest.mark.parametrize(("phase", "rank"), KILLS)
def test_killed_in_any_phase_and_resumed_is_bit_identical(runs, killed, phase, rank):
    root, _ = killed
    runs.assert_same_bits(root / f"{phase}, {rank}", root / "whole")


@pytest.mark.parametrize("steps", [int(os.environ.get("MILLRACE_LONG_RUN", 200))])
def test_memory_files_and_threads_stay_flat(runs, tmp_path, steps):
    """A hundred saves; more with MILLRACE_LONG_RUN=2000."""
    changes = (
        {"run": {"steps": steps}, "checkpoint": {"every_steps": steps // 100}},
        {"data": {"global_batch": 2}},
    )
    resources = runs.apart(watch_resources, runs.job(tmp_path, CHANGES, *changes), steps // 20)
    print("resident MiB, files, threads:", [(r // 1024, f, t) for r, f, t in resources])
    halves = [tuple(zip(*half, strict=True)) for half in (resources[:10], resources[10:])]
    (memory, files, threads), (memory_after, files_after, threads_after) = halves
    assert max(memory_after) <= max(memory) + 8 * 1024
    # A save under way has files and threads of its own; what each of the fifty saves between kept for good
    # would raise the least by fifty.
    assert min(files_after) <= min(files) + 2
    assert min(threads_after) <= min(threads) + 2


def test_the_phases_are_before_and_after_publishing(killed):
    """The save of step 4 was under way: before its folder has its name step 2 is the newest, then step 4."""
    _, left = killed
    phases = list(PHASES)
    for (phase, _), steps in left.items():
        if phase == "ranks agree that it is published":
            assert steps[-1] in (2, 4)  # of a rank that has nothing to publish
        else:
            late = phases.index(phase) >= phases.index("its name is synced")
            assert steps[-1] == (4 if late else 2), phase
