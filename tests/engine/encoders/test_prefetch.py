"""Prefetch of micro-batches: what is encoded when, and that it makes no difference."""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from millrace.engine.config.loading import parse_config
from millrace.engine.encoders import prefetch as module
from millrace.engine.encoders.prefetch import BatchPrefetcher
from millrace.engine.trainer import Trainer
from millrace.engine.util.errors import UserError

CPU = torch.device("cpu")


class Log:
    """A stream of numbers, and a preparation of them, that note what is done."""

    device = CPU

    def __init__(self, fails_at=None):
        self.events, self.fails_at, self.given = [], fails_at, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.given == self.fails_at:
            raise UserError("picture 3 is bad")
        self.given += 1
        return self.given - 1

    def __call__(self, number):
        self.events.append(f"prepare {number}")
        return SimpleNamespace(number=number, tensors=list)


def use(batches, log, count):
    """A training loop: take a batch, work, look ahead."""
    for step in range(count):
        log.events.append(f"use {batches.next_batch(log).number}")
        if step < count - 1:
            batches.look_ahead(log)


def test_the_next_batch_is_prepared_once_while_this_one_is_used():
    log = Log()
    use(BatchPrefetcher(log, ahead=True), log, 3)
    assert log.events == ["prepare 0", "use 0", "prepare 1", "use 1", "prepare 2", "use 2"]
    assert log.given == 3


def test_asking_twice_prepares_once():
    log = Log()
    batches = BatchPrefetcher(log, ahead=True)
    batches.look_ahead(log)
    batches.look_ahead(log)
    assert batches.next_batch(log).number == 0
    assert log.events == ["prepare 0"]


def test_on_a_cpu_nothing_is_prepared_before_its_turn():
    log = Log()
    use(BatchPrefetcher(log), log, 2)
    assert log.events == ["prepare 0", "use 0", "prepare 1", "use 1"]
    batches = BatchPrefetcher(log := Log())
    batches.next_batch(log)
    batches.look_ahead(log)
    assert log.given == 1


def test_an_error_ahead_waits_for_its_turn():
    log = Log(fails_at=1)
    batches = BatchPrefetcher(log, ahead=True)
    assert batches.next_batch(log).number == 0
    batches.look_ahead(log)
    with pytest.raises(UserError, match="picture 3 is bad"):
        batches.next_batch(log)


class Device:
    """Stands for a CUDA device with two streams, and notes in `log` what they are told."""

    def __init__(self, monkeypatch, log):
        self.log = log
        self.main, self.side = self.Stream(self, "main"), self.Stream(self, "side")
        self.current = self.main
        monkeypatch.setattr(torch.cuda, "Stream", lambda _device: self.side)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.switched)

    @contextmanager
    def switched(self, stream):
        self.current = stream
        yield
        self.current = self.main

    class Stream:
        def __init__(self, device, name):
            self.log, self.name, self.events = device.log, name, 0

        def wait_stream(self, other):
            self.log.append(f"{self.name} waits for {other.name}")

        def record_event(self):
            self.events += 1
            return f"event {self.events - 1} of {self.name}"

        def wait_event(self, event):
            self.log.append(f"{self.name} waits for {event}")


class DeviceTensor:
    device = torch.device("cuda")

    def __init__(self, log, number):
        self.log, self.number = log, number

    def record_stream(self, stream):
        self.log.append(f"{stream.name} reads tensor {self.number}")


def test_on_a_device_a_batch_is_used_after_the_side_stream_has_made_it(monkeypatch):
    """And its memory stays until the main stream has read it."""
    log = Log()
    log.device = torch.device("cuda")
    device = Device(monkeypatch, log.events)

    def prepare(number):
        log.events.append(f"{device.current.name} prepares {number}")
        return SimpleNamespace(number=number, tensors=lambda: [DeviceTensor(log.events, number)] * 2)

    log.prepare = prepare
    monkeypatch.setattr(Log, "__call__", lambda log, number: log.prepare(number))
    use(BatchPrefetcher(log), log, 2)
    assert log.events == [
        "side waits for main",
        "side prepares 0",
        "main waits for event 0 of side",
        *["main reads tensor 0"] * 2,
        "use 0",
        "side prepares 1",
        "main waits for event 1 of side",
        *["main reads tensor 1"] * 2,
        "use 1",
    ]


