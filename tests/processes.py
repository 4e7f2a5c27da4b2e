"""What tests that start commands share."""

import os

_LAUNCHER = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "DS_ACCELERATOR",
}


def environment() -> dict[str, str]:
    """This process's environment without what a job's launcher, or a Trainer in this process, sets."""
    return {k: v for k, v in os.environ.items() if k not in _LAUNCHER} | {"OMP_NUM_THREADS": "1"}
