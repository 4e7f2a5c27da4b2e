"""gather_fuse against its definition: fill with the mask token, concatenate, multiply."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from millrace.kernels import gather_fuse
from millrace.kernels.ops.gather_fuse import reference

CASES = {
    "one of two": (2, [1], 64),
    "all but one": (3, [0, 2], 8),
    "a quarter": (16, [1, 4, 11, 14], 72),
    "several runs of rows": (300, [3, *range(120, 131), 250, 299], 24),
    "none kept": (4, [], 16),
    "all by index": (4, [0, 1, 2, 3], 16),
    "all": (5, None, 40),
    "width 1792": (3, [0], 1792),
}
CASE = pytest.mark.parametrize(("total", "kept", "width"), CASES.values(), ids=CASES)
ORDER = pytest.mark.parametrize("order", ["dense_deep", "deep_dense"])


def inputs(total, kept, width):
    """Sizes as in training: PyTorch's default weights, and a mask token that has learnt something."""
    generator = torch.Generator().manual_seed(total + width)
    draw = {"generator": generator, "dtype": torch.float64}
    bound = (2 * width) ** -0.5
    return {
        "dense": torch.randn(total, width, **draw),
        "deep": torch.randn(total if kept is None else len(kept), width, **draw) - 0.5,
        "mask_token": 0.5 * torch.randn(width, **draw) + 1,
        "weight": bound * (2 * torch.rand(width, 2 * width, **draw) - 1),
        "bias": bound * (2 * torch.rand(width, **draw) - 1),
    }


def definition(kept, order):
    """Row by row, nothing of the operation's algebra."""

    def evaluate(dense, deep, mask_token, weight, bias):
        place = {row: k for k, row in enumerate(range(len(dense)) if kept is None else kept)}
        rows = []
        for r in range(len(dense)):
            other = deep[place[r]] if r in place else mask_token
            rows.append(torch.cat([dense[r], other] if order == "dense_deep" else [other, dense[r]]))
        return torch.stack(rows) @ weight.T + bias

    return evaluate


def rows_of(kept, device):
    return None if kept is None else torch.tensor(kept, dtype=torch.int64, device=device)


@CASE
@ORDER
def test_matches_the_definition(total, kept, width, order, device, assert_accurate):
    index = rows_of(kept, device)
    assert_accurate(
        lambda **tensors: gather_fuse(**tensors, index=index, order=order),
        definition(kept, order),
        **inputs(total, kept, width),
    )


@CASE
@ORDER
def test_reference_is_the_definition(total, kept, width, order):
    values = inputs(total, kept, width)
    index = rows_of(kept, "cpu")
    expected = definition(kept, order)(**values)
    torch.testing.assert_close(
        reference(**values, index=index, order=order), expected, rtol=1e-12, atol=1e-12
    )


@ORDER
@pytest.mark.parametrize("kept", [[2, 5], None], ids=["some", "all"])
def test_gradients_in_float64(kept, order):
    leaves = {name: value.requires_grad_() for name, value in inputs(6, kept, 4).items()}

    def operation(*tensors):
        return gather_fuse(**dict(zip(leaves, tensors, strict=True)), index=rows_of(kept, "cpu"), order=order)

    assert torch.autograd.gradcheck(operation, tuple(leaves.values()))


def test_kept_rows_forget_the_mask_token(device, dtype):
    """With its own rounding: of a product that is zero, the bias remains, however large the token was."""
    values = {name: value.to(device, dtype) for name, value in inputs(8, [1, 6], 48).items()}
    index = rows_of([1, 6], device)
    values |= {
        "dense": 0 * values["dense"],
        "deep": 0 * values["deep"],
        "mask_token": 30 * values["mask_token"],
    }
    out = gather_fuse(**values, index=index)
    assert (out[index] - values["bias"]).abs().max() < 1e-5
    assert (out[0] - values["bias"]).abs().max() > 1


def test_a_frozen_mask_token_costs_the_others_nothing(device):
    """Gradients of what is trained do not depend on what else is."""
    values = {name: value.float().to(device) for name, value in inputs(9, [0, 4, 8], 24).items()}
    index = rows_of([0, 4, 8], device)
    everything = {name: value.clone().requires_grad_() for name, value in values.items()}
    gather_fuse(**everything, index=index).square().sum().backward()
    for alone in values:
        leaves = {name: value.clone().requires_grad_(name == alone) for name, value in values.items()}
        gather_fuse(**leaves, index=index).square().sum().backward()
        assert torch.equal(leaves[alone].grad, everything[alone].grad)
        assert all(leaf.grad is None for name, leaf in leaves.items() if name != alone)


