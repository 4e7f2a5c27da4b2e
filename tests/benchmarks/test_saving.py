"""Both ways to save, of a model of seconds."""

import json

import pytest

from millrace.benchmarks.step import saving


@pytest.mark.slow
def test_both_ways_are_measured_and_written(tmp_path, monkeypatch, capsys):
    output = tmp_path / "saving.json"
    words = ["saving", "--width", "64", "--depth", "2", "--saves", "1", "--output", str(output)]
    monkeypatch.setattr("sys.argv", words)
    assert saving.main() == 0
    background, blocking = json.loads(output.read_text())["rows"]
    assert (background["blocking"], blocking["blocking"]) == (False, True)
    assert background["bytes"] == blocking["bytes"] > 0
    assert blocking["wait"] == pytest.approx(blocking["published"], rel=0.5)  # nothing is left to wait for
    for row in (background, blocking):
        assert 0 < row["wait"] <= row["published"]
    table = capsys.readouterr().out
    assert table.index("background") < table.index("blocking")
