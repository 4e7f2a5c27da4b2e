"""Run, checkpoint and logging sections: where and how long a run trains, and what it leaves behind."""

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from millrace.engine.config.section import PathText, Section


class ActivationCheckpointing(Section):
    """What backward recomputes instead of keeping."""

    policy: Literal["auto", "none", "full", "selective"] = "none"
    """`none` keeps every activation; `full` recomputes whole blocks in backward; `selective` keeps the
    outputs of matrix products and attention and recomputes the element-wise rest. `auto` takes the fastest
    that fits."""
    every: int = Field(1, ge=1)
    """Apply the policy to every n-th block: 2 halves the memory saved and the work repeated."""


class Run(Section):
    """The run as a whole: where, how long, on what."""

    output_dir: PathText = "runs/default"
    """Folder that receives checkpoints, log.jsonl, TensorBoard events and sample grids."""
    steps: int = Field(100_000, ge=1)
    """Optimizer steps of the whole run."""
    seed: int = Field(42, ge=0, lt=2**63)
    """Base of all randomness: weights, order, noise, time, crops, caption choice and caption drop."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    compile: bool = False
    """`torch.compile` each block (all blocks share one compiled graph)."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing()
    init_from: PathText | None = None
    """Start from these weights instead of random ones: a diffusers folder (of a transformer or a pipeline),
    a name on the hub (`OWNER/NAME`, `OWNER/NAME@REVISION`), a Photoroom/PRX state dict (.safetensors or .pt),
    or a Millrace run or checkpoint. Optimizer and step start anew."""
    max_bad_steps: int = Field(10, ge=1)
    """Stop after this many steps in a row were skipped because a loss or gradient was not finite; at the
    first of them if the weights or the optimizer's state are not finite themselves."""


class Checkpoint(Section):
    """When the state is saved and how much of it stays."""

    every_steps: int = Field(5_000, ge=1)
    """Steps between checkpoints; one is also written at the end and on SIGTERM or Ctrl-C."""
    keep: int = Field(3, ge=1)
    """How many of the newest checkpoints stay."""
    blocking: bool = False
    """Let training wait until a checkpoint is written. Otherwise it waits for a copy of the state in host
    memory, from which another thread writes; a machine without room for the copies waits all the same."""


class Logging(Section):
    """What a run tells, where."""

    every_steps: int = Field(10, ge=1)
    """Steps between reads of the device's loss buffer; log.jsonl has every step all the same."""
    sample_keys: bool = False
    """Write the keys of all samples to `keys/` in the run's folder, a line a step, one file a process."""
    tensorboard: bool = True
    """Write events to `tensorboard/` in the run's folder."""
    wandb: bool = False
    """Weights & Biases, if installed; a resumed run goes on with its own run there."""
    mlflow: str | None = Field(None, min_length=1)
    """Tracking URI of MLflow, if installed (`http://host:5000`, `sqlite:///runs.db`); a resumed run goes on
    with its own run there."""
    project: str = "millrace"
    """Project of Weights & Biases, experiment of MLflow."""

    @field_validator("mlflow")
    @classmethod
    def _without_password(cls, uri: str | None) -> str | None:
        if uri is not None and urlsplit(uri).password:
            raise ValueError(
                "has a password, which would be copied to config.json and into checkpoints; leave it out and "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return uri
