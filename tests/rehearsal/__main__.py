"""python -m tests.rehearsal [CONFIGURATION ...]: rehearse training on a GPU that is not there.

A line for each stage of each configuration: operators called and kernels started in a ragged and a uniform
micro-batch, kernels that Triton compiles for them, and how many of these are not compiled ahead of time.
"""

import sys
import time
from collections.abc import Sequence

from tests.rehearsal.table import Table, explain, stages


def main(names: Sequence[str]) -> int:
    """Print the table; 1 if anything is missing."""
    table, missing = Table(), {}
    print(f"{'configuration':40} operators  launches  specialisations  missing  seconds")
    for name, config in stages(names):
        started = time.perf_counter()
        row = table.row(name, config)
        calls, launched, found = row.rehearsed
        numbers = f"{calls.total():9}  {launched:8}  {len(found):15}  {len(row.missing) or 'none':>7}"
        how = f"as {row.same_as}" if row.same_as else f"{time.perf_counter() - started:7.1f}"
        print(f"{name:40} {numbers}  {how}", flush=True)
        for one in row.missing:
            missing.setdefault(one, name)
    for line in sorted(f"{explain(one, table.declared)} ({name})" for one, name in missing.items()):
        print(line)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
