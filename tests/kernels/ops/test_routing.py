"""The way out of the routed rows and back."""

import pytest
import torch

from millrace.kernels import gather_tokens, scatter_tokens


def gather_formula(rows):
    return lambda x: torch.stack([x[row] for row in rows]) if rows else x[:0]


def scatter_formula(rows):
    def evaluate(base, update):
        place = {row: k for k, row in enumerate(rows)}
        return torch.stack([update[place[i]] if i in place else base[i] for i in range(len(base))])

    return evaluate


@pytest.mark.parametrize("rows", [[0, 2, 3, 6], [4], [], list(range(7))], ids=str)
@pytest.mark.parametrize("width", [8, 1792])
def test_out_and_back(rows, width, assert_accurate, device):
    """Some rows, one, none (an empty route) and all of them; gradients go where the values came from."""
    index = torch.tensor(rows, dtype=torch.int64, device=device)
    assert_accurate(lambda x: gather_tokens(x, index), gather_formula(rows), x=torch.randn(7, width))
    assert_accurate(
        lambda base, update: scatter_tokens(base, update, index),
        scatter_formula(rows),
        base=torch.randn(7, width),
        update=torch.randn(len(rows), width),
    )


def test_moving_rows_changes_no_bit(dtype, device):
    x = torch.randn(6, 16, device=device).to(dtype)
    index = torch.tensor([1, 4, 5], device=device)
    taken = gather_tokens(x, index)
    assert torch.equal(taken, x[[1, 4, 5]])
    assert torch.equal(scatter_tokens(x, taken, index), x)
    assert torch.equal(scatter_tokens(torch.zeros_like(x), taken, index)[[1, 4, 5]], taken)


def test_scatter_leaves_its_arguments_alone_and_keeps_their_dtype(device):
    base = torch.zeros(3, 4, dtype=torch.bfloat16, device=device)
    out = scatter_tokens(base, torch.ones(1, 4, device=device), torch.tensor([1], device=device))
    assert out.dtype == torch.bfloat16
    assert base.eq(0).all()
    assert out[:, 0].tolist() == [0, 1, 0]


def test_strided_rows(assert_accurate, device):
    index = torch.tensor([0, 2], device=device)
    assert_accurate(
        lambda wide: gather_tokens(wide[:, 4:8], index),
        lambda wide: torch.stack((wide[0, 4:8], wide[2, 4:8])),
        wide=torch.randn(3, 12),
    )
    assert_accurate(
        lambda wide: scatter_tokens(wide[:, 4:8], wide[:2, 8:], index),
        lambda wide: torch.stack((wide[0, 8:], wide[1, 4:8], wide[1, 8:])),
        wide=torch.randn(3, 12),
    )


def test_columns_that_are_not_neighbours(device):
    """A transposed matrix has its columns apart, on the way out and in place on the way back."""
    base = torch.randn(6, 5, device=device).T
    index = torch.tensor([1, 4], device=device)
    assert torch.equal(gather_tokens(base, index), base[[1, 4]])
    update, rest = torch.randn(6, 2, device=device).T, base[[0, 2, 3]]
    assert scatter_tokens(base, update, index, inplace=True) is base
    assert torch.equal(base[[1, 4]], update)
    assert torch.equal(base[[0, 2, 3]], rest)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_long_sequences(share, device):
    """8191 rows, a prime that no tile divides; integers below 2048 are exact in FP16."""
    rows = torch.arange(8191, device=device)
    kept = rows * 37 % 100 < 100 * share
    x = torch.randint(1, 256, (8191, 40), device=device).half().requires_grad_()
    taken = gather_tokens(x, rows[kept])
    assert torch.equal(taken, x[kept])
    back = scatter_tokens(-x, taken, rows[kept])
    sign = torch.where(kept, 1, -1)[:, None]
    assert torch.equal(back, sign * x)
    (grad,) = torch.autograd.grad(back.sum(), x)
    assert torch.equal(grad, sign.expand(8191, 40).half())


