"""How an operation is judged: against a formula in float64, by the error that the formula itself makes in the
operation's dtype when plain PyTorch evaluates it.

A formula is written in the test, loops over the samples, and calls nothing of `millrace.kernels`. How far the
operation may be from the float64 result says `millrace.kernels.support.accuracy`; that holds for every output
and every gradient.
"""

from collections.abc import Callable
from importlib import import_module
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from millrace.kernels.support.accuracy import allowed_errors, errors, longest_sum
from millrace.kernels.support.registration import INTERPRETING

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of operations run a second time with the Triton kernels in Triton's interpreter.

    The smallest telling ones on a GPU: the last case of every comparison with the equations, in each dtype.
    """
    telling = {}
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.interpreter)
        if item.originalname.startswith("test_matches") and item.get_closest_marker("cuda"):
            telling[item.path, item.originalname, item.callspec.params.get("dtype")] = item
    for item in telling.values():
        item.add_marker(pytest.mark.smoke)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request) -> str:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request, device) -> torch.dtype:
    if INTERPRETING and device == "cpu" and request.param == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bf16 wrongly, so operations do not use it there")
    return request.param


@pytest.fixture(autouse=True)
def _as_on_cuda(monkeypatch):
    """In the interpreter, as on CUDA, the fused attention takes no FP64: a test that gives it some fails
    without a GPU too."""
    if not INTERPRETING:
        return
    module = import_module("millrace.kernels.attention.rope_attention")
    fused = module._BACKENDS["triton"]

    def refuse(inputs, *settings):
        assert inputs.qkv.dtype != torch.float64, "backend 'triton' takes no FP64 on CUDA"
        return fused(inputs, *settings)

    monkeypatch.setitem(module._BACKENDS, "triton", refuse)


@pytest.fixture
def many() -> int:
    """A number of rows above which nothing new happens; Triton's interpreter takes milliseconds for a row."""
    return 83 if INTERPRETING else 8191


@pytest.fixture
def offsets(device) -> Callable[..., Tensor]:
    """Lengths -> `cu_seqlens` (B+1,) int32."""

    def build(*lengths: int) -> Tensor:
        return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)

    return build


@pytest.fixture
def spans() -> Callable[..., list[slice]]:
    """Lengths -> the rows of each sample."""

    def build(*lengths: int) -> list[slice]:
        ends = list(accumulate(lengths))
        return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]

    return build


@pytest.fixture
def assert_well_registered() -> Callable[..., None]:
    """`assert_well_registered(function, *inputs)`: what every registered operation promises PyTorch.

    `function` maps the inputs, which require grad, to a tensor. Each operator of ours that runs in its
    forward or backward pass must pass `opcheck` on the arguments it was called with; compiled as one graph,
    with sizes fixed and symbolic, the function gives the same value and gradients; a second run gives the
    same bits.
    """

    def check(function: Callable[..., Tensor], *inputs: Tensor) -> None:
        def run(callable_: Callable[..., Tensor]) -> tuple[Tensor, ...]:
            value = callable_(*inputs)
            return value.detach(), *torch.autograd.grad(value.square().sum(), inputs)

        with _RecordOperators() as recorded:
            expected = run(function)
        assert recorded.calls, "no operator of ours ran"
        for operator, args, kwargs in recorded.calls.values():
            torch.library.opcheck(operator, args, kwargs, test_utils=_checks(operator, args, kwargs))
        for dynamic in (False, True):
            torch._dynamo.reset()
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
            for got, want in zip(run(compiled), expected, strict=True):
                torch.testing.assert_close(got, want)
        for got, want in zip(run(function), expected, strict=True):
            assert torch.equal(got, want), "a second run gave other bits"

    return check


def _checks(operator: Callable, args: tuple, kwargs: dict) -> tuple[str, ...]:
    """Those of opcheck; the one for undeclared changes compares values, which PyTorch cannot in FP8."""
    values = torch.utils._pytree.tree_leaves((args, kwargs, operator(*args, **kwargs)))
    small = any(isinstance(x, Tensor) and x.is_floating_point() and x.element_size() == 1 for x in values)
    every = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    return every[1:] if small else every


class _RecordOperators(TorchDispatchMode):
    """Keeps the first call of each `millrace::` operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "millrace" and func not in self.calls:
            copies = torch.utils._pytree.tree_map_only(
                Tensor, lambda x: x.detach().clone(), (args, kwargs or {})
            )
            self.calls[func] = (func, *copies)
        return func(*args, **kwargs or {})


@pytest.fixture
def assert_accurate(device, dtype) -> Callable[..., None]:
    """`assert_accurate(operation, formula, **inputs)`: the check described at the top of this file.

    `inputs` are float64 on the CPU; they are rounded to `dtype` first, so that all three evaluations start
    from the same numbers. Both functions take them by keyword and return a tensor or a tuple of them.
    """

    def check(operation: Function, formula: Function, **inputs: Tensor) -> None:
        rounded = {name: value.to(device, dtype) for name, value in inputs.items()}
        got, got_gradients = _evaluate(operation, rounded, dtype)
        exact, exact_gradients = _evaluate(formula, rounded, torch.float64)
        plain, plain_gradients = _evaluate(formula, rounded, dtype)
        assert len(got) == len(exact)
        for i, values in enumerate(zip(got, exact, plain, strict=True)):
            _assert_close(f"output {i}", *values, dtype, rounded)
        for name in inputs:
            assert got_gradients[name].dtype == dtype
            gradients = (table[name] for table in (got_gradients, exact_gradients, plain_gradients))
            _assert_close(f"gradient of {name}", *gradients, dtype, rounded)

    return check


def _evaluate(
    function: Function, inputs: dict[str, Tensor], dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Outputs, and the gradients of all inputs (zero where unused) for fixed random ones of the outputs."""
    generator = torch.Generator().manual_seed(1)
    leaves = {name: value.to(dtype).detach().requires_grad_() for name, value in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # Halves and quarters are exact in every dtype, so each evaluation sees the same output gradients.
    towards = [
        (torch.randint(-4, 5, output.shape, generator=generator) / 4).to(output.device, output.dtype)
        for output in outputs
    ]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), towards, materialize_grads=True)
    return tuple(output.detach() for output in outputs), dict(zip(leaves, gradients, strict=True))


def _assert_close(
    name: str, got: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype, inputs: dict[str, Tensor]
) -> None:
    assert got.shape == exact.shape, f"{name} has shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if not exact.numel():
        return
    found = errors(got, exact)
    for which, allowed in allowed_errors(exact, plain, dtype, longest_sum(exact, inputs.values())).items():
        error = found[which]
        assert error <= allowed, f"{name}: {which} error {error:.3e}, allowed {allowed:.3e}"
