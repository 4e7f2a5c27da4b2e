"""Pictures that cannot be read in mid-run: all ranks stop behind a checkpoint, and no step is lost."""

import numpy as np
import pytest
from PIL import Image

from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.run_log.sample_log import keys_of_steps

pytestmark = pytest.mark.slow

PICTURES = 64
STEPS = 7


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(PICTURES):
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8)).save(root / f"{i:02d}.png")
        (root / f"{i:02d}.txt").write_text(f"picture {i}")
    return root


def changes(pictures, **data):
    data = {"source": "folder", "path": str(pictures), **data}
    return {"run": {"steps": STEPS}, "data": data, "logging": {"sample_keys": True}}


def stage(number):
    return {"deepspeed": {"zero_optimization": {"stage": number}}}


@pytest.fixture(scope="module")
def whole(runs, pictures, tmp_path_factory):
    """Folder with zero<i>, each on two ranks."""
    root = tmp_path_factory.mktemp("whole")
    jobs = [runs.job(root / f"zero{number}", changes(pictures), stage(number)) for number in (0, 2, 3)]
    runs.forked(jobs, ranks=2)
    return root


def cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return data


def published(run):
    return [step for step, _ in list_checkpoints(run / "checkpoints")]


@pytest.mark.parametrize("number", [0, 2, 3])
def test_one_unreadable_picture_costs_no_step(runs, pictures, whole, tmp_path, number):
    """It is met by one rank in step 5; repaired, the run goes on as if nothing had been."""
    key = keys_of_steps(whole / f"zero{number}")[5][-1]
    data = cut(pictures / key)
    run = tmp_path / f"zero{number}"
    try:
        ((first, second),) = runs.forked([runs.job(run, changes(pictures), stage(number))], ranks=2).values()
    finally:
        (pictures / key).write_bytes(data)
    assert first.error == second.error
    assert first.error.startswith(f"stopped after step 4, which is saved: {pictures / key}: cannot be read")
    assert "(1 of 64 pictures unreadable so far, data.max_bad_share is 0)" in first.error
    assert published(run) == [4]
    assert [record["step"] for record in runs.log(run)] == [1, 2, 3, 4]

    resumed = runs.forked([runs.job(run, changes(pictures), stage(number), resume="auto")], ranks=2)
    assert [result.error for results in resumed.values() for result in results] == [None, None]
    runs.assert_same_bits(run, whole / f"zero{number}")
    assert keys_of_steps(run) == keys_of_steps(whole / f"zero{number}")


@pytest.mark.parametrize("second", [2, 3])
def test_the_share_counts_over_all_ranks(runs, pictures, whole, tmp_path, second):
    """One of 64 may be bad; each of the two ranks meets one, in step 2 and in the `second`."""
    keys = keys_of_steps(whole / "zero0")
    names = keys[2][0], keys[second][-1]
    kept = {name: cut(pictures / name) for name in names}
    allowed = changes(pictures, max_bad_share=1.5 / PICTURES)
    try:
        ((first, second),) = runs.forked([runs.job(tmp_path / "run", allowed)], ranks=2).values()
    finally:
        for name, data in kept.items():
            (pictures / name).write_bytes(data)
    assert first.error == second.error
    assert "(2 of 64 pictures unreadable so far, data.max_bad_share is 0.0234375)" in first.error
    # In the same step both are replaced before the ranks have told each other; in the next one is not.
    assert first.error.startswith("stopped after step 2, which is saved: ")
    assert published(tmp_path / "run") == [2]


def test_data_that_are_gone_from_the_start_are_refused(runs, pictures, tmp_path):
    """Nothing was trained that could be saved."""
    kept = {path: cut(path) for path in pictures.glob("*.png")}
    try:
        error = runs.here(tmp_path / "run", changes(pictures)).error
    finally:
        for path, data in kept.items():
            path.write_bytes(data)
    assert "cannot be read" in error
    assert published(tmp_path / "run") == []
