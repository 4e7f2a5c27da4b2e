"""docs/logbook.md: the post's techniques and our runs of them; the newest of every scale and data set."""

import math
from typing import Any

from millrace.benchmarks.quality.ablations_table import (
    QUALITY,
    RATED_BY,
    Beside,
    Value,
    at_times,
    best_rate,
    compare,
    published_rows,
    show,
    swept,
    table,
)
from millrace.benchmarks.report.recording import CHARTS, RESULTS, Result
from millrace.benchmarks.report.tables import Table

TITLE = "# Logbook"
INTRODUCTION = """\
The techniques of Photoroom's *Training Design for Text-to-Image Models*, each run here by its configuration
and set beside what the post reports. Written by `python -m benchmarks pages` from the files
`benchmarks/results/ablations*.json`, which `python -m benchmarks ablations` writes, and `guidance*.json` of
`python -m benchmarks guidance`: change those, not this page.
Sentences about what helped are made from the numbers as `millrace compare` makes them
([comparing.md](comparing.md)): better or worse is a difference whose 95 % interval, by the noise between
seeds, leaves out zero; everything else is not decided, and a row with one seed says so."""
WORDS = {
    "frechet": "Frechet distance",
    "accuracy": "caption accuracy",
    "recall": "recall",
    "held_out_loss": "held-out loss",
    "loss": "training loss",
    "images_per_second": "images/s",
    "frechet_curated": "Frechet to curated",
}
SHARES = (0.25, 0.5, 0.75, 1.0)


def page(results: list[Result]) -> str:
    """The page as Markdown."""
    newest: dict[tuple[Any, ...], Result] = {}
    for result in results:
        if result["benchmark"] == "ablations" and not result["quick"]:
            newest[(result["scale"], result["source"], result["rows"][0]["name"])] = result
    text = ["\n\n".join([TITLE, INTRODUCTION])]
    text += [section(result) for result in newest.values()]
    if not newest:
        text.append("Not measured: no result of `python -m benchmarks ablations`.")
    guided = [result for result in results if result["benchmark"] == "guidance"]
    text += [guidance_section(guided[-1])] if guided else []
    text.append(not_run({name for result in newest.values() for name in table(result)}))
    return "\n\n".join(text) + "\n"


def section(result: Result) -> str:
    """One scale on one data set."""
    source = f" on {result['source']}" if result["source"] else ""
    first = result["rows"][0]["name"]
    text = [f"## Scale {result['scale']}{source}: `{first}`", origin(result), conditions(result)]
    rows, beside = table(result), compare(result)
    text.append(main_table(result, rows, beside))
    if beside:
        lines = [verdict(name, found) for name, found in beside.items() if found]
        text += [f"Beside `{first}`:", "\n".join(lines), decided(beside)]
    stem = result["file"].removesuffix(".json")
    if result["chart"]:
        text.append(f"![Learning curves, means over seeds]({CHARTS}/{result['chart']})")
    if (RESULTS / f"{stem}-samples.png").exists():
        text.append(f"![Samples, one row each]({CHARTS}/{stem}-samples.png)")
        text.append("From top to bottom: " + ", ".join(f"`{name}`" for name in rows) + ".")
    text += ["### Training loss during the run", loss_table(result, rows)]
    text += ["### Learning rate", sweep(result)]
    text += ["### What each row sets", changes(result)]
    failed = [run for run in result["runs"] if run["status"] == "failed"]
    if failed:
        lines = (f"- `{run['name']}` seed {run['seed']}: {run['error']}" for run in failed)
        text += ["### Failed", "\n".join(lines)]
    if result["at_scale"]:
        text += [
            "### How a configuration is made small",
            f"```python\n{result['at_scale'].rstrip()}\n```",
        ]
    return "\n\n".join(text)


def origin(result: Result) -> str:
    """File, date, code and machine of a result."""
    commit = result["commit"][:12] if result["commit"] else "unknown"
    changed = " with uncommitted changes" if result["dirty"] else ""
    gpus = ", ".join(gpu["name"] for gpu in result["gpus"])
    machine = f"{result['cpu']}, {result['cpu_cores']} cores" + (f", {gpus}" if gpus else "")
    return (
        f"`{result['file']}`: {result['time'][:10]}, commit {commit}{changed}, torch "
        f"{result['versions']['torch']}, {machine}, `{result['command']}`"
    )


