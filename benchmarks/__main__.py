"""Programs that measure, and the one that makes pages of their results: `python -m benchmarks NAME`."""

import ast
import sys
from importlib import import_module
from pathlib import Path

from millrace.engine.cli import run_command
from millrace.engine.util.errors import UserError, did_you_mean

PROGRAMS = {
    "throughput": "throughput",
    "kernels": "kernels.comparison",
    "resources": "kernels.resources",
    "routing": "step.routing",
    "dataloader": "data.dataloader",
    "saving": "step.saving",
    "scale": "data.scale",
    "remote": "data.remote",
    "traffic": "models.traffic",
    "weights": "models.weight_traffic",
    "scaling": "models.scaling",
    "ablations": "quality.ablations",
    "guidance": "quality.guidance",
    "fp8_parity": "quality.fp8_parity",
    "fine_tuning": "quality.fine_tuning",
    "seed_pairs": "quality.seed_pairs",
    "pages": "report.pages",
}
"""Names to modules of this package, each with a `main` that reads the command line."""


def overview() -> str:
    """Help of the package: the first line of every program, which is not imported for it."""
    lines = ["usage: python -m benchmarks NAME ...", ""]
    for name, module in PROGRAMS.items():
        source = Path(__file__).parent / f"{module.replace('.', '/')}.py"
        doc = ast.get_docstring(ast.parse(source.read_text())) or ""
        lines.append(f"  {name:<12}{doc.splitlines()[0]}")
    return "\n".join([*lines, "", "python -m benchmarks NAME --help has the arguments and examples of one."])


def main() -> int:
    """Run the program that the first word names, with the words after it."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name not in PROGRAMS:
        raise UserError(f"{name}: no such benchmark; {did_you_mean(name, PROGRAMS, 'benchmarks')}")
    sys.argv = [f"python -m benchmarks {name}", *rest]
    return import_module(f"millrace.benchmarks.{PROGRAMS[name]}").main()


if __name__ == "__main__":
    run_command(main)
