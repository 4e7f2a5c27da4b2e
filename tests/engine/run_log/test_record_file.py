"""Files of records that are continued: what is kept, what is dropped, and how much of the file is read."""

import json

import pytest

from millrace.engine.run_log import side_channels
from millrace.engine.run_log.side_channels import RecordFile, drop_after, lines_backwards


def text_of(steps, size=0):
    return "".join(json.dumps({"step": step, "x": "y" * size}) + "\n" for step in steps)


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 16])
@pytest.mark.parametrize(
    "text", ["", "\n", "a", "a\n", "\n\na\nbb\n", "é\u2028x\nlong" + "g" * 300 + "\n\nend"]
)
def test_lines_from_the_end_are_those_from_the_start(tmp_path, monkeypatch, block, text):
    monkeypatch.setattr(side_channels, "_BLOCK", block)
    path = tmp_path / "x"
    path.write_bytes(text.encode())
    with path.open("rb") as file:
        forwards = list(file)
        backwards = list(lines_backwards(file))
    assert [line for _, line in reversed(backwards)] == forwards
    data = text.encode()
    assert all(data[at : at + len(line)] == line for at, line in backwards)


@pytest.mark.parametrize(
    ("before", "step", "after"),
    [
        (text_of(range(1, 9)), 5, text_of(range(1, 6))),
        (text_of([1, 2, 2, 3, 3]), 2, text_of([1, 2, 2])),
        (text_of([1, 2]), 9, text_of([1, 2])),
        (text_of([3, 4]), 2, ""),
        (text_of([1, 2]) + '{"step": 3, "x', 9, text_of([1, 2])),
        (text_of([1, 2]) + '{"step": 3, "x": "y"}', 9, text_of([1, 2]) + '{"step": 3, "x": "y"}\n'),
        (text_of([1, 2]) + "\0" * 300, 9, text_of([1, 2])),
        (text_of([1]) + "[2]\nnull\n" + text_of([3]), 2, text_of([1])),
        ("\0\0", 9, ""),
        ("", 9, ""),
    ],
)
def test_a_file_ends_at_the_step(tmp_path, before, step, after):
    path = tmp_path / "x.jsonl"
    path.write_text(before)
    drop_after(path, step)
    assert path.read_text() == after


def test_a_long_log_is_continued_without_reading_it(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_text(text_of(range(1, 20_001), 100))
    read = []
    forwards = side_channels.lines_backwards

    def counting(file):
        for at, line in forwards(file):
            read.append(len(line))
            yield at, line

    monkeypatch.setattr(side_channels, "lines_backwards", counting)
    number = path.stat().st_ino
    file = RecordFile(path, 19_990)
    file.write({"step": 19_991})
    assert [record["step"] for record in file.of_step(19_990)] == [19_990]
    assert len(read) == 11 + 3
    assert path.stat().st_ino == number  # cut in place, not written again
    assert path.read_text() == text_of(range(1, 19_991), 100) + '{"step": 19991}\n'
    file.close()
