"""add_noise against the path's equation."""

import pytest
import torch

from millrace.kernels import add_noise
from millrace.kernels.support.philox import normal

CASES = {
    "one token": ((1,), 64),
    "empty in the middle": ((3, 0, 5), 12),
    "pixels": ((2, 3), 768),
    "uniform": ((4, 4), 64),
}


def formula(rows):
    def evaluate(clean, noise, t):
        return torch.cat([(1 - t[b]) * clean[s] + t[b] * noise[s] for b, s in enumerate(rows)])

    return evaluate


@pytest.mark.parametrize(("lengths", "features"), CASES.values(), ids=CASES)
def test_matches_the_equation(lengths, features, offsets, spans, assert_accurate):
    cu_seqlens = offsets(*lengths)
    assert_accurate(
        lambda clean, noise, t: add_noise(clean, noise, t, cu_seqlens),
        formula(spans(*lengths)),
        clean=torch.randn(sum(lengths), features),
        noise=torch.randn(sum(lengths), features),
        t=torch.rand(len(lengths)),
    )


def test_ends_of_the_path(offsets, dtype, device):
    """t = 0 is the data and t = 1 the noise, to the bit."""
    clean, noise = (torch.randn(5, 16, device=device).to(dtype) for _ in range(2))
    out = add_noise(clean, noise, torch.tensor([0.0, 1.0], device=device), offsets(2, 3))
    assert torch.equal(out, torch.cat((clean[:2], noise[2:])))


