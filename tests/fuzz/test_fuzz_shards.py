import importlib.util
from pathlib import Path

import pytest

from millrace.engine.data.prepare import tar_members


@pytest.fixture(scope="module")
def fuzz_shards():
    path = Path(__file__).with_name("fuzz_shards.py")
    spec = importlib.util.spec_from_file_location("fuzz_shards", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_five_seconds_of_damage_bring_only_documented_errors(fuzz_shards, capsys):
    assert fuzz_shards.fuzz(5, seed=1) == 0
    out = capsys.readouterr().out
    for outcome in ("tar corrupt_tar", "picture corrupt_picture", "shards refused", "shards unreadable"):
        assert outcome in out


def test_a_bug_is_found_and_named_by_its_case(fuzz_shards, capsys, monkeypatch):
    monkeypatch.setattr(tar_members, "MAX_NAME_BYTES", None)  # comparing with it raises TypeError
    assert fuzz_shards.fuzz(60, seed=1) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED"))
    assert line.startswith("FAILED: --seed 1 --case ")
    assert "TypeError" in line
