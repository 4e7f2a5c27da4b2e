"""Transient errors: reads that a network file system refuses now and grants a moment later."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

TRANSIENT = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EAGAIN,
        errno.EINTR,
        errno.ENOBUFS,
        errno.EREMOTEIO,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENETRESET,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
    }
)
DELAYS = (0.5, 2.0, 8.0)
"""Seconds before the second, third and fourth attempt."""


def retried(read: Callable[[], T]) -> T:
    """The result of `read`, which is called again after an OSError that may pass. Raises the last one."""
    for delay in DELAYS:
        try:
            return read()
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            time.sleep(delay)
    return read()
