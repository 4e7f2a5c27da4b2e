"""A CUDA device that is not there: tensors on it have shapes, dtypes, strides and a device, and no data.

PyTorch's `FakeTensorMode` carries out what the host does and refuses what a device would: tensors of two
devices in one operator, a value that the host reads, a result whose size only the data know. Left to do here
is what PyTorch asks of a driver on the way.

Autograd keeps the current stream of every tensor's device, which a registry of device guards tells it. The
guard of the meta device says "the default one" and does nothing; while the device is pretended it stands for
CUDA's. The engine that runs a backward pass asks more than a guard can answer: `backward_pass.py` walks the
graph instead.
"""

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda", 0)
_GUARDS = "_ZN3c104impl26device_guard_impl_registryE"
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
_CUDA, _META = 1, 14
"""Places of `c10::DeviceType`."""


@contextmanager
def pretended_cuda(architecture: int = 90) -> Iterator["Copies"]:
    """Inside, tensors on `DEVICE` are fake ones of a GPU of this capability; so are all others, on the CPU.

    What waits raises `HostRead`, or an error of `FakeTensorMode`'s.
    """
    stream = _Stream()
    answers = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_args, **_kwargs: True,
        "get_device_name": lambda _device=None: f"a GPU of capability {architecture}",
        "get_device_capability": lambda _device=None: divmod(architecture, 10),
        "get_device_properties": lambda _device=None: SimpleNamespace(multi_processor_count=132),
        "current_device": lambda: 0,
        "get_rng_state": lambda _device=None: None,
        "set_rng_state": lambda _state, _device=None: None,
        "current_stream": lambda _device=None: stream,
        "Stream": _Stream,
        "stream": lambda _stream: nullcontext(),
        "device": lambda _device: nullcontext(),
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _apply))
        # It reads its argument, which must be a stream of the driver's, before any mode is asked.
        stack.enter_context(mock.patch.object(Tensor, "record_stream"))
        stack.enter_context(_guarded())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        copies = stack.enter_context(Copies())
        stack.enter_context(_StandIns())
        yield copies


class _Stream:
    """Has nothing to wait for."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, _other: Any) -> None:
        """Nothing runs on either."""

    wait_event = wait_stream

    def record_event(self, _event: Any = None) -> None:
        """No event: who gets None does not wait."""


@contextmanager
def _guarded() -> Iterator[None]:
    library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libc10.so"))
    guards = (ctypes.c_void_p * (_META + 1)).in_dll(library, _GUARDS)
    usual = guards[_CUDA]
    guards[_CUDA] = guards[_META]
    try:
        yield
    finally:
        guards[_CUDA] = usual


class Copies(TorchDispatchMode):
    """Between host and device. `FakeTensorMode` lets the host read a device's tensor if it copies it first.

    Attributes:
        in_step: whether a copy to the device must not wait either; one from pinned memory does not.
    """

    in_step = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _COPIES:
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            if isinstance(source, FakeTensor) and source.constant is not None:
                # A constant of the host would be copied in truth.
                new = torch.empty_strided(source.shape, source.stride(), dtype=source.dtype)
                args = [new if x is source else x for x in args]
            result = func(*args, **kwargs or {})
            if source.is_cuda and not result.is_cuda:
                raise HostRead(f"the host waits for a copy of {tuple(source.shape)} from the device")
            if self.in_step and result.is_cuda and not source.is_cuda and not _is_async(func, args, kwargs):
                raise HostRead(f"the host waits for a copy of {tuple(source.shape)} to the device")
            return result
        return func(*args, **kwargs or {})


def _is_async(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> bool:
    if func is torch.ops.aten.copy_.default and len(args) > 2:
        return args[2]
    return (kwargs or {}).get("non_blocking", False)


class HostRead(RuntimeError):
    """The host would wait for the device."""


class _StandIns(TorchFunctionMode):
    """Functions of PyTorch that go to the driver without a stop where `FakeTensorMode` could see them."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.pin_memory:
            return args[0]
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is torch.empty:
            kwargs.pop("pin_memory", None)
        if func is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs, device="cpu").to(device)
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """cuDNN's, which PyTorch would ask the driver about before it takes it."""
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, attn_mask, query.requires_grad, dropout_p, is_causal, False, scale=scale
    )[0]


def _apply(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` exchanges the insides of two parameters, which fake ones do not let it."""
    for child in module.modules() if recurse else (module,):
        for name, parameter in child._parameters.items():
            if parameter is not None:
                with torch.no_grad():
                    moved = function(parameter)
                child._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = function(buffer)
    return module
