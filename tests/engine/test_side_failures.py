"""Failures beside the training: each is a warning, the run goes on, and its checkpoints are there."""

import errno
import json
import os
import sys
import time
import types

import pytest

from millrace.engine.checkpoint import checkpoints
from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.run_log import side_channels

pytestmark = pytest.mark.slow

CHANGES = {"run": {"steps": 6}, "checkpoint": {"every_steps": 2, "keep": 2}}
SAMPLES = {"sampling": {"every_steps": 2, "count": 2, "steps": 2}}


def published(run):
    return [step for step, _ in list_checkpoints(run / "checkpoints")]


def warnings(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]


def test_a_folder_of_samples_that_cannot_be_written(runs, tmp_path, capsys):
    tmp_path.joinpath("samples").touch()  # a file where the folder should be
    assert runs.here(tmp_path, CHANGES, SAMPLES).error is None
    first, last = warnings(capsys)
    assert first.startswith("warning: sample grid failed: ")
    assert last == "warning: failures beside the training: sample grid 3"
    assert published(tmp_path) == [4, 6]


def test_the_checkpoint_of_a_step_comes_before_its_samples(runs, tmp_path, monkeypatch):
    seen = []

    def draw(_samples, step, _sampler):
        seen.append((step, published(tmp_path)[-1]))

    monkeypatch.setattr("millrace.engine.evaluation.run_samples.RunSamples._grid", draw)
    assert runs.here(tmp_path, CHANGES, {"checkpoint": {"blocking": True}}, SAMPLES).error is None
    assert seen == [(2, 2), (4, 4), (6, 6)]


