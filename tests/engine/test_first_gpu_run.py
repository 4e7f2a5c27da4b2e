"""What a stranger asks of a new machine: do all ZeRO stages train alike, and does a run continue exactly?"""

import pytest

from tests.engine.test_resume import assert_same_run, copy_until, stage

SHORT = {"precision": {"compute": "bfloat16"}, "run": {"steps": 4}, "checkpoint": {"every_steps": 2}}
"""BF16 autocast with FP32 masters."""


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def trained(request, runs, tmp_path_factory):
    """Folder with stage-0 to stage-3, and the changes that they share."""
    root, changes = tmp_path_factory.mktemp("first"), (SHORT, {"run": {"device": request.param}})
    results = runs.forked([runs.job(root / f"stage-{i}", *changes, stage(i)) for i in range(4)])
    assert [result.error for (result,) in results.values()] == [None] * 4
    return root, changes


def test_all_stages_have_the_same_losses_and_norms(runs, trained):
    """Sums in another order differ in the last bits."""
    root, _ = trained
    logs = [runs.log(root / f"stage-{i}") for i in range(4)]
    found = [[(record["loss"], record["grad_norm"]) for record in log] for log in logs]
    assert len(found[0]) == 4
    for other in found[1:]:
        for step, wanted in zip(other, found[0], strict=True):
            assert step == pytest.approx(wanted, rel=2e-3)


@pytest.mark.parametrize("number", [0, 2, 3])
def test_a_run_continues_exactly(runs, trained, tmp_path, number):
    root, changes = trained
    whole = root / f"stage-{number}"
    half = copy_until(whole, 2, tmp_path / "run")
    assert runs.here(half, *changes, stage(number), resume="auto").error is None
    assert_same_run(runs, half, whole)
