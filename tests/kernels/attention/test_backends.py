"""Each library's attention is given the right rows and offsets.

The libraries run on CUDA alone. Stand-ins with their signatures attend sample by sample according to the
offsets that they are given, so a wrong layout, offset, bound or scale shows on the CPU.
"""

import importlib
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend

from millrace.kernels import rope_attention
from millrace.kernels.attention import backends
from millrace.kernels.support import choice

CASES = {
    "ragged": ((3, 2, 5), (2, 4, 0)),
    "empty samples": ((0, 4, 0), (2, 1, 0)),
    "uniform": ((3, 3), (2, 2)),
    "uniform images, ragged text": ((3, 3), (0, 2)),
}
LEARNED = ("qkv", "text_kv", "q_weight", "k_weight", "text_k_weight")
FLASH_ATTN_4, FLASH_ATTN_2 = "flash_attn.cute", "flash_attn.flash_attn_interface"
module = importlib.import_module("millrace.kernels.attention.rope_attention")


@pytest.fixture(params=CASES.values(), ids=CASES)
def arguments(request, offsets, device):
    lengths, text_lengths = request.param
    total, dim, kind = sum(lengths), 16, {"dtype": torch.float64, "device": device}
    learned = {
        "qkv": torch.randn(total, 3, 2, dim, **kind),
        "text_kv": torch.randn(sum(text_lengths), 2, 2, dim, **kind),
        **{name: torch.rand(dim, **kind) + 0.5 for name in LEARNED[2:]},
    }
    return {name: value.requires_grad_() for name, value in learned.items()} | {
        "cos": torch.randn(4, dim // 2, device=device),
        "sin": torch.randn(4, dim // 2, device=device),
        "positions": torch.randint(4, (total,), device=device),
        "cu_seqlens": offsets(*lengths),
        "cu_seqlens_text": offsets(*text_lengths),
        "max_seqlen": max(lengths),
        "max_seqlen_text": max(text_lengths),
        "scale": 0.3,
    }


def assert_equals_reference(arguments, backend):
    """Value and gradients."""
    leaves = [arguments[name] for name in LEARNED]
    got, expected = (rope_attention(**arguments, backend=name) for name in (backend, "reference"))
    towards = torch.randn_like(expected)
    torch.testing.assert_close(got, expected)
    gradients = torch.autograd.grad(got, leaves, towards)
    for x, y in zip(gradients, torch.autograd.grad(expected, leaves, towards), strict=True):
        torch.testing.assert_close(x, y)


def attend(q, k, v, offsets, key_offsets, longest, longest_key, scale):
    """What all these libraries compute."""
    assert offsets.dtype == key_offsets.dtype == torch.int32
    assert longest >= int(offsets.diff().max())
    assert longest_key >= int(key_offsets.diff().max())
    assert (int(offsets[-1]), int(key_offsets[-1])) == (len(q), len(k))
    parts = []
    for b in range(len(offsets) - 1):
        rows, keys = (slice(x[b], x[b + 1]) for x in (offsets.tolist(), key_offsets.tolist()))
        logits = torch.einsum("nhd,mhd->hnm", q[rows], k[keys]) * scale
        parts.append(torch.einsum("hnm,mhd->nhd", logits.softmax(-1), v[keys]))
    return torch.cat(parts)


def test_padded_sdpa(arguments, monkeypatch):
    """The path of CUDA, and of the CPU while it compiles: one call, padding masked away.

    Memory that nobody writes holds NaN in these tests, so padding that leaks shows.
    """
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_equals_reference(arguments, "sdpa")


def test_padded_sdpa_with_loose_bounds(arguments, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    arguments["max_seqlen"] += 2
    arguments["max_seqlen_text"] += 1
    assert_equals_reference(arguments, "sdpa")


def test_varlen(arguments, monkeypatch):
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale):
        return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    assert_equals_reference(arguments, "varlen")


@pytest.mark.parametrize("with_lse", [False, True], ids=["output", "output and lse"])
def test_flash_attn(with_lse, arguments, monkeypatch):
    def flash_attn_varlen_func(
        q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, deterministic
    ):
        assert deterministic  # asked for in every test
        out = attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)
        return (out, None) if with_lse else out

    library = ModuleType("flash_attn")
    library.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", library)
    monkeypatch.setattr(backends, "is_importable", lambda module: module == FLASH_ATTN_2)
    assert_equals_reference(arguments, "flash_attn")


def test_xformers(arguments, monkeypatch):
    def memory_efficient_attention(query, key, value, attn_bias, scale):
        assert attn_bias.k_seqinfo.seqstart_py[-1] == key.shape[1]
        q_info, k_info = attn_bias.q_seqinfo, attn_bias.k_seqinfo
        bounds = q_info.seqstart, k_info.seqstart, q_info.max_seqlen, k_info.max_seqlen
        return attend(query[0], key[0], value[0], *bounds, scale)[None]

    names = "xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias"
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["xformers.ops"].memory_efficient_attention = memory_efficient_attention
    bias = sys.modules["xformers.ops.fmha.attn_bias"]
    bias.BlockDiagonalMask = lambda q, k: SimpleNamespace(q_seqinfo=q, k_seqinfo=k)
    bias._SeqLenInfo = SimpleNamespace
    monkeypatch.setattr(backends, "is_importable", lambda module: module == "xformers")
    assert_equals_reference(arguments, "xformers")


@pytest.mark.parametrize(
    ("backend", "line"),
    [
        ("flash_attn", "pip install flash-attn --no-build-isolation"),
        ("xformers", "pip install xformers"),
    ],
)
@pytest.mark.parametrize("arguments", [CASES["uniform"]], ids=["uniform"], indirect=True)
def test_says_what_to_install(backend, line, arguments, monkeypatch):
    monkeypatch.setattr(backends, "is_importable", lambda module: False)
    with pytest.raises(ImportError, match=f"attention backend '{backend}' needs .*{line}"):
        rope_attention(**arguments, backend=backend)


@pytest.fixture
def install(monkeypatch):
    """A GPU of a capability with these modules and no others; by default those of version 4 come from it."""

    def build(capability, modules, distribution="flash-attn-4"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(backends, "is_importable", lambda module: module in modules)
        monkeypatch.setattr(backends, "is_installed", lambda name: name == distribution)

    return build


@pytest.mark.parametrize(
    ("capability", "modules", "distribution", "version"),
    [
        ((9, 0), {FLASH_ATTN_4, "flash_attn_interface", FLASH_ATTN_2}, "flash-attn-4", "flash_attn.cute"),
        ((9, 0), {FLASH_ATTN_4, "flash_attn_interface", FLASH_ATTN_2}, "flash-attn", "flash_attn_interface"),
        ((9, 0), {FLASH_ATTN_4, "cutlass", FLASH_ATTN_2}, "flash-attn", "flash_attn"),
        ((9, 0), {FLASH_ATTN_2}, "flash-attn-4", "flash_attn"),
        ((10, 0), {FLASH_ATTN_2}, "flash-attn", "flash_attn"),
        (
            (10, 0),
            {"flash_attn_interface", FLASH_ATTN_2},
            "flash-attn",
            "flash_attn",
        ),  # 3 is for Hopper alone
        ((8, 0), {FLASH_ATTN_4, "flash_attn_interface", FLASH_ATTN_2}, "flash-attn-4", "flash_attn"),
    ],
)
def test_takes_the_newest_flash_attn(capability, modules, distribution, version, install):
    """flash-attn 2 brings a folder `cute` too, so that version 4 is known by what pip installed."""
    install(capability, modules, distribution)
    assert backends._newest_flash_attention(0) == version


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_cudnn_attention_takes_no_mask(masked, monkeypatch):
    """Its gradients with a mask can be NaN; without one it comes first."""
    orders = []
    monkeypatch.setattr(
        backends, "sdpa_kernel", lambda order, set_priority: nullcontext(orders.append(list(order)))
    )
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **_: q)
    rows = SimpleNamespace(is_cuda=True, transpose=lambda *_: rows)
    mask = torch.ones(1, 1, 1, 3, dtype=torch.bool) if masked else None
    backends._attend(rows, rows, rows, mask, 1.0)
    assert (orders[0][0] == SDPBackend.CUDNN_ATTENTION) == (not masked)
    assert (SDPBackend.CUDNN_ATTENTION in orders[0]) == (not masked)
    assert {SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH} <= set(orders[0])


@pytest.mark.parametrize(
    ("backend", "module", "says"),
    [
        ("sdpa", None, "cuDNN first"),
        ("varlen", None, "FlashAttention-2"),
        ("triton", None, "own fused kernels"),
        ("flash_attn", FLASH_ATTN_4, "FlashAttention-4"),
        ("flash_attn", "flash_attn_interface", "FlashAttention-3"),
        ("flash_attn", FLASH_ATTN_2, "FlashAttention-2"),
        ("xformers", None, "xformers"),
    ],
)
def test_says_what_a_backend_is(backend, module, says, install):
    install((9, 0), {module})
    assert says in backends.implementation(backend, 0)


def test_flash_attn_4_stays_out_of_compiled_graphs(monkeypatch):
    """Dynamo could not trace it: what comes before is one graph, and what comes after is another."""

    def flash_attn_varlen_func(q, k, v, *, softmax_scale, **offsets):
        assert not torch.compiler.is_compiling()
        return attend(q, k, v, *(offsets[name] for name in names), softmax_scale), None

    names = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
    for name in ("flash_attn", FLASH_ATTN_4):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[FLASH_ATTN_4].flash_attn_varlen_func = flash_attn_varlen_func
    rows = torch.randn(5, 3, 2, 16)
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)

    def call(q):
        settings = dict(zip(names, (offsets, offsets, 3, 3), strict=True)) | {"softmax_scale": 0.3}
        return backends._flash_attention_4(q * 2, rows[:, 1], rows[:, 2], **settings)[0] + 1

    torch.testing.assert_close(torch.compile(call, backend="eager")(rows[:, 0]), call(rows[:, 0]))


