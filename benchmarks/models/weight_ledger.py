"""Ledger of one training step's weights: what their operators move, what is communicated, who waits.

It watches a Trainer from outside: wrappers around DeepSpeed's and our functions say in which part of the step
an operator runs, a dispatch mode sees the operators themselves.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from millrace.benchmarks.models.ledger_operators import costs
from millrace.benchmarks.models.scaling_worker import COLLECTIVES

NOTED = COLLECTIVES | {"all_to_all_single": 0, "all_gather_object": 0, "gather_object": 0}
"""Functions of torch.distributed, and which argument holds the whole tensor of the operation."""
PARTS = ("forward and backward", "reduction", "update", "average")
"""Of a step: casts of weights and accumulation of gradients; gradients between processes; norm, clipping,
optimizer and working copies; EMA."""


class WeightLedger(TorchDispatchMode):
    """Records a step of a trainer while it is entered.

    Args:
        trainer: after two steps: state is there, and ZeRO-3 knows the order of the layers.
        elements: size from which a tensor is a weight, its gradient or its state.
    """

    def __init__(self, trainer: Any, elements: int) -> None:
        super().__init__()
        self.trainer, self.elements = trainer, elements
        self.bytes: dict[str, Counter[str]] = defaultdict(Counter)
        """By part and operator."""
        self.collectives: list[dict[str, Any]] = []
        self.reads: Counter[str] = Counter()
        """Tensors that the host read, by function."""
        self._part, self._stack, self._inside = PARTS[0], ExitStack(), False

    def __enter__(self) -> "WeightLedger":
        trainer, zero = self.trainer, self.trainer.optimizer_step.zero
        names = (
            "reduce_independent_p_g_buckets_and_remove_grads",
            "reduce_ready_partitions_and_remove_grads",
        )
        wrapped = [(zero, name, PARTS[1]) for name in names if hasattr(zero, name)]
        wrapped += [
            (trainer.engine, "_backward_epilogue", PARTS[1]),
            (trainer.optimizer_step, "apply", PARTS[2]),
        ]
        if trainer.working_weights is not None:
            wrapped.append((trainer.working_weights, "refresh", PARTS[2]))
        if trainer.ema is not None:
            wrapped.append((trainer.ema, "update", PARTS[3]))
        for owner, name, part in wrapped:
            call = self._during(part, getattr(owner, name))
            self._stack.enter_context(mock.patch.object(owner, name, call))
        for name, place in NOTED.items():
            call = self._noting(name, getattr(dist, name), place)
            self._stack.enter_context(mock.patch.object(dist, name, call))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reads[_caller()] += 1
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        if func.namespace != "c10d" and any(x.numel() >= self.elements for x in tensors):
            for cost in costs(func, args, kwargs, result, self.trainer.device.type):
                if cost.kind == "other":
                    self.bytes[self._part][func.overloadpacket._qualified_op_name] += cost.moved
        return result

    def _during(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def during(*args: Any, **kwargs: Any) -> Any:
            with self._in(part):
                return call(*args, **kwargs)

        return during

    @contextmanager
    def _in(self, part: str) -> Iterator[None]:
        before, self._part = self._part, part
        try:
            yield
        finally:
            self._part = before

    def _noting(self, name: str, call: Callable[..., Any], place: int) -> Callable[..., Any]:
        def noting(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return call(*args, **kwargs)
            whole = [*args, *kwargs.values()][place]
            tensors = [x for x in tree_leaves(whole) if isinstance(x, Tensor)]
            self.collectives.append(
                {
                    "kind": name.removeprefix("_"),
                    "bytes": sum(x.nbytes for x in tensors),
                    "dtype": str(tensors[0].dtype).removeprefix("torch.") if tensors else "pickled",
                    "part": self._part,
                    "beside_backward": torch._C._current_graph_task_id() != -1,
                }
            )
            self._inside = True
            try:
                return call(*args, **kwargs)
            finally:
                self._inside = False

        return noting

    def summary(self) -> dict[str, Any]:
        """For JSON; bytes are of each trained element, however many processes share its state."""
        trained = sum(torch.Size(shape).numel() for _, shape in self.trainer.named_shapes)
        return {
            "elements": trained,
            "bytes": {
                part: {name: moved / trained for name, moved in self.bytes[part].most_common()}
                for part in PARTS
            },
            "collectives": self.collectives,
            "host_reads": dict(self.reads),
        }


def _caller() -> str:
    """File and function of the nearest frame outside torch."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if "/torch/" not in file and not file.endswith("weight_ledger.py"):
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}: {frame.f_code.co_name}"
