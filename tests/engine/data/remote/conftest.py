"""The cache of a test's own, and patience with it."""

import time

import pytest

from millrace.engine.util import node_cache


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Folder of the node cache."""
    monkeypatch.setenv(node_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def eventually():
    """`eventually(check)`: samples reach the disk a moment after they were read."""

    def wait(check, seconds=20.0):
        end = time.monotonic() + seconds
        while not check():
            assert time.monotonic() < end
            time.sleep(0.05)

    return wait
