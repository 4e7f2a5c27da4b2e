"""Phases of a step against sums done by hand."""

import pytest

from millrace.engine.distributed.zero_settings import zero_section
from millrace.engine.planning.activations import Traced
from millrace.engine.planning.step_memory import Shape, gigabytes, memory_of, saved_bytes, shape_of

TRACED = Traced(kept=1, peak=10**9, peak_without_gradients=6 * 10**8, moved=0)
NOTHING = Traced(0, 0, 0, 0)


@pytest.fixture
def config(runs, tmp_path):
    return runs.config(tmp_path)


@pytest.fixture
def psi(config):
    return 4 * shape_of(config).parameters


def found(config, stage, ranks, traced=TRACED, **others):
    return memory_of(config, stage, ranks, traced, shape_of(config), **others)


def buckets(config, stage, ranks):
    """Bytes of a bucket, and how many there are."""
    section = zero_section(config, stage, ranks, shape_of(config).parameters)
    return 4 * section["reduce_bucket_size"], 1 + section["overlap_comm"]


def test_what_is_held(config, psi):
    """Weights, master, two moments, EMA; and at stage 3 the bucket and the gradients' partitions."""
    bucket, _ = buckets(config, 3, 4)
    assert found(config, 0, 2).held == 5 * psi - psi  # weights serve as masters
    assert found(config, 1, 2).held == psi + 4 * psi / 2
    assert found(config, 2, 4).held == psi + 4 * psi / 4
    assert found(config, 3, 4).held == 6 * psi / 4 + bucket  # as well weights and gradients
    assert found(config, 0, 1, frozen=7.0).held == 4 * psi + 7


def test_working_copies_are_held_where_products_are_in_bf16(runs, tmp_path, psi):
    low = runs.config(tmp_path, {"precision": {"compute": "bfloat16"}})
    for stage in range(3):
        assert found(low, stage, 4).parts["working copies"] == psi / 2
    assert "working copies" not in found(low, 3, 4).parts


def test_the_backward_pass_is_the_worst_where_activations_are_many(config, psi):
    bucket, two = buckets(config, 1, 2)
    assert two == 2
    wanted = {0: TRACED.peak, 1: TRACED.peak + 2 * bucket, 2: TRACED.peak_without_gradients + 2 * bucket}
    for stage, phase in wanted.items():
        memory = found(config, stage, 2)
        assert memory.worst == "backward"
        assert memory.peak == memory.held + phase
    # Everything is gathered at stage 3, by one fetch, as the model is smaller than what may live.
    assert found(config, 3, 2).phases["backward"] == TRACED.peak_without_gradients + 2 * psi
    assert found(config, 3, 1).phases["backward"] == TRACED.peak_without_gradients


def test_reduction_and_update_without_activations(config, psi):
    bucket, _ = buckets(config, 1, 1)
    assert found(config, 0, 2, NOTHING).phases["reduction"] == 2 * psi  # gradients and their flat copy
    assert found(config, 0, 1, NOTHING).phases["reduction"] == psi  # alone nothing is reduced
    assert found(config, 1, 2, NOTHING).phases["reduction"] == 2 * bucket + psi / 2
    assert found(config, 1, 1, NOTHING).phases["reduction"] == bucket + psi  # no flat copy, but what is owned
    assert found(config, 2, 2, NOTHING).phases["update"] == psi
    assert found(config, 2, 2, NOTHING, fused=False).phases["update"] == psi / 2 + 2 * psi / 2


def test_two_buckets_where_reductions_run_beside(runs, tmp_path):
    shape = Shape(10_000, 100, 10)

    def peak(ranks, **zero):
        zero = {"stage": 2, "reduce_bucket_size": 1000, **zero}
        config = runs.config(tmp_path, {"deepspeed": {"zero_optimization": zero}})
        return memory_of(config, 2, ranks, NOTHING, shape).phases["backward"]

    assert peak(2) == 2 * 4000 + 20_000  # the owned half comes in while backward runs
    assert peak(2, overlap_comm=False) == 4000 + 20_000
    assert peak(1) == 4000 + 40_000  # alone there is nothing to run beside


def test_samples_are_a_phase_of_their_own(runs, tmp_path, config, psi):
    """The weights gathered once, in FP32; at stage 0 those that are there, unless they are in BF16."""
    off = runs.config(tmp_path, {"sampling": {"every_steps": 0}, "evaluation": {"every_steps": 0}})
    on = runs.config(tmp_path, {"sampling": {"every_steps": 5}})
    for stage in range(4):
        plain, drawing = found(off, stage, 4, NOTHING), found(on, stage, 4, NOTHING)
        copy = psi if stage else 0
        assert "sampling" not in plain.phases
        assert drawing.parts == plain.parts
        assert drawing.phases == plain.phases | {"sampling": copy}
        assert plain.certain == plain.held + plain.gradients
        assert drawing.certain == drawing.held + max(drawing.gradients, copy)
    half = {"precision": {"master": "bfloat16", "compute": "bfloat16"}}
    assert (
        found(runs.config(tmp_path, {"sampling": {"every_steps": 5}}, half), 0, 4).phases["sampling"] == psi
    )
    zero = {"deepspeed": {"zero_optimization": {"reduce_bucket_size": 1000}}}
    little = runs.config(tmp_path, {"sampling": {"every_steps": 5}}, zero)
    drawing = found(little, 2, 4, NOTHING)
    assert drawing.worst == "sampling"
    assert "an FP32 copy for sampling" in drawing.table()
    assert found(on, 0, 4).worst == "backward"


def test_small_sizes_do_not_read_as_nothing(config):
    assert [gigabytes(size) for size in (0, 9.3e6, 99e6, 1e8, 27.26e9)] == [
        "0.0",
        "0.0093",
        "0.099",
        "0.1",
        "27.3",
    ]
    table = found(config, 0, 1, NOTHING).table()
    assert "weights 0.0" in table
    assert " 0.0," not in table + ","


def test_what_is_saved_is_divided_over_the_processes(config, psi):
    """Weights, two moments and an average, of which nothing depends on the stage."""
    assert saved_bytes(config, 1, shape_of(config)) == 4 * psi
    assert saved_bytes(config, 8, shape_of(config)) == psi / 2
