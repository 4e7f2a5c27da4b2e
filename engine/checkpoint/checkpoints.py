"""Saving checkpoints and resuming from them: whole or not at all, never overwritten, verified before use.

    runs/jit/checkpoints/
        .tmp-step-00000300/     being written; a leftover if the run died, cleared at the next save
        step-00000100/          published: the name is final, so every byte of it was on disk before
        step-00000200.1/        step 200 saved again; it replaced step-00000200

    reserve ──▶ every rank writes and syncs its shard ──▶ rank 0: manifest, sync, rename, sync ──▶ prune
              agree                                     agree                                        agree

The rename is the commit. A run killed at any moment leaves a `.tmp-step-` folder, which nothing ever reads,
and all that was published before. Deleting goes the same way back: rename to `.tmp-step-`, then remove.

A step that is already published (training resumed behind it, or it is damaged) is published again as
`step-N.1`, `.2`, ... and only then is the older one deleted: replacing a folder under one name would need a
moment without any.

What a folder holds is described in `manifest.py`, how tensors are cut and read in `sharded_tensors.py`.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

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
from millrace.engine.checkpoint.pins import pinned_folders
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader, Piece, write_shard
from millrace.engine.distributed import process_group
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import sync_folder

_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_TMP = ".tmp-step-"

T = TypeVar("T")
AllOk = Callable[[bool], bool]
"""Agreement of all ranks: called by every rank the same number of times, it returns on every rank whether all
passed True. It is the only thing ranks exchange here, e.g. a MIN all-reduce of one integer."""


class _FailedElsewhere(UserError):
    """This rank did its part, another did not."""


def _alone(ok: bool) -> bool:
    return ok


def save_checkpoint(
    root: Path,
    step: int,
    pieces: Iterable[Piece],
    meta: dict[str, Any],
    *,
    keep: int,
    rank: int = 0,
    world_size: int = 1,
    all_ok: AllOk = _alone,
) -> Path:
    """Publish the state after `step` in `root` (on a file system that all ranks share); returns its folder.

    Every rank calls it with the `pieces` that it holds; over all ranks they cover each tensor exactly once.
    `meta` is anything JSON can hold; rank 0's is stored. Then of the checkpoints up to `step` the newest
    `keep` stay. Later ones, left by a run that was resumed behind them, are not touched.

    A rank that fails still takes part in the next agreement, so nobody waits for it: every rank raises,
    nothing is published, the earlier checkpoints are untouched, and what was written is removed. Raises
    UserError for a full disk, missing permission and the like, and on the ranks that did not fail
    themselves; RuntimeError if the pieces leave a gap or overlap. The one failure after publishing, an old
    checkpoint that cannot be deleted, is a UserError that says so. `all_ok` is called up to three times.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, but at least the checkpoint just written stays")
    root = Path(root)
    staging = root / f"{_TMP}{step:08d}"
    leads = rank == 0

    def reserve() -> Path:
        if leads:
            root.mkdir(parents=True, exist_ok=True)
            for leftover in root.glob(f"{_TMP}*"):
                shutil.rmtree(leftover)
            staging.mkdir()
        return _next_folder(root, step)

    def write() -> None:
        shard = staging / shard_name(rank, world_size)
        index = write_shard(shard, pieces, rank)
        write_file(_index_path(shard), index.to_json().encode())

    def publish() -> None:
        if leads:
            _seal(staging, step, world_size, meta)
            os.rename(staging, folder)
            sync_folder(root)
            try:
                _prune(root, step, keep)
            except OSError as error:
                raise UserError(
                    f"{folder} is published, but an older checkpoint cannot be deleted: {error.strerror} "
                    f"({error.filename}); grant permission or delete it"
                ) from error

    try:
        folder = _together(reserve, all_ok)
        _together(write, all_ok)
        _together(publish, all_ok)
    except Exception as error:
        if leads:
            shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(
                f"{root}: checkpoint of step {step} failed: {error.strerror or error}"
                f"{f' ({error.filename})' if error.filename else ''}; earlier checkpoints are untouched, "
                "free space or grant access there, or choose another run.output_dir"
            ) from error
        raise
    return folder


def _together(action: Callable[[], T], all_ok: AllOk) -> T:
    """Run `action` on this rank; raise on every rank if it raised on any."""
    error = None
    try:
        result = action()
    except Exception as raised:
        error = raised
    if all_ok(error is None):
        return result
    raise error or _FailedElsewhere("checkpoint failed on another rank, whose message says why")


def _seal(staging: Path, step: int, world_size: int, meta: dict[str, Any]) -> None:
    """Turn the shards of all ranks into a complete checkpoint, on disk to the last byte."""
    files, indices = {}, []
    files[META] = write_file(staging / META, json.dumps(meta, indent=2).encode())
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
            os.rename(folder, doomed)
            sync_folder(root)
            shutil.rmtree(doomed)


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
    all_ok: AllOk = _alone,
) -> tuple[CheckpointReader | None, list[str]]:
    """A verified checkpoint to continue from, and lines that the caller shows the user.

    "auto" takes the newest of `root`; one that is damaged is named in the messages and the one before it is
    tried. Without any checkpoint the reader is None. If all are damaged UserError is raised: starting again
    from step 0 is for the user to decide. A step or a path is taken as asked for: damage raises.

    Every rank calls it and gets the same answer; each verifies its share of the files. `all_ok` is called
    once for each checkpoint tried.
    """
    published = list_checkpoints(root)
    if which != "auto":
        reader = _open_together(find_checkpoint(root, which), rank, world_size, all_ok)
        return reader, _warn_of_later(root, reader, published)

    messages = []
    for _, folder in reversed(published):
        try:
            return _open_together(folder, rank, world_size, all_ok), messages
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

    Raises UserError where a new run would mix with an old one, or nothing can be resumed.
    """
    folder = output / "checkpoints"
    if resume is None:
        if list_checkpoints(folder):
            raise UserError(
                f"{output} already holds a run; continue it with --resume auto, or choose another "
                "run.output_dir"
            )
        return None, []
    return resume_checkpoint(
        folder,
        resume,
        rank=process_group.rank(),
        world_size=process_group.world_size(),
        all_ok=process_group.all_ranks,
    )


def _warn_of_later(root: Path, reader: CheckpointReader, published: list[tuple[int, Path]]) -> list[str]:
    later = sorted({step for step, _ in published if step > reader.step})
    if not later:
        return []
    return [
        f"{root} also holds checkpoints of later steps ({', '.join(map(str, later))}), which 'auto' prefers "
        "until this run has passed them: move them away or choose another run.output_dir"
    ]


def _open_together(folder: Path, rank: int, world_size: int, all_ok: AllOk) -> CheckpointReader:
    """Open and verify, each rank a share. Raises DamagedCheckpoint on every rank if any rank found damage."""

    def open_share() -> CheckpointReader:
        reader = CheckpointReader(folder, verify=False)
        reader.verify(rank, world_size)
        return reader

    try:
        return _together(open_share, all_ok)
    except _FailedElsewhere:
        # Reading every file is slow, but rare, and lets this rank name the damage too.
        CheckpointReader(folder, verify=True)
        raise DamagedCheckpoint(folder, "a file", "cannot be read by another rank") from None
