"""The training loss: flow matching and the terms that a configuration adds to it."""

from torch import Tensor

from millrace.engine.config import Alignment
from millrace.engine.encoders.batch_encoder import Prepared
from millrace.engine.encoders.perceptual_networks import PerceptualNetworks
from millrace.engine.losses.alignment_terms import (
    alignment_losses,
    alignment_terms,
)
from millrace.engine.losses.flow_matching import FlowMatching
from millrace.engine.losses.perceptual import (
    perceptual_losses,
    perceptual_terms,
)
from millrace.engine.losses.training_model import Outputs
from millrace.engine.model.routing import RoutedSpan


class Losses:
    """Scores a forward pass, term by term.

    Args:
        flow: flow matching as configured.
        patch: edge of a token in latent positions.
        networks: that look at predicted pictures, as the objective asks.
        alignment: with the teacher whose features the batches have.
    """

    def __init__(
        self,
        flow: FlowMatching,
        patch: int = 1,
        networks: PerceptualNetworks | None = None,
        alignment: Alignment | None = None,
    ) -> None:
        self.flow, self.patch, self.networks = flow, patch, networks or PerceptualNetworks()
        self.alignment = alignment or Alignment()

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms, the flow matching loss first."""
        return ("flow", *perceptual_terms(self.flow.config), *alignment_terms(self.alignment))

    def __call__(
        self, outputs: Outputs, batch: Prepared, noise: Tensor, t: Tensor, span: RoutedSpan | None
    ) -> dict[str, Tensor]:
        """Each term (B,) FP32 by name, weighted: the training loss is the mean over samples of their sum."""
        prediction, layout, config = outputs.prediction, batch.layout, self.flow.config
        flow = self.flow.loss(
            prediction, batch.clean, noise, t, layout, batch.unconditional, batch.sample_index
        )
        terms = {"flow": flow}
        if config.perceptual:
            networks = self.networks
            features = networks.dino.patch_tokens if networks.dino else None
            terms |= perceptual_losses(
                prediction, batch.images, layout, t, self.patch, config, networks.lpips, features
            )
        if batch.teacher is not None:
            ours, theirs = (
                (outputs.projected, outputs.attention),
                (batch.teacher.tokens, batch.teacher.attention),
            )
            terms |= alignment_losses(self.alignment, *ours, *theirs, layout, span)
        return terms