@pytest.mark.parametrize(("lengths", "features"), CASES.values(), ids=CASES)
def test_matches_the_equation_without_gradients(lengths, features, offsets, spans, dtype, device):
    """As in training, where the data are constants; each sample of a wide batch spans several programs."""
    data = {
        name: torch.randn(sum(lengths), 3 * features, device=device).to(dtype) for name in ("clean", "noise")
    }
    data["t"] = torch.rand(len(lengths), device=device)
    got = add_noise(**data, cu_seqlens=offsets(*lengths))
    exact = formula(spans(*lengths))(**{name: value.double() for name, value in data.items()})
    assert got.dtype == dtype
    limit = torch.finfo(dtype).eps * exact.abs().max()
    assert (got - exact).abs().max() <= limit


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("features", [1, 6, 10, 64, 1500])
@pytest.mark.parametrize("lengths", [(2, 0, 3), (3, 3)])
def test_keys_stand_for_the_noise_they_draw(lengths, features, scale, offsets, device):
    """Rows of one counter, of several, of a part of one, and of more than a program takes."""
    cu_seqlens, total = offsets(*lengths), sum(lengths)
    clean = torch.randn(total, features, device=device)
    t = torch.rand(len(lengths), device=device)
    keys = torch.arange(len(lengths), device=device) * 977 - 5
    noisy, noise = add_noise(clean, keys, t, cu_seqlens, noise_scale=scale, return_noise=True)
    wanted = normal(keys, cu_seqlens, total, features) * scale
    assert noise.dtype == torch.float32
    torch.testing.assert_close(noise, wanted, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(noisy, add_noise(clean, noise, t, cu_seqlens), rtol=1e-6, atol=1e-6)
    assert torch.equal(noisy, add_noise(clean, keys, t, cu_seqlens, noise_scale=scale))


def test_drawn_noise_is_rounded_once(offsets, spans, dtype, device):
    """It is FP32 whatever the data are, and so is the sum until it is stored."""
    lengths = (2, 0, 3)
    clean, t = torch.randn(5, 10, device=device).to(dtype), torch.rand(3, device=device)
    keys = torch.tensor([11, -3, 8], device=device)
    noisy, noise = add_noise(clean, keys, t, offsets(*lengths), return_noise=True)
    assert (noisy.dtype, noise.dtype) == (dtype, torch.float32)
    exact = formula(spans(*lengths))(clean.double(), noise.double(), t.double())
    assert (noisy - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_drawn_noise_does_not_depend_on_the_batch(offsets, device):
    """To the bit: alone, between others, with any bound of the lengths."""
    clean = torch.randn(10, 7, device=device)
    keys, t = torch.tensor([11, -3, 8], device=device), torch.rand(3, device=device)
    noisy, noise = add_noise(clean, keys, t, offsets(4, 2, 4), return_noise=True)
    for max_seqlen in (None, 4, 7):
        alone = add_noise(clean[6:], keys[2:], t[2:], offsets(4), max_seqlen, return_noise=True)
        assert torch.equal(alone[0], noisy[6:])
        assert torch.equal(alone[1], noise[6:])


def test_given_noise_comes_back(offsets, device):
    clean, noise = torch.randn(2, 5, 4, device=device)
    noisy, same = add_noise(clean, noise, torch.ones(2, device=device), offsets(2, 3), return_noise=True)
    assert same is noise
    assert torch.equal(noisy, noise)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_gradient_of_the_data_under_drawn_noise(scale, offsets, device):
    """1 - t, row by row, and no other noise than without gradients."""
    clean = torch.randn(5, 6, device=device, requires_grad=True)
    keys, t = torch.tensor([1, 2], device=device), torch.tensor([0.25, 0.5], device=device)
    arguments = (keys, t, offsets(2, 3))
    noisy, noise = add_noise(clean, *arguments, noise_scale=scale, return_noise=True)
    (grad,) = torch.autograd.grad(noisy.sum(), clean)
    assert grad[:, 0].tolist() == [0.75, 0.75, 0.5, 0.5, 0.5]
    _, plain = add_noise(clean.detach(), *arguments, noise_scale=scale, return_noise=True)
    torch.testing.assert_close(noise, plain, rtol=1e-5, atol=2e-6)
    assert not noise.requires_grad


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_registration(drawn, dynamic, offsets, device):
    """opcheck of both operators, one graph, and the same bits every time."""
    clean, noise = torch.randn(2, 5, 6, device=device)
    noise = torch.tensor([3, 4], device=device) if drawn else noise
    t, cu_seqlens = torch.rand(2, device=device), offsets(2, 3)
    if drawn:
        torch.library.opcheck(
            torch.ops.millrace.add_drawn_noise.default, (clean, noise, t, cu_seqlens, 2.0, True, 3)
        )
    else:
        torch.library.opcheck(torch.ops.millrace.add_noise.default, (clean, noise, t, cu_seqlens, None))

    def function(clean, noise, t):
        return add_noise(clean, noise, t, cu_seqlens, return_noise=True)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for got, want, again in zip(*(f(clean, noise, t) for f in (compiled, function, function)), strict=True):
        assert torch.equal(got, want)
        assert torch.equal(again, want)


@pytest.mark.parametrize("given", [4, 9, None])
def test_max_seqlen_only_chooses_the_path(given, offsets, device):
    clean, noise = (torch.randn(8, 16, device=device) for _ in range(2))
    t = torch.rand(2, device=device)
    uniform = add_noise(clean, noise, t, offsets(4, 4), max_seqlen=4)
    assert torch.equal(uniform, add_noise(clean, noise, t, offsets(4, 4), max_seqlen=given))


def test_given_noise_is_not_scaled():
    clean, t = torch.zeros(2, 4), torch.zeros(1)
    with pytest.raises(ValueError, match=r"noise_scale is 2\.0, expected 1.0 with given noise"):
        add_noise(clean, clean, t, torch.tensor([0, 2], dtype=torch.int32), noise_scale=2.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"clean": torch.zeros(5)}, r"clean has shape \(5,\), expected \(T, P\)"),
        ({"noise": torch.zeros(5, 7)}, r"noise has shape \(5, 7\), expected \(5, 8\)"),
        ({"noise": torch.zeros(3, dtype=torch.int64)}, r"noise has shape \(3,\), expected \(2,?\)"),
        ({"t": torch.zeros(3)}, r"t has shape \(3,\), expected \(2,?\)"),
        (
            {"cu_seqlens": torch.tensor([0, 2, 5])},
            r"cu_seqlens is \(3,\) torch.int64, expected .* torch.int32",
        ),
    ],
)
def test_says_which_argument_is_wrong(wrong, message):
    right = {
        "clean": torch.zeros(5, 8),
        "noise": torch.zeros(5, 8),
        "t": torch.zeros(2),
        "cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        add_noise(**right | wrong)
