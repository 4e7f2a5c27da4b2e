"""rope_attention against its equations, one sample and one head at a time."""

import importlib
import math
from collections.abc import Callable

import pytest
import torch

from millrace.kernels import rope_attention, sample_route
from millrace.kernels.attention.backends import INSTALL_FLASH_ATTENTION
from millrace.kernels.attention.rope_attention import chosen_backend, describe_choice
from millrace.kernels.support.registration import INTERPRETING

HEADS, SIDE = 2, 6  # heads of every case; positions come from a table of SIDE^2 rows
CASES = {
    "one token": ((1,), (3,), 64),
    "unequal": ((5, 2, 3), (2, 4, 1), 64),
    "empty in the middle": ((3, 0, 4), (2, 3, 1), 64),
    "no text for one": ((3, 2), (0, 4), 64),
    "head_dim 128": ((3, 5), (4, 2), 128),
    "uniform": ((4, 4), (3, 3), 64),
    "uniform, head_dim 128": ((4, 4), (3, 3), 128),
    "uniform images, ragged text": ((4, 4), (1, 3), 64),
    "several tiles": ((17, 1), (0, 33), 64),
}
BACKENDS = ["reference", "sdpa", "triton"]
FP32 = 1e-5
"""Tolerance of an output near 1 where the kernels compute."""


