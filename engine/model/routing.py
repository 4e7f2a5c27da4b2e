"""Routing policies: which tokens run through which blocks during training.

A policy is a small class with `start`, `end` (inclusive) and `draw`. It touches no module and keeps no state;
the denoiser gathers the route's rows before block `start` and puts them back after block `end`.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from millrace.engine.config import Config, route_end
from millrace.engine.model.packing import Layout
from millrace.kernels import Route, sample_route


class RoutedSpan(NamedTuple):
    """A route and the blocks start .. end (inclusive) that it applies to."""

    route: Route
    start: int
    end: int


class RoutingPolicy(Protocol):
    """What the trainer asks of a policy."""

    def draw(self, layout: Layout, seed: int, sample_index: Tensor) -> RoutedSpan | None:
        """The span for one batch, a pure function of the seed and the samples' indices (B,) int64."""


class Dense:
    """Every token runs through every block."""

    def draw(self, layout: Layout, seed: int, sample_index: Tensor) -> None:
        """No span."""
        return None


class Tread:
    """TREAD (Krause et al., arXiv 2501.04765): a uniform random share of tokens bypasses a span of blocks.

    Args:
        start, end: first and last routed block, inclusive; the paper's rule is 2 and depth - 4.
        drop: share of tokens that bypass.
    """

    def __init__(self, start: int, end: int, drop: float) -> None:
        self.start, self.end, self.drop = start, end, drop

    def draw(self, layout: Layout, seed: int, sample_index: Tensor) -> RoutedSpan:
        """Each sample's random subset, for the samples `sample_index` (B,) int64."""
        route = sample_route(layout.cu_seqlens, 1 - self.drop, seed, sample_index, lengths=layout.lengths)
        return RoutedSpan(route, self.start, self.end)


def routing_policy(config: Config) -> RoutingPolicy:
    """The policy that the configuration names."""
    routing = config.routing
    match routing.policy:
        case "none":
            return Dense()
        case "tread":
            return Tread(routing.start, route_end(config), routing.drop)
        case other:
            raise ValueError(f"no routing policy is built for {other!r}")
