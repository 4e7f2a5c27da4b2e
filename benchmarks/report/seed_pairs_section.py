"""The section of docs/comparing.md about pairs of seeds, from the newest result of `seed_pairs`."""

from millrace.benchmarks.quality.seed_pairs import measured
from millrace.benchmarks.report.marked_section import with_section
from millrace.benchmarks.report.recording import Result, of
from millrace.benchmarks.report.tables import Table

WORDS = {
    "pairs": "same setting, other seed: pairs of their own",
    "all pairs": "same setting, other seed: every pair",
    "tenfold": "ten times the learning rate, one seed each",
    "tenth": "a tenth of the learning rate, one seed each",
}
VERDICTS = ("not decided", "better", "worse")


def page(results: list[Result], before: str) -> str:
    """The page `before`, with what stands between its marks made anew. Raises UserError without the marks."""
    found = of(results, "seed_pairs")
    text = section(found[-1]) if found else "Not measured: no result of `python -m benchmarks seed_pairs`."
    return with_section(before, text, "comparing.md")


def section(result: Result) -> str:
    """What the docs say, from the results alone."""
    config, found = result["config"], measured(result["runs"])
    lines = [
        [words, str(sum(counts.values())), *(str(counts.get(verdict, 0)) for verdict in VERDICTS)]
        for name, words in WORDS.items()
        if (counts := result["verdicts"].get(name))
    ]
    same = [run for run in result["runs"] if run["name"] == "same"]
    where = "a CPU" if not result["gpus"] else result["gpus"][0]["name"]
    return "\n".join(
        [
            f"Width {config['model']['width']}, {config['model']['depth']} blocks; {config['run']['steps']} "
            f"steps of {config['data']['global_batch']} digits; held-out loss of "
            f"{config['validation']['samples']} pictures every {config['validation']['every_steps']} steps; "
            f"{len(same)} seeds; on {where}. Commit {(result['commit'] or 'unknown')[:12]}, torch "
            f"{result['versions']['torch']}.",
            "",
            Table(["pairs of runs", "pairs", *VERDICTS], lines).markdown(),
            "",
            f"Two seeds end {found.spread:.2%} apart (root mean square), {found.ratio:.1f} times the spread "
            f"r of their course. The pictures alone would tell {found.by_pictures:.0%} of all pairs of seeds "
            "apart.",
        ]
    )
