"""What every Triton kernel takes of an A100 and of an H100: registers, spills, shared memory, instructions.

    python benchmarks/resources.py                  # the table, and benchmarks/results/resources.json
    python benchmarks/resources.py --only geglu     # the table of one operation

Kernels are compiled, not run, so this needs Triton but no GPU. The file depends on nothing but the sources
and the versions that it names: run it again after a change to a kernel. The exit status is 1 if a kernel
spills, takes more shared memory than the chip has, or does not use the instructions it is written for.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recording import RESULTS, write

from millrace.engine.util.errors import UserError
from millrace.kernels.support.compilation import Launch, compile_launch, launches, problems
from millrace.kernels.support.registration import HAS_TRITON, INTERPRETING

ARCHITECTURES = (80, 90)
COLUMNS = (
    "registers",
    "spill_bytes",
    "static_shared_bytes",
    "dynamic_shared_bytes",
    "num_warps",
    "num_stages",
)
HEADINGS = (
    "arch",
    "kernel",
    "regs",
    "spill",
    "static",
    "shared",
    "warps",
    "stages",
    "instructions",
    "launch",
)
WIDTHS = (4, 30, 4, 5, 6, 6, 5, 6, 16)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        epilog="example: python benchmarks/resources.py --only geglu",
    )
    parser.add_argument("--only", metavar="FILE", help="name of one file of kernels/, such as geglu")
    parser.add_argument(
        "--output", type=Path, help="JSON file; default results/resources.json, none with --only"
    )
    options = parser.parse_args(arguments)
    try:
        return report(options.only, options.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def report(only: str | None, output: Path | None) -> int:
    """Compile, print, write; the exit status."""
    chosen = [(file, launch) for file, launch in _declared() if only in (None, file)]
    if not chosen:
        raise UserError(f"--only {only}: no such file with kernels; there are {', '.join(_files())}")
    print(_line(HEADINGS))
    rows, faults = [], []
    for file, launch in chosen:
        for row, wrong in measure(file, launch):
            cells = (row[name] for name in ("architecture", "kernel", *COLUMNS))
            print(_line((*cells, " ".join(row["instructions"]), f"{file}: {launch.name}")), flush=True)
            rows.append(row)
            faults += [
                f"{file}: {launch.name}: {row['kernel']} for sm_{row['architecture']} {w}" for w in wrong
            ]
    if output is None and only is None:
        output = RESULTS / "resources.json"
    if output is not None:
        write(output, {"benchmark": "resources", "versions": versions(), "kernels": rows})
        print(f"wrote {output}")
    print(*faults, sep="\n", file=sys.stderr, end="\n" if faults else "")
    return int(bool(faults))


def measure(file: str, launch: Launch) -> list[tuple[dict[str, Any], list[str]]]:
    """Of each kernel of a launch on each architecture: its row of the file, and what is wrong with it."""
    return [
        (
            {"file": file, "launch": launch.name, "architecture": architecture} | asdict(resources),
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


def _files() -> list[str]:
    return sorted({file for file, _ in _declared()})


def _line(cells: tuple[Any, ...]) -> str:
    *first, last = cells
    return "  ".join([*(f"{cell!s:<{width}}" for cell, width in zip(first, WIDTHS, strict=True)), str(last)])


if __name__ == "__main__":
    sys.exit(main())
