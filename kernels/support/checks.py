"""Argument checks shared by the operations: which argument is wrong, what it is, what it should be."""

import torch
from torch import Tensor


def expect_shape(name: str, tensor: Tensor, *shape: int | str) -> None:
    """Raise ValueError unless `tensor` has this shape; a string stands for any size and names it."""
    # Plain loops, and text only on failure: torch.compile traces this with symbolic sizes.
    if tensor.dim() == len(shape):
        for want, got in zip(shape, tensor.shape, strict=True):
            if not isinstance(want, str) and want != got:
                break
        else:
            return
    wanted = ", ".join(str(size) for size in shape) + ("," if len(shape) == 1 else "")
    raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({wanted})")


def expect_offsets(name: str, cu_seqlens: Tensor) -> int:
    """Check that `cu_seqlens` is (B+1,) int32 and return B."""
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"{name} is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}, expected (B+1,) torch.int32"
        )
    return cu_seqlens.numel() - 1
