"""Preparation job: from an input to a data set of shards, continued by the same call after a kill.

    find_inputs ──▶ parts, each converted and put aside ──▶ plan_shards ──▶ shards ──▶ manifest ──▶ pictures

Everything that is not finished lies in OUTPUT/.preparing. What is finished is not done again, and nothing
depends on how many processes there are or in which order they finish: parts and shards are numbered
beforehand.
"""

import errno
import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from millrace.engine.data.formats.shard_index import Manifest, Shard, bucket_name, read_manifest
from millrace.engine.data.formats.shard_writer import write_manifest
from millrace.engine.data.prepare.inputs import Inputs, find_inputs
from millrace.engine.data.prepare.parts import DonePart, do_part, load_part
from millrace.engine.data.prepare.progress import Progress
from millrace.engine.data.prepare.reports import draw_caption_lengths, draw_contact_sheet
from millrace.engine.data.prepare.settings import Settings
from millrace.engine.data.prepare.shard_packing import Plan, load_shard, make_shard, plan_shards
from millrace.engine.data.prepare.workers import Workers
from millrace.engine.data.reject_reasons import Reject
from millrace.engine.data.sources.shards import ShardsSource
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import TEMPORARY, sha256, write_atomically

WORK, OVER = ".preparing", ".preparing.over"
EARLY = 1000
"""Inputs after which too many bad ones stop the reading of tars, whose number of samples is not known."""
EXAMPLES = 5
"""Keys of each reason that the manifest names."""


def prepare(
    source: Path, output: Path, settings: Settings, workers: int, max_bad_share: float
) -> tuple[Manifest, list[str]]:
    """Make the data set `output` from `source`, or go on making it; its manifest, and notes for people.

    Raises UserError for input that cannot be read, an output that holds something else, and more than
    `max_bad_share` of bad input.
    """
    inputs = find_inputs(source, settings)
    identity = sha256(f"{inputs.digest} {json.dumps(settings.described())}".encode())
    try:
        with _workspace(output, identity) as work:
            if work is None:
                return read_manifest(output), [f"{output} is complete already"]
            manifest = _prepare(inputs, output, work, settings, identity, workers, max_bad_share)
        return manifest, inputs.notes
    except OSError as error:
        where = error.filename or output
        hint = "; finished work is kept, run the same command again" if error.errno == errno.ENOSPC else ""
        raise UserError(f"{where}: cannot be written: {error.strerror or error}{hint}") from None


def _prepare(
    inputs: Inputs,
    output: Path,
    work: Path,
    settings: Settings,
    identity: str,
    workers: int,
    max_bad_share: float,
) -> Manifest:
    parts = _read(inputs, output, work / "parts", settings, workers, max_bad_share)
    plan = plan_shards(parts, work / "parts", settings)
    rejects = [reject for part in parts for reject in part.rejects] + plan.duplicates
    _write_rejects(output, rejects)
    seen = sum(part.seen for part in parts)
    _check_limit(seen, rejects, max_bad_share, output)
    if not plan.shards:
        raise UserError(f"no sample is left of {seen}: {_by_reason(rejects)}; see {output / 'rejects.jsonl'}")
    shards = _pack(plan, output, work, workers)
    manifest = _manifest(shards, plan, rejects, seen, settings, identity)
    write_manifest(output, manifest)
    draw_contact_sheet(ShardsSource(output), output / "contact_sheet.png")
    draw_caption_lengths(
        plan.rows["long_characters"], plan.rows["short_characters"], output / "caption_lengths.png"
    )
    return manifest


def _read(
    inputs: Inputs, output: Path, folder: Path, settings: Settings, workers: int, max_bad_share: float
) -> list[DonePart]:
    """Convert all parts that are not done."""
    done: dict[int, DonePart] = {}
    for number in range(len(inputs.parts)):
        part = load_part(number, folder)
        if part is not None:
            done[number] = part
    waiting = [number for number in range(len(inputs.parts)) if number not in done]
    weights = [part.weight for part in inputs.parts]
    limit = _Limit(inputs.samples, max_bad_share, output)
    limit.add(done)
    if not waiting:
        return [done[number] for number in range(len(inputs.parts))]
    progress = Progress(
        "reading", sum(weights), sum(weights[number] for number in done), 1.0 if inputs.samples else None
    )
    try:
        with Workers(min(workers, len(waiting)), progress.report) as pool:
            tasks = ((inputs.parts[number], number, folder, settings) for number in waiting)
            for place, part in pool.run(do_part, tasks):
                number = waiting[place]
                done[number] = part
                progress.finish_part(weights[number], part.seen)
                limit.add(done)
    finally:
        progress.close()
    return [done[number] for number in range(len(inputs.parts))]


def _pack(plan: Plan, output: Path, work: Path, workers: int) -> list[Shard]:
    """Make all shards that are not made."""
    shards = [load_shard(planned, output, work / "shards") for planned in plan.shards]
    waiting = [number for number, shard in enumerate(shards) if shard is None]
    sizes = [len(planned.rows) for planned in plan.shards]
    if not waiting:
        return shards
    progress = Progress("packing", sum(sizes), sum(sizes) - sum(sizes[number] for number in waiting), 1.0)
    try:
        with Workers(min(workers, len(waiting)), progress.report) as pool:
            folders = output, work / "parts", work / "shards"
            tasks = ((plan.shards[number], *folders) for number in waiting)
            for place, shard in pool.run(make_shard, tasks):
                shards[waiting[place]] = shard
                progress.finish_part(sizes[waiting[place]], sizes[waiting[place]])
    finally:
        progress.close()
    return shards


