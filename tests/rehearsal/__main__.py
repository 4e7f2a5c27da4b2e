"""python -m tests.rehearsal [CONFIGURATION ...]: rehearse training on a GPU that is not there.

A line for each stage of each configuration: operators called and kernels started in a ragged and a uniform
micro-batch, kernels that Triton compiles for them, and how many of these are not compiled ahead of time.
"""

import sys
import time

from tests.rehearsal.table import declared, explain, rows


def main() -> int:
    missing = {}
    print(f"{'configuration':44} operators  launches  specialisations  missing  seconds")
    started = time.perf_counter()
    for row in rows(sys.argv[1:]):
        seconds, started = time.perf_counter() - started, time.perf_counter()
        calls, launched, found = row.rehearsed
        numbers = f"{calls.total():9}  {launched:8}  {len(found):15}  {len(row.missing) or 'none':>7}"
        print(f"{row.name:44} {numbers}  {'as ' + row.same_as if row.same_as else f'{seconds:7.1f}'}", flush=True)
        for one in row.missing:
            missing.setdefault(one, row.name)
    known = declared()
    for line in sorted(f"{explain(one, known)} ({name})" for one, name in missing.items()):
        print(line)
    return len(missing) > 0


if __name__ == "__main__":
    sys.exit(main())
