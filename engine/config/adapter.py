"""Adapter section: low-rank fine-tuning of a model whose own weights stay as they start."""

from typing import Literal

from pydantic import Field

from millrace.engine.config.optimizer import Optimizer
from millrace.engine.config.precision import Precision
from millrace.engine.config.section import Section


class Adapter(Section):
    """Low-rank adapter (docs/fine_tuning.md). Its factors are trained; the model's weights are frozen and
    stored in `precision.compute`."""

    kind: Literal["none", "lora", "dora"] = "none"
    """`lora` (arXiv 2106.09685) adds a product B A of rank `rank` to a weight; `dora` (arXiv 2402.09353)
    trains the length of each of its rows besides."""
    rank: int = Field(16, ge=1)
    """Rows of A, columns of B."""
    alpha: float | None = Field(None, gt=0)
    """The product is multiplied by alpha / rank; default `rank`, so by 1."""
    targets: tuple[str, ...] = ("blocks.*",)
    """Linear layers that get one, `*` stands for anything: all four of each block, or ["blocks.*.qkv",
    "text_kv"]."""
    unfrozen: tuple[str, ...] = ()
    """Parameters of the model that are trained besides, such as ["final_layer.*", "*_norm"]."""

    @property
    def active(self) -> bool:
        """Whether there is one."""
        return self.kind != "none"

    @property
    def scale(self) -> float:
        """Factor of the product."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def check_adapter(adapter: Adapter, optimizer: Optimizer, precision: Precision, tuned: bool) -> None:
    """Raise ValueError for what does not go with frozen weights; `tuned` of a run that tunes its
    autoencoder."""
    key = "adapter.kind" if adapter.active else "optimizer.frozen" if optimizer.frozen else ""
    if not key:
        return
    if adapter.active and optimizer.kind == "muon":
        raise ValueError(
            "optimizer.kind muon is for the matrices of the blocks, which adapter.kind freezes; take adamw"
        )
    if precision.fp8.active:
        raise ValueError(f"precision.fp8 does not go with {key}; set precision.fp8.backend to none")
    if tuned:
        raise ValueError(
            f"conditioning.autoencoder.tuning trains through the whole model and does not go with {key}; "
            "set conditioning.autoencoder.tuning.enabled to false"
        )
