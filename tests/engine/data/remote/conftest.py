"""Data sets behind a web server that is far away and fails, and the cache of a test's own."""

import time

import pytest

from millrace.benchmarks.data.faulty_server import FaultyServer
from millrace.engine.data.remote import remote_files
from millrace.engine.util import node_cache


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Folder of the node cache."""
    monkeypatch.setenv(node_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def serve():
    """`serve(folder, **faults)` -> a running FaultyServer."""
    running = []

    def start(root, **faults):
        running.append(FaultyServer(root, **faults).__enter__())
        return running[-1]

    yield start
    for server in running:
        server.__exit__()


@pytest.fixture
def hasty(monkeypatch):
    """Attempts follow each other at once."""
    monkeypatch.setattr(remote_files, "DELAYS", (0.0,) * len(remote_files.DELAYS))


@pytest.fixture
def eventually():
    """`eventually(check)`: samples reach the disk a moment after they were read."""

    def wait(check, seconds=20.0):
        end = time.monotonic() + seconds
        while not check():
            assert time.monotonic() < end
            time.sleep(0.05)

    return wait
