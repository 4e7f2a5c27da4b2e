"""What every Triton kernel takes of an A100 and of an H100: registers, spills, shared memory, instructions.

python -m benchmarks resources                  # a line for each launch, and results/resources.json
python -m benchmarks resources --only geglu     # the lines of one file of kernels/

Kernels are compiled, not run, so this needs Triton but no GPU. The file holds the most that any launch of a
kernel takes, and depends on nothing but the sources and the versions that it names. The exit code is 1, and
no file is written, if a kernel spills, takes more shared memory than the chip has, or does not use the
instructions it is written for.
"""

from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from millrace.benchmarks.report.recording import RESULTS, write
from millrace.engine.cli import command_parser, run_command
from millrace.engine.util.errors import UserError
from millrace.kernels.support.compilation import Launch, compile_launch, launches, problems
from millrace.kernels.support.registration import HAS_TRITON, INTERPRETING

ARCHITECTURES = (80, 90)
FIGURES = ("registers", "spill_bytes", "shared_bytes", "instructions")


def main() -> int:
    """Compile, print, write."""
    parser = command_parser(__doc__)
    parser.add_argument("--only", metavar="FILE", help="name of one file of kernels/, such as geglu")
    parser.add_argument(
        "--output", type=Path, help="JSON file; default results/resources.json, none with --only"
    )
    arguments = parser.parse_args()
    chosen = [(file, launch) for file, launch in _declared() if arguments.only in (None, file)]
    if not chosen:
        files = sorted({file for file, _ in _declared()})
        raise UserError(f"--only {arguments.only}: no such file with kernels; there are {', '.join(files)}")
    rows, faults = [], []
    for file, launch in chosen:
        for row, wrong in measure(file, launch):
            figures = ", ".join(f"{name} {row[name]}" for name in FIGURES)
            print(f"sm_{row['architecture']} {row['kernel']}: {figures} ({file}: {launch.name})", flush=True)
            rows.append(row)
            faults += [
                f"{file}: {launch.name}: {row['kernel']} for sm_{row['architecture']} {w}" for w in wrong
            ]
    if faults:
        raise SystemExit("\n".join(faults))
    output = arguments.output or (None if arguments.only else RESULTS / "resources.json")
    if output is not None:
        write(output, {"benchmark": "resources", "versions": versions(), "kernels": summary(rows)})
        print(f"written to {output}")
    return 0


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each kernel on each architecture how many launches there are, and the most that any takes."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["file"], row["kernel"], row["architecture"]].append(row)
    return [
        dict(zip(("file", "kernel", "architecture"), key, strict=True))
        | {"launches": len(group)}
        | {name: max(row[name] for row in group) for name in FIGURES[:-1]}
        | {"instructions": sorted({name for row in group for name in row["instructions"]})}
        for key, group in sorted(groups.items())
    ]


def measure(file: str, launch: Launch) -> list[tuple[dict[str, Any], list[str]]]:
    """Of each kernel of a launch on each architecture: what it takes, and what is wrong with that."""
    return [
        (
            {"file": file, "architecture": architecture, "shared_bytes": resources.shared_bytes}
            | asdict(resources),
            problems(launch, resources, architecture),
        )
        for architecture in ARCHITECTURES
        if architecture >= launch.needs
        for resources in compile_launch(launch, architecture)
    ]


def versions() -> dict[str, str]:
    """Of what turns a kernel into instructions."""
    import triton

    return {"triton": triton.__version__, "ptxas": triton.knobs.nvidia.ptxas.version}


def _declared() -> list[tuple[str, Launch]]:
    if not HAS_TRITON:
        raise UserError("Triton is not installed: pip install triton")
    if INTERPRETING:
        raise UserError("TRITON_INTERPRET=1 is set, and the interpreter compiles nothing: unset it")
    return list(launches())


if __name__ == "__main__":
    run_command(main)
