"""gated_residual_norm_modulate and flow_loss of csrc against their equations in float64: the host library
everywhere, the kernels where there is a GPU. Both are called through
`millrace.kernels.support.cuda_library`."""

from itertools import accumulate, pairwise

import pytest
import torch

from millrace.kernels.support import cuda_library

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = {
    "one row": ((1,), 8),
    "empty samples": ((0, 3, 0, 0, 5, 0), 72),
    "no row": ((0, 0), 8),
    "width 1792": ((2, 3), 1792),
    "width 3584": ((3, 1), 3584),
    "widest": ((2,), 4096),
    "several rows a block": ((1501, 0, 2, 698), 8),
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request, monkeypatch) -> str:
    """The device whose library `cuda_library` calls for the test."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        torch.ops.load_library(request.getfixturevalue("cuda_library_path"))
        monkeypatch.setattr(cuda_library, "_operators", lambda: torch.ops.millrace_cuda)
    else:
        request.getfixturevalue("host_library")
        monkeypatch.setattr(cuda_library, "_operators", lambda: torch.ops.millrace_host)
        monkeypatch.setattr(cuda_library, "_expect_cuda", lambda name, tensor: None)
    return request.param


@pytest.fixture(params=DTYPES.values(), ids=DTYPES)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def random(device):
    """Normal numbers of a shape and dtype, the same for every device."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return draw


def offsets(lengths, device):
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)


def spans(lengths):
    return [slice(start, end) for start, end in pairwise(accumulate(lengths, initial=0))]


def assert_close(got, exact, dtype=torch.float32):
    """Within one rounding to `dtype` (half a unit in the last place) and the FP32 arithmetic before it."""
    assert got.dtype == dtype
    assert got.shape == exact.shape
    if not exact.numel():
        return
    scale = exact.abs().max()
    allowed = 0.5 * torch.finfo(dtype).eps * exact.abs() + 4e-6 * scale
    excess = (got.double() - exact).abs() - allowed
    assert excess.max() <= 0, f"off by {excess.max():.3e} more than allowed, among values up to {scale:.3e}"


def modulate(rows, scale, shift, eps):
    centred = rows - rows.mean(1, keepdim=True)
    return (1 + scale) * centred / torch.sqrt(centred.square().mean(1, keepdim=True) + eps) + shift


@pytest.mark.parametrize("vector_dtype", [None, torch.float32], ids=["same", "fp32 vectors"])
@pytest.mark.parametrize(("lengths", "width"), CASES.values(), ids=CASES)
def test_gated_residual_norm_modulate(lengths, width, vector_dtype, dtype, device, random):
    """Forward and backward, each step against its equation on the numbers that it was given."""
    total, eps, cu_seqlens = sum(lengths), 1e-3, offsets(lengths, device)
    x, branch, grad_out, grad_y = (random(total, width, dtype=dtype) for _ in range(4))
    x += 0.5
    # Slices of a larger matrix, as they come out of one GEMM.
    _, gate, shift, _, scale = random(len(lengths), 5, width, dtype=vector_dtype or dtype).unbind(1)

    out, y, mean, rstd = cuda_library.gated_residual_norm_modulate(
        x, branch, gate, shift, scale, cu_seqlens, eps
    )
    grads = cuda_library.gated_residual_norm_modulate_backward(
        grad_out, grad_y, out, branch, gate, scale, cu_seqlens, mean, rstd
    )

    rows = out.double().requires_grad_()  # the norm sees the sum as stored
    vectors = [vector.double().requires_grad_() for vector in (shift, scale)]
    sums, ys, means, rstds = [], [], [], []
    for b, s in enumerate(spans(lengths)):
        sums.append(x[s].double() + gate[b].double() * branch[s].double())
        ys.append(modulate(rows[s], vectors[1][b], vectors[0][b], eps))
        means.append(rows[s].mean(1))
        rstds.append(1 / torch.sqrt((rows[s] - means[-1][:, None]).square().mean(1) + eps))
    ys = torch.cat(ys)
    assert_close(out, torch.cat(sums), dtype)
    assert_close(y, ys.detach(), dtype)
    assert_close(mean, torch.cat(means).detach())
    assert_close(rstd, torch.cat(rstds).detach())

    through, grad_shift, grad_scale = torch.autograd.grad(ys, (rows, *vectors), grad_y.double())
    through += grad_out.double()
    grad_branch = [gate[b].double() * through[s] for b, s in enumerate(spans(lengths))]
    grad_gate = [(through[s] * branch[s].double()).sum(0) for s in spans(lengths)]
    assert_close(grads[0], through, dtype)
    assert_close(grads[1], torch.cat(grad_branch), dtype)
    for got, exact in zip(grads[2:], (torch.stack(grad_gate), grad_shift, grad_scale), strict=True):
        assert_close(got, exact)