def conditions(result: Result) -> str:
    """Sizes, judge and measures in sentences."""
    sizes, judge = result["sizes"], result["judge"]
    if sizes is None:
        return "The configurations as they are."
    text = (
        f"Width {sizes['width']}, {sizes['depth']} blocks, {sizes['heads']} heads; pictures of "
        f"{sizes['edge']} pixels in tokens of {sizes['patch']}; {sizes['steps']} steps of {sizes['batch']} "
        f"pictures. Samples: {sizes['solver_steps']} Euler steps, guidance {sizes['guidance']:g}"
        f"{' (none)' if sizes['guidance'] == 1 else ''}, the same noise for every run. "
        f"Seeds {', '.join(map(str, result['seeds']))}; ± is the standard deviation over them."
    )
    if judge is None:
        return text
    teacher = judge["teacher"]
    return (
        f"{text}\n\nThe judge is a small classifier trained in the same run on the "
        f"{judge['training_pictures']} training pictures; it reads {judge['accuracy']:.1%} of the "
        f"{judge['held_out_pictures']} held-out ones rightly. Each of those lends its caption to one sample "
        "(the long caption, or the short one where a row trains on short ones). *Caption accuracy* is the "
        "share of samples that the judge reads as the caption's digit, *Frechet distance* that of its "
        "embeddings to the held-out pictures, computed as FID is; the training pictures themselves are "
        f"{judge['frechet_of_training_pictures']:.2f} away. *Frechet to curated* is the distance to the "
        f"{judge['curated_pictures']} pictures of fine-tuning. *Held-out loss* is the squared error of the "
        "velocity on the held-out pictures with their long captions, the mean over eight times, with neither "
        "routing nor auxiliary terms, the same pictures, times and noise for every run; x-prediction weighs "
        "errors near t = 0 by 1/t^2 in it. *Training loss* is the flow term, averaged "
        "exponentially; under contrastive flow matching and routing it is another quantity. The teacher of "
        f"alignment is another classifier (seed {teacher['seed']}, width {teacher['width']}; the judge has "
        f"{judge['seed']} and {judge['width']}), right on {teacher['accuracy']:.1%}."
    )


def main_table(result: Result, rows: dict[str, dict[str, Value]], compared: dict[str, list[Beside]]) -> str:
    """Ours at the left, the post at the right."""
    # The speed of small models on a CPU says nothing of a GPU.
    shown = [name for name in WORDS if result["gpus"] or name != "images_per_second"]
    names = [name for name in shown if any(name in found for found in rows.values())]
    head = ["configuration", "seeds", *(WORDS[name] for name in names)]
    judged = [measure for measure in QUALITY if measure in names]
    head += [*(f"{WORDS[measure]} to baseline" for measure in judged), "compute / weights"]
    head += ["post: FID", "its FID to baseline", "post: CMMD", "post: batches/s"]
    posts, lines = published_rows(), []
    for name, found in rows.items():
        run = next(r for r in result["runs"] if r["name"] == name and r["status"] == "done")
        cells = [f"`{name}`", str(next(iter(found.values())).seeds)]
        cells += [show(found.get(measure)) for measure in names]
        beside = {found.measure: change(found) for found in compared.get(name, [])}
        cells += [beside.get(measure, "-") for measure in judged]
        cells.append(f"{run['compute']} / {run['master']}")
        if name in posts:
            row, base = posts[name]
            cells += [f"{row['fid']:.2f}", f"{row['fid'] / base['fid']:.2f}", f"{row['cmmd']:.2f}"]
            speed = row["batches_per_second"]
            cells.append("-" if speed is None else f"{speed:.2f}")
        else:
            cells += 4 * ["-"]
        lines.append(cells)
    return Table(head, lines).markdown() if lines else "No run has finished."


def change(found: Beside) -> str:
    """A difference from the baseline in percent, with its interval."""
    scale = 100 / abs(found.row.first) if found.row.first else math.nan
    half = "" if found.half is None else f" ± {found.half * scale:.1f}"
    return f"{found.difference * scale:+.1f}{half} %"


def decided(beside: dict[str, list[Beside]]) -> str:
    """Which rows the held-out loss decides, and which not."""
    by_verdict: dict[str, list[str]] = {}
    for name, found in beside.items():
        for one in found:
            if one.measure == RATED_BY:
                by_verdict.setdefault(one.verdict, []).append(f"`{name}`")
    lines = (f"**{word}** {', '.join(names)}" for word, names in sorted(by_verdict.items()))
    return f"By the {WORDS[RATED_BY]}: {'; '.join(lines)}."


