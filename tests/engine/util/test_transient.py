"""Reads that are tried again, and those that are not."""

import errno
import os

import pytest

from millrace.engine.util import transient
from millrace.engine.util.transient import DELAYS, retried


@pytest.fixture
def slept(monkeypatch):
    waits = []
    monkeypatch.setattr(transient.time, "sleep", waits.append)
    return waits


class Failing:
    """Raises `number` times, then reads."""

    def __init__(self, number, times):
        self.number, self.times, self.calls = number, times, 0

    def __call__(self):
        self.calls += 1
        if self.calls <= self.times:
            raise OSError(self.number, os.strerror(self.number))
        return "data"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("times", range(len(DELAYS) + 1))
def test_what_passes_is_read(slept, number, times):
    assert retried(Failing(number, times)) == "data"
    assert tuple(slept) == DELAYS[:times]


def test_what_does_not_pass_is_raised(slept):
    read = Failing(errno.EIO, 99)
    with pytest.raises(OSError, match="Input/output error"):
        retried(read)
    assert read.calls == len(DELAYS) + 1


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EISDIR])
def test_what_will_not_pass_is_raised_at_once(slept, number):
    read = Failing(number, 1)
    with pytest.raises(OSError, match=os.strerror(number)):
        retried(read)
    assert (read.calls, slept) == (1, [])
