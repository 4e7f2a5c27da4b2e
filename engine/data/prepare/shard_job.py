"""Preparation job: from an input to a data set of shards, continued by the same call after a kill, and
brought up to date by it when the input has changed.

    find_inputs ──▶ parts, converted and put aside ──▶ plan_shards ──▶ shards, manifest, pictures ──▶ publish

Everything that is not finished lies in OUTPUT/.preparing. What is finished is not done again while its input
is the same, and nothing depends on how many processes there are or in which order they finish.
"""

import errno
import fcntl
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from millrace.engine.data.formats.shard_index import Manifest, Shard, bucket_name, read_manifest
from millrace.engine.data.formats.shard_writer import write_manifest
from millrace.engine.data.prepare.freeing import Freeing, can_free, forget_packed
from millrace.engine.data.prepare.inputs import Inputs, find_inputs
from millrace.engine.data.prepare.known_items import INDEX, KnownItems, merge, save_index
from millrace.engine.data.prepare.parts import DonePart, data_path, do_part
from millrace.engine.data.prepare.progress import Progress
from millrace.engine.data.prepare.publishing import READY, publish
from millrace.engine.data.prepare.reports import caption_summary, draw_caption_lengths, draw_contact_sheet
from millrace.engine.data.prepare.settings import Settings
from millrace.engine.data.prepare.shard_packing import Plan, PlannedShard, load_shard, make_shard, plan_shards
from millrace.engine.data.prepare.workers import Workers
from millrace.engine.data.reject_reasons import Reject
from millrace.engine.data.sources.shards import ShardsSource
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import TEMPORARY, require_apart, sha256, sync_folder, write_atomically

WORK, OVER = ".preparing", ".preparing.over"
EARLY = 1000
"""Inputs after which too many bad ones stop the reading of tars, whose number of samples is not known."""
EXAMPLES = 5
"""Keys of each reason that the manifest names."""


def prepare(
    source: Path | str, output: Path, settings: Settings, workers: int, max_bad_share: float
) -> tuple[Manifest, list[str]]:
    """Make the data set `output` from `source`, or go on making it; its manifest, and notes for people.

    A `source` that is a str is a URL.

    Raises UserError for input that cannot be read, an output that holds something else, and more than
    `max_bad_share` of bad input.
    """
    if not isinstance(source, str):
        require_apart("--input", source, "--output", output)
    inputs = find_inputs(source, settings)
    described = json.dumps(settings.described())
    identity = sha256(f"{inputs.digest} {described}".encode())
    try:
        if not (output / WORK).exists() and _is_current(output, settings, identity):
            return read_manifest(output), [f"{output} is complete already"]
        with _workspace(output, described) as work:
            if _is_current(output, settings, identity):  # but the end of an earlier call was missing
                return read_manifest(output), [f"{output} is complete already"]
            old = _finished(output, settings)
            if old is not None and "captions" in old.settings:
                raise UserError(
                    f"{output}: was given captions by --captions, and its input has changed since; make a "
                    "data set in another --output and give it these captions"
                )
            forget_packed(work, identity)
            job = _Job(inputs, source, output, work, settings, identity, workers, old)
            manifest = job.run(max_bad_share)
        return manifest, [*inputs.notes, *job.notes]
    except OSError as error:
        where = error.filename or output
        hint = "; finished work is kept, run the same command again" if error.errno == errno.ENOSPC else ""
        raise UserError(f"{where}: cannot be written: {error.strerror or error}{hint}") from None


