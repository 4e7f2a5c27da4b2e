"""The training loss: flow matching and the terms that a configuration adds to it."""

from torch import Tensor

from millrace.engine.model.routing import RoutedSpan
from millrace.engine.objective.flow import FlowMatching
from millrace.engine.preparation import Prepared
from millrace.engine.training_model import Outputs


class Losses:
    """Scores a forward pass, term by term.

    Args:
        flow: flow matching as configured.
    """

    def __init__(self, flow: FlowMatching) -> None:
        self.flow = flow

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms, the flow matching loss first."""
        return ("flow",)

    def __call__(
        self, outputs: Outputs, batch: Prepared, noise: Tensor, t: Tensor, span: RoutedSpan | None
    ) -> dict[str, Tensor]:
        """Each term (B,) FP32 by name, weighted: the training loss is the mean over samples of their sum."""
        return {"flow": self.flow.loss(outputs.prediction, batch.clean, noise, t, batch.layout)}
