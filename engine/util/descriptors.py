"""Descriptors: how many files this process may have open, raised to what the system allows."""

import resource

MOST = 1 << 17
"""Descriptors that are asked for, where the system sets no lower limit."""


def raise_limit() -> int:
    """Raise the soft limit of open files to the hard one, at most to MOST; the limit that holds.

    The usual soft limit of 1,024 is less than a process of a job of 1,024 has sockets.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft == resource.RLIM_INFINITY:
        return MOST
    if soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
        except (OSError, ValueError):  # a sandbox may refuse
            pass
    return soft