class _Job:
    """One call that has work to do; `old` is the manifest of the data set that it brings up to date."""

    def __init__(
        self,
        inputs: Inputs,
        source: Path | str,
        output: Path,
        work: Path,
        settings: Settings,
        identity: str,
        workers: int,
        old: Manifest | None,
    ) -> None:
        self.inputs, self.output, self.work, self.settings = inputs, output, work, settings
        self.identity, self.workers, self.old = identity, workers, old
        self.source = sha256(os.fsencode(source if isinstance(source, str) else os.path.realpath(source)))
        self.notes: list[str] = []
        self.known = KnownItems(output, old, work / "parts")
        # The reports of a complete data set stay as they are until the new ones are.
        self.reports = output if old is None else work

    def run(self, max_bad_share: float) -> Manifest:
        """Make the data set and put it where it belongs."""
        parts = self._read(max_bad_share)
        plan = plan_shards(parts, self.known.files, self.settings)
        rejects = [reject for part in parts for reject in part.rejects] + plan.duplicates
        _write_rejects(self.reports, rejects)
        seen = sum(part.seen for part in parts)
        _check_limit(seen, rejects, max_bad_share, self.reports)
        if not plan.shards:
            where = self.reports / "rejects.jsonl"
            raise UserError(f"no sample is left of {seen}: {_by_reason(rejects)}; see {where}")
        root = self.work / "set"
        root.mkdir(exist_ok=True)
        shards = self._pack(plan, root)
        manifest = _manifest(shards, plan, rejects, seen, self.settings, self.identity)
        if self.old is not None:
            # A cache knows the shards that it was made from: it is refused where they have changed.
            manifest = manifest.model_copy(update={"caches": self.old.caches})
            if self.old.caches and manifest.digest != self.old.digest:
                kinds = ",".join(self.old.caches)
                self.notes.append(f"its caches are stale; bring them up to date with millrace cache {kinds}")
        write_manifest(root, manifest)
        save_index(root, manifest, parts, plan.kept, plan.order, self.source)
        _write_rejects(root, rejects)
        draw_contact_sheet(ShardsSource(root), root / "contact_sheet.png")
        draw_caption_lengths(
            plan.rows["long_characters"], plan.rows["short_characters"], root / "caption_lengths.png"
        )
        os.replace(root, self.output / READY)
        sync_folder(self.output)
        publish(self.output, self.work)
        return manifest

    def _read(self, max_bad_share: float) -> list[DonePart]:
        """The items of all parts: those that are known, and the others read."""
        parts, known = self.inputs.parts, self.known
        matches = [known.find(part) for part in parts]
        missing = [np.flatnonzero(match.count == 0).tolist() for match in matches]
        waiting = [number for number, units in enumerate(missing) if units]
        total = sum(len(match.count) for match in matches)
        left = sum(map(len, missing))
        if self.old is not None:
            if known.input is None:
                self.notes.append(f"{self.output}: has no {INDEX} that fits it, so everything was read again")
            elif left == total and known.input != self.source:
                raise UserError(
                    f"{self.output}: holds a data set made from other input; choose another --output or "
                    "remove it"
                )
        done = {number: known.take(match) for number, match in enumerate(matches) if not missing[number]}
        weights = [part.weight for part in parts]
        limit = _Limit(self.inputs.samples, max_bad_share, self.reports)
        limit.add(done)
        if not waiting:
            return [done[number] for number in range(len(parts))]
        if left == total:
            size = _mib(self.inputs.size)
            _say(f"reading: {size} of input; what is kept takes as much at most, if it is JPEG", self.work)
        folder, settings = self.work / "parts", self.settings
        some = [parts[number].only(missing[number]) for number in waiting]
        finished = sum(weights) - sum(part.weight for part in some)
        progress = Progress("reading", sum(weights), finished, 1.0 if self.inputs.samples else None)
        try:
            with Workers(min(self.workers, len(waiting)), progress.report) as pool:
                tasks = ((part, folder, settings) for part in some)
                for place, new in pool.run(do_part, tasks):
                    number = waiting[place]
                    new.rows["file"] = known.number(data_path(folder, some[place].key))
                    progress.finish_part(some[place].weight, new.seen)
                    before = known.take(matches[number])
                    done[number] = merge(parts[number], before, new) if len(before.rows) else new
                    limit.add(done)
        finally:
            progress.close()
        if left < total:
            self.notes.append(f"read {left:,} of {total:,} {self.inputs.unit}; the others have not changed")
        return [done[number] for number in range(len(parts))]

    def _pack(self, plan: Plan, root: Path) -> list[Shard]:
        """Make all shards that are not made; what of the parts is in a shard leaves the disk."""
        files, done = self.known.files, self.work / "shards"
        shards = [load_shard(planned, root, done) for planned in plan.shards]
        waiting = [number for number, shard in enumerate(shards) if shard is None]
        sizes = [len(planned.rows) for planned in plan.shards]
        freeing = Freeing(plan, files, self.work, self.identity) if can_free(self.work) else None
        if freeing:
            made = zip(plan.shards, shards, strict=True)
            freeing.free([planned for planned, shard in made if shard is not None])
        if not waiting:
            return shards
        _say_need(plan, waiting, self.work, self.workers if freeing else None)
        left = sum(sizes[number] for number in waiting)
        progress = Progress("packing", sum(sizes), sum(sizes) - left, 1.0)
        try:
            with Workers(min(self.workers, len(waiting)), progress.report) as pool:
                tasks = (
                    (plan.shards[number], root, _files_of(plan.shards[number], files), done)
                    for number in waiting
                )
                for place, shard in pool.run(make_shard, tasks):
                    number = waiting[place]
                    shards[number] = shard
                    if freeing:
                        freeing.free([plan.shards[number]])
                    progress.finish_part(sizes[number], sizes[number])
        finally:
            progress.close()
        return shards