def test_backward_is_deterministic(device):
    found = []
    for _ in range(2):
        leaves = {
            n: v.float().to(device).requires_grad_() for n, v in inputs(700, [*range(0, 700, 4)], 32).items()
        }
        out = gather_fuse(**leaves, index=rows_of([*range(0, 700, 4)], device))
        found.append(torch.autograd.grad(out.square().sum(), list(leaves.values())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_strided_inputs(device):
    """Rows with gaps between them, a transposed weight, an expanded gradient."""
    values = {name: value.float().to(device) for name, value in inputs(6, [1, 3], 16).items()}
    index = rows_of([1, 3], device)
    strided = {
        "dense": torch.cat([values["dense"]] * 2, dim=1)[:, :16],
        "deep": torch.cat([values["deep"]] * 2, dim=1)[:, 16:],
        "mask_token": values["mask_token"].repeat_interleave(2)[::2],
        "weight": values["weight"].t().contiguous().t(),
        "bias": values["bias"].repeat_interleave(2)[::2],
    }
    found = []
    for given in (values, strided):
        leaves = {name: value.detach().requires_grad_() for name, value in given.items()}
        out = gather_fuse(**leaves, index=index)
        found.append((out, *torch.autograd.grad(out.sum(), list(leaves.values()))))
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-5)


def test_autocast_casts_as_for_a_linear_layer(device):
    values = {name: value.float().to(device) for name, value in inputs(6, [1, 3], 16).items()}
    index = rows_of([1, 3], device)
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        out = gather_fuse(**leaves, index=index)
    assert out.dtype == torch.bfloat16
    rounded = {name: value.bfloat16() for name, value in values.items()}
    assert torch.equal(out, gather_fuse(**rounded, index=index))
    out.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves.values())


def test_flops_are_those_of_the_kept_rows():
    values = {name: value.float().requires_grad_() for name, value in inputs(10, [1, 3, 4], 8).items()}
    for kept, rows in (([1, 3, 4], 13), (None, 20)):
        given = values | {"deep": values["dense"]} if kept is None else values
        with FlopCounterMode(display=False) as forward:
            out = gather_fuse(**given, index=rows_of(kept, "cpu"))
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        assert forward.get_total_flops() == 2 * rows * 8 * 8
        assert backward.get_total_flops() == 4 * rows * 8 * 8


def test_traces_without_a_graph_break():
    values = {name: value.float().requires_grad_() for name, value in inputs(6, [1, 3], 8).items()}
    index = rows_of([1, 3], "cpu")

    def operation(**tensors):
        return gather_fuse(**tensors, index=index)

    results = []
    for function in (torch.compile(operation, fullgraph=True, backend="aot_eager"), operation):
        out = function(**values)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(values.values()))))
    for traced, called in zip(*results, strict=True):
        torch.testing.assert_close(traced, called)


@pytest.mark.parametrize("kept", [[1, 3], None])
def test_operators_keep_their_word(kept):
    values = {name: value.float() for name, value in inputs(6, kept, 8).items()}
    dense, deep, mask_token, weight, bias = values.values()
    index = rows_of(kept, "cpu")
    common = (dense, deep, index, mask_token, weight)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.millrace.gather_fuse, (*common, bias, True), test_utils=checks)
    torch.library.opcheck(
        torch.ops.millrace.gather_fuse_backward, (torch.ones(6, 8), *common, False), test_utils=checks
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dense": torch.zeros(5)}, r"dense has shape \(5,\), expected \(T, C\)"),
        ({"deep": torch.zeros(3, 8)}, r"deep has shape \(3, 8\), expected \(2, 8\)"),
        ({"index": None}, r"deep has shape \(2, 8\), expected \(5, 8\)"),
        ({"index": torch.zeros(2, 1, dtype=torch.int64)}, r"index has shape \(2, 1\), expected \(K,\)"),
        ({"index": torch.tensor([1, 4], dtype=torch.int32)}, r"index is torch.int32, expected torch.int64"),
        ({"mask_token": torch.zeros(1, 8)}, r"mask_token has shape \(1, 8\), expected \(8,\)"),
        ({"weight": torch.zeros(16, 8)}, r"weight has shape \(16, 8\), expected \(8, 16\)"),
        ({"bias": torch.zeros(16)}, r"bias has shape \(16,\), expected \(8,\)"),
        ({"bias": torch.zeros(8).double()}, r"bias is torch.float64, expected torch.float32 as dense is"),
        ({"order": "deep_first"}, r"order is 'deep_first', expected 'dense_deep' or 'deep_dense'"),
    ],
)
def test_says_which_argument_is_wrong(wrong, message):
    right = {
        "dense": torch.zeros(5, 8),
        "deep": torch.zeros(2, 8),
        "index": torch.tensor([1, 4]),
        "mask_token": torch.zeros(8),
        "weight": torch.zeros(8, 16),
        "bias": torch.zeros(8),
    }
    with pytest.raises(ValueError, match=message):
        gather_fuse(**right | wrong)