@pytest.fixture
def gpu(monkeypatch, install):
    """A Hopper without optional packages and with nothing measured; `gpu(uniform="triton")` makes its table,
    that of GPU number 1."""
    monkeypatch.setattr(choice, "_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(choice, "_told", set())
    install((9, 0), ())

    def measure(**fastest):
        table = {f"rope_attention_{kind}": name for kind, name in fastest.items()}
        other = dict.fromkeys(table, "reference")
        monkeypatch.setattr(choice, "measured_choices", lambda: {"GPU 1": table, "GPU 0": other})

    measure()
    return measure


def choose(lengths, dtype=torch.bfloat16, dim=64):
    qkv = SimpleNamespace(shape=(sum(lengths), 3, 2, dim), dtype=dtype, device=torch.device("cuda", 1))
    return module.chosen_backend(qkv, torch.empty(6, 2, 2, dim), torch.empty(3), max(lengths), 3)


@pytest.mark.parametrize(
    ("lengths", "dtype", "dim", "backend"),
    [
        ((4, 4), torch.bfloat16, 64, "sdpa"),
        ((4, 3), torch.bfloat16, 64, "varlen"),
        ((4, 3), torch.float16, 264, "sdpa"),
        ((4, 3), torch.float16, 36, "sdpa"),
        ((4, 3), torch.float32, 64, "sdpa"),
    ],
)
def test_choice_on_cuda(lengths, dtype, dim, backend, gpu):
    """By rule, where nothing is measured."""
    assert choose(lengths, dtype, dim) == backend


@pytest.mark.parametrize(
    ("capability", "modules", "distribution", "backend"),
    [
        ((9, 0), {FLASH_ATTN_4}, "flash-attn-4", "flash_attn"),
        ((9, 0), {"flash_attn_interface"}, "flash-attn-3", "flash_attn"),
        ((9, 0), {FLASH_ATTN_4, FLASH_ATTN_2}, "flash-attn", "varlen"),  # the folder `cute` of version 2
        ((9, 0), {FLASH_ATTN_2}, "flash-attn", "varlen"),  # no faster than torch's
        ((10, 3), {FLASH_ATTN_4}, "flash-attn-4", "flash_attn"),
        ((10, 0), {"flash_attn_interface"}, "flash-attn-3", "varlen"),
        ((12, 0), {FLASH_ATTN_4}, "flash-attn-4", "varlen"),
        ((8, 0), {FLASH_ATTN_4, "flash_attn_interface"}, "flash-attn-4", "varlen"),
    ],
)
def test_newer_flash_attn_for_ragged_batches(capability, modules, distribution, backend, gpu, install):
    """Torch's own is version 2, the slowest of the three on a Hopper."""
    install(capability, modules, distribution)
    assert choose((4, 3)) == backend
    assert choose((4, 4)) == "sdpa"
    assert [choose((4, 3), dim=dim) for dim in (192, 36)] == ["varlen", "sdpa"]
    gpu(ragged="sdpa")
    assert choose((4, 3)) == "sdpa"  # a measurement comes first


def test_choice_by_measurement(gpu, caplog):
    """Where one is recorded for this GPU and shape class."""
    gpu(uniform="triton", ragged="sdpa")
    assert [choose((4, 4)), choose((4, 3))] == ["triton", "sdpa"]
    assert choose((4, 4), torch.float32) == "sdpa"  # measured in 16 bit
    assert not caplog.records


@pytest.mark.parametrize(
    ("backend", "dim", "reason"),
    [
        ("flash_attn", 64, "needs flash-attn"),
        ("xformers", 64, "needs xformers"),
        ("triton", 64, "Triton is not installed"),
        ("triton", 96, "does not take this head_dim"),
        ("triton", 128, "head_dims of at most 64"),
        ("flash_attn", 264, "does not take this head_dim"),
        ("quantum", 64, "no implementation of this name"),
    ],
)
def test_a_measured_choice_that_cannot_run_here(backend, dim, reason, gpu, monkeypatch, caplog):
    """The default is taken, and the log says once why."""
    gpu(uniform=backend)
    lacking = "needs" in reason or "Triton" in reason
    monkeypatch.setattr(backends, "is_importable", lambda name: not lacking)
    monkeypatch.setattr(backends, "HAS_TRITON", not lacking)
    for _ in range(2):
        assert choose((4, 4), dim=dim) == "sdpa"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert reason in record.getMessage()


@pytest.mark.parametrize("dim", [32, 64])
def test_fused_kernels_are_for_short_spans(dim, gpu, caplog):
    gpu(uniform="triton", ragged="triton")
    assert [choose((n, n), dim=dim) for n in (512, 513)] == ["triton", "sdpa"]
    assert [choose((n, 1), dim=dim) for n in (512, 513)] == ["triton", "varlen"]
    assert all("at most 512 queries" in record.getMessage() for record in caplog.records)
    assert len(caplog.records) == 2  # once a shape class
