"""Runs whose state is damaged: nothing damaged is published, and good checkpoints outlive restarts."""

import json
import re

import pytest

from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.checkpoint.damage import RECORD
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader

pytestmark = pytest.mark.slow

CHANGES = {"run": {"steps": 12, "max_bad_steps": 3}, "checkpoint": {"every_steps": 2, "keep": 2}}
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
RESTARTS = 3


def stage(number):
    return {"deepspeed": {"zero_optimization": {"stage": number}}}


@pytest.fixture(scope="module", params=[0, 1])
def poisoned(runs, tmp_path_factory, request):
    """Folder of runs <kind>-<ZeRO stage> on two ranks, of which rank `param` is poisoned after step 5 each
    time that it comes there; and their errors at the first start and at each of three restarts."""
    root = tmp_path_factory.mktemp("poisoned")
    errors = {}
    for start in range(1 + RESTARTS):
        jobs = [
            runs.job(
                root / f"{kind}-{number}",
                CHANGES,
                stage(number),
                poisoned=(kind, 5, request.param),
                resume="auto" if start else None,
            )
            for kind in KINDS
            for number in range(4)
        ]
        for name, results in runs.forked(jobs, ranks=2).items():
            errors.setdefault(name, []).append([result.error for result in results])
    return root, errors


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_damaged_is_published_and_the_good_ones_stay(poisoned, kind, number):
    root, errors = poisoned
    run = root / f"{kind}-{number}"
    published = list_checkpoints(run / "checkpoints")
    assert [step for step, _ in published] == [2, 4]
    for _, folder in published:
        CheckpointReader(folder, verify=False).verify(sound=True)
    for (first, second), start in zip(errors[run.name], range(1 + RESTARTS), strict=True):
        assert first == second  # the ranks agree
        assert "\n" not in first
        if start < 2:
            said = re.fullmatch(
                r"the training state is damaged: (.*); it was sound at step 4 and is not at step (\d), so it "
                r"is not saved: continue with --resume auto, which goes back to step 4\. .*",
                first,
            )
            assert said, first
            assert "element" in said[1]
            assert int(said[2]) <= 7
            if kind == "ema":
                assert re.match(r"ema/\S+\.weight \(1 element not finite\)$", said[1])
        else:
            assert f"{run}: going back to step 4 did not help" in first
    assert len((run / RECORD).read_text().splitlines()) == 2


def test_once_is_enough_to_go_back_and_finish(runs, tmp_path, capsys):
    """A bit that flipped: after the restart it does not."""
    first = runs.here(tmp_path / "run", CHANGES, poisoned=("exp_avg", 5, 0))
    assert "the training state is damaged: " in first.error
    assert runs.here(tmp_path / "run", CHANGES, resume="auto").error is None
    said = capsys.readouterr().err
    assert "resumed at step 4" in said
    assert "going back to step 4: at step 6 the training state was damaged: " in said
    assert runs.here(tmp_path / "whole", CHANGES).error is None
    runs.assert_same_bits(tmp_path / "run", tmp_path / "whole")
    (entry,) = map(json.loads, (tmp_path / "run" / RECORD).read_text().splitlines())
    assert entry["good"] == 4


def test_a_step_that_is_asked_for_is_tried_once_more(runs, tmp_path):
    for resume in (None, "auto"):
        assert "is damaged" in runs.here(tmp_path, CHANGES, poisoned=("ema", 5, 0), resume=resume).error
    assert "did not help" in runs.here(tmp_path, CHANGES, resume="auto").error
    assert runs.here(tmp_path, CHANGES, resume="4").error is None
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [10, 12]


def test_a_run_without_a_checkpoint_starts_again(runs, tmp_path):
    changes = {**CHANGES, "checkpoint": {"every_steps": 100}}
    error = runs.here(tmp_path, changes, poisoned=("master", 3, 0)).error
    assert "it was sound at step 0 and is not at step" in error
    assert "not saved: start again" in error
    assert list_checkpoints(tmp_path / "checkpoints") == []
