"""What one operator reads and writes, from its arguments and results alone.

    read      of each input the elements that its view holds: an expanded dimension counts once, a slice
    counts
              its own; two views of one storage never more than that storage; of a table that is looked up by
              index, the rows looked up
    written   every new output, and every argument changed in place
    nothing   views, other changes of metadata, and memory that is only set aside

One operator is one kernel, except where the tables below say otherwise. Our fused operators are one each,
plus the scratch memory and matrix products that PARTS and SCRATCH declare. What cuBLAS and PyTorch's kernels
keep to themselves (workspaces, the passes of a sort) does not count.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import millrace.kernels.ops.fp8_linear  # noqa: F401 - registers an operator that is named here
from millrace.kernels.support.rows import sum_launch

aten = torch.ops.aten

Kind = Literal["gemm", "attention", "other"]


class Cost(NamedTuple):
    """Of one operator, or of one part of it."""

    kind: Kind
    read: int
    """Bytes."""
    written: int
    """Bytes."""
    kernels: int = 1
    flops: int = 0
    """Of matrix products and attention; other arithmetic is not counted."""

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


FREE = {
    aten._unsafe_view.default,
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
"""Set memory aside or change metadata, though their schemas say that they make a tensor."""

SHAPE_ONLY = {
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
}
"""Take a tensor for its shape and dtype."""

OVERWRITES = {
    aten.copy_.default,
    aten._foreach_copy_.default,
    aten.fill_.Scalar,
    aten.fill_.Tensor,
    aten.zero_.default,
}
"""Change their first argument without reading it."""

FUSED_ADAM = {aten._fused_adamw_.default}
"""Write gradients, their second argument, only where they scale them."""

LOOKUPS = {"aten::index_select", "aten::gather", "aten::index", "millrace::gather_rows"}
"""Read as much of the first argument as they write."""

ROW_WRITES = {"aten::index_copy", "aten::index_fill", "aten::scatter"}
"""Write rows or elements by index: into their first argument if the name ends in _, else into a copy of
it."""
ROW_SUMS = {"aten::index_add", "aten::scatter_add"}
"""The same, and they read what they add to."""

PADDED = {aten.slice_backward.default, aten.select_backward.default, aten.constant_pad_nd.default}
"""Fill a new tensor, then copy the argument into it."""

KERNELS = {
    aten.mse_loss.default: 2,
    aten.topk.default: 2,
    aten.sort.stable: 2,
    aten.masked_select.default: 3,
    **dict.fromkeys(PADDED, 2),
}
"""Kernels of operators that take more than one; masked_select counts, sums up and copies."""

GEMMS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, torch.ops.millrace.fp8_product}
ATTENTION = (
    "scaled_dot_product",
    "_flash_attention",
    "_efficient_attention",
    "varlen_attn",
    "rope_attention_fused",
)
"""Parts of the names of attention operators."""


def costs(
    operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, device: str
) -> list[Cost]:
    """The parts of one call; none if it moves nothing on `device`."""
    name = operator.overloadpacket._qualified_op_name
    if name in PARTS:
        return PARTS[name](*args)
    outputs, changed, inputs = _tensors(operator, args, kwargs, result, device)
    if operator in FREE or not (outputs or changed):
        return []
    if name.rstrip("_") in ROW_WRITES | ROW_SUMS:
        return [_indexed_write(name, args, outputs)]
    written = sum(map(held_bytes, (*outputs, *changed)))
    if operator in FUSED_ADAM and kwargs.get("grad_scale") is None:
        written -= sum(map(held_bytes, args[1]))
    if operator in SHAPE_ONLY or operator in OVERWRITES:
        read = read_bytes(inputs[max(len(changed), 1) :])
    elif name in LOOKUPS:
        read = read_bytes(inputs[1:]) + min(written, held_bytes(inputs[0]))
    else:
        read = read_bytes(inputs)
    if operator in PADDED:
        written += read
    kind: Kind = "other"
    if operator.overloadpacket in GEMMS:
        kind = "gemm"
    elif any(part in name for part in ATTENTION):
        kind = "attention"
    flops = 0 if kind == "other" else _flops(operator, args, kwargs, result)
    scratch = SCRATCH[name](*args) if name in SCRATCH else []
    return [Cost(kind, read, written, KERNELS.get(operator, 1), flops), *scratch]


def _tensors(
    operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, device: str
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """New outputs, arguments changed in place, and inputs, as far as they lie on `device`."""
    schema = operator._schema

    def on_device(values: Any) -> list[Tensor]:
        return [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.device.type == device]

    results = (result,) if len(schema.returns) == 1 else result or ()
    pairs = zip(results, schema.returns, strict=True)
    new = [value for value, declared in pairs if declared.alias_info is None]
    inputs, changed = [], []
    for i, declared in enumerate(schema.arguments):
        found = on_device(args[i] if i < len(args) else kwargs.get(declared.name))
        if declared.alias_info is not None and declared.alias_info.is_write:
            changed += found
        if not declared.is_out:
            inputs += found
    return on_device(new), changed, inputs


def _indexed_write(name: str, args: Sequence[Any], outputs: Sequence[Tensor]) -> Cost:
    """(self, dim, index, source or number): what the index says is written."""
    target, dim, index, source = args[:4]
    if name.startswith("aten::index_fill"):
        elements = target.numel() // max(target.shape[dim], 1) * index.numel()
    else:
        elements = (source if isinstance(source, Tensor) else index).numel()
    written = elements * target.element_size()
    read = read_bytes([x for x in (index, source) if isinstance(x, Tensor)])
    if name.rstrip("_") in ROW_SUMS:
        read += written
    if not outputs:
        return Cost("other", read, written)
    return Cost("other", read + held_bytes(target), written + held_bytes(outputs[0]), 2)


def held_bytes(tensor: Tensor) -> int:
    """Bytes of the elements that a view holds, an expanded dimension once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride or not size) * tensor.element_size()