def verdict(name: str, found: list[Beside]) -> str:
    """What a row did to the measures of quality, here and in the post."""
    parts = [f"{WORDS[one.measure]} **{one.verdict}** ({change(one)})" for one in found]
    text = f"- `{name}`: {', '.join(parts)}."
    posts = published_rows()
    if name not in posts:
        return f"{text} The post gives no numbers."
    row, base = posts[name]
    theirs = "better" if row["fid"] < base["fid"] else "worse"
    text += f" The post: {theirs}, FID {row['fid']:.2f} against {base['fid']:.2f}."
    ours = {one.verdict for one in found} & {"better", "worse"}
    if not ours:
        return f"{text} Whether that holds here is not decided."
    if len(ours) > 1:
        return f"{text} Here loss and samples disagree."
    return f"{text} {'The same here.' if theirs in ours else 'It does not hold here.'}"


def guidance_section(result: Result) -> str:
    """What each guidance does to models trained with routing."""
    rows = [row for row in result["rows"] if row["accuracy"] is not None]
    text = [
        "## Guidance of models trained with routing",
        origin(result),
        f"{rows[0]['pictures']} pictures of each row, one seed; the measures are those above, by a judge "
        "trained in this run. What each guidance is: [guidance.md](guidance.md). FLOPs are the denoiser's "
        "for one picture, as multiples of the unguided ones.",
    ]
    lines, sentences = [], []
    for run in dict.fromkeys(row["run"] for row in rows):
        mine = [row for row in rows if row["run"] == run]
        unguided = next(row for row in mine if row["guidance"] == "none")
        for row in mine:
            cost = row["flops_per_picture"] / unguided["flops_per_picture"]
            lines.append(
                [run, row["guidance"], f"{row['accuracy']:.2f}", f"{row['frechet']:.2f}", f"{cost:.2f}"]
            )
        closest = min(mine, key=lambda row: row["frechet"])
        truest = max(mine, key=lambda row: row["accuracy"])
        sentences.append(
            f"- `{run}`: the lowest Frechet distance is that of {closest['guidance']} "
            f"({closest['frechet']:.2f}, unguided {unguided['frechet']:.2f}), the highest caption accuracy "
            f"that of {truest['guidance']} ({truest['accuracy']:.2f}, unguided {unguided['accuracy']:.2f})."
        )
    head = ["trained with", "guidance", WORDS["accuracy"], WORDS["frechet"], "FLOPs"]
    return "\n\n".join([*text, Table(head, lines).markdown(), "\n".join(sentences)])


def loss_table(result: Result, rows: dict[str, dict[str, Value]]) -> str:
    """The averaged training loss after shares of the run."""
    head = ["configuration", *(f"{share:.0%} of the steps" for share in SHARES)]
    lines = [[f"`{name}`", *(show(found) for found in at_times(result, name, SHARES))] for name in rows]
    return Table(head, lines).markdown() if lines else "No run has finished."


def sweep(result: Result) -> str:
    """What was tried, and what was taken of it."""
    found = swept(result)
    if not found:
        return "No sweep was run."
    rates = result["learning_rates"]
    lines = []
    for name, by_rate in found.items():
        cells = [f"{by_rate[rate][RATED_BY]:.3f}" if rate in by_rate else "-" for rate in rates]
        lines.append([f"`{name}`", *cells, f"{best_rate(by_rate):g}"])
    taken = ", ".join(f"{kind} {rate:g}" for kind, rate in result["sizes"]["lr"].items())
    return (
        f"The same rates for every optimizer, one run each with seed {result['sweep_seed']}, which no row of "
        f"the table has; {WORDS[RATED_BY]} at the end. The other rows take the rate of their "
        f"optimizer: {taken}.\n\n"
        + Table(["configuration", *(f"{rate:g}" for rate in rates), "best"], lines).markdown()
    )


def changes(result: Result) -> str:
    """The settings of each row that differ from the first's."""
    lines = []
    for row in result["rows"]:
        settings = ", ".join(f"`{key}` {_value(value)}" for key, value in row["changes"].items())
        lines.append([f"`{row['name']}`", settings or "the baseline", row["source"]])
    return Table(
        ["configuration", "at this scale, beside the baseline", "where it comes from"], lines
    ).markdown()


def _value(value: Any) -> str:
    return f"`{value}`"


def not_run(done: set[str]) -> str:
    """The rows of the post of which there is no result."""
    missing = {name: row for name, (row, _) in published_rows().items() if name not in done}
    text = ["## Rows of the post that were not run"]
    if not missing:
        return "\n\n".join([*text, "None."])
    lines = [
        [f"`{name}`", row["method"], f"{row['fid']:.2f}", f"{row['cmmd']:.2f}", f"{row['dino_mmd']:.2f}"]
        for name, row in missing.items()
    ]
    return "\n\n".join(
        [*text, Table(["configuration", "method", "FID", "CMMD", "DINO-MMD"], lines).markdown()]
    )
