"""Keys of consumed samples and unreadable pictures, as files in the run's folder."""

import json

import pytest

from millrace.engine.distributed import process_group
from millrace.engine.run_log.sample_log import SampleLog, keys_of_steps


def as_rank(monkeypatch, rank, world_size=1):
    monkeypatch.setattr(process_group, "rank", lambda: rank)
    monkeypatch.setattr(process_group, "world_size", lambda: world_size)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(monkeypatch, output, rank, first, last, world_size=2):
    as_rank(monkeypatch, rank, world_size)
    log = SampleLog(output, first, keep_keys=True)
    for step in range(first + 1, last + 1):
        log.step(step, [f"{step}{rank}a", f"{step}{rank}b"], ["long", "empty"], {})
    log.close()


def test_the_keys_of_a_step_are_those_of_all_processes_in_order(monkeypatch, tmp_path):
    for rank in (0, 1):
        write(monkeypatch, tmp_path, rank, 0, 2)
    assert sorted(path.name for path in (tmp_path / "keys").iterdir()) == [
        "rank-00000.jsonl",
        "rank-00001.jsonl",
    ]
    first = lines(tmp_path / "keys" / "rank-00000.jsonl")[0]
    assert first == {"step": 1, "keys": ["10a", "10b"], "captions": ["long", "empty"]}
    assert keys_of_steps(tmp_path) == {1: ["10a", "10b", "11a", "11b"], 2: ["20a", "20b", "21a", "21b"]}


def test_what_a_killed_run_wrote_after_its_checkpoint_is_dropped_from_all_files(monkeypatch, tmp_path):
    for rank in (0, 1):
        write(monkeypatch, tmp_path, rank, 0, 4)
    with (tmp_path / "keys" / "rank-00001.jsonl").open("a") as file:
        file.write('{"step": 5, "ke')
    write(monkeypatch, tmp_path, 0, 2, 3, world_size=1)  # one process goes on
    assert keys_of_steps(tmp_path) == {
        1: ["10a", "10b", "11a", "11b"],
        2: ["20a", "20b", "21a", "21b"],
        3: ["30a", "30b"],
    }


def test_without_the_setting_there_are_no_keys(monkeypatch, tmp_path):
    as_rank(monkeypatch, 0)
    log = SampleLog(tmp_path, 0, keep_keys=False)
    log.step(1, ["a"], ["long"], {})
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_rejects_are_written_once_by_any_process_and_after_resuming(monkeypatch, tmp_path):
    for rank, bad in (
        (0, {"a": "torn"}),
        (1, {"a": "torn", "b": 'not a "JPEG"\n'}),
        (0, {"b": "again", "c": "x"}),
    ):
        as_rank(monkeypatch, rank)
        log = SampleLog(tmp_path, 0, keep_keys=False)
        log.step(1, [], [], {})
        log.step(2, [], [], bad)
        log.step(3, [], [], bad)
        log.close()
    wanted = [("a", "torn"), ("b", 'not a "JPEG"\n'), ("c", "x")]
    assert [(line["key"], line["reason"]) for line in lines(tmp_path / "rejects.jsonl")] == wanted
    assert [line.keys() for line in lines(tmp_path / "rejects.jsonl")] == [{"key", "reason"}] * 3


@pytest.mark.parametrize("told", [0, 3])
def test_more_rejects_are_added_as_they_come(monkeypatch, tmp_path, told):
    as_rank(monkeypatch, 0)
    log = SampleLog(tmp_path, 0, keep_keys=False)
    bad = {f"{i}": "r" for i in range(told)}
    log.reject(bad)
    bad["new"] = "torn"
    log.reject(bad)
    assert [line["key"] for line in lines(tmp_path / "rejects.jsonl")] == [*map(str, range(told)), "new"]


def test_a_line_of_rejects_that_was_cut_off_is_ended_and_does_not_count(monkeypatch, tmp_path):
    as_rank(monkeypatch, 0)
    (tmp_path / "rejects.jsonl").write_text('{"key": "a", "reason": "r"}\n{"key": "b", "rea')
    log = SampleLog(tmp_path, 0, keep_keys=False)
    log.reject({"a": "r", "b": "r"})
    log.reject({"a": "r", "b": "r", "c": "r"})
    kept = (tmp_path / "rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in (kept[0], *kept[2:])] == ["a", "b", "c"]


def test_rejects_of_others_are_read_once(monkeypatch, tmp_path):
    """What a call reads is what was added since the last one, so that the whole is linear."""
    as_rank(monkeypatch, 0)
    mine, other = (SampleLog(tmp_path, 0, keep_keys=False) for _ in range(2))
    bad = {}
    for number in range(20):
        bad[f"{number}"] = "r"
        mine.reject(bad)
    before = mine._read
    other.reject({"5": "r", "new": "r"})
    mine.reject(bad | {"new": "r", "newer": "r"})
    assert mine._read - before == len('{"key": "19", "reason": "r"}\n{"key": "new", "reason": "r"}\n')
    keys = [line["key"] for line in lines(tmp_path / "rejects.jsonl")]
    assert keys == [*map(str, range(20)), "new", "newer"]
