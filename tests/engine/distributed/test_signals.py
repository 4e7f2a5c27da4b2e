"""Requests to stop, as one process sees them; whole runs are stopped in test_signals.py."""

import os
import signal

import pytest

from millrace.engine.distributed import signals
from millrace.engine.distributed.signals import Request, StopRequests


@pytest.fixture(autouse=True)
def _handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nothing_asked(tmp_path):
    assert StopRequests(tmp_path).poll() == Request(save=False, stop=None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_the_step_boundary_and_stays(tmp_path, number):
    requests = StopRequests(tmp_path)
    os.kill(os.getpid(), number)
    assert requests.poll() == Request(save=False, stop=number.name)
    assert requests.poll().stop == number.name


def test_the_second_interrupt_is_not_held_back(tmp_path):
    StopRequests(tmp_path)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_interrupt_after_sigterm_interrupts(tmp_path):
    StopRequests(tmp_path)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_repeated_sigterm_is_harmless(tmp_path):
    """Schedulers send it more than once."""
    requests = StopRequests(tmp_path)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert requests.poll().stop == "SIGTERM"


def test_files(tmp_path):
    requests = StopRequests(tmp_path)
    (tmp_path / "save").touch()
    assert requests.poll() == Request(save=True, stop=None)
    assert requests.poll() == Request(save=False, stop=None)
    (tmp_path / "stop").touch()
    assert requests.poll() == Request(save=False, stop="the file 'stop'")
    assert list(tmp_path.iterdir()) == []
    assert requests.poll().stop == "the file 'stop'"


def test_a_lost_launcher(tmp_path, monkeypatch):
    chain = [20, 10]
    monkeypatch.setattr(signals, "_launchers", lambda: chain)
    requests = StopRequests(tmp_path)
    assert requests.poll().stop is None
    chain = [20]
    assert requests.poll().stop == "the launcher is gone"


def test_no_launcher_no_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "_launchers", lambda: [])
    assert StopRequests(tmp_path).poll().stop is None


def test_this_process_has_no_launcher():
    assert signals._launchers() == []
