"""Sections of the performance page about whole training steps: the post's rows, and the time of one step."""

from collections.abc import Callable, Iterable
from typing import Any

import suite_report
from step_timeline import CATEGORIES

Result = dict[str, Any]
Markdown = Callable[[list[str], Iterable[list[str]]], str]

NOT_MEASURED = "Not measured: no result of `benchmarks/throughput.py --suite post` from a GPU."
NO_PROFILE = "Not measured: no result of `benchmarks/throughput.py --profile` from a GPU."


def suite_section(
    suites: list[Result], routings: list[Result], origin: Callable[[Result], str], markdown: Markdown
) -> str:
    """The newest suite of each GPU; without one the post's rows with what is known about them.

    Args:
        suites: results of the suite, oldest first, none of them a trial.
        routings: results of `routing.py`.
        origin: of a result, in a line.
    """
    text = ["## The post's rows"]
    newest = {result["gpus"][0]["name"]: result for result in suites if result["device"] == "cuda"}
    routing = suite_report.newest_routing(routings, "cuda")
    if not newest:
        rows = suite_report.derive([], routing)
        text += [NOT_MEASURED, _relative(rows, markdown)]
        text.append(" ".join(f"{line}." for line in suite_report.meanings(suite_report.named(routing))))
    for gpu, result in newest.items():
        rows = suite_report.derive(result["cases"], routing)
        text += [f"### {gpu}", origin(result), markdown(*_split(suite_report.speed_lines(rows)))]
        text.append(_relative(rows, markdown))
        peers = suite_report.peer_lines(result["cases"])
        if peers:
            text += ["Peers, on cached inputs:", markdown(*_split(peers))]
        fp8 = suite_report.fp8_lines(result["cases"])
        if fp8:
            text += ["FP8 products in the blocks, on cached inputs:", markdown(*_split(fp8))]
        others = suite_report.other_lines(result["cases"])
        if others:
            text += ["Without figures:", "\n".join(f"- {line}" for line in others)]
        shown = result | suite_report.named(routing)
        text.append("\n".join(f"- {line}" for line in suite_report.notes(shown)))
    return "\n\n".join(text)


def _split(lines: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    return lines[0], lines[1:]


def _relative(rows: list[Result], markdown: Markdown) -> str:
    return markdown(*_split(suite_report.relative_lines(rows)))


def profile_section(
    profiles: list[Result], origin: Callable[[Result], str], markdown: Markdown, charts: str
) -> str:
    """The newest profile of each step on each GPU, with its picture."""
    text = ["## Where a step's time goes"]
    newest = {
        (result["gpus"][0]["name"], result["config"], result["conditioning"]): result
        for result in profiles
        if result["device"] == "cuda"
    }
    if not newest:
        return "\n\n".join([*text, NO_PROFILE])
    for (gpu, config, conditioning), result in newest.items():
        bounds = result["roofline_seconds"] or {}
        text += [f"### {config}, {conditioning}, {gpu}", origin(result)]
        lines = []
        for category in CATEGORIES:
            seconds, bound = result["seconds"][category], bounds.get(category)
            least = "-" if bound is None else f"{bound * 1e3:.2f}"
            share = f"{seconds / result['step_seconds']:.1%}"
            lines.append([category, f"{seconds * 1e3:.2f}", share, least])
        lines.append(["step", f"{result['step_seconds'] * 1e3:.2f}", "100.0%", ""])
        text.append(markdown(["category", "ms", "share", "at least ms"], lines))
        if result["chart"]:
            text.append(f"![Where the time of the step went]({charts}/{result['chart']})")
    return "\n\n".join(text)