def table(dim, device):
    """cos, sin (SIDE^2, D/2) FP32: half of the angles follow the row, half the column."""
    place = torch.arange(SIDE**2)
    frequency = 100.0 ** (-torch.arange(dim // 4) / (dim // 4))
    angle = torch.cat(((place // SIDE)[:, None] * frequency, (place % SIDE)[:, None] * frequency), 1)
    return angle.cos().to(device), angle.sin().to(device)


def formula(rows, text_rows, cos, sin, positions, scale=None, eps=1e-6, queries=slice(None)):
    """The docstring's equations, for these queries of each sample.

    Rotation as x * cos + partner(x) * sin, partner (a, b) -> (-b, a).
    """

    def norm(x, weight):
        return x / torch.sqrt((x * x).sum(1, keepdim=True) / x.shape[1] + eps) * weight

    def rotate(x, place):
        swapped = x[:, torch.arange(x.shape[1], device=x.device) ^ 1]
        sign = x.new_ones(x.shape[1])
        sign[0::2] = -1
        cosine, sine = (t[place].to(x.dtype).repeat_interleave(2, dim=1) for t in (cos, sin))
        return x * cosine + sign * swapped * sine

    def evaluate(qkv, text_kv, weights):
        samples = []
        for s, u in zip(rows, text_rows, strict=True):
            heads = []
            for h in range(qkv.shape[2]):
                q = rotate(norm(qkv[s, 0, h], weights[0]), positions[s])[queries]
                k = rotate(norm(qkv[s, 1, h], weights[1]), positions[s])
                text_k = norm(text_kv[u, 0, h], weights[2])
                logits = torch.cat((q @ k.T, q @ text_k.T), 1)
                logits = logits * (qkv.shape[-1] ** -0.5 if scale is None else scale)
                odds = torch.exp(logits - logits.amax(1, keepdim=True))
                share = odds / odds.sum(1, keepdim=True)
                heads.append(share @ torch.cat((qkv[s, 2, h], text_kv[u, 1, h])))
            samples.append(torch.stack(heads, 1))
        return torch.cat(samples)

    return evaluate


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture
def precision(request, device) -> torch.dtype:
    """Of the arguments: float64, in which properties hold almost exactly; FP32 where kernels run."""
    backend = request.getfixturevalue("backend") if "backend" in request.fixturenames else "auto"
    return torch.float32 if backend == "triton" and (device == "cuda" or INTERPRETING) else torch.float64


@pytest.fixture
def within(precision) -> Callable[[float], dict[str, float]]:
    """Tolerance in float64 -> `rtol` and `atol` in `precision`, 1e-5 in FP32: outputs are about 1."""
    return lambda exact: dict.fromkeys(
        ("rtol", "atol"), max(exact, FP32) if precision == torch.float32 else exact
    )


@pytest.fixture
def case(offsets, device, precision):
    """Lengths -> keyword arguments of rope_attention in `precision`."""

    def build(lengths, text_lengths, dim=64):
        total = sum(lengths)
        cos, sin = table(dim, device)
        tensors = {
            "qkv": torch.randn(total, 3, HEADS, dim),
            "text_kv": torch.randn(sum(text_lengths), 2, HEADS, dim),
            "q_weight": torch.rand(dim) + 0.5,
            "k_weight": torch.rand(dim) + 0.5,
            "text_k_weight": torch.rand(dim) + 0.5,
        }
        return {name: value.to(device, precision) for name, value in tensors.items()} | {
            "cos": cos,
            "sin": sin,
            "positions": torch.randint(SIDE**2, (total,), device=device),
            "cu_seqlens": offsets(*lengths),
            "cu_seqlens_text": offsets(*text_lengths),
            "max_seqlen": max(lengths),
            "max_seqlen_text": max(text_lengths),
        }

    return build


LEARNED = ("qkv", "text_kv", "q_weight", "k_weight", "text_k_weight")


def in_fp32(arguments):
    """For what is to hold in FP32 whatever computes it."""
    return arguments | {name: arguments[name].float() for name in LEARNED}


def in_fp64(arguments):
    return arguments | {name: arguments[name].double() for name in LEARNED}


def evaluate_formula(arguments, rows, text_rows, **settings):
    weights = torch.stack([arguments[name] for name in ("q_weight", "k_weight", "text_k_weight")])
    compute = formula(rows, text_rows, arguments["cos"], arguments["sin"], arguments["positions"], **settings)
    return compute(arguments["qkv"], arguments["text_kv"], weights)


@pytest.mark.parametrize(("lengths", "text_lengths", "dim"), CASES.values(), ids=CASES)
def test_matches_the_equations(lengths, text_lengths, dim, backend, offsets, spans, device, assert_accurate):
    """qkv comes as (T, 3 H D) of one projection; text_kv as one block's slice of (S, depth, 2, H, D)."""
    cu_seqlens, cu_text = offsets(*lengths), offsets(*text_lengths)
    cos, sin = table(dim, device)
    positions = torch.randint(SIDE**2, (sum(lengths),), device=device)

    def split(qkv, text):
        return qkv.unflatten(1, (3, HEADS, dim)), text.unflatten(1, (3, 2, HEADS, dim)).unbind(1)[1]

    def operation(qkv, text, weights):
        qkv, text_kv = split(qkv, text)
        assert len(text_kv) < 2 or not text_kv.is_contiguous()
        return rope_attention(
            qkv,
            text_kv,
            *weights.unbind(0),
            cos,
            sin,
            positions,
            cu_seqlens,
            cu_text,
            max(lengths),
            max(text_lengths),
            backend=backend,
        )

    compute = formula(spans(*lengths), spans(*text_lengths), cos, sin, positions)
    assert_accurate(
        operation,
        lambda qkv, text, weights: compute(*split(qkv, text), weights),
        qkv=torch.randn(sum(lengths), 3 * HEADS * dim),
        text=torch.randn(sum(text_lengths), 3 * 2 * HEADS * dim),
        weights=torch.rand(3, dim) + 0.5,
    )


@pytest.mark.parametrize("settings", [{"scale": 0.5}, {"eps": 0.7}, {"scale": 0.0}])
@pytest.mark.parametrize("lengths", [(3, 2), (3, 3)], ids=["unequal", "uniform"])
def test_scale_and_eps(lengths, settings, backend, case, within, spans):
    arguments = case(lengths, (2, 2))
    exact = evaluate_formula(in_fp64(arguments), spans(*lengths), spans(2, 2), **settings)
    got = rope_attention(**arguments, **settings, backend=backend)
    torch.testing.assert_close(got.double(), exact, **within(1e-6))  # the RoPE table is FP32
    default = rope_attention(**arguments, backend=backend)
    assert (got - default).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("lengths", "text_lengths"), [((3, 4), (3, 4)), ((4, 4), (4, 4))], ids=["unequal", "uniform"]
)
def test_order_of_text_rows_does_not_matter(lengths, text_lengths, backend, case, within, spans):
    arguments = case(lengths, text_lengths)
    shuffle = torch.cat([s.start + torch.randperm(s.stop - s.start) for s in spans(*text_lengths)])
    shuffled = arguments | {"text_kv": arguments["text_kv"][shuffle]}
    assert not torch.equal(shuffled["text_kv"], arguments["text_kv"])
    torch.testing.assert_close(
        rope_attention(**arguments, backend=backend),
        rope_attention(**shuffled, backend=backend),
        **within(1e-7),
    )


def test_packing_equals_masked_padding(backend, case, within, spans, device):
    """Dense attention over text padded with large rubbish and masked out gives what packed rows give."""
    lengths, text_lengths, longest = (3, 3), (1, 4), 4
    arguments = case(lengths, text_lengths)
    got = rope_attention(**arguments, backend=backend)
    arguments = in_fp64(arguments)
    padded = torch.full((2, longest, 2, HEADS, 64), 50.0, dtype=torch.float64, device=device)
    mask = torch.zeros(2, 3 + longest, dtype=torch.bool, device=device)
    mask[:, :3] = True
    for b, s in enumerate(spans(*text_lengths)):
        padded[b, : text_lengths[b]] = arguments["text_kv"][s]
        mask[b, 3 : 3 + text_lengths[b]] = True

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * arguments[name]

    def rotate(x):
        cos, sin = (arguments[name][arguments["positions"]].view(2, 3, 1, 32) for name in ("cos", "sin"))
        pairs = torch.view_as_complex(x.unflatten(-1, (32, 2)).contiguous())
        return torch.view_as_real(pairs * torch.complex(cos.double(), sin.double())).flatten(-2)

    q, k, v = arguments["qkv"].unflatten(0, (2, 3)).unbind(2)
    keys = torch.cat((rotate(norm(k, "k_weight")), norm(padded[:, :, 0], "text_k_weight")), 1)
    values = torch.cat((v, padded[:, :, 1]), 1)
    logits = torch.einsum("bnhd,bmhd->bhnm", rotate(norm(q, "q_weight")), keys) / 8
    share = logits.masked_fill(~mask[:, None, None], float("-inf")).softmax(-1)
    dense = torch.einsum("bhnm,bmhd->bnhd", share, values).flatten(0, 1)
    torch.testing.assert_close(got.double(), dense, **within(1e-6))


@pytest.mark.parametrize("lengths", [(40, 24), (32, 32)], ids=["unequal", "uniform"])
def test_logits_and_softmax_are_fp32_for_bf16_inputs(lengths, backend, case, spans, device):
    """Queries and keys of +-1 leave the norm exact, so only what follows can err: a scale of log 2 does not
    round the queries of a kernel whose logits are in units of it.

    Logits have a spread of 8. Rounded to bf16 those would be wrong by up to 2^-5 and the output by
    about 1 %; in FP32 what remains are the roundings of the probabilities and of the output.
    """
    scale = math.log(2)
    arguments = case(lengths, (9, 9)) | {"eps": 0.0, "scale": scale}
    arguments["q_weight"] = arguments["q_weight"] / scale
    for name in ("qkv", "text_kv"):
        arguments[name][:, :-1] = arguments[name][:, :-1].sign()
    arguments["cos"], arguments["sin"] = torch.ones_like(arguments["cos"]), torch.zeros_like(arguments["sin"])
    for name in ("k_weight", "text_k_weight"):
        arguments[name] = torch.ones_like(arguments[name])
    narrow = {
        name: arguments[name].bfloat16()
        for name in ("qkv", "text_kv", "q_weight", "k_weight", "text_k_weight")
    }
    wide = {name: value.double() for name, value in narrow.items()}
    exact = evaluate_formula(arguments | wide, spans(*lengths), spans(9, 9), scale=scale, eps=0.0)
    got = rope_attention(**arguments | narrow, backend=backend).double()
    error = (got - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 2**-8


def test_samples_do_not_see_each_other(backend, case, within, spans):
    """Each sample of a mixed batch gets what it gets alone."""
    lengths, text_lengths = (4, 1, 3), (2, 3, 1)
    arguments = case(lengths, text_lengths)
    together = rope_attention(**arguments, backend=backend)
    for s, u, n, m in zip(spans(*lengths), spans(*text_lengths), lengths, text_lengths, strict=True):
        alone = arguments | {
            "qkv": arguments["qkv"][s],
            "text_kv": arguments["text_kv"][u],
            "positions": arguments["positions"][s],
            "cu_seqlens": torch.tensor([0, n], dtype=torch.int32, device=together.device),
            "cu_seqlens_text": torch.tensor([0, m], dtype=torch.int32, device=together.device),
        }
        torch.testing.assert_close(rope_attention(**alone, backend=backend), together[s], **within(1e-7))


def test_only_distances_matter_between_image_tokens(backend, case):
    """Without text, moving every token by the same rows and columns changes nothing; with text it does."""
    apart = {"rtol": 1e-5, "atol": 1e-5}
    for text_length in (0, 3):
        arguments = case((4,), (text_length,))
        arguments["positions"] = torch.tensor([0, 1, SIDE, SIDE + 2], device=arguments["qkv"].device)
        moved = arguments | {"positions": arguments["positions"] + 3 * SIDE + 2}
        here, there = rope_attention(**arguments, backend=backend), rope_attention(**moved, backend=backend)
        assert torch.allclose(here, there, **apart) == (text_length == 0)


def test_lengths_of_queries_and_keys_do_not_matter(backend, case, within):
    """RMSNorm with eps 0 removes any positive factor; a factor of its weight is a factor of the scale."""
    arguments = case((3, 2), (2, 2)) | {"eps": 0.0}
    expected = rope_attention(**arguments, backend=backend)
    factor = torch.tensor([3.0, 0.2, 1.0], device=expected.device)[None, :, None, None]
    text_factor = torch.tensor([5.0, 1.0], device=expected.device)[None, :, None, None]
    longer = arguments | {
        "qkv": arguments["qkv"] * factor,
        "text_kv": arguments["text_kv"] * text_factor,
    }
    torch.testing.assert_close(rope_attention(**longer, backend=backend), expected, **within(1e-6))
    sharper = arguments | {"q_weight": arguments["q_weight"] * 2}
    torch.testing.assert_close(
        rope_attention(**sharper, backend=backend),
        rope_attention(**arguments, scale=2 * 64**-0.5, backend=backend),
        **within(1e-7),
    )


@pytest.mark.parametrize(("image", "text"), [(4, 3), (9, 3), (4, 8), (9, 8)])
def test_max_seqlen_only_chooses_the_path(image, text, backend, case, within):
    """The exact lengths (4 and 3) take the dense path, larger bounds the general one."""
    arguments = case((4, 4), (3, 3))
    results = []
    for bounds in ((4, 3), (image, text)):
        leaves = {name: arguments[name].clone().requires_grad_() for name in ("qkv", "text_kv", "k_weight")}
        limits = dict(zip(("max_seqlen", "max_seqlen_text"), bounds, strict=True))
        out = rope_attention(**arguments | leaves | limits, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))))
    for dense, general in zip(*results, strict=True):
        torch.testing.assert_close(dense, general, **within(1e-10))


def test_text_of_an_empty_sample_gets_zero_gradient(case):
    arguments = case((3, 0), (2, 2))
    text = arguments["text_kv"].clone().requires_grad_()
    rope_attention(**arguments | {"text_kv": text}).square().sum().backward()
    assert torch.equal(text.grad[2:], torch.zeros_like(text.grad[2:]))
    assert text.grad[:2].abs().min() > 0


LAYOUTS = {
    "part of a wider projection": lambda x: x.unflatten(1, (6, 1, 64))[:, 2:5],
    "parts innermost": lambda x: x.unflatten(1, (2, 3, 64)).transpose(1, 2)[:, :, :1],
    "features apart": lambda x: x.unflatten(1, (3, 64, 2)).transpose(2, 3)[:, :, :1],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(layout, backend, case, device):
    """A strided qkv gives what its contiguous copy gives."""
    arguments = in_fp32(case((3, 2), (1, 2)))
    projection = torch.randn(5, 6 * 64, device=device).requires_grad_()
    arguments["text_kv"] = arguments["text_kv"][:, :, :1]
    results = []
    for qkv in (layout(projection), layout(projection).contiguous()):
        out = rope_attention(**arguments | {"qkv": qkv}, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), projection)))
    for strided, contiguous in zip(*results, strict=True):
        torch.testing.assert_close(strided, contiguous)


