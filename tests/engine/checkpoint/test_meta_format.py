"""Meta data of every format, brought to the newest."""

import json

import pytest

from millrace.engine.checkpoint import meta_format
from millrace.engine.checkpoint.checkpoints import save_checkpoint
from millrace.engine.checkpoint.manifest import DamagedCheckpoint
from millrace.engine.checkpoint.meta_format import FORMAT, current_meta, rename_keys, stamp
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from millrace.engine.util.errors import UserError


def test_what_is_written_says_its_format_and_version(tmp_path):
    folder = save_checkpoint(tmp_path, 1, [], {"step": 1}, keep=1)
    values = json.loads((folder / "meta.json").read_text())
    assert values == {"format": FORMAT, "millrace": stamp()["millrace"], "step": 1}
    reader = CheckpointReader(folder)
    assert (reader.meta, reader.written_by) == ({"step": 1}, stamp()["millrace"])


def test_meta_data_without_a_stamp_are_of_the_first_format(tmp_path):
    assert current_meta({"step": 1}, tmp_path) == ({"step": 1}, "0.1.0 or earlier")


def test_each_migration_runs_once_from_where_the_meta_data_are(tmp_path, monkeypatch):
    def renames(meta):
        rename_keys(meta["config"], {"data.batch": "data.global_batch", "speed": "optimizer.lr"})

    monkeypatch.setattr(meta_format, "MIGRATIONS", (*meta_format.MIGRATIONS, renames))
    monkeypatch.setattr(meta_format, "FORMAT", FORMAT + 1)
    config = {"data": {"batch": 8}, "speed": 0.1, "stages": [{"at": 3, "data": {"batch": 4}}]}
    wanted = {
        "data": {"global_batch": 8},
        "optimizer": {"lr": 0.1},
        "stages": [{"at": 3, "data": {"global_batch": 4}}],
    }
    stored = json.dumps({"config": config})
    assert current_meta(json.loads(stored), tmp_path)[0] == {"config": wanted}
    second = {"format": FORMAT, "millrace": "7.1"}
    assert current_meta(json.loads(stored) | second, tmp_path) == ({"config": wanted}, "7.1")
    third = {"format": FORMAT + 1, "millrace": "7.2"}
    assert current_meta(json.loads(stored) | third, tmp_path) == ({"config": config}, "7.2")


def test_a_later_format_is_refused_with_the_version_that_reads_it(tmp_path):
    with pytest.raises(
        UserError, match=rf"format {FORMAT + 1}, written by millrace 9\.0; this version"
    ) as caught:
        current_meta({"format": FORMAT + 1, "millrace": "9.0"}, tmp_path)
    assert not isinstance(caught.value, DamagedCheckpoint)


@pytest.mark.parametrize("values", [[], "step", {"format": "two"}, {"format": True}])
def test_something_else_is_damage(tmp_path, values):
    with pytest.raises(DamagedCheckpoint, match=r"meta\.json does not describe a checkpoint"):
        current_meta(values, tmp_path)
