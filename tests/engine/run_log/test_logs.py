"""log.jsonl and the loss buffer."""

import fcntl
import json
import math
import os
import re
import select
import struct
import sys
import termios
from contextlib import suppress
from threading import Thread

import pytest
import torch

from millrace.engine.run_log.logs import RunLog, make_output
from millrace.engine.run_log.loss_buffer import LossBuffer
from millrace.engine.util.errors import UserError

CPU = torch.device("cpu")


def record(step, loss=1.0, **more):
    times = {"step_seconds": 0.1, "images_per_second": 10.0}
    return {"step": step, "loss": loss, "grad_norm": 1.0} | times | more


def lines(folder):
    return (folder / "log.jsonl").read_text().splitlines()


def test_losses_are_means_over_samples_and_by_time():
    buffer = LossBuffer(2, CPU)
    buffer.add({"flow": torch.tensor([1.0, 2.0])}, torch.tensor([0.1, 0.3]))
    buffer.add({"flow": torch.tensor([4.0, 9.0])}, torch.tensor([0.2, 1.0]))
    assert not buffer.end_step()
    buffer.add({"flow": torch.tensor([0.5])}, torch.tensor([0.75]))
    assert buffer.end_step()
    first, second = buffer.flush()
    assert first.loss == 4.0
    assert first.by_time == [2.5, 2.0, None, 9.0]
    assert (second.loss, second.by_time) == (0.5, [None, None, None, 0.5])


def test_a_flush_starts_anew():
    buffer = LossBuffer(3, CPU)
    buffer.add({"flow": torch.tensor([1.0])}, torch.tensor([0.5]))
    buffer.end_step()
    assert [step.loss for step in buffer.flush()] == [1.0]
    assert buffer.flush() == []
    buffer.add({"flow": torch.tensor([3.0])}, torch.tensor([0.5]))
    buffer.end_step()
    assert [step.loss for step in buffer.flush()] == [3.0]


def test_sums_are_kept_in_float64():
    buffer = LossBuffer(1, CPU)
    for _ in range(1000):
        buffer.add({"flow": torch.tensor([1e-4, 1e4])}, torch.tensor([0.5, 0.5]))
    buffer.end_step()
    (step,) = buffer.flush()
    tiny, large = (float(torch.tensor(value)) for value in (1e-4, 1e4))
    assert step.loss == pytest.approx((tiny + large) / 2, rel=1e-12)  # FP32 sums err by 1e-8


def test_nan_stays_in_its_step():
    buffer = LossBuffer(2, CPU)
    buffer.add({"flow": torch.tensor([math.nan])}, torch.tensor([0.5]))
    buffer.end_step()
    buffer.add({"flow": torch.tensor([1.0])}, torch.tensor([0.5]))
    buffer.end_step()
    first, second = buffer.flush()
    assert math.isnan(first.loss)
    assert second.loss == 1.0
    buffer.add({"flow": torch.tensor([2.0])}, torch.tensor([0.5]))
    buffer.end_step()
    assert buffer.flush()[0].loss == 2.0


