"""Requests to stop, as one process sees them; whole runs are stopped in engine/test_signals.py."""

import os
import signal
import time

import pytest

from millrace.engine.distributed import signals
from millrace.engine.distributed.signals import DataNeverCame, Request, StopRequests


@pytest.fixture(autouse=True)
def _handlers():
    heard = (*signals.SIGNALS, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in heard}
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def requests(tmp_path):
    with StopRequests(tmp_path) as found:
        yield found


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = [1000.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    return now


def send(number):
    os.kill(os.getpid(), number)


def test_nothing_asked(requests):
    assert requests.poll() == Request(save=False, stop=None)


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_waits_for_the_step_boundary_and_stays(requests, number):
    send(number)
    assert requests.poll() == Request(save=False, stop=number.name)
    assert requests.poll(now=True).stop == number.name


def test_before_it_listens_signals_are_as_they_were(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    StopRequests(tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before


def test_nohup_keeps_its_meaning(tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequests(tmp_path) as requests:
        send(signal.SIGHUP)
        assert requests.poll().stop is None


def test_the_second_interrupt_of_a_person_is_not_held_back(requests):
    send(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


@pytest.mark.parametrize("second", signals.INSISTING)
def test_the_second_sigterm_interrupts(requests, clock, second):
    send(signal.SIGTERM)
    clock[0] += signals.REPEAT_SECONDS
    with pytest.raises(KeyboardInterrupt):
        send(second)


@pytest.mark.parametrize("number", signals.INSISTING)
def test_a_launcher_that_passes_on_what_its_group_received_is_no_second_one(
    requests, clock, monkeypatch, number
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    send(number)
    clock[0] += 0.1
    send(signal.SIGTERM)
    assert requests.reason == number.name


@pytest.mark.parametrize("early", [signal.SIGUSR1, signal.SIGHUP])
def test_a_warning_before_the_end_is_not_the_first_of_two(requests, clock, early):
    """Slurm sends SIGUSR1 minutes before SIGTERM: a save in progress goes on."""
    send(early)
    clock[0] += 300
    send(signal.SIGTERM)
    send(early)
    assert requests.poll().stop == early.name


def test_files(tmp_path, requests, clock):
    (tmp_path / "save").touch()
    assert requests.poll() == Request(save=True, stop=None)
    assert requests.poll() == Request(save=False, stop=None)
    (tmp_path / "stop").touch()
    assert requests.poll().stop is None  # looked a moment ago
    clock[0] += signals.LOOK_SECONDS
    assert requests.poll() == Request(save=False, stop="the file 'stop'")
    assert list(tmp_path.iterdir()) == []
    assert requests.poll().stop == "the file 'stop'"


def test_a_lost_launcher(tmp_path, monkeypatch, clock):
    chain = [20, 10]
    monkeypatch.setattr(signals, "_launchers", lambda: chain)
    requests = StopRequests(tmp_path)
    assert requests.poll().stop is None
    chain = [20]
    clock[0] += signals.LOOK_SECONDS
    assert requests.poll().stop == "the launcher is gone"


def test_no_launcher_no_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "_launchers", lambda: [])
    assert StopRequests(tmp_path).poll().stop is None


def test_this_process_has_no_launcher():
    assert signals._launchers() == []


def test_a_loader_without_data_is_interrupted_after_a_while(requests, monkeypatch):
    monkeypatch.setattr(signals, "DATA_SECONDS", 0.05)
    read, write = os.pipe()
    send(signal.SIGTERM)
    time.sleep(0.1)  # nobody waits for data: nothing happens
    began = time.monotonic()
    with pytest.raises(DataNeverCame), requests.waiting_for_data():
        os.read(read, 1)
    assert time.monotonic() - began >= 0.05
    os.close(read)
    os.close(write)


def test_a_loader_that_waits_a_moment_is_not(requests, monkeypatch):
    monkeypatch.setattr(signals, "DATA_SECONDS", 0.2)
    send(signal.SIGTERM)
    for _ in range(5):
        with requests.waiting_for_data():
            time.sleep(0.08)


class Store(dict):
    """A job's store, as far as it is used here."""

    set = dict.__setitem__

    def check(self, keys):
        return all(key in self for key in keys)

    def get(self, key):
        return self[key].encode()


def test_a_stop_reaches_ranks_that_no_step_reaches(tmp_path, monkeypatch):
    """One rank was asked; another waits for data, where it would never learn of it."""
    store, woken = Store(), []
    monkeypatch.setattr(os, "kill", lambda _pid, number: woken.append(number))
    asked, other = StopRequests(tmp_path), StopRequests(tmp_path)
    other.while_stalled(store)
    asked._handle(signal.SIGTERM, None)
    asked.while_stalled(store)
    other.while_stalled(store)
    assert (other.reason, woken) == ("SIGTERM", [signal.SIGALRM])
    signal.setitimer(signal.ITIMER_REAL, 0)
