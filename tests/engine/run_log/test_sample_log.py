"""Keys of consumed samples and unreadable pictures, as files in the run's folder."""

import json

import pytest

from millrace.engine.distributed import process_group
from millrace.engine.run_log.sample_log import SampleLog, keys_of_steps


def as_rank(monkeypatch, rank):
    monkeypatch.setattr(process_group, "rank", lambda: rank)
    monkeypatch.setattr(process_group, "wait_for_all", lambda: None)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(monkeypatch, output, rank, first, last):
    as_rank(monkeypatch, rank)
    log = SampleLog(output, first, keep_keys=True)
    for step in range(first + 1, last + 1):
        log.step(step, [f"{step}{rank}a", f"{step}{rank}b"], {})
    log.close()


def test_the_keys_of_a_step_are_those_of_all_processes_in_order(monkeypatch, tmp_path):
    for rank in (0, 1):
        write(monkeypatch, tmp_path, rank, 0, 2)
    assert sorted(path.name for path in (tmp_path / "keys").iterdir()) == [
        "rank-00000.jsonl",
        "rank-00001.jsonl",
    ]
    assert keys_of_steps(tmp_path) == {1: ["10a", "10b", "11a", "11b"], 2: ["20a", "20b", "21a", "21b"]}


def test_what_a_killed_run_wrote_after_its_checkpoint_is_dropped_from_all_files(monkeypatch, tmp_path):
    for rank in (0, 1):
        write(monkeypatch, tmp_path, rank, 0, 4)
    with (tmp_path / "keys" / "rank-00001.jsonl").open("a") as file:
        file.write('{"step": 5, "ke')
    write(monkeypatch, tmp_path, 0, 2, 3)  # one process goes on
    assert keys_of_steps(tmp_path) == {
        1: ["10a", "10b", "11a", "11b"],
        2: ["20a", "20b", "21a", "21b"],
        3: ["30a", "30b"],
    }


def test_without_the_setting_there_are_no_keys(monkeypatch, tmp_path):
    as_rank(monkeypatch, 0)
    log = SampleLog(tmp_path, 0, keep_keys=False)
    log.step(1, ["a"], {})
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
        log.step(1, [], {})
        log.step(2, [], bad)
        log.step(3, [], bad)
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
