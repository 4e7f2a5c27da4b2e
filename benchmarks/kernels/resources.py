"""What every Triton kernel takes of each chip: registers, occupancy, local memory in loops, shared memory.

python -m benchmarks resources                            # every chip; writes results/resources.json
python -m benchmarks resources --only geglu               # one file of kernels/; renews its rows there
python -m benchmarks resources --only geglu --chips 90    # on one chip; writes nothing

Kernels are compiled, not run, so this needs Triton but no GPU. The file holds the most that any launch of a
kernel takes, and depends on nothing but the sources and the versions that it names. The exit code is 1 if a
kernel accesses local memory in a loop, takes more than the chip has, or does not use the matrix instructions
that it is written for; what is wrong stands in the file as well.
"""

import json
import os
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from millrace.benchmarks.report import resources_report as report
from millrace.benchmarks.report.recording import RESULTS, write
from millrace.engine.cli import command_parser, run_command
from millrace.engine.util.errors import UserError
from millrace.kernels.support.compilation import CHIPS, Launch, compile_launch, launches, problems
from millrace.kernels.support.registration import HAS_TRITON, INTERPRETING

Row = dict[str, Any]
RECORDED = RESULTS / "resources.json"
MOST = ("registers", "spill_bytes", "loop_local", "shared_bytes")


def main() -> int:
    """Compile, print, write."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--only", metavar="FILE", help="name of one file of kernels/, such as geglu")
    add("--chips", nargs="+", type=int, choices=CHIPS, default=list(CHIPS), metavar="N", help="default all")
    add("--processes", type=int, default=os.cpu_count(), metavar="N", help="default one a core")
    add("--output", type=Path, help="JSON file; default results/resources.json, none with --chips")
    arguments = parser.parse_args()
    chosen = [i for i, (file, _) in enumerate(declared()) if arguments.only in (None, file)]
    if not chosen:
        files = ", ".join(sorted({file for file, _ in declared()}))
        raise UserError(f"--only {arguments.only}: no such file with kernels; there are {files}")
    began, rows = time.monotonic(), []
    jobs = [(i, chip) for chip in arguments.chips for i in chosen if chip >= declared()[i][1].needs]
    with ExitStack() as stack:
        run = map
        if arguments.processes > 1:
            pool = ProcessPoolExecutor(arguments.processes, get_context("spawn"))
            run = stack.enter_context(pool).map
        for found in run(_measure, jobs):
            print(*map(report.line, found), sep="\n", flush=True)
            rows += found
    content = {
        "benchmark": "resources",
        "versions": versions(),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "processes": arguments.processes,
        "kernels": summary(rows),
    }
    print(report.table(content["kernels"]).text())
    if arguments.output is None and arguments.chips == list(CHIPS):
        arguments.output = RECORDED
        if arguments.only:
            content = renewed(json.loads(RECORDED.read_text()), content)
    if output := arguments.output:
        write(output, content)
        print(f"written to {output}")
    faults = [f"{row['file']}: {row['launch']}: {wrong}" for row in rows for wrong in row["problems"]]
    print(*faults, sep="\n")
    return int(bool(faults))


def renewed(recorded: Row, content: Row) -> Row:
    """What was recorded, with the rows of the files that were compiled anew. Raises UserError."""
    if recorded["versions"] != content["versions"]:
        raise UserError(f"{RECORDED} was written by other versions: run it without --only")
    files = {row["file"] for row in content["kernels"]}
    rows = [row for row in recorded["kernels"] if row["file"] not in files] + content["kernels"]
    return recorded | {"kernels": sorted(rows, key=lambda row: (row["file"], row["kernel"], row["chip"]))}


@cache
def declared() -> list[tuple[str, Launch]]:
    """Every launch of training. Raises UserError where nothing can be compiled."""
    if not HAS_TRITON:
        raise UserError("Triton is not installed: pip install triton")
    if INTERPRETING:
        raise UserError("TRITON_INTERPRET=1 is set, and the interpreter compiles nothing: unset it")
    return list(launches())


def _measure(job: tuple[int, int]) -> list[Row]:
    index, chip = job
    return measure(*declared()[index], chip)


def measure(file: str, launch: Launch, chip: int) -> list[Row]:
    """Of each kernel of a launch: what it takes of a chip, and what is wrong with that."""
    return [
        asdict(resources)
        | {
            "file": file,
            "launch": launch.name,
            "chip": chip,
            "shared_bytes": resources.shared_bytes,
            "occupancy": resources.occupancy(chip),
            "problems": [f"{resources.kernel} on sm_{chip} {w}" for w in problems(launch, resources, chip)],
        }
        for resources in compile_launch(launch, chip)
    ]


def summary(rows: list[Row]) -> list[Row]:
    """Of each kernel on each chip the launches, the most that any takes, and the least occupancy."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["file"], row["kernel"], row["chip"]].append(row)
    return [
        {"file": file, "kernel": kernel, "chip": chip, "launches": len(group)}
        | {name: max(row[name] for row in group) for name in MOST}
        | {
            "occupancy": min(row["occupancy"] for row in group),
            "instructions": " ".join(sorted({name for row in group for name in row["instructions"]})),
            "problems": sum(bool(row["problems"]) for row in group),
        }
        for (file, kernel, chip), group in sorted(groups.items())
    ]


def versions() -> dict[str, str]:
    """Of what turns a kernel into instructions."""
    import triton

    tools = {"ptxas": triton.knobs.nvidia.ptxas, "ptxas for Blackwell": triton.knobs.nvidia.ptxas_blackwell}
    return {"triton": triton.__version__} | {name: tool.version for name, tool in tools.items()}


if __name__ == "__main__":
    run_command(main)
