"""The backward pass node by node, as autograd's engine runs it, on a device that has no driver."""

from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_TASK = 1
"""Stands for the pass: non-reentrant checkpointing recomputes a region once for each."""


def backward(loss: Tensor) -> dict[Tensor, Tensor]:
    """Gradients of all leaves that `loss` () depends on.

    As in the engine: a node runs when all that use its results have run, gradients of a result with several
    users are added up, and one that comes in another dtype than the result's is converted.
    """
    root = loss.grad_fn
    waits, incoming, found = _users(root), {root: [torch.ones_like(loss)]}, {}
    ready = [root]
    with mock.patch.object(torch._C, "_current_graph_task_id", return_value=_TASK), torch.no_grad():
        while ready:
            node = ready.pop()
            gradients = _as_results(node, incoming.pop(node, []))
            if hasattr(node, "variable"):
                found[node.variable] = gradients[0]
                continue
            edges = [edge for edge in node.next_functions if edge[0] is not None]
            for (other, place), gradient in zip(edges, _run(node, gradients), strict=True):
                slots = incoming.setdefault(other, [])
                slots.extend([None] * (place + 1 - len(slots)))
                if gradient is not None:
                    slots[place] = gradient if slots[place] is None else slots[place] + gradient
                waits[other] -= 1
                if not waits[other]:
                    ready.append(other)
    return found


def _users(root: Any) -> Counter[Any]:
    """How many edges lead to each node."""
    counts: Counter[Any] = Counter()
    seen, open_nodes = {root}, [root]
    while open_nodes:
        for other, _ in open_nodes.pop().next_functions:
            if other is not None:
                counts[other] += 1
                if other not in seen:
                    seen.add(other)
                    open_nodes.append(other)
    return counts


def _as_results(node: Any, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of a node's results, in the shape, dtype and on the device of these."""
    checked: list[Tensor | None] = []
    for place, about in enumerate(node._input_metadata):
        gradient = gradients[place] if place < len(gradients) else None
        if gradient is not None:
            if gradient.device != about.device:
                raise RuntimeError(f"{node.name()}: gradient on {gradient.device}, result on {about.device}")
            gradient = gradient.sum_to_size(about.shape).to(about.dtype)
        checked.append(gradient)
    return checked


def _run(node: Any, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """A gradient for each edge of the node that leads anywhere."""
    # An `autograd.Function`, whose backward gets zeros for what is unused.
    own = hasattr(node, "_forward_cls")
    if own:
        gradients = [
            torch.zeros(about.shape, dtype=about.dtype, device=about.device) if gradient is None else gradient
            for gradient, about in zip(gradients, node._input_metadata, strict=True)
        ]
    elif all(gradient is None for gradient in gradients):
        return [None for other, _ in node.next_functions if other is not None]
    results = node.apply(*gradients) if own else node(*gradients)
    results = results if isinstance(results, tuple) else (results,)
    wanted = node.needs_input_grad if own else [other is not None for other, _ in node.next_functions]
    # As in the engine, a `Function` may end with more None than it has inputs.
    return [result for result, needed in zip(results, wanted, strict=False) if needed]