def test_one_object_a_step_and_null_for_what_json_cannot_say(runs, tmp_path):
    log = RunLog(runs.config(tmp_path), tmp_path, 0)
    log.records([record(1, 0.1 + 0.2), record(2, math.nan, loss_by_time=[math.inf, None, 1.0, 2.0])])
    log.records([])
    log.records([record(3)])
    log.close()
    text = (tmp_path / "log.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    found = [json.loads(line) for line in text.splitlines()]
    assert [item["step"] for item in found] == [1, 2, 3]
    assert found[0]["loss"] == 0.1 + 0.2  # every bit
    assert found[1]["loss"] is None
    assert found[1]["loss_by_time"] == [None, None, 1.0, 2.0]


def test_records_are_on_disk_before_the_next_step(runs, tmp_path):
    log = RunLog(runs.config(tmp_path), tmp_path, 0)
    log.records([record(1)])
    assert len(lines(tmp_path)) == 1
    log.close()


def test_resuming_drops_later_steps_and_a_line_cut_off(runs, tmp_path):
    first = RunLog(runs.config(tmp_path), tmp_path, 0)
    first.records([record(step, step / 7) for step in range(1, 6)])
    first.close()
    kept = lines(tmp_path)[:4]
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    second = RunLog(runs.config(tmp_path), tmp_path, 4)
    assert lines(tmp_path) == kept
    second.records([record(5, 0.5)])
    second.close()
    assert lines(tmp_path)[:4] == kept
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert json.loads(lines(tmp_path)[4])["loss"] == 0.5


def test_a_line_cut_off_that_is_still_wanted_ends_cleanly(runs, tmp_path):
    """The disk lost the end of the log: the lines before stay, and nothing is glued to the torn one."""
    (tmp_path / "log.jsonl").write_text(json.dumps(record(1)) + "\n" + '{"step": 2, "loss": 0.')
    log = RunLog(runs.config(tmp_path), tmp_path, 2)
    log.records([record(3)])
    log.close()
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == [1, 3]


def test_a_new_run_leaves_no_lines_of_an_older_one(runs, tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps(record(1)) + "\n")
    RunLog(runs.config(tmp_path), tmp_path, 0).close()
    assert lines(tmp_path) == []


def test_tensorboard_has_every_step(runs, tmp_path):
    """Also those that a resumed run makes again, once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = runs.config(tmp_path, {"logging": {"tensorboard": True}})
    log = RunLog(config, tmp_path, 0)
    log.records([record(1, 0.5), record(2, 0.25)])
    log.close()
    again = RunLog(config, tmp_path, 1)
    again.records([record(2, 0.125)])
    again.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.125)]


def test_progress_says_step_loss_rate_and_time_left(runs, tmp_path, capsys):
    log = RunLog(runs.config(tmp_path), tmp_path, 0)
    log.records([record(3, 0.5, mfu=0.41)])
    log.close()
    shown = capsys.readouterr().err
    for part in ("step 3/6", "loss 0.5000", "norm 1.000", "100 ms", "10.0 img/s", "MFU 41.0%", "left"):
        assert part in shown


class Terminal:
    """While active, stderr is a terminal; `shown` is then what was written to it."""

    def __init__(self, monkeypatch, columns=100, rows=24):
        self._patch = monkeypatch
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._screen, self._pieces, self._closed = os.fdopen(slave, "w"), [], False
        self._reader = Thread(target=self._read)

    def _read(self):
        """A terminal that nobody reads stops its writer after a few kilobytes."""
        while select.select([self._master], [], [], 0 if self._closed else 0.05)[0] or not self._closed:
            with suppress(BlockingIOError):
                self._pieces.append(os.read(self._master, 4096))

    def __enter__(self):
        os.set_blocking(self._master, False)
        self._reader.start()
        self._patch.setattr(sys, "stderr", self._screen)
        return self

    def __exit__(self, *_exception):
        self._patch.undo()
        self._screen.flush()
        self._closed = True
        self._reader.join()
        self._screen.close()
        os.close(self._master)
        self.shown = b"".join(self._pieces).decode()


def test_a_terminal_gets_a_bar_with_what_the_plain_line_says(runs, tmp_path, monkeypatch):
    """It goes on where the run resumes, and lines for people stand above it."""
    with Terminal(monkeypatch) as terminal:
        log = RunLog(runs.config(tmp_path), tmp_path, 2)
        log.say("saved a checkpoint")
        log.records([record(5, 0.5, mfu=0.41)])
        log.close()
    shown = terminal.shown
    assert shown.index("2/6 [") < shown.index("saved a checkpoint\r\n") < shown.index("5/6 [")
    assert "loss 0.5000  norm 1.000  100 ms  10.0 img/s  MFU 41.0%" in shown
    assert "step 5/6" not in shown


@pytest.mark.parametrize("size", [(24, 100), (0, 0), (24, 0)])
def test_the_bar_moves_every_step_with_the_last_loss_that_is_known(runs, tmp_path, monkeypatch, size):
    """The host learns the losses of several steps at once; also where the terminal says that it is 0 x 0."""
    rows, columns = size
    with Terminal(monkeypatch, columns, rows) as terminal:
        log = RunLog(runs.config(tmp_path), tmp_path, 0)
        log._bar.mininterval, log._bar.miniters = 0, 1
        for step in (1, 2, 3):
            known = record(step)
            loss = known.pop("loss")
            log.advance(known)
            if step == 2:
                log.records([record(1, 0.75), record(2, loss / 2)])
        log.close()
    shown = terminal.shown.split("\r")
    assert any("1/6 [" in line and "norm 1.000" in line and "loss" not in line for line in shown)
    assert any("2/6 [" in line and "loss 0.5000  norm 1.000" in line for line in shown)
    assert any("3/6 [" in line and "loss 0.5000  norm 1.000  100 ms" in line for line in shown)
    assert max(len(line) for line in shown) <= (columns or 80)


@pytest.mark.slow
def test_a_training_run_in_a_terminal_shows_every_step(runs, tmp_path, monkeypatch):
    """Though it reads the device once in three steps."""
    moved = []
    advance = RunLog.advance
    monkeypatch.setattr(
        RunLog, "advance", lambda log, r: (moved.append((r["step"], "loss" in r)), advance(log, r))
    )
    with Terminal(monkeypatch, 0, 0) as terminal:
        runs.here(tmp_path / "run", {"run": {"steps": 3}, "logging": {"every_steps": 3}})
    assert moved == [(1, False), (2, False), (3, False), (3, True)]
    assert "3/3 [" in terminal.shown


@pytest.mark.slow
def test_a_training_run_in_a_terminal_shows_the_bar(runs, tmp_path, monkeypatch):
    with Terminal(monkeypatch) as terminal:
        runs.here(tmp_path / "run", {"run": {"steps": 2}})
    shown = terminal.shown
    assert "0/2 [" in shown
    assert "2/2 [" in shown
    assert "step 2/2" not in shown


def test_elsewhere_there_is_no_bar(runs, tmp_path, capsys):
    log = RunLog(runs.config(tmp_path), tmp_path, 2)
    log.say("saved a checkpoint")
    log.records([record(5, 0.5)])
    log.close()
    first, second = capsys.readouterr().err.splitlines()
    assert first == "saved a checkpoint"
    assert re.fullmatch(
        r"step 5/6  loss 0\.5000  norm 1\.000  100 ms  10\.0 img/s  \d:\d\d:\d\d left", second
    )


def test_the_folder_of_a_run(tmp_path):
    make_output(tmp_path / "a" / "b")
    make_output(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(
            UserError, match=rf"^{path}: cannot be written: .*; choose another run\.output_dir$"
        ):
            make_output(path)


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        make_output(tmp_path)
