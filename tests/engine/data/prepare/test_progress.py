import re

import pytest

from millrace.engine.data.prepare import progress
from millrace.engine.data.prepare.progress import Progress


def test_lines_tell_share_counts_rate_and_time_left(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    bar = Progress("reading", total=200, done=100, each=1.0)
    for _ in range(50):
        clock[0] += 0.5
        bar.report(1, 0)
    bar.report(0, 2)
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "reading: 60%, 20 images, 2.0 images/s, 40 s left"
    assert lines[-1] == "reading: 76%, 50 images, 2.0 images/s, 2 rejected, 23 s left"
    assert len(lines) == 3


def test_weight_of_samples_is_learned_from_finished_parts(capsys, monkeypatch):
    bar = Progress("reading", total=1000)
    bar.report(10, 0)
    assert bar._done() == 0
    bar.finish_part(500, 10)
    assert bar._done() == 500
    bar.report(5, 0)
    assert bar._done() == 750
    bar.report(50, 0)
    assert bar._done() == 1000
    bar.close()
    assert re.match("reading: 100%, 65 images", capsys.readouterr().err)


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    bar = Progress("packing", total=4, each=1.0)
    bar.report(3, 1)
    bar._bar.refresh()
    bar.close()
    shown = capsys.readouterr().err
    assert "packing 100%" in shown
    assert "3 images" in shown
    assert "1 rejected" in shown


@pytest.mark.parametrize("total", [0, 0.0])
def test_nothing_to_do(total, capsys):
    Progress("packing", total).close()
    assert capsys.readouterr().err == ""
