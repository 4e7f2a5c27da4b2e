"""The section of docs/fine_tuning.md about digits, from the newest result of `fine_tuning`."""

from millrace.benchmarks.report.marked_section import with_section
from millrace.benchmarks.report.recording import Result, of
from millrace.benchmarks.report.tables import Table


def page(results: list[Result], before: str) -> str:
    """The page `before`, with what stands between its marks made anew. Raises UserError without the marks."""
    found = [result for result in of(results, "fine_tuning") if not result["quick"]]
    text = section(found[-1]) if found else "Not measured: no result of `python -m benchmarks fine_tuning`."
    return with_section(before, text, "fine_tuning.md")


def section(result: Result) -> str:
    """What the docs say, from the results alone."""
    base, tuned, seeds = result["base"], result["tuned"], [run["seed"] for run in result["runs"]]
    head = ["fine-tuned", *(f"seed {seed}" for seed in seeds), "share of what all weights gain"]
    lines = [
        [row["arm"], *(f"{loss:.4f}" for loss in row["held_out_loss"]), _range(row["share_of_gain"])]
        for row in result["table"]
    ]
    where = "a CPU" if not result["gpus"] else result["gpus"][0]["name"]
    changed = " with uncommitted changes" if result["dirty"] else ""
    trained = result["digits"] - result["held_out_pictures"]
    return "\n".join(
        [
            f"Width {base['model']['width']}, {base['model']['depth']} blocks, batches of "
            f"{base['data']['global_batch']}; {base['run']['steps']} steps on the digits zero to four, then "
            f"{tuned['run']['steps']} steps on {trained} pictures of five to nine; "
            f"{result['held_out_pictures']} others of those are held out; on {where}. Commit "
            f"{(result['commit'] or 'unknown')[:12]}{changed}, torch {result['versions']['torch']}.",
            "",
            Table(head, lines).markdown(),
        ]
    )


def _range(shares: list[float]) -> str:
    low, high = (f"{bound:.0%}" for bound in (min(shares), max(shares)))
    return low if low == high else f"{low} to {high}"
