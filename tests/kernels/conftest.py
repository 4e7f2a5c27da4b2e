"""How an operation is judged: against a formula in float64, by the error that the formula itself makes in the
operation's dtype when plain PyTorch evaluates it.

A formula is written in the test, loops over the samples, and calls nothing of `millrace.kernels`. The
operation may be twice as far from the float64 result as the formula in its own dtype, plus one rounding of
the largest value (a formula can be exact by luck where numbers are few). This holds for every output and
every gradient, in the largest error and in the RMS error.
"""

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from millrace.kernels.support.registration import INTERPRETING

if INTERPRETING:
    from tests.kernels.memory_watch import judged

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of operations run a second time with the Triton kernels in Triton's interpreter."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.interpreter)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request) -> str:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request) -> torch.dtype:
    return request.param


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
            _assert_close(f"output {i}", *values, dtype)
        for name in inputs:
            assert got_gradients[name].dtype == dtype
            gradients = (table[name] for table in (got_gradients, exact_gradients, plain_gradients))
            _assert_close(f"gradient of {name}", *gradients, dtype)

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


def _assert_close(name: str, got: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == exact.shape, f"{name} has shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if not exact.numel():
        return
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    for measure, of in (("largest", _largest), ("RMS", _rms)):
        error, allowed = of(got - exact), 2 * of(plain - exact) + rounding
        if INTERPRETING and error:
            judged(name, (error / allowed).item())
        assert error <= allowed, f"{name}: {measure} error {error:.3e}, allowed {allowed:.3e}"


def _largest(error: Tensor) -> Tensor:
    return error.abs().max()


def _rms(error: Tensor) -> Tensor:
    return error.square().mean().sqrt()
