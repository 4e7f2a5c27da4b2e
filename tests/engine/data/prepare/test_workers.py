import os
import signal
import time

import pytest

from millrace.engine.data.prepare.workers import Workers
from millrace.engine.util.errors import UserError


def nothing(*_):
    pass


def test_no_processes_is_this_process():
    counts = []
    with Workers(0, lambda *n: counts.append(n)) as pool:
        results = list(pool.run(lambda x, report: (report(1, 2), x * x)[1], [(2,), (3,)]))
    assert results == [(0, 4), (1, 9)]
    assert counts == [(1, 2), (1, 2)]


def test_errors_of_a_task_are_raised():
    with Workers(0, nothing) as pool, pytest.raises(ZeroDivisionError):
        list(pool.run(lambda x, _: 1 / x, [(0,)]))


def test_processes_return_everything_report_everything_and_raise():
    with Workers(2, nothing) as pool:
        results = dict(pool.run(_first, [(i,) for i in range(20)]))
        assert results == {i: str((i, "report")) for i in range(20)}
        with pytest.raises(FileNotFoundError):
            list(pool.run(_open, [("/no/such/file",)]))


def test_a_process_that_dies_is_one_line_and_no_hang():
    started = time.monotonic()
    with Workers(1, nothing) as pool, pytest.raises(UserError, match="a worker process died"):
        list(pool.run(_die, [(1,)]))
    assert time.monotonic() - started < 60


def _first(value, report):
    return str((value, "report"))


def _open(path, report):
    raise FileNotFoundError(path)


def _die(_, report):
    os.kill(os.getpid(), signal.SIGKILL)
