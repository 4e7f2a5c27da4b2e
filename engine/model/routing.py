"""Routing policies: which tokens run through which blocks during training; the registry of their kinds.

A policy is a small class, its entry in POLICIES. It touches no module and keeps no state; the denoiser
gathers the route's rows before block `start` and joins them with the others after block `end` (inclusive):

    TREAD     bypassing rows stay where they are, the route's rows are put back between them
    SPRINT    all rows bypass; a linear layer fuses them with the route's rows, a mask token where there are
              none (`sprint.py`). The layer is part of the model, so it also runs where nothing is routed.

A policy that drops nothing (`routing.drop` 0, the fine-tune on all tokens that may follow) runs every block
on every token: TREAD's is then the dense model, SPRINT's keeps its fusion layer and its path drop.

Sampling routes too: a branch of the guidance (`guidance_branches.py`) may drop tokens, or skip the span.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from millrace.engine.config import Config, Routing, route_end
from millrace.engine.model.guidance_branches import Branch
from millrace.engine.model.layout import Layout
from millrace.engine.util.errors import UserError
from millrace.engine.util.randomness import Purpose
from millrace.kernels import Route, sample_route
from millrace.kernels.ops.routing import kept_tokens
from millrace.kernels.support.philox import sample_keys, uniform


class RoutedSpan(NamedTuple):
    """A route and the blocks start .. end (inclusive) that it applies to."""

    route: Route | None
    """None where every row runs: a SPRINT model in sampling."""
    start: int
    end: int
    dropped: Tensor | None = None
    """(B,) bool, samples whose rows of the route count as not run (SPRINT's path drop)."""
    skip: bool = False
    """Whether no block of the span runs, because the route has no rows (SPRINT's path-drop guidance)."""


class RoutingPolicy(Protocol):
    """What the engine asks of a kind of policy (`routing.policy`), and of one that is built."""

    fuses: bool
    """Whether its model has SPRINT's fusion layer."""

    @staticmethod
    def build(routing: Routing, depth: int) -> "RoutingPolicy":
        """The policy of a model of `depth` blocks."""

    @staticmethod
    def kept(routing: Routing, tokens: int, drop: float) -> int:
        """Image tokens of a sample of `tokens` that run through the span where the share `drop` does not."""

    @staticmethod
    def details(routing: Routing) -> str:
        """What its line has for people besides name, share and span."""

    def draw(self, layout: Layout, seed: int, sample_index: Tensor) -> RoutedSpan | None:
        """The span for one batch, a pure function of the seed and the samples' indices (B,) int64."""


class Dense:
    """Every token runs through every block."""

    fuses = False

    @staticmethod
    def build(_routing: Routing, _depth: int) -> "Dense":
        return Dense()

    @staticmethod
    def kept(_routing: Routing, tokens: int, _drop: float) -> int:
        return tokens

    @staticmethod
    def details(_routing: Routing) -> str:
        return ""

    def draw(self, layout: Layout, seed: int, sample_index: Tensor) -> None:
        """No span."""
        return None


class Tread:
    """TREAD (Krause et al., arXiv 2501.04765): a uniform random share of tokens bypasses a span of blocks.

    Args:
        start, end: first and last routed block, inclusive; the paper's rule is 2 and depth - 4.
        drop: share of tokens that bypass.
    """

    fuses = False

    def __init__(self, start: int, end: int, drop: float) -> None:
        self.start, self.end, self.drop = start, end, drop

    @staticmethod
    def build(routing: Routing, depth: int) -> RoutingPolicy:
        if not routing.drop:
            return Dense()
        return Tread(routing.start, routing.last(depth), routing.drop)

    @staticmethod
    def kept(_routing: Routing, tokens: int, drop: float) -> int:
        return kept_tokens(tokens, 1 - drop) if drop else tokens

    @staticmethod
    def details(_routing: Routing) -> str:
        return ""

    def draw(self, layout: Layout, seed: int, sample_index: Tensor) -> RoutedSpan:
        """Each sample's random subset, for the samples `sample_index` (B,) int64."""
        route = sample_route(layout.cu_seqlens, 1 - self.drop, seed, sample_index, lengths=layout.lengths)
        return RoutedSpan(route, self.start, self.end)


class Sprint:
    """SPRINT (Park et al., arXiv 2510.21986): few tokens run through the span, then are fused with all.

    Args:
        start, end, drop: as of `Tread`; the paper's are 2, depth - 3 and 0.75. Drop 0 runs all tokens.
        structured: keep as many tokens in each small square of the grid, instead of anywhere.
        path_drop: share of samples that are trained without what the span computes.
    """

    fuses = True

    def __init__(
        self, start: int, end: int, drop: float, structured: bool = False, path_drop: float = 0.0
    ) -> None:
        self.start, self.end, self.drop = start, end, drop
        self.structured, self.path_drop = structured, path_drop

    @staticmethod
    def build(routing: Routing, depth: int) -> RoutingPolicy:
        end = routing.last(depth)
        return Sprint(routing.start, end, routing.drop, routing.structured, routing.path_drop)

    kept = staticmethod(Tread.kept)

    @staticmethod
    def details(routing: Routing) -> str:
        kind = "structured" if routing.structured else "unstructured"
        return f"; {kind}, {routing.mask_token} mask token, path drop {routing.path_drop:.4g}"

    def draw(self, layout: Layout, seed: int, sample_index: Tensor) -> RoutedSpan:
        """Each sample's random subset, and which samples lose theirs; `sample_index` (B,) int64."""
        if self.structured and len(set(layout.grids)) > 1:
            raise ValueError(f"structured routes need one grid, the batch has {sorted(set(layout.grids))}")
        route, dropped = None, None
        if self.drop:
            route = sample_route(
                layout.cu_seqlens,
                1 - self.drop,
                seed,
                sample_index,
                grid=layout.grids[0],
                structured=self.structured,
                lengths=layout.lengths,
            )
        elif self.path_drop:
            # The fusion layer finds the rows of dropped samples by their route.
            every_row = torch.arange(sum(layout.lengths), device=layout.cu_seqlens.device)
            route = Route(every_row, layout.cu_seqlens, layout.max_seqlen)
        if self.path_drop:
            dropped = uniform(sample_keys(seed, sample_index, Purpose.PATH_DROP))[:, 0] < self.path_drop
        return RoutedSpan(route, self.start, self.end, dropped)


POLICIES: dict[str, type[RoutingPolicy]] = {"none": Dense, "tread": Tread, "sprint": Sprint}
"""By `routing.policy`."""


def routing_policy(config: Config) -> RoutingPolicy:
    """The policy that the configuration names."""
    return _policy(config.routing, config.model.depth)


def _policy(routing: Routing, depth: int) -> RoutingPolicy:
    return POLICIES[routing.policy].build(routing, depth)


def branch_span(
    branch: Branch, routing: Routing, depth: int, layout: Layout, seed: int, sample_index: Tensor
) -> RoutedSpan | None:
    """The span of one evaluation in sampling, for a model of `depth` blocks trained with `routing`.

    Raises UserError where the routing is structured and the pictures' grids cannot be cut so.
    """
    if branch.skip:
        nothing = torch.zeros_like(layout.cu_seqlens)
        route = Route(nothing[:0].long(), nothing, 0)
        return RoutedSpan(route, routing.start, routing.last(depth), skip=True)
    if not branch.drop:
        return None
    policy = _policy(routing.model_copy(update={"drop": branch.drop, "path_drop": 0.0}), depth)
    try:
        return policy.draw(layout, seed, sample_index)
    except ValueError as error:
        raise UserError(
            f"sampling.method self with routing.structured: {error}; sample other sizes"
        ) from None


def require_grid(config: Config, edge: int) -> None:
    """Raise UserError if `routing.structured` cannot cut the grid of a picture's tokens of `edge` pixels."""
    if not config.routing.structured or not config.routing.drop:
        return
    side = config.data.resolution // edge
    one = torch.tensor([0, side * side], dtype=torch.int32)
    try:
        sample_route(one, 1 - config.routing.drop, 0, torch.tensor([0]), grid=(side, side), structured=True)
    except ValueError as error:
        raise UserError(
            f"routing.structured does not fit pictures of {config.data.resolution} pixels: {error}; change "
            "data.resolution or routing.drop"
        ) from None


def describe(config: Config) -> str:
    """The routing in one line for people."""
    routing = config.routing
    if routing.policy == "none":
        return "routing: none"
    span = f"{routing.start}..{route_end(config)}"
    line = f"routing: {routing.policy}, {routing.drop:.4g} of the tokens bypass blocks {span}"
    if not routing.drop:
        line = f"routing: {routing.policy}, all tokens run through blocks {span}"
    return line + POLICIES[routing.policy].details(routing)
