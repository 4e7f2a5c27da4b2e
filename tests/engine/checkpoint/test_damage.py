"""Elements that no sound state has: found when saving, when loading, and over restarts."""

import pytest
import torch

from millrace.engine.checkpoint import checkpoints
from millrace.engine.checkpoint.checkpoints import resume_checkpoint, save_checkpoint
from millrace.engine.checkpoint.damage import (
    RECORD,
    BadElements,
    DamagedState,
    bad_elements,
    describe,
    forget_damage,
    record_damage,
    require_progress,
    total,
)
from millrace.engine.checkpoint.manifest import DamagedCheckpoint
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader, Piece
from millrace.engine.util.errors import UserError

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "values", "wanted"),
    [
        ("master/w", [1.0, -2.0, -0.0], None),
        ("master/w", [NAN, -2.0, NAN], BadElements(2, 0)),
        ("ema/w", [1.0, INF, 0.0], BadElements(1, 0)),
        ("ema/w", [-INF, INF, 0.0], BadElements(2, 0)),
        ("exp_avg/w", [-1.0, -1.0, -1.0], None),
        ("exp_avg_sq/w", [0.0, -0.0, 3.0], None),
        ("exp_avg_sq/w", [0.0, -1.0, NAN], BadElements(1, 1)),
        ("exp_avg_sq/w", [-INF, -1.0, -1.0], BadElements(1, 2)),
        ("tuning/autoencoder/exp_avg_sq/w", [-1.0], BadElements(0, 1)),
        ("master/w", [], None),
    ],
)
def test_counts(dtype, name, values, wanted):
    assert bad_elements(name, torch.tensor(values, dtype=dtype)) == wanted


def test_whole_numbers_are_always_good():
    assert bad_elements("updates/w", torch.tensor([-1])) is None
    assert bad_elements("exp_avg_sq/w", torch.tensor([True])) is None


def test_total_and_description():
    found = total([{"b": BadElements(1, 0)}, {}, {"a": BadElements(0, 2), "b": BadElements(2, 0)}])
    assert found == {"a": BadElements(0, 2), "b": BadElements(3, 0)}
    assert describe(found) == "a (2 elements negative), b (3 elements not finite)"
    many = {name: BadElements(1, 0) for name in "abcde"}
    assert describe(many).endswith("c (1 element not finite) and 2 more tensors")


def save(root, step, tensor, name="exp_avg_sq/w", **options):
    return save_checkpoint(root, step, [Piece(name, (4,), 0, tensor)], {"step": step}, keep=3, **options)


GOOD, NEGATIVE = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, -2.0, 3.0])


def test_a_damaged_state_is_not_published(tmp_path):
    save(tmp_path, 10, GOOD)
    for step in range(20, 60, 10):
        with pytest.raises(DamagedState, match=r"exp_avg_sq/w \(1 element negative\)"):
            save(tmp_path, step, NEGATIVE)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_damage_that_a_rank_found_outside_of_what_it_writes_counts(tmp_path):
    with pytest.raises(DamagedState, match=r"master/copy \(3 elements not finite"):
        save(tmp_path, 10, GOOD, bad={"master/copy": BadElements(3, 0)})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def damaged_by_an_earlier_version(tmp_path, monkeypatch):
    """Steps 10 and 20 good, 30 and 40 not; versions before 0.2 published such."""
    for step in (10, 20):
        save(tmp_path, step, GOOD)
    monkeypatch.setattr(checkpoints, "total", lambda parts: {})
    for step in (30, 40):
        save_checkpoint(tmp_path, step, [Piece("exp_avg_sq/w", (4,), 0, NEGATIVE)], {"step": step}, keep=9)
    monkeypatch.undo()
    return tmp_path


def test_auto_goes_back_past_damaged_states_and_says_so(damaged_by_an_earlier_version):
    reader, messages = resume_checkpoint(damaged_by_an_earlier_version)
    assert reader.step == 20
    problem = (
        "shard-00000-of-00001.safetensors holds a damaged training state: exp_avg_sq/w (1 element negative)"
    )
    assert messages == [f"not resuming from step-000000{step}: {problem}" for step in (40, 30)]


def test_a_damaged_state_that_is_asked_for_is_refused(damaged_by_an_earlier_version):
    with pytest.raises(DamagedCheckpoint, match="holds a damaged training state"):
        resume_checkpoint(damaged_by_an_earlier_version, 30)


def test_damage_across_the_parts_that_are_read_at_a_time(tmp_path, monkeypatch):
    tensor = torch.zeros(100)
    tensor[[3, 50, 99]] = torch.tensor([NAN, INF, -INF])
    monkeypatch.setattr(checkpoints, "total", lambda parts: {})
    folder = save_checkpoint(tmp_path, 1, [Piece("w", (100,), 0, tensor)], {}, keep=1)
    monkeypatch.undo()
    monkeypatch.setattr("millrace.engine.checkpoint.sharded_tensors._CHUNK", 64)
    with pytest.raises(DamagedCheckpoint, match=r"w \(3 elements not finite\)"):
        CheckpointReader(folder, verify=False).verify(sound=True)
    CheckpointReader(folder)  # a checksum is no opinion


def test_auto_gives_up_when_going_back_has_not_helped_twice(tmp_path):
    damage = DamagedState({"master/w": BadElements(1, 0)})
    assert require_progress(tmp_path, 20) == []
    record_damage(tmp_path, 20, 25, damage)
    (said,) = require_progress(tmp_path, 20)
    assert said.startswith(
        "going back to step 20: at step 25 the training state was damaged: master/w (1 element"
    )
    record_damage(tmp_path, 20, 26, damage)
    with pytest.raises(UserError, match="going back to step 20 did not help") as caught:
        require_progress(tmp_path, 20)
    assert "at step 25: master/w (1 element not finite), at step 26: master/w" in str(caught.value)
    require_progress(tmp_path, 30)  # it has come further
    require_progress(tmp_path, 10)
    forget_damage(tmp_path, 20)
    require_progress(tmp_path, 20)


def test_the_record_survives_a_line_that_was_cut_off(tmp_path):
    damage = DamagedState({"master/w": BadElements(1, 0)})
    record_damage(tmp_path, 20, 25, damage)
    (tmp_path / RECORD).write_text((tmp_path / RECORD).read_text() + '{"good": 20, "st\n[]\n')
    require_progress(tmp_path, 20)
    record_damage(tmp_path, 20, 26, damage)
    with pytest.raises(UserError, match="did not help"):
        require_progress(tmp_path, 20)
