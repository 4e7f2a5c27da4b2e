"""Everything that is trained, as one module for DeepSpeed: the denoiser, and what only training needs."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.packing import Layout
from millrace.engine.model.routing import RoutedSpan

_OWN = "denoiser."


class Outputs(NamedTuple):
    """What one forward pass gives to the loss."""

    prediction: Tensor
    """(T, P) velocity or clean patches."""


class TrainingModel(nn.Module):
    """The denoiser and the heads of auxiliary losses.

    Parameters and buffers of the denoiser keep the names that they have there, so that a checkpoint of a run
    with heads differs from one without by the heads' tensors alone.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def named_parameters(self, *args, **kwargs) -> Iterator[tuple[str, nn.Parameter]]:  # noqa: ANN002, ANN003
        """As of any module, with the denoiser's own names."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield name.removeprefix(_OWN), parameter

    def named_buffers(self, *args, **kwargs) -> Iterator[tuple[str, Tensor]]:  # noqa: ANN002, ANN003
        """As of any module, with the denoiser's own names."""
        for name, buffer in super().named_buffers(*args, **kwargs):
            yield name.removeprefix(_OWN), buffer

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill all parameters from `seed`."""
        self.denoiser.init_weights(seed)

    def forward(
        self, tokens: Tensor, t: Tensor, text: Tensor, layout: Layout, span: RoutedSpan | None
    ) -> Outputs:
        """Noisy patches (T, P) at times (B,) with text (S, E) -> what the loss needs."""
        (prediction,) = self.denoiser(tokens, t, text, layout, span)
        return Outputs(prediction)
