"""Model weights of a checkpoint: the denoiser's or their EMA, without the optimizer's state."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from torch import Tensor

from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.checkpoint.damage import require_finite
from millrace.engine.checkpoint.manifest import MANIFEST
from millrace.engine.checkpoint.pins import pin, unpin
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from millrace.engine.config import Config
from millrace.engine.config.stages import values_at
from millrace.engine.config.stored import stored_config
from millrace.engine.model.adapters import is_factor, merged
from millrace.engine.optim.training_optimizer import HEADS
from millrace.engine.util.errors import UserError

Stored = Literal["model", "ema", "ema2"]
Weights = Literal["auto", "model", "ema", "ema2"]
"""Which weights are meant; `auto` takes EMA where there is one; `ema2` is that of `ema.second_decay`."""

_PREFIX = {"model": "master/", "ema": "ema/", "ema2": "ema2/"}


def checkpoint_folder(path: str | Path) -> Path:
    """`path` itself if it is a checkpoint, or the newest checkpoint of the run folder `path`."""
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    published = list_checkpoints(path / "checkpoints")
    if not published:
        raise UserError(
            f"{path} is neither a checkpoint nor a run with a checkpoint in {path / 'checkpoints'}"
        )
    return published[-1][1]


@contextmanager
def pinned_checkpoint(path: str | Path) -> Iterator[Path]:
    """`checkpoint_folder` of `path`, resolved once; in this block no run deletes it.

    In a folder where this user may not write it is not pinned. Raises UserError as `checkpoint_folder` does,
    and for a checkpoint that its run deletes just now.
    """
    folder = checkpoint_folder(path)
    file = pin(folder)
    while file is not None and not folder.is_dir():  # pruned between the two
        unpin(file)
        if folder == Path(path):
            raise UserError(f"{folder}: its run has just deleted it; take a newer one")
        folder = checkpoint_folder(path)
        file = pin(folder)
    try:
        yield folder
    finally:
        unpin(file)


def choose_weights(reader: CheckpointReader, weights: Weights = "auto") -> Stored:
    """Resolve `auto`. Raises UserError where an average is asked for that the run does not keep."""
    kept = {kind for kind, prefix in _PREFIX.items() if any(n.startswith(prefix) for n in reader.names())}
    if weights == "auto":
        return "ema" if "ema" in kept else "model"
    if weights not in kept:
        setting = {"ema": "EMA weights (ema.enabled was false)", "ema2": "second EMA (ema.second_decay)"}
        instead = "ema" if "ema" in kept else "model"
        raise UserError(f"{reader.folder} holds no {setting[weights]}; take weights {instead!r}")
    return weights


def read_weights(reader: CheckpointReader, weights: Stored) -> dict[str, Tensor]:
    """Parameters and buffers on the CPU by their names in the Denoiser, in the dtype they are stored in.

    Without those of heads that only training has. A frozen weight is its own average. An adapter is merged
    into the weights that have one, which then are FP32. Raises UserError for weights that are not finite.
    """
    found = read_parameters(reader, weights)
    factors = {name: found.pop(name) for name in list(found) if is_factor(name)}
    if factors:
        found = dict(merged(found.items(), factors, checkpoint_config(reader).adapter.scale))
    return found


def read_parameters(reader: CheckpointReader, weights: Stored) -> dict[str, Tensor]:
    """As `read_weights`, with the factors of an adapter beside the weights as they were before."""
    there, names = reader.names(), {}
    for prefix in ("master/", "buffer/", _PREFIX[weights]):  # an average takes the place of its weight
        names |= {name.partition("/")[2]: name for name in there if name.startswith(prefix)}
    found = {ours: reader.tensor(name) for ours, name in names.items() if not ours.startswith(HEADS)}
    require_finite(found, f"{reader.folder}: its weights {weights!r}")
    return found


def checkpoint_config(reader: CheckpointReader) -> Config:
    """The configuration under which the checkpoint's last step was trained: that of its stage, as far as this
    version knows it."""
    values, _ = values_at(reader.meta["config"], reader.step)
    return stored_config(values, str(reader.folder))


def describe_checkpoint(reader: CheckpointReader, weights: Stored) -> str:
    """In one line for people: which checkpoint, of which step and stage, and which of its weights."""
    _, stage = values_at(reader.meta["config"], reader.step)
    kind = {"ema": "EMA weights", "ema2": "weights of the second EMA", "model": "weights"}[weights]
    return f"{kind} of {reader.folder}, step {reader.step}{f', stage {stage!r}' if stage else ''}"


def checkpoint_state(path: str | Path, weights: Weights = "auto") -> tuple[dict[str, Tensor], Config]:
    """Weights and configuration of a run folder (its newest checkpoint) or a checkpoint folder.

    The checkpoint is verified first. Raises DamagedCheckpoint, or UserError if there is none or no EMA.
    """
    reader = CheckpointReader(checkpoint_folder(path))
    return read_weights(reader, choose_weights(reader, weights)), checkpoint_config(reader)