def test_a_checkpoint_is_published_while_samples_are_drawn(runs, tmp_path, monkeypatch, capsys):
    def draw(_samples, step, _sampler):
        deadline = time.monotonic() + 60
        while step not in published(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert published(tmp_path)[-1] == step

    monkeypatch.setattr("millrace.engine.evaluation.run_samples.RunSamples._grid", draw)
    assert runs.here(tmp_path, CHANGES, SAMPLES).error is None
    assert warnings(capsys) == []


class FullDisk:
    """The end of a file on a disk that is full at some writes, and takes a few bytes of the first of them."""

    def __init__(self, file, full):
        self.file, self.full, self.writes = file, full, 0

    def write(self, data):
        self.writes += 1
        if self.writes == self.full[0]:
            return self.file.write(data[:5])
        if self.writes in self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_disk_that_is_full_at_the_log_for_a_while(runs, tmp_path, monkeypatch, capsys):
    """One line; the steps that it refused are in the log once there is space again."""
    write = side_channels.RecordFile.write

    def writing(self, *records, sync=False):
        if self._file is not None and not isinstance(self._file, FullDisk):
            self._file = FullDisk(self._file, full=range(2, 6))
        write(self, *records, sync=sync)

    monkeypatch.setattr(side_channels.RecordFile, "write", writing)
    assert runs.here(tmp_path, CHANGES).error is None
    first, last = warnings(capsys)
    assert first.startswith("warning: log.jsonl failed: No space left on device; training goes on")
    assert last == "warning: failures beside the training: log.jsonl 3"
    assert [record["step"] for record in runs.log(tmp_path)] == list(range(1, 7))
    assert published(tmp_path) == [4, 6]


class Refusing:
    """Stands for TensorBoard or Weights & Biases that raise at everything but their opening."""

    def __getattr__(self, name):
        raise ConnectionError("no answer")


def fake_wandb(monkeypatch, init):
    module = types.ModuleType("wandb")
    module.init, module.Html = init, str
    monkeypatch.setitem(sys.modules, "wandb", module)


@pytest.mark.parametrize("opens", [True, False])
def test_weights_and_biases_that_raises(runs, tmp_path, monkeypatch, capsys, opens):
    def init(**_arguments):
        if opens:
            return Refusing()
        raise RuntimeError("api key not configured\nrun wandb login")

    fake_wandb(monkeypatch, init)
    assert runs.here(tmp_path, CHANGES, {"logging": {"wandb": True}}).error is None
    first, last = warnings(capsys)
    reason = "no answer" if opens else "RuntimeError: api key not configured"
    assert (
        f"Weights & Biases failed: {'ConnectionError: ' if opens else ''}{reason}; training goes on" in first
    )
    assert last.endswith(f"Weights & Biases {8 if opens else 1}")  # the configuration, six steps and the end
    assert published(tmp_path) == [4, 6]


def test_tensorboard_that_raises(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("millrace.engine.run_log.sinks.TensorBoard.open", lambda *_: Refusing())
    assert runs.here(tmp_path, CHANGES, {"logging": {"tensorboard": True}}).error is None
    assert "TensorBoard failed: ConnectionError: no answer" in warnings(capsys)[0]
    assert published(tmp_path) == [4, 6]


def test_weights_and_biases_goes_on_with_its_run(runs, tmp_path, monkeypatch):
    ids = []

    def init(**arguments):
        ids.append((arguments["id"], arguments["resume"]))
        return types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda **_: None)

    fake_wandb(monkeypatch, init)
    staged = {"logging": {"wandb": True}, "stages": [{"at": 4, "optimizer": {"lr": 5e-4}}]}
    assert runs.here(tmp_path / "run", CHANGES, staged).error is None
    assert runs.here(tmp_path / "run", CHANGES, staged, {"run": {"steps": 8}}, resume="auto").error is None
    assert len(set(ids)) == 1
    assert len(ids) == 3  # two stages, and the resumed run
    assert ids[0][1] == "allow"
    assert runs.here(tmp_path / "other", CHANGES, {"logging": {"wandb": True}}).error is None
    assert ids[3] != ids[0]


def test_rejects_that_were_cut_off(runs, tmp_path):
    """The line of a power cut; one more bad picture comes after it."""
    from millrace.engine.run_log.sample_log import SampleLog

    (tmp_path / "rejects.jsonl").write_text('{"key": "a", "reason": "x"}\n{"key": "b", "rea')
    SampleLog(tmp_path, 0, keep_keys=False).reject({"a": "x", "b": "y", "c": "z"})
    *whole, b, c = (tmp_path / "rejects.jsonl").read_text().splitlines()
    assert whole == ['{"key": "a", "reason": "x"}', '{"key": "b", "rea']
    assert [json.loads(line)["key"] for line in (b, c)] == ["b", "c"]


def test_rejects_that_cannot_be_written(runs, tmp_path, caplog):
    from millrace.engine.run_log.sample_log import SampleLog

    (tmp_path / "rejects.jsonl").mkdir()
    log = SampleLog(tmp_path, 0, keep_keys=False)
    for _ in range(2):
        log.reject({"a": "x"})
    assert len(caplog.records) == 1
    assert "rejects.jsonl failed: Is a directory" in caplog.text


def test_an_old_checkpoint_that_is_busy(runs, tmp_path, monkeypatch, caplog):
    delete = checkpoints.shutil.rmtree

    def refuse(path, ignore_errors=False):
        if not ignore_errors and "00000002" in str(path):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        delete(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(checkpoints.shutil, "rmtree", refuse)
    assert runs.here(tmp_path, CHANGES, {"run": {"steps": 8}}).error is None
    assert published(tmp_path) == [6, 8]
    assert "cannot be deleted: Device or resource busy" in caplog.text


class TestSaving:
    """A disk that refuses checkpoints."""

    @pytest.fixture(autouse=True)
    def refusing(self, monkeypatch):
        self.refused = ()
        rename = os.rename

        def renaming(source, target):
            if any(str(target).endswith(f"step-{step:08d}") for step in self.refused):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
            rename(source, target)

        monkeypatch.setattr(os, "rename", renaming)

    def test_the_next_step_that_is_due_tries_again(self, runs, tmp_path, capsys):
        self.refused = (2,)
        assert runs.here(tmp_path, CHANGES).error is None
        (said,) = warnings(capsys)
        assert "checkpoint of step 2 failed: No space left on device" in said
        assert "tried again at the next step that is due" in said
        assert published(tmp_path) == [4, 6]

    def test_two_failures_that_are_not_in_a_row(self, runs, tmp_path):
        self.refused = (2, 6)
        assert runs.here(tmp_path, CHANGES, {"run": {"steps": 8}}).error is None
        assert published(tmp_path) == [4, 8]

    def test_the_second_in_a_row_ends_the_run(self, runs, tmp_path):
        self.refused = (4, 6)
        error = runs.here(tmp_path, CHANGES, {"run": {"steps": 10}}).error
        assert "checkpoint of step 6 failed: No space left on device" in error
        assert published(tmp_path) == [2]

    def test_the_last_one_ends_the_run(self, runs, tmp_path):
        self.refused = (6,)
        assert "checkpoint of step 6 failed" in runs.here(tmp_path, CHANGES).error
        assert published(tmp_path) == [2, 4]
