"""Saving checkpoints and resuming from them: whole or not at all, never overwritten, verified before use.

    runs/jit/checkpoints/
        .tmp-step-00000300/     being written; a leftover if the run died, cleared at the next save
        step-00000100/          published: the name is final, so every byte of it was on disk before
        step-00000200.1/        step 200 saved again; it replaced step-00000200

    reserve ──▶ every rank writes and syncs its shard ──▶ rank 0: manifest, sync, rename, sync ──▶ prune
              agree                        agree: written, and sound                                 agree

The rename is the commit. A run killed at any moment leaves a `.tmp-step-` folder, which nothing ever reads,
and all that was published before. Deleting goes the same way back: rename to `.tmp-step-`, then remove.

A step that is already published (training resumed behind it, or it is damaged) is published again as
`step-N.1`, `.2`, ... and only then is the older one deleted: replacing a folder under one name would need a
moment without any.

What a folder holds is described in `manifest.py`, how tensors are cut and read in `sharded_tensors.py`.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from millrace.engine.checkpoint.damage import (
    BadElements,
    DamagedState,
    forget_damage,
    require_progress,
    total,
)
from millrace.engine.checkpoint.manifest import (
    META,
    DamagedCheckpoint,
    Manifest,
    ShardIndex,
    merge,
    shard_name,
    write_file,
    write_manifest,
)
from millrace.engine.checkpoint.meta_format import stamp
from millrace.engine.checkpoint.pins import pinned_folders
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader, Piece, write_shard
from millrace.engine.distributed import process_group
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import sync_folder

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_TMP = ".tmp-step-"
_NONE_BAD: Mapping[str, BadElements] = {}

T = TypeVar("T")
Gather = Callable[[Any], list[Any]]
"""Values of all ranks, in rank order, such as `process_group.gather_objects`: called by every rank the same
number of times, it returns the same on every rank. Ranks exchange nothing else here; values are small."""


class CheckpointNotWritten(UserError):
    """The disk refused a checkpoint, on every rank alike: nothing is published, and it may be tried again."""


def _alone(value: Any) -> list[Any]:
    return [value]


def save_checkpoint(
    root: Path,
    step: int,
    pieces: Iterable[Piece],
    meta: dict[str, Any],
    *,
    keep: int,
    bad: Mapping[str, BadElements] = _NONE_BAD,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather = _alone,
) -> Path:
    """Publish the state after `step` in `root` (on a file system that all ranks share); returns its folder.

    Every rank calls it with the `pieces` that it holds; over all ranks they cover each tensor exactly once.
    `meta` is anything JSON can hold; rank 0's is stored. Then of the checkpoints up to `step` the newest
    `keep` stay. Later ones, left by a run that was resumed behind them, are not touched. An old one that
    cannot be deleted is a warning, and tried again at the next save.

    A rank that fails still takes part in the next agreement, so nobody waits for it: every rank raises the
    same, nothing is published, the earlier checkpoints are untouched, and what was written is removed. Raises
    CheckpointNotWritten for a full disk, missing permission and the like; DamagedState for bad elements in
    the pieces of any rank, or in `bad`, which a rank has found elsewhere; RuntimeError if the pieces leave a
    gap or overlap. `gather` is called up to three times.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, but at least the checkpoint just written stays")
    root = Path(root)
    leads = rank == 0
    staging: Path | None = None

    def reserve() -> tuple[Path, Path] | None:
        if not leads:
            return None
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(f"{_TMP}*"):
            _delete(leftover)
        return _new_staging(root, step), _next_folder(root, step)

    def write() -> Mapping[str, BadElements]:
        shard = staging / shard_name(rank, world_size)
        index = write_shard(shard, pieces, rank)
        write_file(_index_path(shard), index.to_json().encode())
        return total([index.bad, bad])

    def publish() -> None:
        if leads:
            _seal(staging, step, world_size, meta)
            os.rename(staging, folder)
            sync_folder(root)
            _prune(root, step, keep)

    try:
        staging, folder = together(reserve, gather)[0]
        if found := total(together(write, gather)):
            raise DamagedState(found)
        together(publish, gather)
    except Exception as error:
        if leads and staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointNotWritten(
                f"{root}: checkpoint of step {step} failed: {error.strerror or error}"
                f"{f' ({error.filename})' if error.filename else ''}; earlier checkpoints are untouched, "
                "free space or grant access there, or choose another run.output_dir"
            ) from error
        raise
    return folder