class LookingAhead(BatchPrefetcher):
    """As on CUDA, in place."""

    def __init__(self, prepare):
        super().__init__(prepare, ahead=True)
        self.lying_ahead = 0

    def look_ahead(self, stream):
        assert self._next is None
        super().look_ahead(stream)
        self.lying_ahead += 1


def trained(runs, output, *changes, ahead, monkeypatch, resume=None):
    made = []

    def prefetcher(encoder, _ahead):
        made.append(LookingAhead(encoder) if ahead else BatchPrefetcher(encoder))
        return made[0]

    monkeypatch.setattr("millrace.engine.trainer.BatchPrefetcher", prefetcher)
    trainer = Trainer(parse_config(runs.values(output, *changes), "test"), resume)
    consumed = []
    inner = trainer.next_batch
    trainer.next_batch = lambda: consumed.append(batch := inner()) or batch
    trainer.train()
    return SimpleNamespace(
        batches=made[0], consumed=[batch.keys for batch in consumed], stream=trainer.stream
    )


@pytest.mark.slow
def test_looking_ahead_changes_neither_numbers_nor_the_cursor(runs, tmp_path, monkeypatch):
    changes = {"checkpoint": {"every_steps": 2}, "conditioning": {"text": {"max_tokens": 3}}}
    plain = trained(runs, tmp_path / "plain", changes, ahead=False, monkeypatch=monkeypatch)
    ahead = trained(runs, tmp_path / "ahead", changes, ahead=True, monkeypatch=monkeypatch)
    assert ahead.consumed == plain.consumed
    # Every batch but the first was prepared ahead, and none after the last.
    assert ahead.batches.lying_ahead == len(ahead.consumed) - 1
    assert ahead.stream._submitted == plain.stream._submitted == len(ahead.consumed)
    runs.assert_same_bits(tmp_path / "ahead", tmp_path / "plain")
    # A batch counts when it is handed out, not when it is encoded.
    cut = [[line["captions_cut"] for line in runs.log(tmp_path / run)] for run in ("ahead", "plain")]
    assert cut[0] == cut[1]
    assert 0 < cut[0][0] < cut[0][-1]

    # A checkpoint knows nothing of the batch that lay ahead when it was written.
    middle = Path(tmp_path / "ahead" / "checkpoints" / "step-00000002")
    again = trained(
        runs,
        tmp_path / "resumed",
        changes,
        ahead=True,
        monkeypatch=monkeypatch,
        resume=str(middle),
    )
    assert again.consumed == plain.consumed[2 * len(plain.consumed) // 6 :]
    assert runs.state_of(tmp_path / "resumed")[0] == runs.state_of(tmp_path / "plain")[0]


@pytest.mark.cuda
@pytest.mark.slow
def test_overlapped_and_sequential_runs_are_the_same_bits(runs, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    from millrace.engine.encoders.autoencoder import autoencoder_entry
    from millrace.engine.encoders.text_encoder import text_encoder_entry

    conditioning = {
        "text": {"kind": "t5gemma", "path": str(text_encoder_entry("t5gemma").tiny(16, tmp_path / "tower"))},
        "autoencoder": {
            "kind": "flux1",
            "path": str(autoencoder_entry("flux1").tiny(tmp_path / "autoencoder")),
        },
    }
    changes = {
        "run": {"device": "cuda", "steps": 12},
        "model": {"in_channels": 16, "patch_size": 2},
        "objective": {"prediction": "velocity"},
        "conditioning": conditioning,
        "data": {"resolution": 64, "upscale": True, "workers": 2},
        "sampling": {"every_steps": 4, "count": 2, "steps": 2},
    }
    runs.here(tmp_path / "overlapped", changes)
    monkeypatch.setattr(module.BatchPrefetcher, "look_ahead", lambda *_: None)
    runs.here(tmp_path / "sequential", changes)
    runs.assert_same_bits(tmp_path / "overlapped", tmp_path / "sequential")