def test_rows_far_from_zero_keep_their_variance(device, random):
    """E[x^2] - E[x]^2 in FP32 would have no digit left at a mean of 1000 and a deviation of 0.1."""
    x = 1000 + 0.1 * random(3, 1792)
    zero = torch.zeros(1, 1792, device=device)
    _, y, _, _ = cuda_library.gated_residual_norm_modulate(
        x, x, zero, zero, zero, offsets((3,), device), 1e-6
    )
    exact = modulate(x.double(), 0, 0, 1e-6)
    assert (y.double() - exact).abs().max() < 2e-3  # the mean's rounding, half of 2^-14, over the deviation


@pytest.mark.parametrize("kind", ["columns", "misaligned", "expanded", "mixed dtypes"])
def test_vectors_of_any_layout(kind, device, random):
    x, branch = random(5, 24, dtype=torch.bfloat16), random(5, 24, dtype=torch.bfloat16)
    vectors = random(3, 2, 25, dtype=torch.bfloat16)
    gate, shift, scale = {
        "columns": vectors[:, :, :24].mT.contiguous().mT.unbind(0),
        "misaligned": vectors[:, :, 1:].unbind(0),
        "expanded": vectors[:, :1, :24].expand(3, 2, 24).unbind(0),
        "mixed dtypes": (vectors[0, :, :24].float(), vectors[1, :, :24].half(), vectors[2, :, :24]),
    }[kind]
    cu_seqlens = offsets((2, 3), device)
    got = cuda_library.gated_residual_norm_modulate(x, branch, gate, shift, scale, cu_seqlens, 1e-6)
    plain = [vector.float().contiguous() for vector in (gate, shift, scale)]
    wanted = cuda_library.gated_residual_norm_modulate(x, branch, *plain, cu_seqlens, 1e-6)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)
    grads = [
        cuda_library.gated_residual_norm_modulate_backward(x, branch, x, branch, *pair, cu_seqlens, *got[2:])
        for pair in ((gate, scale), (plain[0], plain[2]))
    ]
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def flow_formula(lengths, prediction, clean, noise, t, negative, weight, predicts_sample, t_min):
    """Loss, per-sample losses and residual, row by row, in float64."""
    prediction, clean, noise, t = (tensor.double() for tensor in (prediction, clean, noise, t))
    rows, predicted, targets = spans(lengths), [], []
    for b, s in enumerate(rows):
        floor = max(t[b], torch.as_tensor(t_min))
        noisy = (1 - t[b]) * clean[s] + t[b] * noise[s]
        predicted.append((noisy - prediction[s]) / floor if predicts_sample else prediction[s])
        targets.append((noisy - clean[s]) / floor if predicts_sample else noise[s] - clean[s])
    residual, per_sample, total = torch.zeros_like(prediction), torch.zeros_like(t), 0.0
    for b, s in enumerate(rows):
        error = predicted[b] - targets[b]
        residual[s], squares = error, error.square().sum()
        other = (b - 1) % len(rows) if negative is None else int(negative[b])
        if weight and len(rows) > 1 and other >= 0 and len(targets[other]) and len(predicted[b]):
            away = torch.stack(
                [v - targets[other][r % len(targets[other])] for r, v in enumerate(predicted[b])]
            )
            residual[s] -= weight * away
            squares = squares - weight * away.square().sum()
        total += squares
        per_sample[b] = squares / max(error.numel(), 1)
    return total / max(prediction.numel(), 1), per_sample, residual


