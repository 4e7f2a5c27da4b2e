"""What the throughput suite says about the post's rows: figures, tables, section of the performance page."""

from collections.abc import Iterable
from typing import Any

from millrace.benchmarks.report import throughput_report as report
from millrace.benchmarks.report.recording import Result, gpu_of, of, origin
from millrace.benchmarks.report.tables import Table
from millrace.engine.config import Config
from millrace.engine.config.loading import load_config
from millrace.engine.encoders.autoencoder import published_factor
from millrace.engine.model.flops import dense_training_flops, training_flops

Row = dict[str, Any]

NOT_MEASURED = "Not measured: no result of `benchmarks/throughput.py --suite post` from a GPU."
MEANINGS = (
    "post, pictures, cached, live: speed relative to the row named under `against`, with the same inputs; "
    "the post's is of its whole job, fed as `pictures` is, on GPUs whose model and count it does not say",
    "cached: no figure for rows that differ from their baseline by the autoencoder, which does not run there",
    "ideal: that speed if time followed the FLOPs of all that runs, or of the denoiser alone",
    "saved: share of the baseline's time saved over share of its FLOPs saved",
)
"""What the columns that set a row against its baseline mean."""
LEAST_SAVED = 0.01
"""Share of FLOPs below which time saved over FLOPs saved is noise."""


def post_rows() -> list[Row]:
    """The rows of the post's tables with a speed of their own, once each, with their table's baseline."""
    found: dict[str, Row] = {}
    for table in report.PUBLISHED["tables"]:
        base = table["rows"][0]
        for row in table["rows"]:
            if row["batches_per_second"] and row["config"] and not table["section"].startswith("Data:"):
                entry = row | {"resolution": table["resolution"], "baseline": base["config"]}
                found.setdefault(row["config"], entry)
    return list(found.values())


