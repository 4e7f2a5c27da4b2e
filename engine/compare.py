"""Compare runs by held-out loss, metrics and speed: better, worse, or not decided yet.

millrace compare runs/latent_256 runs/latent_256_muon
millrace compare runs/adamw-0 runs/adamw-1 runs/adamw-2 runs/muon-0 runs/muon-1 runs/muon-2
millrace compare runs/a runs/b --output runs/a-beside-b
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millrace.engine.cli import command_parser, require_path, run_command
from millrace.engine.util.errors import UserError

if TYPE_CHECKING:
    from millrace.engine.comparison.verdicts import Comparison, Row, Setting

_LISTED = 6
"""Differing settings that the table names."""


def build_parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    parser = command_parser(__doc__, "millrace compare")
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folders of runs; those that differ in seed alone are one setting, the first run's is the one "
        "that others are compared with",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="write comparison.json and, where matplotlib is installed, comparison.png there",
    )
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Read the runs, print the table and the verdicts."""
    parser = build_parser()
    arguments = parser.parse_args(words)
    if len(arguments.runs) < 2:
        parser.error("RUN: give two runs or more")
    seen = set[Path]()
    for run in arguments.runs:
        if run.resolve() in seen:
            parser.error(f"RUN {run}: given twice")
        seen.add(run.resolve())
    for run in arguments.runs:
        require_path("RUN", run)
        if not (run / "config.json").is_file():
            raise UserError(f"RUN {run}: no run: config.json is missing or cannot be read")

    from millrace.engine.comparison.run_curves import read_run
    from millrace.engine.comparison.verdicts import compare, group

    settings = group([read_run(run) for run in arguments.runs])
    if len(settings) == 1:
        raise UserError("all runs have the same settings but for the seed; add a run of another setting")
    comparisons = compare(settings)
    print("\n".join(table(settings, comparisons)))
    if arguments.output is not None:
        print(_write(arguments.output, settings, comparisons))
    return 0


def table(settings: "Sequence[Setting]", comparisons: "Sequence[Comparison]") -> list[str]:
    """The settings, their quantities in one table, and the verdicts, for people."""
    first = settings[0]
    lines = [f"{first.letter}  {_runs(first)}"]
    for found in comparisons:
        lines.append(f"{found.setting.letter}  {_runs(found.setting)}: {_differing(found)}")
    head = (
        "",
        "quantity",
        "samples",
        first.letter,
        "other",
        "difference",
        "95 %",
        f"of {first.letter}",
        "verdict",
    )
    rows = [head]
    remarks = []
    for found in comparisons:
        for row in found.rows:
            rows.append((found.setting.letter, *_cells(row)))
            if row.remark and row.remark not in remarks:
                remarks.append(row.remark)
                rows[-1] = (*rows[-1][:-1], f"{rows[-1][-1]} [{len(remarks)}]")
            elif row.remark:
                rows[-1] = (*rows[-1][:-1], f"{rows[-1][-1]} [{remarks.index(row.remark) + 1}]")
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines.append("")
    for row in rows:
        cells = [
            cell.ljust(width) if i in (0, 1, 8) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines += [f"[{number}] {remark}" for number, remark in enumerate(remarks, start=1)]
    lines.append("")
    lines += [f"{found.setting.letter}: {found.sentence}" for found in comparisons]
    return lines


def _runs(setting: "Setting") -> str:
    names = ", ".join(run.name for run in setting.runs)
    seeds = ", ".join(str(run.seed) for run in setting.runs)
    return f"{names} ({'one seed' if len(setting.runs) == 1 else 'seeds'}: {seeds})"


def _differing(found: "Comparison") -> str:
    parts = [f"{key} {_value(old)} -> {_value(new)}" for key, (old, new) in found.differing.items()]
    more = f" and {len(parts) - _LISTED} more" if len(parts) > _LISTED else ""
    return ", ".join(parts[:_LISTED]) + more


def _value(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _cells(row: "Row") -> tuple[str, ...]:
    samples = "" if row.samples is None else f"{row.samples:,}"
    means = (f"{row.first:.5g}", f"{row.second:.5g}")
    if row.interval is None:
        change = row.second - row.first
        return (row.quantity, samples, *means, f"{change:+.3g}", "", "", row.verdict)
    change, half = row.interval.difference, row.interval.half
    percent = f"{change / row.first:+.2%}" if row.first else ""
    return (
        row.quantity,
        samples,
        *means,
        f"{change:+.3g}",
        f"{change - half:+.3g} to {change + half:+.3g}",
        percent,
        row.verdict,
    )


def _write(folder: Path, settings: "Sequence[Setting]", comparisons: "Sequence[Comparison]") -> str:
    """Write comparison.json and the picture; what was written, in words. Raises UserError."""
    from millrace.engine.util.files import write_atomically

    path = folder / "comparison.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(report(settings, comparisons), indent=2) + "\n")
        from millrace.engine.comparison.comparison_chart import draw

        draw(settings, folder / "comparison.png")
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written: {error.strerror}") from None
    except ModuleNotFoundError as error:
        return f"written to {path}; no picture: {error}"
    return f"written to {path} and comparison.png"


def report(settings: "Sequence[Setting]", comparisons: "Sequence[Comparison]") -> dict[str, Any]:
    """All that the table says, as plain values."""
    return {
        "settings": [
            {"letter": s.letter, "runs": [{"folder": run.name, "seed": run.seed} for run in s.runs]}
            for s in settings
        ],
        "comparisons": [
            {
                "letter": found.setting.letter,
                "differing": {key: list(pair) for key, pair in found.differing.items()},
                "rows": [_plain(row) for row in found.rows],
                "verdict": found.sentence,
            }
            for found in comparisons
        ],
    }


def _plain(row: "Row") -> dict[str, Any]:
    values = row._asdict()
    if row.interval is not None:
        pictures = row.interval.pictures
        values["interval"] = {
            "difference": row.interval.difference,
            "half": row.interval.half,
            "seeds": row.interval.seeds._asdict(),
            "pictures": None if pictures is None else pictures._asdict(),
        }
    return values


if __name__ == "__main__":
    run_command(main)
