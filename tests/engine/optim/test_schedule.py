"""Learning rates at the points that define each schedule, and against PyTorch's schedulers."""

import math

import pytest
import torch

from millrace.engine.config import Schedule
from millrace.engine.optim.schedule import learning_rate

PEAK, STEPS = 2e-4, 100


def rates(**schedule):
    config = Schedule(**schedule)
    return [learning_rate(step, PEAK, config, STEPS) for step in range(STEPS)]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_warm_up_rises_evenly_to_the_peak(kind):
    found = rates(kind=kind, warmup=10)
    assert found[:10] == pytest.approx([PEAK * k / 10 for k in range(1, 11)])
    assert max(found) == PEAK == found[9]


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_the_last_step_has_the_final_rate(kind, final):
    found = rates(kind=kind, warmup=10, final=final)
    assert found[-1] == pytest.approx(PEAK * final, abs=1e-18)
    assert found[10:] == sorted(found[10:], reverse=True)


def test_constant_stays():
    assert rates(kind="constant", warmup=10, final=0.1)[10:] == [PEAK] * 90
    assert rates(kind="constant", warmup=0) == [PEAK] * STEPS


def test_linear():
    found = rates(kind="linear", warmup=20, final=0.5)
    assert found[59] == pytest.approx(PEAK * 0.75)  # 40 of 80 steps after the warm-up
    assert found[79] == pytest.approx(PEAK * (1 - 0.5 * 60 / 80))


def test_cosine():
    found = rates(kind="cosine", warmup=20, final=0.2)
    assert found[59] == pytest.approx(PEAK * 0.6)
    assert found[39] == pytest.approx(PEAK * (0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2))


def test_cosine_is_pytorchs():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=PEAK)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=0.1 * PEAK)
    found = rates(kind="cosine", warmup=0, final=0.1)
    for rate in found:
        optimizer.step()
        scheduler.step()
        assert rate == pytest.approx(scheduler.get_last_lr()[0])


def test_warm_up_stable_decay():
    found = rates(kind="wsd", warmup=10, decay=0.2)
    assert found[9:80] == [PEAK] * 71
    assert found[80:] == pytest.approx([PEAK * (1 - k / 20) for k in range(1, 21)])


def test_wsd_whose_decay_would_begin_in_the_warm_up():
    found = rates(kind="wsd", warmup=60, decay=0.9)
    assert found[59] == PEAK
    assert found[79] == pytest.approx(PEAK / 2)


def test_a_warm_up_longer_than_the_run_just_rises():
    config = Schedule(kind="cosine", warmup=1000)
    assert [learning_rate(step, PEAK, config, 3) for step in range(3)] == pytest.approx(
        [PEAK / 1000, PEAK * 2 / 1000, PEAK * 3 / 1000]
    )
