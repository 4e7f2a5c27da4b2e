"""BF16 working copies of FP32 weights: cast once in an optimizer step, not once in every micro-batch.

Autocast casts the weight of each linear layer in every forward pass, and its gradient back in every backward
pass; AccumulateGrad then reads the FP32 gradient and the sum, and writes the sum. Here a copy is made after
each update, and its BF16 gradient is added to the FP32 gradient of the weight in one pass. The products have
the same operands, and the sums the same order and dtype: losses and gradients keep every bit
(`python -m benchmarks weights` counts the bytes).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millrace.engine.config import Precision
from millrace.kernels.support.autocast import autocast_dtype


def has_working_weights(precision: Precision, stage: int) -> bool:
    """Whether a run multiplies by working copies.

    At ZeRO stage 3 a weight comes and goes with its layer, and is cast where it was gathered.
    """
    return precision.compute != precision.master and stage < 3


class WorkingLinear(nn.Linear):
    """A linear layer that multiplies by working copies of its parameters, where autocast would cast them.

    The parameters are those of the layer given. The copies are neither parameters nor buffers: optimizer,
    average and checkpoint do not see them.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.dtype = dtype
        self.copies = tuple(
            p if p is None or p.dtype == dtype else _copy_of(p, dtype) for p in (linear.weight, linear.bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), in autocast's dtype where that is on."""
        if autocast_dtype(x.device.type) != self.dtype:
            return super().forward(x)
        weight, bias = self.copies
        # Frozen for a while, as where a loss is not to train this model, or for good.
        if not self.weight.requires_grad:
            weight = weight.detach()
        if bias is not None and not self.bias.requires_grad:
            bias = bias.detach()
        return F.linear(x, weight, bias)


class WorkingWeights:
    """The working copies of a model, whose linear layers become `WorkingLinear`.

    Args:
        model: with weights where they are trained; layers of other classes are left alone, and those that
            are frozen as a whole, whose weights are stored in `dtype` already.
        dtype: that autocast computes in.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.masters: list[nn.Parameter] = []
        self.copies: list[Tensor] = []
        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Linear and any(p.requires_grad for p in child.parameters()):
                    layer = WorkingLinear(child, dtype)
                    setattr(module, name, layer)
                    for master, copy in zip((layer.weight, layer.bias), layer.copies, strict=True):
                        if copy is not None and copy is not master:
                            self.masters.append(master)
                            self.copies.append(copy)

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the weights as they are now. Due after whatever changes them."""
        if self.copies:  # none where all linear layers are frozen
            torch._foreach_copy_(self.copies, list(self.masters))


def _copy_of(master: nn.Parameter, dtype: torch.dtype) -> Tensor:
    copy = torch.empty_like(master, dtype=dtype, requires_grad=True)
    copy.register_post_accumulate_grad_hook(partial(_add_gradient, master))
    return copy


@torch.no_grad()
def _add_gradient(master: nn.Parameter, copy: Tensor) -> None:
    """Add the gradient of a copy to that of its weight, and tell who waits for it."""
    gradient, copy.grad = copy.grad, None
    if master.grad is None:
        master.grad = gradient.to(master.dtype)
    else:
        master.grad.add_(gradient)
    # ZeRO's hooks on the weight, which autograd did not reach.
    for hook in list((master._post_accumulate_grad_hooks or {}).values()):
        hook(master)