def together(action: Callable[[], T], gather: Gather) -> list[T]:
    """Run `action` on every rank: its small results, by rank. What one rank raises, every rank raises; of
    several the first."""
    result = failure = None
    try:
        result = action()
    except Exception as error:
        failure = error
    answers = gather((result, _sendable(failure)))
    failures = [found for _, found in answers if found is not None]
    if not failures:
        return [found for found, _ in answers]
    if failure is not None and len(failures) == 1:
        raise failure
    raise failures[0] from failure


def _sendable(error: Exception | None) -> Exception | None:
    """The same, of a class that survives pickling."""
    if error is None or type(error) in (UserError, DamagedCheckpoint, RuntimeError):
        return error
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror or str(error), error.filename)
    return (UserError if isinstance(error, UserError) else RuntimeError)(f"{type(error).__name__}: {error}")


def _new_staging(root: Path, step: int) -> Path:
    """A new folder to write in, beside a leftover of the same step that cannot be deleted."""
    number = 0
    while True:
        staging = root / f"{_TMP}{step:08d}{f'.{number}' if number else ''}"
        try:
            staging.mkdir()
            return staging
        except FileExistsError:
            number += 1


def _delete(doomed: Path) -> None:
    """Remove a folder; a warning where that fails."""
    try:
        shutil.rmtree(doomed)
    except OSError as error:
        _warn_undeleted(doomed, error)


def _warn_undeleted(folder: Path, error: OSError) -> None:
    log.warning(
        "warning: %s cannot be deleted: %s (%s); tried again at the next save",
        folder,
        error.strerror or error,
        error.filename,
    )


def _seal(staging: Path, step: int, world_size: int, meta: dict[str, Any]) -> None:
    """Turn the shards of all ranks into a complete checkpoint, on disk to the last byte."""
    files, indices = {}, []
    files[META] = write_file(staging / META, json.dumps(stamp() | meta, indent=2).encode())
    for rank in range(world_size):
        shard = staging / shard_name(rank, world_size)
        path = _index_path(shard)
        index = ShardIndex.from_json(path.read_text())
        path.unlink()
        if shard.stat().st_size != index.file.bytes:
            raise OSError(f"{shard} lost bytes after it was written")
        files[shard.name] = index.file
        indices.append(index)
    write_manifest(staging, Manifest(step, world_size, files, merge(indices)))


def _index_path(shard: Path) -> Path:
    return shard.with_suffix(".json")