def test_mixed_aspect_ratios(backend, case, spans, device):
    """A wide, a tall and a square image index one table."""
    grids = (2, 6), (5, 1), (4, 4)
    arguments = in_fp32(case((12, 5, 16), (2, 0, 3)))
    arguments["positions"] = torch.cat(
        [(torch.arange(h)[:, None] * SIDE + torch.arange(w)).flatten() for h, w in grids]
    ).to(device)
    exact = evaluate_formula(in_fp64(arguments), spans(12, 5, 16), spans(2, 0, 3))
    got = rope_attention(**arguments, backend=backend)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75])
def test_route_keeps_the_positions_of_its_tokens(keep, backend, case, spans, device):
    """Attention among a route's rows: the gathered rows with their own places in the table."""
    arguments = in_fp32(case((8, 8), (2, 3)))
    samples = torch.arange(2, device=device)
    route = sample_route(arguments["cu_seqlens"], keep, 0, samples, lengths=[8, 8])
    routed = arguments | {
        "qkv": arguments["qkv"][route.index],
        "positions": arguments["positions"][route.index],
        "cu_seqlens": route.cu_seqlens,
        "max_seqlen": route.max_seqlen,
    }
    kept = round(8 * keep)
    assert route.cu_seqlens.tolist() == [0, kept, 2 * kept]
    exact = evaluate_formula(in_fp64(routed), spans(kept, kept), spans(2, 3))
    got = rope_attention(**routed, backend=backend)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)