def _files_of(planned: PlannedShard, files: list[Path]) -> dict[int, Path]:
    return {number: files[number] for number in np.unique(planned.rows["file"]).tolist()}


def _say_need(plan: Plan, waiting: list[int], work: Path, at_once: int | None) -> None:
    """Say what packing needs of the disk; `at_once` shards are made before parts of them are freed."""
    sizes = sorted((plan.shards[number].bytes for number in waiting), reverse=True)
    need = sum(sizes if at_once is None else sizes[: max(1, at_once)])
    why = "" if at_once is not None else ": this file system cannot free what is packed"
    _say(
        f"packing: {len(sizes):,} shards of {_mib(sum(sizes))} need {_mib(need)} more than is taken now{why}",
        work,
    )


def _say(line: str, folder: Path) -> None:
    print(f"{line}; {_mib(shutil.disk_usage(folder).free)} are free", file=sys.stderr, flush=True)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


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
        aspect="square" if settings.aspect == "square" else "mixed",
        patch=settings.patch,
        buckets=tuple(sorted({shard.bucket for shard in shards})),
        shards=tuple(shards),
        counts={
            "seen": seen,
            "samples": len(plan.rows),
            "rejected": len(rejects),
            "unusable_profiles": int(plan.rows["unusable_profile"].sum()),
        },
        histogram=dict(histogram),
        rejects={str(reason): reasons[reason] for reason in sorted(reasons)},
        reject_examples={str(reason): examples[reason] for reason in sorted(examples)},
        caption_characters={
            "long": caption_summary(plan.rows["long_characters"]),
            "short": caption_summary(plan.rows["short_characters"]),
        },
        settings=settings.described() | {"identity": identity},
    )


def _finished(output: Path, settings: Settings) -> Manifest | None:
    """Manifest of the data set if it is complete. Raises UserError unless it has these settings."""
    if not (output / "manifest.json").exists():
        return None
    manifest = read_manifest(output)
    wanted = settings.described()
    differ = [name for name, value in wanted.items() if manifest.settings.get(name) != value]
    if differ:
        raise UserError(
            f"{output}: holds a data set made with other settings ({', '.join(differ)}); choose another "
            "--output or remove it"
        )
    return manifest


def _is_current(output: Path, settings: Settings, identity: str) -> bool:
    manifest = _finished(output, settings)
    return manifest is not None and manifest.settings.get("identity") == identity


@contextmanager
def _workspace(output: Path, described: str) -> Iterator[Path]:
    """The folder for what is not finished, locked; removed at the end."""
    work = output / WORK
    shutil.rmtree(output / OVER, ignore_errors=True)
    begun = work.exists() or (output / "manifest.json").exists()
    if not begun and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: is not empty; choose a new folder for --output")
    for folder in (work / "parts", work / "shards"):
        folder.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{output}: another millrace prepare is writing it; wait for its end") from None
        before = work / "settings"
        if before.exists() and before.read_text() != described:
            raise UserError(
                f"{output}: was begun with other settings or libraries; go on with those, or remove it and "
                "begin again"
            )
        publish(output, work)
        write_atomically(before, described)
        for left in output.rglob(f"*{TEMPORARY}"):  # of processes that were killed
            left.unlink(missing_ok=True)
        yield work
        os.replace(work, output / OVER)  # so that a kill while it is removed leaves no half of it
        shutil.rmtree(output / OVER)