FLOW_CASES = {
    "one row": ((1,), 64, None),
    "uniform": ((4, 4, 4), 16, None),
    "unequal": ((2, 7, 3), 768, None),
    "chosen negatives": ((2, 0, 7, 3), 24, (2, 0, 1, -1)),
    "its own negative": ((3, 2), 8, (0, 0)),
    "no row": ((0, 0), 8, None),
    "several blocks": ((150, 1, 0, 90), 72, None),
    "wide": ((3, 2), 6144, None),
}


@pytest.mark.parametrize("data_dtype", [None, torch.float32], ids=["same", "fp32 data"])
@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("predicts_sample", [False, True], ids=["velocity", "sample"])
@pytest.mark.parametrize(("lengths", "width", "negative"), FLOW_CASES.values(), ids=FLOW_CASES)
def test_flow_loss(lengths, width, negative, predicts_sample, weight, data_dtype, dtype, device, random):
    prediction = random(sum(lengths), width, dtype=dtype)
    clean, noise = (random(sum(lengths), width, dtype=data_dtype or dtype) for _ in range(2))
    t = torch.linspace(0.02, 1, len(lengths), device=device)  # the first is below t_min
    if negative is not None:
        negative = torch.tensor(negative, device=device)
    settings = (weight, predicts_sample, 0.05)
    cu_seqlens = offsets(lengths, device)
    got = cuda_library.flow_loss(prediction, clean, noise, t, cu_seqlens, negative, *settings)
    exact = flow_formula(lengths, prediction, clean, noise, t, negative, *settings)
    assert_close(got[0], exact[0])
    assert_close(got[1], exact[1])
    assert_close(got[2], exact[2], dtype)


def test_flow_loss_backward_is_the_derivative(device, random):
    lengths, settings = (2, 0, 5), (0.3, True, 0.05)
    prediction, clean, noise = (random(7, 16).double() for _ in range(3))
    t, cu_seqlens = torch.tensor([0.3, 0.5, 0.9], device=device), offsets(lengths, device)
    weights = random(3).double()
    prediction.requires_grad_()
    loss, per_sample, _ = differentiable_flow(lengths, prediction, clean, noise, t.double(), *settings)
    (exact,) = torch.autograd.grad(2 * loss + (weights * per_sample).sum(), prediction)
    single = [tensor.detach().float() for tensor in (prediction, clean, noise)]
    _, _, residual = cuda_library.flow_loss(*single, t, cu_seqlens, None, *settings)
    two = torch.tensor(2.0, device=device)
    got = cuda_library.flow_loss_backward(residual, two, weights.float(), t, cu_seqlens, *settings[1:])
    assert_close(got, exact)


