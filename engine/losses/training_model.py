"""Training model: the denoiser and the heads that only training needs, as one module for DeepSpeed."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from millrace.engine.config import Alignment
from millrace.engine.losses.repa import AlignmentHead
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.layout import Layout
from millrace.engine.model.routing import RoutedSpan
from millrace.engine.util.randomness import Purpose
from millrace.kernels.support.keys import stream_key

_OWN = "denoiser."


class Outputs(NamedTuple):
    """What one forward pass gives to the loss."""

    prediction: Tensor
    """(T, P) velocity or clean patches."""
    projected: Tensor | None = None
    """(K, D) features of the aligned block, as the alignment's head maps them; K are the rows it sees."""
    attention: tuple[tuple[Tensor, Tensor], ...] = ()
    """Queries and keys (K, heads, D) of each block whose attention is aligned."""


class TrainingModel(nn.Module):
    """The denoiser and the heads of auxiliary losses.

    Parameters and buffers of the denoiser keep the names that they have there, so that a checkpoint of a run
    with heads differs from one without by the heads' tensors alone.

    Args:
        denoiser: the model.
        alignment: with a vision network, if there is one.
        teacher_dim: features of that network.
    """

    def __init__(self, denoiser: Denoiser, alignment: Alignment | None = None, teacher_dim: int = 0) -> None:
        super().__init__()
        self.denoiser = denoiser
        config = alignment or Alignment()
        self.alignment = None
        if config.kind != "none":
            self.alignment = AlignmentHead(config, denoiser.config, teacher_dim)
        self.taps = (config.block,) if self.alignment is not None else ()
        self.attention_taps = config.attention.blocks if config.attention.weight > 0 else ()
        self.tapped_heads = config.attention.heads

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
        if self.alignment is not None:
            self.alignment.init_weights(torch.Generator().manual_seed(stream_key(seed, Purpose.ALIGNMENT)))

    def forward(
        self, tokens: Tensor, t: Tensor, text: Tensor, layout: Layout, span: RoutedSpan | None
    ) -> Outputs:
        """Noisy patches (T, P) at times (B,) with text (S, E) -> what the loss needs."""
        prediction, features, attention = self.denoiser(
            tokens, t, text, layout, span, self.taps, self.attention_taps, self.tapped_heads
        )
        projected = self.alignment(features[0], layout, span) if self.alignment is not None else None
        return Outputs(prediction, projected, attention)
