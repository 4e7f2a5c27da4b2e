"""Loss term: what a part of the training loss beside flow matching gets and gives."""

from abc import ABC, abstractmethod
from typing import NamedTuple, Self

import torch
from torch import Tensor

from millrace.engine.config import Config
from millrace.engine.encoders.batch_encoder import EncodedBatch
from millrace.engine.losses.training_model import Outputs
from millrace.engine.model.routing import RoutedSpan


class LossInputs(NamedTuple):
    """One micro-batch after its forward pass."""

    outputs: Outputs
    batch: EncodedBatch
    noise: Tensor
    """(T, P) FP32, what is in the noisy patches."""
    t: Tensor
    """(B,) FP32 times."""
    span: RoutedSpan | None
    """The route that the batch took."""


class LossTerm(ABC):
    """One or several terms that share their work.

    A term is a class in a file of its own, and a line in `TERMS` of `total.py`. It opens the frozen networks
    that it looks through. What it gives is averaged over the samples, so a term of a sample must not depend
    on the others in its batch.
    """

    names: tuple[str, ...]
    """As the log calls them."""
    needs_images = False
    """Whether the batches must keep their pictures for it."""

    @classmethod
    @abstractmethod
    def build(cls, config: Config, device: torch.device) -> Self | None:
        """The term of a run, or None where the configuration does not ask for it. Raises UserError."""

    @abstractmethod
    def __call__(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Each of `names` (B,) FP32, weighted, differentiable in the outputs."""