class _Limit:
    """Stops once too much is bad, at a point that does not depend on which parts finish first."""

    def __init__(self, samples: int | None, share: float, output: Path) -> None:
        self._samples, self._share, self._output = samples, share, output
        self._next = self._seen = self._bad = 0
        self._rejects: list[Reject] = []

    def add(self, done: dict[int, DonePart]) -> None:
        """Look at the parts up to the first that is missing in `done`."""
        while self._next in done:
            part = done[self._next]
            self._next += 1
            self._seen += part.seen
            self._bad += part.bad
            self._rejects += part.rejects
            if self._samples is None and self._seen < EARLY:
                continue
            if self._bad > self._share * (self._samples or self._seen):
                _write_rejects(self._output, self._rejects)
                _check_limit(self._seen, self._rejects, 0.0, self._output, self._share)


def _check_limit(
    seen: int, rejects: list[Reject], allowed: float, output: Path, named: float | None = None
) -> None:
    """Raises UserError if more than `allowed` of the inputs is bad; `named` is what the user has set."""
    bad = [reject for reject in rejects if reject.reason.is_bad]
    if len(bad) > allowed * seen:
        raise UserError(
            f"{len(bad)} of {seen} inputs are bad, more than --max-bad-share "
            f"{allowed if named is None else named:g} allows: {_by_reason(bad)}; {output / 'rejects.jsonl'} "
            "names them; repair them, or set a higher --max-bad-share and run again: finished work is kept"
        )


def _by_reason(rejects: list[Reject]) -> str:
    """`3 corrupt_picture (a.jpg), 1 missing_caption (b.jpg)`."""
    counts = Counter(reject.reason for reject in rejects)
    first = {reject.reason: reject.key for reject in reversed(rejects)}
    return ", ".join(f"{n} {reason} ({first[reason]})" for reason, n in counts.most_common()) or "no inputs"


def _write_rejects(output: Path, rejects: list[Reject]) -> None:
    lines = [json.dumps(reject._asdict(), ensure_ascii=False) + "\n" for reject in rejects]
    write_atomically(output / "rejects.jsonl", "".join(lines).encode("utf-8", "backslashreplace"))


def _manifest(
    shards: list[Shard], plan: Plan, rejects: list[Reject], seen: int, settings: Settings, identity: str
) -> Manifest:
    histogram: Counter[str] = Counter()
    for shard in shards:
        histogram[bucket_name(shard.bucket)] += shard.samples
    examples: dict[str, list[str]] = {}
    for reject in rejects:
        some = examples.setdefault(reject.reason, [])
        if len(some) < EXAMPLES:
            some.append(reject.key)
    reasons = Counter(reject.reason for reject in rejects)
    return Manifest(
        resolution=settings.resolution,
        aspect=settings.aspect,
        patch=settings.patch,
        buckets=tuple(sorted({shard.bucket for shard in shards})),
        shards=tuple(shards),
        counts={"seen": seen, "samples": len(plan.rows), "rejected": len(rejects)},
        histogram=dict(histogram),
        rejects={str(reason): reasons[reason] for reason in sorted(reasons)},
        reject_examples={str(reason): examples[reason] for reason in sorted(examples)},
        caption_characters={
            "long": _summary(plan.rows["long_characters"]),
            "short": _summary(plan.rows["short_characters"]),
        },
        settings=settings.described() | {"identity": identity},
    )


def _summary(lengths: np.ndarray) -> dict[str, float]:
    low, middle, high, higher, top = np.percentile(lengths, [0, 50, 95, 99, 100]).round(1).tolist()
    mean = round(float(lengths.mean()), 1)
    return {"min": low, "median": middle, "mean": mean, "p95": high, "p99": higher, "max": top}


@contextmanager
def _workspace(output: Path, identity: str) -> Iterator[Path | None]:
    """The folder for what is not finished, locked; removed at the end. None where all is finished."""
    work = output / WORK
    shutil.rmtree(output / OVER, ignore_errors=True)
    if not work.exists():
        if (output / "manifest.json").exists():
            if read_manifest(output).settings.get("identity") == identity:
                yield None
                return
            raise UserError(
                f"{output}: holds a data set made from other input or with other settings; "
                "choose another --output or remove it"
            )
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"{output}: is not empty; choose a new folder for --output")
    for folder in (work / "parts", work / "shards"):
        folder.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{output}: another millrace prepare is writing it; wait for its end") from None
        begun = work / "identity"
        if begun.exists() and begun.read_text() != identity:
            raise UserError(
                f"{output}: was begun with other input, settings or libraries; go on with those, or remove "
                "it and begin again"
            )
        write_atomically(begun, identity)
        for left in output.rglob(f"*{TEMPORARY}"):  # of processes that were killed
            left.unlink(missing_ok=True)
        yield work
        os.replace(work, output / OVER)  # so that a kill while it is removed leaves no half of it
        shutil.rmtree(output / OVER)
