"""Time of a step against sums done by hand."""

import json
from dataclasses import replace

import pytest

from millrace.benchmarks.report.recording import RESULTS
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.optim.adamw import FUSED_PASSES
from millrace.engine.optim.muon import muon_stacks
from millrace.engine.planning.activations import Traced
from millrace.engine.planning.devices import Device, Hierarchy, Link
from millrace.engine.planning.step_memory import LIVE, Shape, shape_of
from millrace.engine.planning.step_time import (
    AVERAGE,
    accumulation_passes,
    average_bytes,
    copy_passes,
    fetches,
    gathers,
    optimizer_bytes,
    step_of,
    transfers,
)

COUNTED = json.loads((RESULTS / "weights.json").read_text())["rows"]
SHAPE = Shape(parameters=1000, largest=100, tensors=10)
TRACED = Traced(kept=0, peak=0, peak_without_gradients=0, moved=500)
DEVICE = Device(
    "test", 100.0, 50.0, 1e9, Hierarchy(8, Link(1000.0, 0.0), Link(1.0, 0.0)), slack=2.0, overlaps=False
)


@pytest.fixture
def config(runs, tmp_path):
    return runs.config(tmp_path, {"ema": {"enabled": False}})


def moved(config, stage, ranks, micro_batches=1, shape=SHAPE):
    return {(t.kind, t.size) for t in transfers(config, stage, ranks, shape, micro_batches)}


def test_what_each_stage_sends(config):
    assert moved(config, 0, 1) == set()
    assert moved(config, 0, 2, micro_batches=3) == {("all_reduce", 4000)}
    assert moved(config, 1, 2, micro_batches=3) == {("all_reduce", 4000), ("all_gather", 4000)}
    assert moved(config, 2, 2, micro_batches=3) == {("all_reduce", 12_000), ("all_gather", 4000)}
    assert moved(config, 3, 2, micro_batches=3) == {("all_gather", 12_000), ("reduce_scatter", 12_000)}
    large = Shape(LIVE, 100, 10)
    assert gathers(large) == 2
    assert ("all_gather", 8.0 * LIVE) in moved(config, 3, 2, shape=large)


def test_reduction_in_bf16_moves_half(runs, tmp_path):
    config = runs.config(tmp_path, {"precision": {"compute": "bfloat16", "reduce": "bfloat16"}})
    assert moved(config, 1, 2) == {("all_reduce", 2000), ("all_gather", 4000)}


def test_muon_brings_matrices_together(runs, tmp_path):
    muon = runs.config(tmp_path, {"optimizer": {"kind": "muon"}})
    shape = shape_of(muon)
    named = Denoiser(muon.model).named_parameters()
    stacks = muon_stacks(named, muon.optimizer, muon.model).values()
    size = 2 * sum(stack.count * stack.rows * stack.columns for stack in stacks)  # BF16
    assert shape.exchange.bytes == size > 0
    assert ("all_to_all", 2 * size) in moved(muon, 2, 2, shape=shape)
    assert ("all_gather", size) in moved(muon, 0, 2, shape=shape)
    # The products of the orthogonalisation are shared by the processes.
    plain = runs.config(tmp_path)
    less = step_of(plain, 1, 1, DEVICE, TRACED, shape_of(plain), flops=25.0).optimizer
    assert step_of(muon, 1, 1, DEVICE, TRACED, shape, flops=25.0).optimizer == pytest.approx(
        less + shape.exchange.flops / DEVICE.product_flops
    )


def test_weights_are_fetched_in_groups():
    few = {"stage3_prefetch_bucket_size": 300}
    assert fetches(few, SHAPE) == 4
    assert fetches({}, SHAPE) == 1
    assert fetches(few, Shape(1000, 100, 2)) == 2


def test_the_parts_of_a_step(config):
    """8 samples in 4 micro-batches, one process: FLOPs, bytes, and passes over 4000 bytes of parameters."""
    step = step_of(config, 0, 1, DEVICE, TRACED, SHAPE, flops=25.0)
    assert step.compute == pytest.approx(2.0 * (8 * 25 / 100 + 4 * 500 / 50))
    assert step.copies == pytest.approx(4000 / 50)
    assert step.optimizer == pytest.approx(7 * 4000 / 50)
    assert step.accumulation == pytest.approx(3 * 3 * 4000 / 50)  # of 4 micro-batches all but the first
    assert step.casts == step.averages == step.exposed == step.sent == 0
    assert step.seconds == pytest.approx(step.compute + step.accumulation + step.copies + step.optimizer)


def test_every_micro_batch_casts_the_weights_and_their_gradients(config):
    low = replace(TRACED, casts=12_000)
    step = step_of(config, 0, 1, DEVICE, low, SHAPE, flops=25.0)
    assert step.casts == pytest.approx(4 * 12_000 / 50)
    plain = step_of(config, 0, 1, DEVICE, TRACED, SHAPE, flops=25.0)
    assert step.seconds == pytest.approx(plain.seconds + step.casts)


