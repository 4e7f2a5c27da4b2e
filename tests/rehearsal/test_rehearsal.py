"""Every shipped configuration trains a step on a CUDA device that is not there, and what would stop it does.

Nothing is computed: what is tested is that all tensors of a step are where they have to be, that the host
waits for none of them, and that each kernel which a configuration launches is compiled ahead of time.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from millrace.engine.losses.flow_matching import FlowMatching
from millrace.kernels.attention import prologue
from millrace.kernels.ops import gated_residual, geglu
from millrace.kernels.support.registration import HAS_TRITON, INTERPRETING
from tests.rehearsal import __main__ as command
from tests.rehearsal.backward_pass import backward
from tests.rehearsal.pretended_cuda import DEVICE, HostRead, pretended_cuda
from tests.rehearsal.step import rehearse
from tests.rehearsal.table import Table, explain, stages

pytestmark = pytest.mark.skipif(
    INTERPRETING or not HAS_TRITON, reason="asks Triton's compiler, which its interpreter replaces"
)
STAGES = dict(stages())
SMALL = STAGES["quickstart"]

TWO_DEVICES = "found at least two devices, cuda:0 and cpu"
ON_HOST = torch.ones(32)
"""A constant that somebody forgot to move."""


@pytest.fixture(scope="module")
def table():
    return Table()


@pytest.mark.parametrize("name", STAGES)
def test_rehearses_and_launches_what_is_declared(name, table):
    row = table.row(name, STAGES[name])
    assert row.rehearsed.calls.total() > 0
    assert [explain(one, table.declared) for one in row.missing] == []


def kernels_of_liger(rehearsed):
    prefix = "liger_kernel.ops."
    return {one.file.removeprefix(prefix) for one in rehearsed.specialisations if one.file.startswith(prefix)}


def test_the_activation_of_liger_kernel(liger):
    """Without a wait, with results as its fake implementation says, on the device."""
    config = SMALL.model_copy(update={"model": SMALL.model.model_copy(update={"geglu_backend": "liger"})})
    rehearsed, usual = rehearse(config), rehearse(SMALL)
    for name in ("geglu", "geglu_backward"):
        other = name.replace("geglu", "geglu_liger")
        assert rehearsed.calls[other] == usual.calls[name] > 0
        assert rehearsed.calls[name] == usual.calls[other] == 0
    assert kernels_of_liger(rehearsed) == {"geglu"}
    assert kernels_of_liger(usual) == set()


@pytest.mark.parametrize("kernels", ["auto", "hf"])
def test_a_text_encoder_on_the_kernels_of_liger_kernel(kernels, liger):
    text = SMALL.conditioning.text.model_copy(update={"kind": "t5gemma", "kernels": kernels})
    model = SMALL.model.model_copy(update={"context_dim": 2304})
    conditioning = SMALL.conditioning.model_copy(update={"text": text})
    config = SMALL.model_copy(update={"conditioning": conditioning, "model": model})
    found = kernels_of_liger(rehearse(config, {"t5gemma"}))
    assert found == ({"rms_norm", "rope", "geglu"} if kernels == "auto" else set())


FAULTS = {
    "constant of the host": (lambda t: t + ON_HOST, RuntimeError, TWO_DEVICES),
    "new tensor on the host": (lambda t: torch.cat((t, torch.ones(1)))[:-1], RuntimeError, TWO_DEVICES),
    "item": (lambda t: t * t.max().item(), RuntimeError, "_local_scalar_dense"),
    "truth": (lambda t: t + 1 if t.any() else t, RuntimeError, "_local_scalar_dense"),
    "mask as index": (lambda t: t[t > 0], RuntimeError, "nonzero"),
    "copy to the host": (lambda t: t.cpu().to(DEVICE), HostRead, "from the device"),
    "copy that waits": (lambda t: t + torch.ones(32).to(DEVICE), HostRead, "to the device"),
    "number that waits": (lambda t: t + torch.tensor(1.0, device=DEVICE), HostRead, "to the device"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_finds_a_fault_in_a_step(fault, monkeypatch):
    spoil, error, told = FAULTS[fault]
    time = FlowMatching.time
    monkeypatch.setattr(FlowMatching, "time", lambda flow, index: spoil(time(flow, index)))
    with pytest.raises(error, match=told):
        rehearse(SMALL)


def test_finds_a_fault_in_a_backward_pass(monkeypatch):
    run = geglu._GeGLU.backward
    monkeypatch.setattr(
        geglu._GeGLU, "backward", lambda ctx, grad: (run(ctx, grad)[0] * torch.ones(1120), None)
    )
    with pytest.raises(RuntimeError, match=TWO_DEVICES):
        rehearse(SMALL)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda x: x * ON_HOST[:1], TWO_DEVICES),
        (lambda x: x * x.sum().item(), "_local_scalar_dense"),
    ],
    ids=["constant of the host", "item"],
)
def test_finds_a_fault_in_a_launcher(spoil, told, monkeypatch):
    monkeypatch.setattr(gated_residual, "unit_stride", spoil)
    with pytest.raises(RuntimeError, match=told):
        rehearse(SMALL)


def test_finds_a_fake_implementation_that_differs(monkeypatch):
    monkeypatch.setattr(gated_residual, "unit_stride", lambda x: x.double())
    with pytest.raises(AssertionError, match="the launcher returns"):
        rehearse(SMALL)


def test_tells_what_is_not_declared(monkeypatch, capsys):
    """A row for each stage, and for each kernel what it is compiled for beyond what is declared."""
    monkeypatch.setattr(geglu, "configurations", tuple)
    launches = prologue.configurations()
    monkeypatch.setattr(prologue, "configurations", lambda: launches[:4])
    assert command.main(["quickstart"]) == 1
    told = capsys.readouterr().out
    assert "geglu: geglu_fwd_kernel: not declared at all (quickstart)" in told
    assert "attention.prologue: rope_attention_prologue_fwd_kernel: qkv *fp32 D, declared *bf16 D" in told


def test_prints_a_table(capsys):
    assert command.main(["quickstart"]) == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split()[:2] == ["configuration", "operators"]
    assert row.split()[0] == "quickstart"
    assert row.split()[4] == "none"


def test_the_device_is_gone_afterwards():
    with pretended_cuda():
        assert torch.empty(1, device=DEVICE).is_cuda
        assert torch.cuda.is_available()
    assert torch.cuda.is_available() == bool(torch.cuda.device_count())
    assert type(torch.empty(1)) is torch.Tensor


def test_walks_backward_as_autograd_does():
    """Results with several users and without any, an `autograd.Function`, a region that is recomputed."""

    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, _factor):
            ctx.save_for_backward(x)
            return x * x, x.exp()

        @staticmethod
        def backward(ctx, first, second):
            (x,) = ctx.saved_tensors
            return 2 * x * first + x.exp() * second, None, None

    layer, x = torch.nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)
    hidden = layer(x)
    square, _ = Both.apply(hidden, 2.0)
    square = square + checkpoint(lambda y: y.sin() * y, square + x, use_reentrant=False)
    loss = (square.unbind(0)[1] + hidden.double().sum(0)).sum()
    leaves = [x, *layer.parameters()]
    got = backward(loss)
    for leaf, wanted in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(got[leaf], wanted, rtol=0, atol=0)
