"""Quiet imports: warnings that other packages log while they are imported are left out."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Log no warnings inside. diffusers and torchao warn of each other and of torch's next version there, in
    lines before ours that no user of Millrace can do anything about; errors are still logged."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)
