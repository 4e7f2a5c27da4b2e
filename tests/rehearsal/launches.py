"""What the operators of `millrace.kernels` would start on a GPU, noted on a pretended one."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from millrace.kernels.support.compilation import Specialisation, recording


class Launches(TorchDispatchMode):
    """While active, the CUDA implementation of every operator of ours runs too, up to its kernels.

    It runs on the tensors that the operator was called with, so what it allocates and adds up has a device,
    too, and its results must look as the operator's fake implementation says. Equal calls are looked at once.
    """

    def __init__(self, noted: list[Specialisation]) -> None:
        super().__init__()
        self.noted = noted
        self.calls: Counter[str] = Counter()
        self._known: dict[Any, tuple[Specialisation, ...]] = {}
        self.launches = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "millrace":
            self.calls[func.overloadpacket.__name__] += 1
            key = (func, _described((args, kwargs)))
            if key not in self._known:
                before = len(self.noted)
                launched = func._op_dk(torch._C.DispatchKey.CUDA, *args, **kwargs)
                self._known[key] = tuple(self.noted[before:])
                if _described(launched) != _described(result):
                    raise AssertionError(
                        f"{func}: the launcher returns {_described(launched)}, the fake implementation "
                        f"{_described(result)}"
                    )
            self.launches += len(self._known[key])
        return result


@contextmanager
def noting_launches(architecture: int) -> Iterator[Launches]:
    """A `Launches` at work."""
    with recording(architecture) as noted, Launches(noted) as launches:
        yield launches


def _described(values: Any) -> tuple[Any, ...]:
    """Tensors by what a kernel can be specialised for; other values as they are."""
    return tuple(tree_leaves(tree_map_only(Tensor, _look, values)))


def _look(tensor: Tensor) -> str:
    where = tensor.storage_offset() * tensor.element_size() % 16
    return f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {tensor.device} {where}"