def differentiable_flow(lengths, prediction, clean, noise, t, weight, predicts_sample, t_min):
    """flow_formula for predicted samples in terms of autograd."""
    sums, per_sample, rows = [], [], spans(lengths)
    predicted, targets = [], []
    for b, s in enumerate(rows):
        noisy = (1 - t[b]) * clean[s] + t[b] * noise[s]
        predicted.append((noisy - prediction[s]) / max(t[b], t_min))
        targets.append((noisy - clean[s]) / max(t[b], t_min))
    for b, v in enumerate(predicted):
        squares, other = (v - targets[b]).square().sum(), targets[(b - 1) % len(rows)]
        if len(other):
            repeated = other[torch.arange(len(v), device=v.device) % len(other)]
            squares = squares - weight * (v - repeated).square().sum()
        sums.append(squares)
        per_sample.append(squares / max(v.numel(), 1))
    return sum(sums) / prediction.numel(), torch.stack(per_sample), None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_rounding_is_to_nearest_even(dtype, device):
    """Over all magnitudes, subnormals, ties and overflow: the residual of zero is the noise, rounded."""
    bits = torch.arange(-(2**31), 2**31, 65_521, dtype=torch.int64)
    every = torch.arange(2**16).to(torch.int32).to(torch.int16).view(dtype).float()
    ties = (every.view(torch.int32) + (1 << (15 if dtype == torch.bfloat16 else 12))).view(torch.float32)
    noise = torch.cat((bits.to(torch.int32).view(torch.float32), every, ties))
    noise = noise[: len(noise) // 8 * 8].view(-1, 8).to(device)
    zero = torch.zeros_like(noise, dtype=dtype)
    one = torch.ones(1, device=device)
    _, _, residual = cuda_library.flow_loss(
        zero, zero.float(), noise, one, offsets((len(noise),), device), None, 0.0, False, 0.05
    )
    wanted = (-noise).to(dtype)
    assert torch.equal(residual.isnan(), wanted.isnan())
    assert torch.equal(residual.nan_to_num(7), wanted.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_every_number_is_read_right(dtype, device):
    """The mean of a row of eight equal numbers is the number, for every finite one."""
    every = torch.arange(2**16).to(torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite() & (every.float().abs() < 1e37)]
    x = every[:, None].repeat(1, 8).to(device)
    zero = torch.zeros(1, 8, dtype=dtype, device=device)
    _, _, mean, _ = cuda_library.gated_residual_norm_modulate(
        x, torch.zeros_like(x), zero, zero, zero, offsets((len(x),), device), 1.0
    )
    assert torch.equal(mean.cpu(), every.float())


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_rows_are_moved(index_dtype, dtype, device, random):
    x = random(19, 33, dtype=dtype)
    index = torch.tensor([7, 0, 18, 3], device=device)
    kept = cuda_library.gather_rows(x, index.to(index_dtype))
    assert torch.equal(kept, x[index])
    expected = x.index_copy(0, index, -kept)
    cuda_library.scatter_rows(x, -kept, index.to(index_dtype))
    assert torch.equal(x, expected)
    with pytest.raises(ValueError, match="base is not contiguous"):
        cuda_library.scatter_rows(x[:, 1:], kept[:, 1:], index)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_same_bits_every_time(backward, device, random):
    x, branch = random(2000, 64), random(2000, 64)
    gate, shift, scale = random(3, 3, 64).unbind(1)
    cu_seqlens = offsets((700, 300, 1000), device)

    def evaluate():
        forward = cuda_library.gated_residual_norm_modulate(x, branch, gate, shift, scale, cu_seqlens, 1e-6)
        if not backward:
            return forward
        return cuda_library.gated_residual_norm_modulate_backward(
            x, branch, forward[0], branch, gate, scale, cu_seqlens, *forward[2:]
        )

    for one, other in zip(evaluate(), evaluate(), strict=True):
        assert torch.equal(one, other)


WRONG = {
    "offsets": ({"cu_seqlens": torch.tensor([0, 4, 3], dtype=torch.int32)}, "cu_seqlens does not rise"),
    "int64 offsets": ({"cu_seqlens": torch.tensor([0, 1, 3])}, "cu_seqlens has another dtype"),
    "branch": ({"branch": torch.zeros(2, 8)}, "branch has another shape"),
    "gate": ({"gate": torch.zeros(3, 8)}, r"gate must be \(B, C\)"),
    "scale": ({"scale": torch.zeros(2, 8, dtype=torch.float16)}, "scale has another dtype"),
    "layout": ({"x": torch.zeros(8, 3).mT}, "x has another shape .* or is not contiguous"),
    "width": ({name: torch.zeros(3, 6) for name in ("x", "branch")}, "must be"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG)
def test_operator_refuses(wrong, message, host_library):
    right = {
        "x": torch.zeros(3, 8),
        "branch": torch.zeros(3, 8),
        "gate": torch.zeros(2, 8),
        "shift": torch.zeros(2, 8),
        "scale": torch.zeros(2, 8),
        "cu_seqlens": torch.tensor([0, 1, 3], dtype=torch.int32),
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.millrace_host.gated_residual_norm_modulate(**right | wrong, eps=1e-6)


def test_flow_loss_operator_refuses_a_negative_that_is_no_sample(host_library):
    rows, t = torch.zeros(3, 8), torch.zeros(2)
    cu_seqlens = torch.tensor([0, 1, 3], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="an index is out of range"):
        torch.ops.millrace_host.flow_loss(
            rows, rows, rows, t, cu_seqlens, torch.tensor([1, 2]), 0.1, False, 0.05
        )
