"""Ownership of a run's folder over all its stages, and the record of how it failed."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.config import Config
from millrace.engine.distributed import process_group
from millrace.engine.distributed.run_lock import RunLock
from millrace.engine.run_log.failures import Failures
from millrace.engine.run_log.logs import make_output
from millrace.engine.util.files import sha256_json

log = logging.getLogger(__name__)


@contextmanager
def owned_run(config: Config, resume: bool) -> Iterator[Failures]:
    """In this block no other process trains in the folder of the run. Collective.

    Raises UserError if one does, if the folder cannot be written, and for `resume` of a run that failed in
    the same way too often.
    """
    output = Path(config.run.output_dir)
    digest = sha256_json(config.model_dump(mode="json"))
    with ExitStack() as stack:

        def own() -> None:
            make_output(output)
            lock = stack.enter_context(RunLock(output))
            failures = Failures(output, digest)
            if lock.taken_over:
                log.warning(lock.taken_over)
            if lock.taken_over and resume:
                failures.note_death(
                    max((step for step, _ in list_checkpoints(output / "checkpoints")), default=0)
                )
            if resume:
                failures.refuse_loop()

        process_group.lead(own)
        yield Failures(output, digest)  # with what was counted just now, on all ranks
