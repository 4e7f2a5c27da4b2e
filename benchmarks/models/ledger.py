"""What every operator of a training step reads and writes, recorded on meta tensors: no data, no GPU.

    ledger = Ledger()
    ledger.watch(model.blocks)
    with ledger:
        loss = forward()
        ledger.backward(loss)
    ledger.entries

An operator costs what it must move if nothing stays in a cache between two operators (`ledger_operators.py`).
Each entry knows its phase and where in the network it belongs. Forward, hooks on the blocks say so. Backward,
an autograd node belongs where it was made: nodes are numbered as they are made, and the hooks note the
numbers at which a block begins and ends.
"""

import bisect
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from millrace.benchmarks.models.ledger_operators import Cost, costs

aten = torch.ops.aten

ACCUMULATION = 1 << 62
"""Nodes that store the gradient of a parameter have numbers above this: they have no place of their own."""


class Entry(NamedTuple):
    """One operator, or one part of it."""

    operator: str
    phase: Literal["forward", "backward"]
    place: str
    """`input` before the first block, `block N`, `between` two blocks (routing), `output` after the last."""
    cost: Cost


class Ledger(TorchDispatchMode):
    """Records every operator on `device` while it is entered.

    Args:
        device: of the tensors that count; work on others is the host's.
        selected: elements that `masked_select` finds. Its result has a shape that depends on data, which meta
            tensors do not have; the number is fixed by the share of tokens that a route keeps.
    """

    def __init__(self, device: str = "meta", selected: int | None = None) -> None:
        super().__init__()
        self.entries: list[Entry] = []
        self.device, self.selected = device, selected
        self._phase: Literal["forward", "backward"] = "forward"
        self._place = "input"
        self._starts, self._places = [0], ["input"]
        self._gpu_attention = GpuAttention()

    def __enter__(self) -> "Ledger":
        self._gpu_attention.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._gpu_attention.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten.masked_select.default and self.device == "meta":
            if self.selected is None:
                raise RuntimeError(
                    "masked_select on meta tensors: tell the Ledger how many elements it finds"
                )
            result = args[0].new_empty(self.selected)
        else:
            result = func(*args, **kwargs)
        name = func.overloadpacket._qualified_op_name
        for cost in costs(func, args, kwargs, result, self.device):
            self.entries.append(Entry(name, self._phase, self._place, cost))
        return result

    def watch(self, blocks: Sequence[nn.Module]) -> None:
        """Attribute what happens inside these modules, which run one after the other."""
        last = len(blocks) - 1
        for i, block in enumerate(blocks):
            after = "output" if i == last else "between"
            block.register_forward_pre_hook(lambda *_, place=f"block {i}": self._enter(place))
            block.register_forward_hook(lambda *_, place=after: self._enter(place))

    def _enter(self, place: str) -> None:
        self._place = place
        self._starts.append(torch._C._autograd._get_sequence_nr())
        self._places.append(place)

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`, each node's operators entered where the node was made."""
        waiting, seen = [loss.grad_fn], {loss.grad_fn}
        while waiting:
            node = waiting.pop()
            number = node._sequence_nr()
            if number < ACCUMULATION:
                place = self._places[bisect.bisect_right(self._starts, number) - 1]
                node.register_prehook(lambda _, place=place: setattr(self, "_place", place))
            new = {child for child, _ in node.next_functions if child is not None} - seen
            seen |= new
            waiting.extend(new)
        self._phase = "backward"
        loss.backward()


class GpuAttention(TorchFunctionMode):
    """Replaces `scaled_dot_product_attention` by an operator that PyTorch has for it on a GPU.

    On meta tensors it would be spelt out in products and a softmax that no GPU runs. With a mask it is the
    memory-efficient kernel, which reads a mask without expanding it, else FlashAttention.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return (_attend if func is F.scaled_dot_product_attention else func)(*args, **kwargs)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        raise ValueError(
            "enable_gqa is True; the ledger counts attention with as many key heads as query heads"
        )
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    bias = attn_mask.expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, is_causal, scale=scale
    )[0]
