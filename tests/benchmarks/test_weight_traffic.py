"""Ledger of the weights of a step: what is counted, and that the step moves no more than it must."""

import pytest
import torch

from millrace.benchmarks.models import weight_traffic
from millrace.benchmarks.models.ledger_operators import costs
from millrace.benchmarks.report import weight_traffic_report as report

aten = torch.ops.aten
ELEMENTS = 1000


def moved(operator, *arguments, **keywords):
    """Bytes for each element."""
    result = operator(*arguments, **keywords)
    return sum(cost.moved for cost in costs(operator, arguments, keywords, result, "cpu")) / ELEMENTS


def test_operators_of_an_update():
    full, half = torch.ones(ELEMENTS), torch.ones(ELEMENTS, dtype=torch.bfloat16)
    assert moved(aten._foreach_copy_.default, [half], [full]) == 6  # reads FP32, writes BF16
    assert moved(aten.add_.Tensor, full, half) == 10  # one pass over a BF16 gradient
    state = [[torch.ones(ELEMENTS)] for _ in range(4)]
    rest = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.9, "weight_decay": 0.0, "eps": 1e-8}
    rest |= {"amsgrad": False, "maximize": False}
    adam = aten._fused_adamw_.default
    plain = moved(adam, *state, [], [torch.tensor(1.0)], **rest)
    scaled = moved(adam, *state, [], [torch.tensor(1.0)], **rest, grad_scale=torch.tensor(2.0))
    assert plain == pytest.approx(28, abs=0.1)  # reads four tensors, writes three
    assert scaled - plain == pytest.approx(4, abs=0.1)  # and the gradient that it scaled


@pytest.mark.slow
def test_a_step_moves_no_more_than_it_must():
    """Bytes for each element, with FP32 masters, BF16 products, EMA, and a gradient that is clipped."""
    accumulation = 4
    alone, shared = (
        weight_traffic.measure([stage], [processes], accumulation)[0] for stage, processes in ((0, 1), (1, 2))
    )
    parts = {part: report.per_step(alone, part) for part in report.PARTS}
    # The first gradient is widened, the others are added in one pass.
    assert parts["forward and backward"] == pytest.approx(6 + (accumulation - 1) * 10, rel=0.02)
    assert parts["reduction"] == 0
    # Norm 4, AdamW 28 and the scaled gradient 4, working copies 6.
    assert parts["update"] == pytest.approx(4 + 28 + 4 + 6, rel=0.02)
    assert parts["average"] == pytest.approx(12, rel=0.02)
    assert report.waits(alone) == report.waits(shared) == 1
    assert alone["collectives"] == []
    reduced = [found for found in shared["collectives"] if found["bytes"] > report.SMALL]
    assert {found["kind"] for found in reduced} == {"all_reduce"}
    assert sum(found["bytes"] for found in reduced) == pytest.approx(4 * shared["elements"], rel=0.01)
    beside = sum(found["bytes"] for found in reduced if found["beside_backward"])
    assert beside > 2 / 3 * 4 * shared["elements"]
