"""Each library's attention is given the right rows and offsets.

The libraries run on CUDA alone. Stand-ins with their signatures attend sample by sample according to the
offsets that they are given, so a wrong layout, offset, bound or scale shows on the CPU.
"""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from millrace.kernels import rope_attention
from millrace.kernels.attention import backends

CASES = {
    "ragged": ((3, 2, 5), (2, 4, 0)),
    "empty samples": ((0, 4, 0), (2, 1, 0)),
    "uniform": ((3, 3), (2, 2)),
    "uniform images, ragged text": ((3, 3), (0, 2)),
}
LEARNED = ("qkv", "text_kv", "q_weight", "k_weight", "text_k_weight")
FLASH_ATTN_4, FLASH_ATTN_2 = ("flash_attn.cute", "cutlass"), "flash_attn.flash_attn_interface"
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
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
        return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, query.shape[-1] ** -0.5)

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
    monkeypatch.setattr(backends, "_is_installed", lambda name: name == FLASH_ATTN_2)
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
    monkeypatch.setattr(backends, "_is_installed", lambda name: name == "xformers")
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
    monkeypatch.setattr(backends, "_is_installed", lambda name: False)
    with pytest.raises(ImportError, match=f"attention backend '{backend}' needs .*{line}"):
        rope_attention(**arguments, backend=backend)


@pytest.mark.parametrize(
    ("capability", "installed", "version"),
    [
        ((9, 0), {*FLASH_ATTN_4, "flash_attn_interface", FLASH_ATTN_2}, "flash_attn.cute"),
        ((9, 0), {"flash_attn.cute", "flash_attn_interface", FLASH_ATTN_2}, "flash_attn_interface"),
        ((10, 0), {FLASH_ATTN_2}, "flash_attn"),
        ((8, 0), {*FLASH_ATTN_4, "flash_attn_interface", FLASH_ATTN_2}, "flash_attn"),
    ],
)
def test_takes_the_newest_flash_attn(capability, installed, version, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(backends, "_is_installed", lambda name: name in installed)
    assert backends._newest_flash_attention(0) == version


def test_finds_packages():
    assert backends._is_installed("torch.nn")
    assert not backends._is_installed("torch.no_such_part")
    assert not backends._is_installed("no_such_package.part")


@pytest.mark.parametrize(
    ("lengths", "dtype", "backend"),
    [
        ((4, 4), torch.bfloat16, "sdpa"),
        ((4, 3), torch.bfloat16, "varlen"),
        ((4, 3), torch.float32, "sdpa"),
        ((4, 4), torch.float16, "measured"),
    ],
)
def test_choice_on_cuda(lengths, dtype, backend, monkeypatch):
    """By rule, and by measurement where one is recorded for this GPU and shape class."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    if backend == "measured":
        table = {"GPU 1": {"rope_attention_uniform": backend}, "GPU 0": {"rope_attention_uniform": "other"}}
        monkeypatch.setattr(module, "measured_choices", lambda: table)
    qkv = SimpleNamespace(shape=(sum(lengths), 3, 2, 64), dtype=dtype, device=torch.device("cuda", 1))
    chosen = module.chosen_backend(qkv, torch.empty(6, 2, 2, 64), torch.empty(3), max(lengths), 3)
    assert chosen == backend
