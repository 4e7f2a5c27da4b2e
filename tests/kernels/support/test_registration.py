"""Which implementation of an operator runs, and on which device."""

import ast
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import millrace.kernels
from millrace import kernels
from millrace.kernels.support import registration
from millrace.kernels.support.philox import uniform
from millrace.kernels.support.registration import FLOATS, HAS_TRITON, INTERPRETING

FILES = sorted(Path(millrace.kernels.__file__).parent.rglob("*.py"))


def operators_with_kernels() -> set[str]:
    """Names of all operators that are registered with a launcher of Triton kernels, read from the sources."""
    names = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "register":
                schema = node.args[0]
                text = schema.values[0] if isinstance(schema, ast.JoinedStr) else schema
                if any(keyword.arg == "triton" for keyword in node.keywords):
                    names.add(text.value.partition("(")[0])
    return names


def run_every_operation(device):
    """All public operations forward and backward, on two samples of 4 image and 3 text tokens."""
    width, heads = 32, 2
    real = {"device": device, "requires_grad": True}
    offsets, text_offsets = (torch.tensor([0, n, 2 * n], dtype=torch.int32, device=device) for n in (4, 3))
    samples = torch.arange(2, device=device)
    rows, more, vectors = torch.randn(8, width, **real), torch.randn(8, width, **real), torch.randn(2, width)
    vectors = vectors.to(device).requires_grad_()
    t, index = torch.rand(2, device=device), torch.tensor([0, 3, 5], device=device)
    attention = {
        "qkv": torch.randn(8, 3, heads, 16, **real),
        "text_kv": torch.randn(6, 2, heads, 16, **real),
        **{name: torch.rand(16, **real) for name in ("q_weight", "k_weight", "text_k_weight")},
        **{name: torch.rand(4, 8, device=device) for name in ("cos", "sin")},
        "positions": torch.arange(4, device=device).repeat(2),
        "cu_seqlens": offsets,
        "cu_seqlens_text": text_offsets,
        "max_seqlen": 4,
        "max_seqlen_text": 3,
    }
    plain = rows.detach()
    outputs = [
        kernels.rope_attention(**attention, backend="triton"),
        kernels.rope_attention(**attention, backend="sdpa"),
        kernels.flow_loss(rows, plain, plain + 1, t, offsets)[0],
        kernels.gated_residual(rows, more, vectors, offsets),
        *kernels.gated_residual_norm_modulate(rows, more, vectors, vectors, vectors, offsets),
        kernels.gather_fuse(
            rows, rows[:3], index, vectors[0], torch.randn(width, 2 * width, **real), more[0]
        ),
        kernels.geglu(rows),
        kernels.norm_modulate(rows, vectors, vectors, offsets),
        kernels.gather_tokens(rows, index),
        kernels.scatter_tokens(rows, more[:3], index),
    ]
    if device == "cpu" or torch.cuda.get_device_capability() >= (8, 9):
        outputs.append(kernels.fp8_linear(rows, torch.randn(16, width, **real)))
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    kernels.add_noise(plain, plain, t, offsets)
    kernels.add_noise(plain, samples, t, offsets)
    kernels.newton_schulz(torch.randn(1, 130, 140, device=device), steps=1)  # one tile is left to cuBLAS
    uniform(samples, 3)
    for structured in (False, True):
        kernels.sample_route(offsets, 0.5, 0, samples, (2, 2), structured)


class _CountLaunches(TorchDispatchMode):
    """Kernels that each `millrace::` operator has started, by its name."""

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.of_operator, self.total = {}, 0
        if INTERPRETING:
            from triton.runtime.interpreter import GridExecutor as launcher

            method = "__call__"
        else:
            from triton.runtime.jit import JITFunction as launcher

            method = "run"
        launch = getattr(launcher, method)

        def counted(*args, **kwargs):
            self.total += 1
            return launch(*args, **kwargs)

        monkeypatch.setattr(launcher, method, counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = self.total
        result = func(*args, **kwargs or {})
        if func.namespace == "millrace":
            name = func.name().removeprefix("millrace::")
            self.of_operator[name] = self.of_operator.get(name, 0) + self.total - before
        return result


def test_every_operator_with_kernels_launches_them(device, monkeypatch):
    """An operator that is plain PyTorch in silence would make all other tests here test that twice."""
    if device == "cpu" and not INTERPRETING:
        pytest.skip("kernels run on CUDA, and on the CPU under TRITON_INTERPRET=1")
    with _CountLaunches(monkeypatch) as counted:
        run_every_operation(device)
    # Liger's kernels are another package's, with tests of their own here (test_geglu.py).
    wanted = {name for name in operators_with_kernels() if "liger" not in name}
    assert len(wanted) > 20
    assert {name for name, launches in counted.of_operator.items() if launches} == wanted


@pytest.mark.parametrize("is_cuda", [False, True], ids=["cpu", "cuda"])
@pytest.mark.parametrize("dtypes", [FLOATS, (torch.int64,)], ids=["floats", "keys"])
def test_device_and_dtype_of_the_first_argument_choose(dtypes, is_cuda):
    """FP64 has no kernels."""
    for dtype in (*FLOATS, torch.float64, torch.int64):
        tensor = SimpleNamespace(is_cuda=is_cuda, dtype=dtype)
        has = HAS_TRITON if is_cuda else INTERPRETING
        assert registration.uses_triton(tensor, dtypes) == (has and dtype in dtypes)


@pytest.mark.parametrize(
    ("is_cuda", "index", "entered"),
    [(True, 0, []), (True, 1, [1]), (False, -1, [])],
    ids=["current device", "another device", "cpu"],
)
def test_launches_on_the_device_of_the_tensors(is_cuda, index, entered, monkeypatch):
    """GPU 0 is the current one."""
    switched = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda i: nullcontext(switched.append(i)))
    monkeypatch.setattr(registration, "uses_triton", lambda tensor, dtypes: True)
    run = registration._choose(lambda *_: "eager", lambda *given: ("triton", *given[1:]), FLOATS)
    assert run(SimpleNamespace(is_cuda=is_cuda, get_device=lambda: index), 2, 3) == ("triton", 2, 3)
    assert switched == entered
