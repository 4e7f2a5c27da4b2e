"""What tests of programs share: loading a file that is run as a script, and starting a command."""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"

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


def load(name: str, folder: Path = BENCHMARKS) -> ModuleType:
    """The file `name`.py of a folder, which finds its neighbours as when one of them runs as a script."""
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
