"""End of an optimizer step: the norm, what is done with it, and who waits for whom."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch

from millrace.benchmarks.models.weight_ledger import WeightLedger
from millrace.engine.optim.optimizer_step import OptimizerStep
from millrace.engine.trainer import Trainer

STAGES = [0, 1, 2, 3]


class Engine:
    """DeepSpeed's engine at stage 0, as far as a step needs it."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.stepped = (self.optimizer.skip, self.optimizer.gradient_scale)


def step_of(gradients, clip):
    model = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros_like(g)) for g in gradients)
    optimizer = SimpleNamespace(skip=False, gradient_scale=1.0)
    step = OptimizerStep(Engine(optimizer), optimizer, optimizer, model, 0, clip)
    for parameter, gradient in zip(model, gradients, strict=True):
        parameter.grad = gradient
    return step.apply(), optimizer.stepped


def test_norm_is_that_of_all_elements_together():
    parts = [torch.randn(3, 4), torch.randn(5)]
    expected = float(torch.cat([part.double().flatten() for part in parts]).square().sum().sqrt())
    (norm, applied), (skip, scale) = step_of(parts, clip=0.0)
    assert norm == pytest.approx(expected, rel=1e-6)
    assert (applied, skip, scale) == (True, False, 1.0)


def test_clips_to_the_limit_and_no_further():
    gradient = torch.tensor([3.0, 4.0])
    assert step_of([gradient], clip=6.0) == ((5.0, True), (False, 1.0))
    (norm, _), (_, scale) = step_of([gradient], clip=1.0)
    assert norm == 5.0
    assert scale == pytest.approx(0.2, rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_skipped(bad):
    (norm, applied), (skip, _) = step_of([torch.ones(2), torch.tensor([bad])], clip=1.0)
    assert not math.isfinite(norm)
    assert (applied, skip) == (False, True)


def test_a_parameter_without_a_gradient_is_one_whose_gradient_is_zero():
    """So that its moments decay, as they do where DeepSpeed reduces."""
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(2)) for _ in range(2)])
    optimizer = SimpleNamespace(skip=False, gradient_scale=1.0)
    step = OptimizerStep(Engine(optimizer), optimizer, optimizer, model, 0, 0.0)
    model[0].grad = torch.ones(2)
    step.apply()
    assert torch.equal(model[1].grad, torch.zeros(2))


BF16 = {"precision": {"compute": "bfloat16"}, "optimizer": {"clip": 1e-3}, "run": {"steps": 50}}


@pytest.fixture
def trainer(runs, tmp_path, request):
    """After two steps: state is there, and ZeRO-3 knows the order of the layers."""
    stage, changes = request.param
    section = {"zero_optimization": {"stage": stage, **changes}}
    trainer = Trainer(runs.config(tmp_path, BF16, {"deepspeed": section}))
    for _ in range(2):
        trainer.train_step()
    yield trainer
    trainer.sample_log.close()
    trainer.stream.close()
    trainer.run_log.close()


@pytest.mark.parametrize("trainer", [(stage, {}) for stage in STAGES], indirect=True, ids=STAGES)
def test_the_host_reads_the_device_once(trainer):
    """AdamW counts its steps on the host, and DeepSpeed looks at the norm that it was given there."""
    with WeightLedger(trainer, 1) as ledger:
        trainer.train_step()
    host = {"adamw.py: step", "utils.py: is_invalid_grad_norm"}
    assert {where: n for where, n in ledger.reads.items() if where not in host} == {
        "optimizer_step.py: _take_norm": 1
    }


@pytest.mark.parametrize("trainer", [(0, {})], indirect=True)
def test_one_process_reduces_nothing(trainer):
    with WeightLedger(trainer, 1) as ledger:
        trainer.train_step()
    assert ledger.collectives == []
    assert not ledger.bytes["reduction"]


class Stream:
    """A stream, or an accelerator's notion of one; notes who waits for it."""

    def __init__(self):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)


@pytest.mark.parametrize(
    "trainer",
    [(stage, {"overlap_comm": True, "reduce_bucket_size": 4000}) for stage in (1, 2)],
    indirect=True,
    ids=[1, 2],
)
def test_the_device_waits_for_reductions_not_the_host(trainer, monkeypatch):
    """With a second stream, as on CUDA, DeepSpeed's epilogue would synchronise the device."""
    from deepspeed.accelerator import get_accelerator

    zero, current, synchronised = trainer.optimizer_step.zero, Stream(), []
    monkeypatch.setattr(zero, "reduction_stream", Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: current)
    accelerator = get_accelerator()
    for name, value in {
        "resolves_data_dependency": lambda: False,
        "current_stream": lambda *_: current,
        "stream": lambda _stream: contextlib.nullcontext(),
        "synchronize": lambda *_: synchronised.append(1),
    }.items():
        monkeypatch.setattr(accelerator, name, value)
    trainer.train_step()
    assert synchronised == []
    assert current.waited[-1] is zero.reduction_stream
    assert zero.overlap_comm is True
