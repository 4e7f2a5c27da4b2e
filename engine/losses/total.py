"""Training loss: flow matching and the terms that a configuration adds to it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from millrace.engine.config import Config
from millrace.engine.losses.alignment_terms import AlignmentTerms
from millrace.engine.losses.flow_matching import FlowMatching
from millrace.engine.losses.loss_term import LossInputs, LossTerm
from millrace.engine.losses.perceptual import PerceptualTerms

TERMS: tuple[type[LossTerm], ...] = (PerceptualTerms, AlignmentTerms)
"""All that may be added to flow matching, in the order of the log."""


class TrainingLoss:
    """Scores a forward pass, term by term.

    Args:
        flow: flow matching as configured.
        terms: what is added to it.
    """

    def __init__(self, flow: FlowMatching, terms: Sequence[LossTerm] = ()) -> None:
        self.flow, self.terms = flow, terms
        self.names = ("flow", *(name for term in terms for name in term.names))
        self.needs_images = any(term.needs_images for term in terms)

    def __call__(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Each term (B,) FP32 by name, weighted: the training loss is the mean over samples of their sum."""
        outputs, batch, noise, t, _ = inputs
        flow = self.flow.loss(
            outputs.prediction, batch.clean, noise, t, batch.layout, batch.unconditional, batch.sample_index
        )
        losses = {"flow": flow}
        for term in self.terms:
            losses |= term(inputs)
        return losses


def build_loss(config: Config, flow: FlowMatching, device: torch.device) -> TrainingLoss:
    """The loss of a run, with the frozen networks of its terms on `device`. Raises UserError."""
    return TrainingLoss(flow, [term for kind in TERMS if (term := kind.build(config, device)) is not None])