@pytest.mark.parametrize("inplace", [False, True])
def test_out_through_a_layer_and_back(inplace, assert_accurate, device):
    """The engine's use: a layer before, rows out, a layer for them, rows back, and a layer after."""
    index = torch.tensor([0, 3, 4, 8], device=device)
    rows = [0, 3, 4, 8]

    def operation(x, before, inside, after):
        x = x @ before
        deep = torch.sin(gather_tokens(x, index) @ inside)
        return torch.sin(scatter_tokens(x, deep, index, inplace=inplace) @ after)

    def formula(x, before, inside, after):
        x = list(x @ before)
        for row in rows:
            x[row] = torch.sin(x[row] @ inside)
        return torch.sin(torch.stack(x) @ after)

    assert_accurate(
        operation,
        formula,
        x=torch.randn(9, 8),
        before=torch.randn(8, 8) / 3,
        inside=torch.randn(8, 8) / 3,
        after=torch.randn(8, 8) / 3,
    )


def test_in_place_writes_the_rows_and_nothing_else(dtype, device):
    base, update = torch.randn(5, 16, device=device).to(dtype), torch.randn(2, 16, device=device).to(dtype)
    before, index = base.clone(), torch.tensor([0, 3], device=device)
    out = scatter_tokens(base, update, index, inplace=True)
    assert out is base
    assert torch.equal(out[[0, 3]], update)
    assert torch.equal(out[[1, 2, 4]], before[[1, 2, 4]])


def test_in_place_over_rows_that_backward_needs_is_noticed(device):
    x = torch.randn(5, 4, device=device, requires_grad=True)
    base = x.exp()  # its derivative is its value
    out = scatter_tokens(
        base, torch.zeros(1, 4, device=device), torch.tensor([2], device=device), inplace=True
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_in_place_over_a_parameter_is_refused(device):
    leaf = torch.zeros(3, 4, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        scatter_tokens(leaf, torch.ones(1, 4, device=device), torch.tensor([1], device=device), inplace=True)


@pytest.mark.parametrize("inplace", [False, True])
def test_registration(inplace, device, assert_well_registered):
    index = torch.tensor([0, 2, 5], device=device)

    def function(x, update):
        doubled = x * 2
        taken = gather_tokens(doubled, index)
        return scatter_tokens(doubled, taken * update, index, inplace=inplace)

    inputs = (torch.randn(6, 8, device=device), torch.randn(3, 8, device=device))
    assert_well_registered(function, *(x.requires_grad_() for x in inputs))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"base": torch.zeros(6)}, r"base has shape \(6,\), expected \(T, C\)"),
        ({"update": torch.zeros(3, 4)}, r"update has shape \(3, 4\), expected \(2, 4\)"),
        ({"update": torch.zeros(2, 5)}, r"update has shape \(2, 5\), expected \(2, 4\)"),
        ({"index": torch.zeros(2, 1, dtype=torch.int64)}, r"index has shape \(2, 1\), expected \(K,\)"),
    ],
)
def test_says_which_argument_of_scatter_is_wrong(wrong, message):
    right = {"base": torch.zeros(6, 4), "update": torch.zeros(2, 4), "index": torch.tensor([1, 3])}
    with pytest.raises(ValueError, match=message):
        scatter_tokens(**right | wrong)


def test_says_which_argument_of_gather_is_wrong():
    with pytest.raises(ValueError, match=r"x has shape \(6,\), expected \(T, C\)"):
        gather_tokens(torch.zeros(6), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"index has shape \(1, 1\), expected \(K,\)"):
        gather_tokens(torch.zeros(6, 4), torch.tensor([[1]]))


def test_says_which_backend_is_unknown():
    with pytest.raises(ValueError, match="backend is 'fast', expected one of: auto, reference, triton, cuda"):
        gather_tokens(torch.zeros(6, 4), torch.tensor([1]), backend="fast")
