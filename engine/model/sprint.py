"""SPRINT's fusion layer: it joins the stream that ran through the routed blocks with the one that did not."""

import torch
from torch import Tensor, nn

from millrace.engine.config import Routing
from millrace.engine.model.routing import RoutedSpan
from millrace.kernels import gather_fuse
from millrace.kernels.support.packed import rows_from_samples


class Fusion(nn.Module):
    """Linear(concat(dense, deep)), where a mask token stands for the deep rows that did not run.

    The weights lie here and not in an `nn.Linear`: ZeRO-3 gathers those of the module whose forward runs.
    A frozen mask token is a buffer: no optimizer, no average, but part of every checkpoint.
    """

    FROZEN_STD = 0.02
    """Of the frozen mask token's entries, from the paper's code."""

    def __init__(self, width: int, routing: Routing) -> None:
        super().__init__()
        self.order = routing.fuse_order
        self.weight = nn.Parameter(torch.empty(width, 2 * width))
        self.bias = nn.Parameter(torch.empty(width))
        mask_token = torch.empty(width)
        if routing.mask_token == "learned":
            self.mask_token = nn.Parameter(mask_token)
        else:
            self.register_buffer("mask_token", mask_token)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """PyTorch's default of a linear layer; the mask token zero if learned (PRX), else normal."""
        bound = self.weight.shape[1] ** -0.5
        for parameter in (self.weight, self.bias):
            drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.copy_(drawn)
        if isinstance(self.mask_token, nn.Parameter):
            self.mask_token.zero_()
        else:
            drawn = torch.empty(self.mask_token.shape).normal_(std=self.FROZEN_STD, generator=generator)
            self.mask_token.copy_(drawn)

    def forward(self, dense: Tensor, deep: Tensor, span: RoutedSpan) -> Tensor:
        """dense (T, C), deep (K, C) of the span's route, or (T, C) where it has none -> (T, C)."""
        route = span.route
        if route is not None and span.dropped is not None:
            rows = rows_from_samples(span.dropped, route.cu_seqlens, len(deep), route.max_seqlen)
            deep = torch.where(rows[:, None], self.mask_token.to(deep.dtype), deep)
        index = None if route is None else route.index
        return gather_fuse(dense, deep, index, self.mask_token, self.weight, self.bias, self.order)
