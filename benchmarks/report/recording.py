"""Results as files: what every benchmark writes besides its numbers, and reading them all."""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from millrace.engine.util.errors import UserError
from millrace.engine.util.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
Result = dict[str, Any]
CHARTS = "../benchmarks/results"
"""Where pages in docs/ find them."""
PACKAGES = (
    *("triton", "deepspeed", "flash-attn", "xformers", "transformers", "diffusers"),
    *("pillow", "nvidia-dali-cuda130", "webdataset", "mosaicml-streaming"),
)


def environment() -> dict[str, Any]:
    """Where, when, with what and how this process runs; null for what cannot be known here."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {"torch": torch.__version__} | {name: version_of(name) for name in PACKAGES},
    }


def default_path(benchmark: str, device: torch.device) -> Path:
    """A new file under results/, named by benchmark, device and time (UTC)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    slug = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
    return RESULTS / f"{benchmark}-{slug}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON; the file is complete or not there. Raises UserError where that is impossible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; choose another --output") from None


def read_results(folder: Path = RESULTS) -> list[Result]:
    """The results of a folder, each with the names of its file and of its chart; oldest first."""
    results = []
    for path in sorted(folder.glob("*.json")):
        chart = path.with_suffix(".svg")
        names = {"file": path.name, "chart": chart.name if chart.exists() else None}
        results.append(json.loads(path.read_text()) | names)
    return sorted(results, key=lambda result: (result.get("time", ""), result["file"]))


def of(results: list[Result], benchmark: str) -> list[Result]:
    """The results of one benchmark, but not those of a trial run."""
    return [r for r in results if r["benchmark"] == benchmark and not r.get("smoke")]


def gpu_of(result: Result) -> str:
    """Name of the GPU of a result; several of one kind count as that kind."""
    return result["gpus"][0]["name"]


def origin(result: Result) -> str:
    """Where a result comes from, in a line of Markdown."""
    commit = result["commit"][:12] if result["commit"] else "unknown"
    changed = " with uncommitted changes" if result["dirty"] else ""
    torch, triton = result["versions"]["torch"], result["versions"]["triton"]
    return (
        f"`{result['file']}`: {result['time'][:10]}, commit {commit}{changed}, torch {torch}, Triton "
        f"{triton}, `{result['command']}`"
    )


def source(result: Result) -> str:
    """Where a chart comes from: file, day and processor."""
    where = gpu_of(result) if result.get("gpus") else f"{result['cpu']}, CPU"
    return f"{result['file']}: {result['time'][:10]}, {where}"


def _git(*arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
    }


def version_of(package: str) -> str | None:
    """Of an installed package; None without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
