"""Where a run begins: anew, or at one of its checkpoints."""

from pathlib import Path

from millrace.engine.checkpoint.checkpoints import (
    CheckpointReader,
    list_checkpoints,
    resume_checkpoint,
)
from millrace.engine.distributed import process_group
from millrace.engine.util.errors import UserError


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