def test_many_tokens(backend, many, offsets, spans, device):
    """A length that is no multiple of any tile. The loss reads few queries, the gradients reach all keys."""
    cos, sin = table(64, device)
    positions = torch.randint(SIDE**2, (many,), device=device)
    inputs = [torch.randn(*shape) for shape in ((many, 3, 1, 64), (5, 2, 1, 64), (3, 64))]
    inputs = [x.to(device).requires_grad_() for x in inputs]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    chosen = torch.tensor([0, 1, many // 2, many - 1], device=device)
    out = rope_attention(
        *inputs[:2],
        *inputs[2].unbind(0),
        cos,
        sin,
        positions,
        offsets(many),
        offsets(5),
        many,
        5,
        backend=backend,
    )[chosen]
    exact = formula(spans(many), spans(5), cos, sin, positions, queries=chosen)(*exact_inputs)
    towards = torch.randn(4, 1, 64, device=device)
    gradients = torch.autograd.grad(out, inputs, towards)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, towards.double())
    for got, want in zip((out, *gradients), (exact, *exact_gradients), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)
def test_is_well_registered(backend, case, assert_well_registered):
    """Compiled, `sdpa` cannot read lengths on the host: it pads where it otherwise goes by the sample."""
    arguments = in_fp32(case((3, 2), (0, 2)))

    def function(*inputs):
        return rope_attention(**arguments | dict(zip(LEARNED, inputs, strict=True)), backend=backend)

    assert_well_registered(function, *(arguments[name].requires_grad_() for name in LEARNED))


def test_says_what_auto_takes(case):
    arguments = case((3, 2), (2, 2))
    names = ("qkv", "text_kv", "cu_seqlens", "max_seqlen", "max_seqlen_text")
    backend = chosen_backend(*(arguments[name] for name in names))
    assert backend == "sdpa"  # the CPU, or FP64
    assert torch.equal(rope_attention(**arguments), rope_attention(**arguments, backend=backend))


@pytest.mark.parametrize("installed", [False, True], ids=["nothing installed", "flash-attn-4"])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_says_what_auto_takes_on_a_gpu(capability, installed, monkeypatch):
    """With the line that installs a faster one, where there is one that is not installed."""
    measured = {"rope_attention_uniform": "triton", "rope_attention_ragged": None}
    module = importlib.import_module(
        "millrace.kernels.attention.rope_attention"
    )  # the package has the function
    monkeypatch.setattr(module, "_measured", lambda kind, _device: measured[kind])
    monkeypatch.setattr(module, "_refuse", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    for name in ("is_installed", "is_importable"):
        monkeypatch.setattr(module.backends, name, lambda _name: installed)
    newer = installed and capability == (9, 0)
    ragged = "flash_attn (FlashAttention-4" if newer else "varlen (torch's FlashAttention-2"
    better = f"; faster for ragged batches on this GPU is FlashAttention-4: {INSTALL_FLASH_ATTENTION}"
    assert describe_choice(torch.device("cuda"), torch.bfloat16, 64) == (
        "triton (own fused kernels; measured) up to 512 queries and "
        "sdpa (torch's SDPA, cuDNN first; not measured) for uniform batches, "
        f"{ragged}; not measured) for ragged batches"
        + (better if capability == (9, 0) and not installed else "")
    )
    other = describe_choice(torch.device("cuda"), torch.float32, 64)
    assert other == "sdpa (no other backend for float32 on cuda)"


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("dim", [64, 128])
def test_varlen_matches_the_equations(dim, device, dtype, offsets, spans, assert_accurate):
    lengths, text_lengths = (37, 0, 130, 1), (5, 3, 64, 2)
    cos, sin = table(dim, device)
    positions = torch.randint(SIDE**2, (sum(lengths),), device=device)
    compute = formula(spans(*lengths), spans(*text_lengths), cos, sin, positions)
    bounds = offsets(*lengths), offsets(*text_lengths), max(lengths), max(text_lengths)
    assert_accurate(
        lambda qkv, text_kv, weights: rope_attention(
            qkv, text_kv, *weights.unbind(0), cos, sin, positions, *bounds, backend="varlen"
        ),
        compute,
        qkv=torch.randn(sum(lengths), 3, HEADS, dim),
        text_kv=torch.randn(sum(text_lengths), 2, HEADS, dim),
        weights=torch.rand(3, dim) + 0.5,
    )


INT32 = torch.int32


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"qkv": torch.zeros(5, 2, 2, 8)}, r"qkv has shape \(5, 2, 2, 8\), expected \(T, 3, H, D\)"),
        ({"text_kv": torch.zeros(4, 2, 3, 8)}, r"text_kv has shape \(4, 2, 3, 8\), expected \(S, 2, 2, 8\)"),
        ({"q_weight": torch.zeros(9)}, r"q_weight has shape \(9,\), expected \(8,\)"),
        ({"k_weight": torch.zeros(9)}, r"k_weight has shape \(9,\), expected \(8,\)"),
        ({"text_k_weight": torch.zeros(9)}, r"text_k_weight has shape \(9,\), expected \(8,\)"),
        ({"cos": torch.zeros(6, 8)}, r"cos has shape \(6, 8\), expected \(P, 4\)"),
        ({"sin": torch.zeros(6, 8)}, r"sin has shape \(6, 8\), expected \(P, 4\)"),
        ({"positions": torch.zeros(4, dtype=torch.int64)}, r"positions has shape \(4,\), expected \(5,\)"),
        (
            {"cu_seqlens": torch.tensor([0, 2, 5])},
            r"cu_seqlens is \(3,\) torch.int64, expected .* torch.int32",
        ),
        (
            {"cu_seqlens_text": torch.tensor([0, 4])},
            r"cu_seqlens_text is \(2,\) torch.int64, expected .*int32",
        ),
        ({"cu_seqlens_text": torch.tensor([0, 4], dtype=INT32)}, "cu_seqlens_text has 2 entries, expected 3"),
        ({"backend": "quick"}, "backend is 'quick', expected one of: auto, reference, triton, sdpa"),
    ],
)
def test_says_which_argument_is_wrong(wrong, message):
    right = {
        "qkv": torch.zeros(5, 3, 2, 8),
        "text_kv": torch.zeros(4, 2, 2, 8),
        "q_weight": torch.ones(8),
        "k_weight": torch.ones(8),
        "text_k_weight": torch.ones(8),
        "cos": torch.ones(6, 4),
        "sin": torch.zeros(6, 4),
        "positions": torch.zeros(5, dtype=torch.int64),
        "cu_seqlens": torch.tensor([0, 2, 5], dtype=INT32),
        "cu_seqlens_text": torch.tensor([0, 1, 4], dtype=INT32),
        "max_seqlen": 3,
        "max_seqlen_text": 3,
    }
    with pytest.raises(ValueError, match=message):
        rope_attention(**right | wrong)
