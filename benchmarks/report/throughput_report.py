"""Training steps beside the published speeds: figures, table, and the section of the performance page."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from millrace.benchmarks.report.recording import ROOT, Result, gpu_of, of
from millrace.benchmarks.report.tables import Table

CONFIGS = ROOT / "configs"
PUBLISHED = json.loads((ROOT / "benchmarks" / "published.json").read_text())

# Overrides that change how a step is computed but not what, so that the published figure still belongs to it.
HOW = (
    "run.",
    "data.micro_batch",
    "data.global_batch",
    "data.source",
    "data.path",
    "data.workers",
    "data.prefetch",
    "conditioning.text.path",
    "conditioning.autoencoder.path",
    "model.attention_backend",
    "model.geglu_backend",
    "conditioning.text.kernels",
    "deepspeed.",
)


def summarise(
    step_seconds: list[float],
    global_batch: int,
    devices: int,
    flops_per_image: float,
    peak: float | None,
    published: dict[str, Any] | None,
    frozen_flops: dict[str, float] | None = None,
) -> dict[str, Any]:
    """The figures of a row.

    Args:
        step_seconds: of each measured step, the slowest process's.
        global_batch: images of a step.
        devices: of the job.
        flops_per_image: model FLOPs of forward and backward.
        peak: FLOP/s that one device can do, or None if unknown.
        published: the row of `published.json` to set beside it.
        frozen_flops: of teacher, autoencoder and text encoder for one image, as far as they run.
    """
    p20, median, p80 = np.percentile(step_seconds, (20, 50, 80)).tolist()
    images = global_batch * len(step_seconds) / sum(step_seconds)
    batches = images / PUBLISHED["global_batch"]
    theirs = published and published["batches_per_second"]
    frozen_flops = frozen_flops or {}
    all_flops = flops_per_image + sum(frozen_flops.values())
    return {
        "step_seconds_median": median,
        "step_seconds_p20": p20,
        "step_seconds_p80": p80,
        "images_per_second": images,
        "images_per_second_per_device": images / devices,
        "batches_per_second": batches,
        "model_flops_per_image": flops_per_image,
        "frozen_flops_per_image": frozen_flops,
        "peak_flops_per_device": peak,
        "mfu": flops_per_image * images / (devices * peak) if peak else None,
        "mfu_with_frozen": all_flops * images / (devices * peak) if peak else None,
        "published": published,
        "ratio_to_published": batches / theirs if theirs else None,
    }


def published_row(path: str, overrides: list[str]) -> dict[str, Any] | None:
    """The row with a throughput that a file of configs/ reproduces, unless overrides make it another run."""
    if Path(path).resolve().parent != CONFIGS or not all(item.startswith(HOW) for item in overrides):
        return None
    rows = (row for table in PUBLISHED["tables"] for row in table["rows"])
    mine = (row for row in rows if row["config"] == Path(path).stem and row["batches_per_second"])
    return next(mine, None)


def published_configs() -> list[str]:
    """The files of configs/ with a published throughput whose step differs from the others': tables of data
    run the baseline's step."""
    tables = (table for table in PUBLISHED["tables"] if not table["section"].startswith("Data:"))
    rows = (row for table in tables for row in table["rows"] if row["batches_per_second"] and row["config"])
    return [str(CONFIGS / f"{name}.json") for name in dict.fromkeys(row["config"] for row in rows)]


def table(rows: list[dict[str, Any]]) -> Table:
    """One line for each configuration and kind of inputs."""
    head = ["config", "inputs", "devices", "batch", "step ms", "p20", "p80", "images/s", "/device"]
    head += ["batches/s", "post", "ratio", "GiB", "TFLOP/image", "MFU"]
    return Table(head, [_cells(row) for row in rows], left=2)


def text(rows: list[dict[str, Any]]) -> str:
    """The table, then what its columns mean."""
    notes = [
        f"inputs {name}: {includes}"
        for name, includes in {r["conditioning"]: r["includes"] for r in rows}.items()
    ]
    notes.append("step ms: median, 20th and 80th percentile; images/s over the whole measured time")
    notes.append(f"batches/s: of {PUBLISHED['global_batch']} images; GiB: peak memory of one process")
    notes.append("MFU: model FLOPs of forward and backward over the dense BF16 peak of the devices")
    if any(row["published"] for row in rows):
        source = f"{PUBLISHED['authors']}, {PUBLISHED['title']} ({PUBLISHED['date']})"
        notes.append(f"post: batches/s in {source},")
        notes.append("      measured end to end on GPUs whose model and count are not published;")
        notes.append("      so the ratio is one of whole jobs, and says nothing about one GPU")
    if any(row["overrides"] or row["smoke"] for row in rows):
        notes.append("*: with values overridden or shrunk by --smoke, as the JSON says")
    if any(row["skipped_steps"] for row in rows):
        notes.append("some steps had no finite gradient and were skipped; do not use these times")
    return "\n".join([table(rows).text(), "", *notes])


def _cells(row: dict[str, Any]) -> list[str]:
    published, ratio, mfu = row["published"], row["ratio_to_published"], row["mfu"]
    per_process = row["global_batch"] // row["devices"]
    accumulation = per_process // row["micro_batch"]
    milliseconds = (f"{row[f'step_seconds_{which}'] * 1e3:.1f}" for which in ("median", "p20", "p80"))
    return [
        row["config"] + ("*" if row["overrides"] or row["smoke"] else ""),
        row["conditioning"],
        f"{row['devices']} {row['device']}",
        f"{row['micro_batch']}" + (f" x {accumulation}" if accumulation > 1 else ""),
        *milliseconds,
        f"{row['images_per_second']:.1f}",
        f"{row['images_per_second_per_device']:.1f}",
        f"{row['batches_per_second']:.3f}",
        f"{published['batches_per_second']:.2f}" if published else "-",
        f"{ratio:.2f}" if ratio else "-",
        f"{row['peak_memory_bytes'] / 2**30:.1f}",
        f"{row['model_flops_per_image'] / 1e12:.3g}",
        f"{mfu:.1%}" if mfu is not None else "unknown",
    ]


def section(results: list[Result]) -> str:
    """Of the performance page: the newest training steps of each configuration on each GPU."""
    text = ["## Training step"]
    rows: dict[tuple[Any, ...], tuple[str, Result]] = {}
    for result in of(results, "throughput"):
        for row in result["rows"]:
            if row["device"] == "cuda" and not row["smoke"]:
                key = (row["config"], tuple(row["overrides"]), row["conditioning"], row["devices"])
                rows[(gpu_of(result), *key)] = gpu_of(result), row
    if not rows:
        return "\n\n".join([*text, "Not measured: no result of `benchmarks/throughput.py` from a GPU."])
    head = ["GPU", "configuration", "inputs", "step ms (p20-p80)", "images/s per GPU", "MFU", "peak GiB"]
    lines = []
    for gpu, row in rows.values():
        times = [row[f"step_seconds_{which}"] * 1e3 for which in ("median", "p20", "p80")]
        name = " ".join([f"`{row['config']}`", *(f"`{override}`" for override in row["overrides"])])
        lines.append(
            [
                f"{row['devices']} x {gpu}",
                name,
                row["conditioning"],
                f"{times[0]:.1f} ({times[1]:.1f}-{times[2]:.1f})",
                f"{row['images_per_second_per_device']:.1f}",
                "unknown" if row["mfu"] is None else f"{row['mfu']:.1%}",
                f"{row['peak_memory_bytes'] / 2**30:.1f}",
            ]
        )
    return "\n\n".join([*text, Table(head, lines).markdown()])
