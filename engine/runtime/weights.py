"""The denoiser's weights out of a checkpoint, without its optimizer."""

from pathlib import Path
from typing import Literal

from torch import Tensor

from millrace.engine.config import Config
from millrace.engine.config_file import parse_config
from millrace.engine.errors import UserError
from millrace.engine.runtime.checkpoint import list_checkpoints
from millrace.engine.runtime.manifest import MANIFEST
from millrace.engine.runtime.sharded import CheckpointReader

Weights = Literal["auto", "model", "ema"]
"""Which weights are meant; `auto` takes EMA where there is one."""

_PREFIX = {"model": "master/", "ema": "ema/"}


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


def choose_weights(reader: CheckpointReader, weights: Weights = "auto") -> Literal["model", "ema"]:
    """Resolve `auto`. Raises UserError where EMA is asked for and the run keeps none."""
    has_ema = any(name.startswith(_PREFIX["ema"]) for name in reader.names())
    if weights == "ema" and not has_ema:
        raise UserError(f"{reader.folder} holds no EMA weights (ema.enabled was false); take weights 'model'")
    if weights == "auto":
        return "ema" if has_ema else "model"
    return weights


def read_weights(reader: CheckpointReader, weights: Literal["model", "ema"]) -> dict[str, Tensor]:
    """Parameters and buffers on the CPU by their names in the Denoiser, in the dtype they are stored in."""
    prefixes = (_PREFIX[weights], "buffer/")
    return {
        name.partition("/")[2]: reader.tensor(name) for name in reader.names() if name.startswith(prefixes)
    }


def checkpoint_config(reader: CheckpointReader) -> Config:
    """The resolved configuration of the run that wrote the checkpoint."""
    return parse_config(reader.meta["config"], str(reader.folder))


def checkpoint_state(path: str | Path, weights: Weights = "auto") -> tuple[dict[str, Tensor], Config]:
    """Weights and configuration of a run folder (its newest checkpoint) or a checkpoint folder.

    The checkpoint is verified first. Raises DamagedCheckpoint, or UserError if there is none or no EMA.
    """
    reader = CheckpointReader(checkpoint_folder(path))
    return read_weights(reader, choose_weights(reader, weights)), checkpoint_config(reader)