def config_flops(name: str) -> tuple[float, float]:
    """Model FLOPs of an image as configs/`name`.json trains it, and if it routed nothing; full captions."""
    config: Config = load_config(report.CONFIGS / f"{name}.json")
    edge = published_factor(config.conditioning.autoencoder) * config.model.patch_size
    tokens, text = (config.data.resolution // edge) ** 2, config.conditioning.text.max_tokens
    return training_flops(config, tokens, text), dense_training_flops(config, tokens, text)


def all_flops(row: Row) -> float:
    """FLOPs of an image in a measured row, those of the frozen networks included."""
    return row["model_flops_per_image"] + sum(row["frozen_flops_per_image"].values())


def saved_per_saved(speedup: float, flop_ratio: float) -> float | None:
    """Share of the baseline's time saved over share of its FLOPs saved; None where too few are saved."""
    if flop_ratio > 1 - LEAST_SAVED:
        return None
    return (1 - 1 / speedup) / (1 - flop_ratio)


def derive(cases: Iterable[Row]) -> list[Row]:
    """One row for each of the post's, from the measured cases.

    Args:
        cases: of the suite, with `status`.

    Returns:
        post: batches/s, relative to its baseline, saved time over saved FLOPs (FLOPs of the denoiser with
        full captions); by conditioning: the same of the measured row, MFU, and `ideal`, the speed relative to
        the baseline if time followed the FLOPs of everything that runs.
    """
    measured = {(case["config"], case["conditioning"]): case for case in cases if _plain(case)}
    kinds = list(dict.fromkeys(kind for _, kind in measured))
    speeds = {row["config"]: row["batches_per_second"] for row in post_rows()}
    found = []
    for row in post_rows():
        name, base = row["config"], row["baseline"]
        flops, dense = config_flops(name)
        relative = row["batches_per_second"] / speeds[base]
        entry = {
            "method": row["method"],
            "resolution": row["resolution"],
            "config": name,
            "baseline": base,
            "post": {
                "batches_per_second": row["batches_per_second"],
                "relative": relative,
                "flop_ratio": flops / dense,
                "ideal": dense / flops,
                "saved_time_per_saved_flops": saved_per_saved(relative, flops / dense),
            },
        }
        for kind in kinds:
            entry[kind] = _ours(measured.get((name, kind)), measured.get((base, kind)))
        found.append(entry)
    return found


def _ours(case: Row | None, base: Row | None) -> Row | None:
    if case is None:
        return None
    keys = ("images_per_second_per_device", "batches_per_second", "mfu", "mfu_with_frozen", "micro_batch")
    entry: Row = {key: case[key] for key in keys}
    if base is None:
        return entry | {"relative": None, "ideal": None, "saved_time_per_saved_flops": None}
    relative = case["images_per_second"] / base["images_per_second"]
    ratio = all_flops(case) / all_flops(base)
    return entry | {
        "relative": relative,
        "flop_ratio": ratio,
        "ideal": 1 / ratio,
        "saved_time_per_saved_flops": saved_per_saved(relative, ratio),
        "same_micro_batch": case["micro_batch"] == base["micro_batch"],
    }


def speed_table(rows: list[Row]) -> Table:
    """Speed and utilisation of every row."""
    kinds = kinds_of(rows)
    head = ["row", "px", "post"]
    for kind in kinds:
        head += [f"{kind}: images/s/device", "batches/s", "MFU", "with frozen"]
    lines = []
    for row in rows:
        cells = [row["method"], str(row["resolution"]), f"{row['post']['batches_per_second']:.2f}"]
        for kind in kinds:
            ours = row[kind]
            if ours is None:
                cells += ["-"] * 4
                continue
            cells += [f"{ours['images_per_second_per_device']:.1f}", f"{ours['batches_per_second']:.3f}"]
            cells += [_percent(ours["mfu"]), _percent(ours["mfu_with_frozen"])]
        lines.append(cells)
    return Table(head, lines)


def relative_table(rows: list[Row]) -> Table:
    """Every row against its own baseline."""
    kinds = kinds_of(rows)
    head = ["row", "px", "against", "post", *kinds]
    head += [f"ideal {kind}" for kind in kinds] or ["ideal, denoiser"]
    head += ["saved post", *(f"saved {kind}" for kind in kinds)]
    lines = []
    for row in rows:
        ours = [row[kind] or {} for kind in kinds]
        cells = [row["method"], str(row["resolution"]), row["baseline"], _ratio(row["post"]["relative"])]
        cells += [
            _ratio(one.get("relative")) + ("" if one.get("same_micro_batch", True) else "~") for one in ours
        ]
        cells += [_ratio(one.get("ideal")) for one in ours] or [_ratio(row["post"]["ideal"])]
        cells.append(_ratio(row["post"]["saved_time_per_saved_flops"]))
        cells += [_ratio(one.get("saved_time_per_saved_flops")) for one in ours]
        lines.append(cells)
    return Table(head, lines)


def kinds_of(rows: list[Row]) -> list[str]:
    """Kinds of inputs that were measured."""
    return [kind for kind in ("cached", "pictures", "live") if kind in rows[0]]


def peer_table(cases: list[Row]) -> Table:
    """Every peer beside our step with the same inputs."""
    ours = {case["config"]: case for case in cases if _plain(case) and case["conditioning"] == "cached"}
    head = ["configuration", "peer", "batch", "step ms", "images/s/device", "MFU", "GiB", "ours to peer"]
    lines = []
    for case in cases:
        if not case.get("peer") or case["status"] != "measured":
            continue
        own = ours.get(case["config"])
        speed = case["images_per_second_per_device"]
        lines.append(
            [
                case["config"],
                case["peer"],
                str(case["micro_batch"]),
                f"{case['step_seconds_median'] * 1e3:.1f}",
                f"{speed:.1f}",
                _percent(case["mfu"]),
                f"{case['peak_memory_bytes'] / 2**30:.1f}",
                f"{own['images_per_second_per_device'] / speed:.2f}" if own else "-",
            ]
        )
    return Table(head, lines, left=2)


def fp8_table(cases: list[Row]) -> Table:
    """Every step in FP8 beside the same step in BF16."""
    plain = {case["config"]: case for case in cases if _plain(case) and case["conditioning"] == "cached"}
    head = ["configuration", "FP8 by", "batch", "step ms", "images/s/device", "GiB", "to BF16"]
    lines = []
    for case in cases:
        if not case.get("fp8") or case["status"] != "measured":
            continue
        own = plain.get(case["config"])
        speed = case["images_per_second_per_device"]
        ratio = "-"
        if own:
            ratio = f"{speed / own['images_per_second_per_device']:.2f}"
            ratio += "" if own["micro_batch"] == case["micro_batch"] else "~"
        lines.append(
            [
                case["config"],
                case["fp8"],
                str(case["micro_batch"]),
                f"{case['step_seconds_median'] * 1e3:.1f}",
                f"{speed:.1f}",
                f"{case['peak_memory_bytes'] / 2**30:.1f}",
                ratio,
            ]
        )
    return Table(head, lines, left=2)


def _plain(case: Row) -> bool:
    """Whether a case has figures of our own step as its configuration says."""
    return case["status"] == "measured" and not case.get("peer") and not case.get("fp8")


def other_lines(cases: list[Row]) -> list[str]:
    """A line for each case that has no figures, with the reason."""
    return [
        f"{case['case']}: {case['status']}: {case['reason']}"
        for case in cases
        if case["status"] != "measured"
    ]


def notes(result: Row) -> list[str]:
    """What the columns of a measured suite mean."""
    cases = [case for case in result["cases"] if case["status"] == "measured"]
    includes = {case["conditioning"]: case["includes"] for case in cases if not case.get("peer")}
    batch = report.PUBLISHED["global_batch"]
    lines = [f"{kind}: {text}" for kind, text in includes.items()]
    steps = list(dict.fromkeys(str(case["global_batch"]) for case in cases))
    lines += [
        f"batches/s: of {batch} images, derived: measured images/s over {batch}; a measured step has "
        f"{', '.join(steps) or 'no'} images",
        "MFU: model FLOPs of the denoiser over the dense BF16 peak; with frozen: and those of teacher, "
        "autoencoder and text encoder where they run",
        *MEANINGS,
    ]
    overrides = [case["overrides"] for case in cases if case["overrides"] and not case.get("fp8")]
    if overrides:
        lines.append(f"overridden: {' '.join(overrides[0])}")
    if result["smoke"]:
        lines.append("--smoke: small models on a CPU; the speeds mean nothing, the program does")
    if any(case["skipped_steps"] for case in cases):
        lines.append("some steps had no finite gradient and were skipped; do not use these times")
    lines.append("~: micro-batches of another size than the baseline's")
    return lines


def tables(result: Row) -> dict[str, Table]:
    """Everything that a measured suite shows, by title; without the tables that have no rows."""
    found = {
        "Speed and utilisation:": speed_table(result["table"]),
        "Against each row's baseline:": relative_table(result["table"]),
        "Peers, on cached inputs:": peer_table(result["cases"]),
        "FP8 products in the blocks, on cached inputs:": fp8_table(result["cases"]),
    }
    return {title: table for title, table in found.items() if table.rows}


def text(result: Row) -> str:
    """The whole result for people."""
    parts = [f"{title}\n{table.text()}" for title, table in tables(result).items()]
    return "\n\n".join([*parts, *other_lines(result["cases"]), "\n".join(notes(result))])


def section(results: list[Result]) -> str:
    """Of the performance page: the newest suite of each GPU; without one what is known of the post's rows."""
    text = ["## The post's rows"]
    newest = {gpu_of(result): result for result in of(results, "suite") if result["device"] == "cuda"}
    if not newest:
        text += [NOT_MEASURED, relative_table(derive([])).markdown()]
        text.append("\n".join(f"- {line}" for line in MEANINGS))
    for gpu, result in newest.items():
        shown = result | {"table": derive(result["cases"])}
        text += [f"### {gpu}", origin(result)]
        for title, table in tables(shown).items():
            text += [title, table.markdown()]
        if others := other_lines(result["cases"]):
            text += ["Without figures:", "\n".join(f"- {line}" for line in others)]
        text.append("\n".join(f"- {line}" for line in notes(shown)))
    return "\n\n".join(text)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