def read_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of several views: equal ones once, and those of one storage never more than that storage."""
    by_storage: dict[int, dict[Any, Tensor]] = {}
    for x in tensors:
        view = (x.storage_offset(), x.shape, x.stride(), x.dtype)
        by_storage.setdefault(x.untyped_storage()._cdata, {})[view] = x
    total = 0
    for views in by_storage.values():
        whole = next(iter(views.values())).untyped_storage().nbytes()
        total += min(sum(map(held_bytes, views.values())), whole)
    return total


def _flops(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Of a product or an attention; attention backward makes 2.5 times the products of forward."""
    if operator.namespace == "aten" or operator.overloadpacket in GEMMS:
        return flop_registry[operator.overloadpacket](*args, **kwargs, out_val=result)
    # Packed: every sample here has as many queries, so the pairs of query and key need no lengths.
    tensors = [x for x in args if isinstance(x, Tensor)]
    samples = next(x for x in tensors if x.dtype == torch.int32).numel() - 1
    backward = "backward" in operator.overloadpacket._qualified_op_name
    first, second = tensors[1:3] if backward else tensors[:2]
    total, heads, dim = first.shape[0], *first.shape[-2:]
    joint = operator.namespace == "millrace"  # image and text, not queries and all keys
    keys = second.shape[0] + (total if joint else 0)
    forward = 4 * heads * dim * (total // samples) * keys
    return forward * 5 // 2 if backward else forward


def _sums(vectors: int) -> Callable[..., list[Cost]]:
    """FP32 sums of `vectors` gradients (B, C): written by a backward kernel's programs, added up by a second
    kernel, whose result is the operator's own. A sample that has one program needs neither."""

    def scratch(x: Tensor, *rest: Any) -> list[Cost]:
        samples = next(a for a in rest if isinstance(a, Tensor) and a.dtype == torch.int32).numel() - 1
        chunks = sum_launch(x, samples, rest[-1]).grid[0]
        size = 4 * vectors * samples * chunks * x.shape[1]
        return [] if chunks == 1 else [Cost("other", size, size)]

    return scratch


def _prologue_sums(_grad: Tensor, *rest: Any) -> list[Cost]:
    """Sums of the norms' weights: two of a program of image rows, one of a program of text rows; one kernel
    adds them up."""
    from millrace.kernels.attention.prologue import TILE, heads_of_program

    qkv, offsets, bounds = rest[2], rest[-5], rest[-4:-2]
    heads, dim = qkv.shape[2:]
    rows = max(TILE // (1 << (dim - 1).bit_length()), 1)
    image, text = ((offsets.numel() - 1) * -(-bound // rows) for bound in bounds)
    size = 4 * dim * (2 * image + text) * -(-heads // heads_of_program(qkv, image + text))
    return [Cost("other", size, size)]


def _loss_sums(*_: Any) -> list[Cost]:
    """A second kernel adds up one number a tile, which is too little to count."""
    return [Cost("other", 0, 0)]


SCRATCH = {
    "millrace::flow_loss": _loss_sums,
    "millrace::rope_attention_prologue_backward": _prologue_sums,
    "millrace::norm_modulate_backward": _sums(2),
    "millrace::gated_residual_backward": _sums(1),
    "millrace::gated_residual_norm_modulate_backward": _sums(3),
}
"""Operators of ours to what they move beside arguments and results."""


def _gather_fuse(dense: Tensor, deep: Tensor, index: Tensor, *_: Any) -> list[Cost]:
    """Products of all rows, of the kept rows and of the mask token, then one pass over the kept rows."""
    (total, width), kept, size = dense.shape, len(deep), dense.element_size()
    weight, every, rows = width * width * size, total * width * size, kept * width * size
    return [
        Cost("gemm", every + weight, every, 1, 2 * total * width**2),
        Cost("gemm", rows + weight, rows, 1, 2 * kept * width**2),
        Cost("gemm", weight + 2 * width * size, width * size, 1, 2 * width**2),
        Cost("other", 2 * rows + held_bytes(index), rows),
    ]


GATHER_FUSE_ROWS = 128
"""Rows of one partial sum of `gather_fuse`'s backward kernel."""


def _gather_fuse_backward(grad: Tensor, dense: Tensor, deep: Tensor, index: Tensor, *_: Any) -> list[Cost]:
    """Two products for each half, and one pass that gathers the kept rows and sums over columns."""
    (total, width), kept, size = dense.shape, len(deep), dense.element_size()
    weight, every, rows = width * width * size, total * width * size, kept * width * size
    partial = 4 * 2 * width * -(-total // GATHER_FUSE_ROWS)
    products = [
        Cost("gemm", moved, written, 1, 2 * count * width**2)
        for count, moved, written in (
            (total, 2 * every, weight),
            (total, every + weight, every),
            (kept, 2 * rows + weight, weight),
            (kept, rows + weight, rows),
        )
    ]
    return [
        *products,
        Cost("gemm", weight + width * size, width * size, 1, 2 * width**2),
        Cost("other", 0, weight),  # the outer product that the third product adds to
        Cost("other", held_bytes(index), 2 * 4 * total, 3),  # the place of every kept row, -1 elsewhere
        Cost("other", every + 4 * total, rows + partial),
        Cost("other", partial, 2 * 4 * width),
    ]


def _scatter_rows(_base: Tensor, update: Tensor, index: Tensor) -> list[Cost]:
    return [Cost("other", read_bytes([update, index]), held_bytes(update))]


PARTS = {
    "millrace::scatter_rows_": _scatter_rows,
    "millrace::gather_fuse": _gather_fuse,
    "millrace::gather_fuse_backward": _gather_fuse_backward,
}
"""Operators of ours whose arguments and results do not tell what they move."""
