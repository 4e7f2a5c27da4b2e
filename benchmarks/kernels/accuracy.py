"""Whether an implementation is right: the gate that everything passes before it is timed.

Every output and every gradient must be as near to the float64 result as `millrace.kernels.support.accuracy`
asks; integer outputs must be equal. It is the rule of the tests of the operations.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from millrace.kernels.support.accuracy import allowed_errors, errors, longest_sum

Function = Callable[..., Tensor | tuple[Tensor, ...]]


class Verdict(NamedTuple):
    """How far an implementation is from the float64 result."""

    error_over_allowed: float
    """The worst of all tensors; right up to 1."""
    where: str
    """Which tensor, and by which measure."""

    @property
    def right(self) -> bool:
        """Whether every error is allowed; NaN is not."""
        return self.error_over_allowed <= 1


def evaluate(function: Function, inputs: Mapping[str, Tensor], differentiate: bool) -> dict[str, Tensor]:
    """Outputs, and the gradients of all inputs for fixed random ones of the outputs."""
    leaves = {name: value.detach().requires_grad_(differentiate) for name, value in inputs.items()}
    with torch.set_grad_enabled(differentiate):
        outputs = as_tuple(function(**leaves))
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    if differentiate:
        gradients = torch.autograd.grad(
            outputs, list(leaves.values()), output_gradients(outputs), materialize_grads=True
        )
        found |= {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}
    return found


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What an operation returned, as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def output_gradients(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients to start a backward pass with; halves and quarters, exact in every dtype."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return [
        (torch.randint(-4, 5, x.shape, generator=generator, device=x.device) / 4).to(x.dtype) for x in outputs
    ]


class Gate:
    """The float64 result of an operation on some inputs, and the errors that are allowed.

    Args:
        reference: the operation; evaluated in float64.
        plain: the same in plain PyTorch; evaluated in the dtype of the inputs.
        inputs: differentiable tensors by name.
        differentiate: whether gradients count too.
    """

    def __init__(
        self, reference: Function, plain: Function, inputs: Mapping[str, Tensor], differentiate: bool
    ) -> None:
        self.inputs, self.differentiate = inputs, differentiate
        wide = {name: value.double() for name, value in inputs.items()}
        self.exact = evaluate(reference, wide, differentiate)
        plain_results = evaluate(plain, inputs, differentiate)
        self.allowed: dict[str, dict[str, float]] = {}
        for name, exact in self.exact.items():
            if exact.is_floating_point() and exact.numel():
                terms = longest_sum(exact, inputs.values())
                self.allowed[name] = allowed_errors(exact, plain_results[name], _dtype(inputs), terms)

    def check(self, function: Function) -> Verdict:
        """Judge an implementation."""
        worst = Verdict(0.0, "equal")
        found = evaluate(function, self.inputs, self.differentiate)
        if found.keys() != self.exact.keys():
            return Verdict(float("inf"), f"{len(found)} results, expected {len(self.exact)}")
        for name, exact in self.exact.items():
            if found[name].shape != exact.shape:
                return Verdict(float("inf"), f"{name} has shape {tuple(found[name].shape)}")
            if name not in self.allowed:
                if not torch.equal(found[name], exact.to(found[name].dtype)):
                    return Verdict(float("inf"), f"{name} is not equal")
                continue
            for which, error in errors(found[name], exact).items():
                ratio = error / max(self.allowed[name][which], 1e-300)
                if not ratio <= worst.error_over_allowed:
                    worst = Verdict(ratio, f"{which} error of {name}")
                if ratio != ratio:
                    return worst
        return worst


def _dtype(inputs: Mapping[str, Tensor]) -> torch.dtype:
    """The coarsest dtype among the inputs: the one that the operation computes in."""
    return max((x.dtype for x in inputs.values()), key=lambda dtype: torch.finfo(dtype).eps)