def test_working_copies_are_cast_once_and_take_gradients_in_one_pass(runs, tmp_path):
    config = runs.config(tmp_path, {"precision": {"compute": "bfloat16"}})
    step = step_of(config, 0, 1, DEVICE, replace(TRACED, casts=6000), SHAPE, flops=25.0)
    assert step.casts == pytest.approx((6000 + 4 * 6000) / 50)
    assert step.accumulation == pytest.approx(3 * 4000 / 50)
    gathered = step_of(config, 3, 1, DEVICE, replace(TRACED, casts=12_000), SHAPE, flops=25.0)
    assert gathered.casts == pytest.approx(4 * 12_000 / 50)


@pytest.mark.parametrize("row", COUNTED, ids=lambda row: f"stage {row['stage']}, {row['processes']}")
def test_passes_are_those_that_were_counted(row):
    """Bytes for each element that `python -m benchmarks weights` found, against the planner's sum of them."""
    stage, ranks, micro_batches = row["stage"], row["processes"], row["accumulation"]
    working, owned = stage < 3, ranks if stage else 1
    casts = 6 * (1 + micro_batches) if working else 12 * micro_batches
    passes = (micro_batches - 1) * accumulation_passes(stage, ranks, working) + copy_passes(stage, ranks)
    passes += (FUSED_PASSES + 1 + AVERAGE) / owned  # the counted step clips, and so writes gradients
    found = sum(sum(part.values()) for part in row["bytes"].values())
    assert casts + 4 * passes == pytest.approx(found, rel=0.05)


def test_communication_of_two(config):
    step = step_of(config, 1, 2, DEVICE, TRACED, SHAPE, flops=25.0)
    assert step.sent == 4000 + 2000  # all-reduce: both halves twice; all-gather once
    assert step.communication == pytest.approx(2 * 2 + 2)
    assert step.hidden == 0


def test_reductions_hide_behind_the_backward_pass(runs, tmp_path):
    zero = {"overlap_comm": True, "reduce_bucket_size": 250}
    config = runs.config(tmp_path, {"deepspeed": {"zero_optimization": zero}})
    beside = Device("test", 1.0, 50.0, 1e9, DEVICE.network)
    step = step_of(config, 1, 2, beside, TRACED, SHAPE, flops=25.0)
    assert step.hidden == pytest.approx(4 * 3 / 4)  # of four buckets the last has nothing left
    busy = Device("test", 1e9, 1e9, 1e9, DEVICE.network)
    few = step_of(config, 1, 2, busy, TRACED, SHAPE, flops=25.0)
    assert few.hidden == pytest.approx(few.compute * 2 / 3)  # no more than the backward pass is long
    casting = step_of(config, 1, 2, busy, replace(TRACED, casts=1000), SHAPE, flops=25.0)
    assert casting.hidden == pytest.approx(few.hidden + casting.casts / 2)


def test_attention_has_a_rate_of_its_own(config):
    slow = replace(DEVICE, attention_flops=20.0)
    step = step_of(config, 0, 1, slow, TRACED, SHAPE, flops=25.0, attention=0.2)
    assert step.compute == pytest.approx(2.0 * (8 * (20 / 100 + 5 / 20) + 4 * 500 / 50))
    assert step_of(config, 0, 1, slow, TRACED, SHAPE, flops=25.0).compute < step.compute


def test_a_loader_that_starves(config):
    step = step_of(config, 0, 1, DEVICE, TRACED, SHAPE, flops=25.0, images_per_second=0.002)
    assert step.seconds == pytest.approx(8 / 0.002)
    assert step_of(config, 0, 1, DEVICE, TRACED, SHAPE, 25.0, images_per_second=1e9).starving == 0


def test_the_update_is_shared(runs, tmp_path):
    averaged = runs.config(tmp_path, {"ema": {"enabled": True, "every": 2}})
    for stage, owned in ((0, 4000), (1, 1000)):
        assert optimizer_bytes(averaged, stage, 4, SHAPE, fused=True) == owned * 7
        assert average_bytes(averaged, stage, 4, SHAPE) == owned * 1.5
    fused, loop = (optimizer_bytes(averaged, 1, 4, SHAPE, fused) for fused in (True, False))
    assert loop > fused
    step = step_of(averaged, 0, 1, DEVICE, TRACED, SHAPE, flops=25.0)
    assert step.averages == pytest.approx(1.5 * 4000 / 50)


def test_gradients_are_copied_less_by_more_processes():
    for stage in (1, 2, 3):
        passes = [copy_passes(stage, ranks) for ranks in (2, 4, 64)]
        assert passes == sorted(passes, reverse=True)
