"""Which settings are taken, on devices small enough to leave a choice."""

from dataclasses import replace

import pytest

from millrace.engine.planning.devices import GPUS
from millrace.engine.planning.search import POLICIES, TIE, Planner
from millrace.engine.util.errors import UserError

WIDE = {
    "model": {"width": 64, "heads": 2, "depth": 4},
    "data": {"resolution": 64, "global_batch": 16},
    "sampling": {"every_steps": 0},
}


@pytest.fixture
def planner(runs, tmp_path):
    def make(ranks=2, memory=80e9, *changes):
        return Planner(runs.config(tmp_path, WIDE, *changes), ranks, replace(GPUS["h100"], memory=memory))

    return make


def test_room_for_everything(planner):
    best, found = planner().best()
    assert (best.stage, best.micro_batch, best.policy) == (1, 8, "none")
    assert {option.stage for option in found} == {0, 1, 2, 3}
    assert {(o.stage, o.policy) for o in found} == {
        (stage, policy) for stage in range(4) for policy in POLICIES if (stage, policy) != (3, "selective")
    }
    fastest = min(option.step.seconds for option in found)
    assert best.step.seconds <= fastest * (1 + TIE)


def test_of_stages_that_are_as_fast_the_simplest_is_taken(planner):
    """Alone there is nothing to shard; 1 before 0 where only 1 hides its reduction."""
    assert {option.stage for option in planner(1).options()} == {0}
    pair = planner()
    assert pair.simplest == (1, 0, 2, 3)
    without = Planner(pair.config, 2, replace(pair.device, overlaps=False))
    assert without.best()[0].stage == 0


def test_little_memory_takes_smaller_micro_batches_or_recomputes(planner):
    roomy = planner()
    whole = roomy.option(0, 8, "none").memory.peak
    tight = planner(2, 0.75 * whole / roomy.device.usable)
    best, found = tight.best()
    assert best.fits
    assert best.memory.peak <= tight.device.capacity < whole
    assert (best.micro_batch, best.policy) != (8, "none")
    for option in found:
        smaller = [size for size in tight.micro_batches() if size > option.micro_batch]
        assert all(not tight.option(option.stage, size, option.policy).fits for size in smaller)


def test_nothing_fits(planner):
    with pytest.raises(UserError, match=r"no setting fits 2 x H100 SXM: .* take more devices") as raised:
        planner(2, 1e5).best()
    assert "\n" not in str(raised.value)


def test_sharding_lets_a_large_model_fit(planner):
    small_batch = {"data": {"resolution": 16, "global_batch": 8}}
    roomy = planner(8, 80e9, small_batch)
    memory = {stage: roomy.option(stage, 1, "none").memory.peak for stage in range(4)}
    between = (memory[0] + memory[2]) / 2
    best, _ = planner(8, between / roomy.device.usable, small_batch).best()
    assert best.stage > 0


@pytest.mark.parametrize(
    ("ranks", "message"),
    [(3, "data.global_batch 16 is not a multiple of 3 devices; set it to 18, or take 2"), (0, "is 0")],
)
def test_devices_that_do_not_divide_the_batch(planner, ranks, message):
    with pytest.raises(UserError, match=message):
        planner(ranks)


def test_activations_in_between_are_interpolated(planner):
    whole = planner(1, 80e9, {"data": {"global_batch": 96}})
    exact = planner(1, 80e9, {"data": {"global_batch": 96}})
    assert exact.micro_batches()[0] == 96
    direct = exact._trace("none", 48, 0)
    assert whole.traced("none", 48, 0).peak == pytest.approx(direct.peak, rel=0.02)
    assert whole.traced("none", 48, 0).moved == pytest.approx(direct.moved, rel=0.02)


def test_what_the_engine_refuses_is_no_option(planner):
    compiled = planner(2, 80e9, {"run": {"compile": True}})
    assert "selective" not in {option.policy for option in compiled.options()}
    low = planner(2, 80e9, {"precision": {"master": "bfloat16", "compute": "bfloat16"}})
    assert {option.stage for option in low.options()} == {0}


def test_contrastive_flow_matching_has_a_partner(planner):
    assert planner().micro_batches() == [8, 4, 2, 1]
    assert planner(2, 80e9, {"objective": {"contrastive_weight": 0.05}}).micro_batches() == [8, 4, 2]