def _published(root: Path) -> list[tuple[int, int, Path]]:
    """(step, repeat, folder), ascending. The name alone decides: a folder gets it when it is complete."""
    try:
        entries = list(Path(root).iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{root}: cannot list checkpoints: {error.strerror}") from None
    found = ((_NAME.fullmatch(entry.name), entry) for entry in entries if entry.is_dir())
    return sorted((int(name[1]), int(name[2] or 0), entry) for name, entry in found if name)


def _next_folder(root: Path, step: int) -> Path:
    repeats = [repeat for other, repeat, _ in _published(root) if other == step]
    return root / (f"step-{step:08d}.{max(repeats) + 1}" if repeats else f"step-{step:08d}")


def _prune(root: Path, step: int, keep: int) -> None:
    """Delete what a newer folder of the same step replaced, and all but the `keep` newest up to `step`; what
    another process reads now, at a later save."""
    published, pinned = _published(root), pinned_folders(root)
    newest = {other: folder for other, _, folder in published}
    dropped = set(sorted(other for other in newest if other <= step)[:-keep])
    for other, _, folder in published:
        if (folder != newest[other] or other in dropped) and folder.name not in pinned:
            doomed = root / f"{_TMP}{folder.name.removeprefix('step-')}-deleted"
            try:
                os.rename(folder, doomed)
                sync_folder(root)
            except OSError as error:  # in use, or the remains of an earlier attempt are in the way
                _warn_undeleted(folder, error)
                continue
            _delete(doomed)


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """Published checkpoints as (step, folder), oldest step first; none if `root` does not exist.

    A step is listed twice if a run was killed between replacing a checkpoint and deleting the older one;
    the later entry is the newer.
    """
    return [(step, folder) for step, _, folder in _published(root)]


def find_checkpoint(root: Path, which: str | int | Path) -> Path:
    """Folder of a step (100 or "100") of `root`, or of a path to a checkpoint anywhere. Raises UserError."""
    published = dict(list_checkpoints(root))
    if isinstance(which, int) or str(which).isdecimal():
        if int(which) not in published:
            known = ", ".join(map(str, published)) or "none"
            raise UserError(f"{root}: no checkpoint of step {which}; published steps: {known}")
        return published[int(which)]
    folder = Path(which)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such checkpoint folder; give a step, a folder or 'auto'")
    return folder


def resume_checkpoint(
    root: Path,
    which: str | int | Path = "auto",
    *,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather = _alone,
) -> tuple[CheckpointReader | None, list[str]]:
    """A verified checkpoint to continue from, and lines that the caller shows the user.

    "auto" takes the newest of `root`; one that is damaged, in its files or in the state that they hold, is
    named in the messages and the one before it is tried. Without any checkpoint the reader is None. If all
    are damaged UserError is raised: starting again from step 0 is for the user to decide. A step or a path
    is taken as asked for: damage raises.

    Every rank calls it and gets the same answer: rank 0 lists the folder, because a network file system may
    show others an older listing, and each rank verifies its share of the files.
    """

    def find() -> tuple[list[tuple[int, Path]], Path | None] | None:
        if rank:
            return None
        return list_checkpoints(root), None if which == "auto" else find_checkpoint(root, which)

    published, wanted = together(find, gather)[0]
    if wanted is not None:
        reader = _opentogether(wanted, rank, world_size, gather)
        return reader, _warn_of_later(root, reader, published)

    messages = []
    for _, folder in reversed(published):
        try:
            return _opentogether(folder, rank, world_size, gather), messages
        except DamagedCheckpoint as damage:
            messages.append(f"not resuming from {folder.name}: {damage.file} {damage.problem}")
    if published:
        raise UserError(
            f"{root}: every checkpoint is damaged; restore one, or move them away to start again from step 0 "
            f"({'; '.join(messages)})"
        )
    return None, []


def find_start(output: Path, resume: str | None) -> tuple[CheckpointReader | None, list[str]]:
    """The checkpoint of the run in `output` to continue from, or None, and lines for the user. Collective.

    Args:
        resume: None for a new run, "auto", a step, or a folder.

    Raises UserError where a new run would mix with an old one, nothing can be resumed, or "auto" has gone
    back to this checkpoint before and the training state was damaged again.
    """
    folder, leads, gather = output / "checkpoints", process_group.rank() == 0, process_group.gather_objects
    if resume is None:
        if together(lambda: bool(leads and list_checkpoints(folder)), gather)[0]:
            raise UserError(
                f"{output} already holds a run; continue it with --resume auto, or choose another "
                "run.output_dir"
            )
        return None, []
    reader, messages = resume_checkpoint(
        folder,
        resume,
        rank=process_group.rank(),
        world_size=process_group.world_size(),
        gather=gather,
    )
    step = reader.step if reader is not None else 0
    consult = require_progress if resume == "auto" else forget_damage
    messages += together(lambda: consult(output, step) if leads else [], gather)[0]
    return reader, messages


def _warn_of_later(root: Path, reader: CheckpointReader, published: list[tuple[int, Path]]) -> list[str]:
    later = sorted({step for step, _ in published if step > reader.step})
    if not later:
        return []
    return [
        f"{root} also holds checkpoints of later steps ({', '.join(map(str, later))}), which 'auto' prefers "
        "until this run has passed them: move them away or choose another run.output_dir"
    ]


def _opentogether(folder: Path, rank: int, world_size: int, gather: Gather) -> CheckpointReader:
    """Open and verify, each rank a share. What one rank finds, all raise."""
    opened = []

    def open_share() -> None:
        reader = CheckpointReader(folder, verify=False)
        reader.verify(rank, world_size, sound=True)
        opened.append(reader)

    together(open_share, gather)
    return opened[0]
