"""`deepspeed.zero_optimization`: what follows where it is not set."""

import pytest

from millrace.engine.distributed.zero_settings import AUTOMATIC, automatic_keys, zero_section, zero_stage
from millrace.engine.util.errors import UserError


@pytest.fixture
def section(runs, tmp_path):
    def found(zero, stage, ranks, parameters=10**9):
        config = runs.config(tmp_path, {"deepspeed": {"zero_optimization": zero}})
        return zero_section(config, stage, ranks, parameters)

    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 64])
def test_several_processes_reduce_beside_the_backward_pass(section, stage, ranks):
    overlap = stage > 0 and ranks > 1
    size = 100_000_000 if overlap else 500_000_000
    assert section("auto", stage, ranks) == {
        "stage": stage,
        "overlap_comm": overlap,
        "reduce_bucket_size": size,
        "allgather_bucket_size": size,
        "reduce_scatter": False,
    }


@pytest.mark.parametrize("key", AUTOMATIC)
def test_auto_is_as_if_it_were_not_there(section, key):
    assert section({key: "auto"}, 2, 8) == section({}, 2, 8) == section("auto", 2, 8)


def test_what_the_run_sets_holds(section):
    found = section({"stage": 2, "overlap_comm": False, "round_robin_gradients": True}, 2, 8)
    assert found["overlap_comm"] is False
    assert found["round_robin_gradients"] is True
    assert found["reduce_bucket_size"] == 500_000_000  # several are of use only beside something
    found = section({"reduce_bucket_size": 7}, 1, 8)
    assert (found["reduce_bucket_size"], found["allgather_bucket_size"]) == (7, 100_000_000)


def test_buckets_are_no_larger_than_the_model(section):
    assert section({}, 1, 1, 20)["reduce_bucket_size"] == 20
    assert section({}, 1, 2, 15)["allgather_bucket_size"] == 16  # DeepSpeed aligns to two elements


def test_which_keys_are_automatic(runs, tmp_path):
    def keys(zero):
        return automatic_keys(runs.config(tmp_path, {"deepspeed": {"zero_optimization": zero}}))

    assert keys("auto") == AUTOMATIC
    assert keys({"stage": 1}) == keys({}) == ()
    assert keys({"stage": "auto", "reduce_bucket_size": "auto", "overlap_comm": True}) == (
        "stage",
        "reduce_bucket_size",
    )


def test_an_automatic_stage_is_no_stage(runs, tmp_path):
    config = runs.config(tmp_path, {"deepspeed": {"zero_optimization": "auto"}})
    with pytest.raises(UserError, match="stage is 'auto'; it is 0, 1, 2, 3 or auto"):
        zero_stage(config)
