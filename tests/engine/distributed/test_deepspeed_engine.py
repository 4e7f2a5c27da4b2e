"""DeepSpeed's configuration, made from ours."""

import pytest
import torch

from millrace.engine.distributed.deepspeed_engine import (
    OWNED,
    PASSED,
    accumulation_steps,
    deepspeed_config,
    with_buckets,
    zero_stage,
)
from millrace.engine.util.errors import UserError


def section(runs, tmp_path, *changes, **deepspeed):
    return runs.config(tmp_path, *changes, {"deepspeed": deepspeed})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_deepspeed_is_told(runs, tmp_path, stage):
    """All of it. DeepSpeed's own defaults clip at 1.0, and wait for the device to measure throughput."""
    found = deepspeed_config(section(runs, tmp_path, zero_optimization={"stage": stage}))
    assert found == {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.0,
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }


def test_bfloat16_is_autocast_and_reduces_in_float32(runs, tmp_path):
    found = deepspeed_config(runs.config(tmp_path, {"precision": {"compute": "bfloat16"}}))
    assert found["torch_autocast"] == {
        "enabled": True,
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],
    }
    assert "bf16" not in found
    assert "communication_data_type" not in found


def test_bfloat16_reduction_where_asked_for(runs, tmp_path):
    low = {"precision": {"compute": "bfloat16", "reduce": "bfloat16"}}
    found = deepspeed_config(runs.config(tmp_path, low))
    linear = [
        "torch.nn.Linear",
        "millrace.engine.model.adapters.AdaptedLinear",
        "millrace.engine.model.fp8.Fp8Linear",
        "millrace.engine.model.working_weights.WorkingLinear",
    ]
    assert found["torch_autocast"]["lower_precision_safe_modules"] == linear
    assert found["communication_data_type"] == "bf16"
    with pytest.raises(UserError, match=r"precision\.reduce bfloat16 needs precision.compute bfloat16"):
        deepspeed_config(runs.config(tmp_path, {"precision": {"reduce": "bfloat16"}}))


def test_keys_are_ours_or_passed_on_never_both():
    assert not set(OWNED) & set(PASSED)


@pytest.mark.parametrize("key", OWNED)
def test_our_keys_are_refused(runs, tmp_path, key):
    with pytest.raises(UserError) as raised:
        deepspeed_config(section(runs, tmp_path, **{key: 1}))
    assert str(raised.value).startswith(f"deepspeed.{key} conflicts with the engine")
    assert OWNED[key] in str(raised.value)


@pytest.mark.parametrize("key", [key for key in PASSED if key != "zero_optimization"])
def test_other_keys_pass(runs, tmp_path, key):
    assert deepspeed_config(section(runs, tmp_path, **{key: {"a": 1}}))[key] == {"a": 1}


def test_unknown_keys_get_a_suggestion(runs, tmp_path):
    with pytest.raises(UserError, match="did you mean 'wall_clock_breakdown'"):
        deepspeed_config(section(runs, tmp_path, wall_clock_brakedown=True))
    with pytest.raises(UserError, match=r"'gradient_clipping' follows from optimizer\.clip, set it there"):
        deepspeed_config(section(runs, tmp_path, gradient_cliping=1))
    with pytest.raises(UserError, match="it takes: zero_optimization, aio"):
        deepspeed_config(section(runs, tmp_path, qqqq=True))


@pytest.mark.parametrize("stage", [4, -1, "two", None])
def test_other_stages_are_refused(runs, tmp_path, stage):
    with pytest.raises(UserError, match="it is 0, 1, 2, 3 or auto"):
        zero_stage(section(runs, tmp_path, zero_optimization={"stage": stage}))


def test_a_stage_without_an_object_is_refused(runs, tmp_path):
    with pytest.raises(UserError, match=r"deepspeed\.zero_optimization is 2; it is an object such as"):
        zero_stage(section(runs, tmp_path, zero_optimization=2))


def test_what_depends_on_the_model_is_added(runs, tmp_path):
    model = torch.nn.Linear(3, 5, device="meta")
    config = section(runs, tmp_path, zero_optimization={"stage": 2}, comms_logger={"a": 1})
    found = with_buckets(config, model)
    assert found["zero_optimization"] == {
        "stage": 2,
        "overlap_comm": False,  # there is one process
        "reduce_bucket_size": 20,
        "allgather_bucket_size": 20,
        "reduce_scatter": False,
    }
    assert found["comms_logger"] == {"a": 1}
    assert found["train_micro_batch_size_per_gpu"] == 2


def test_without_a_section_it_is_stage_0(runs, tmp_path):
    assert zero_stage(runs.config(tmp_path, {"deepspeed": {}})) == 0


def test_accumulation(runs, tmp_path, monkeypatch):
    config = runs.config(tmp_path, {"data": {"global_batch": 24, "micro_batch": 4}})
    for ranks, steps in ((1, 6), (2, 3), (3, 2), (6, 1)):
        monkeypatch.setattr(
            "millrace.engine.distributed.deepspeed_engine.world_size", lambda ranks=ranks: ranks
        )
        assert accumulation_steps(config) == steps
    monkeypatch.setattr("millrace.engine.distributed.deepspeed_engine.world_size", lambda: 4)
    with pytest.raises(UserError, match=r"data\.global_batch 24 is not a multiple of .* 4 x 4 process"):
        accumulation_steps(config)


def test_selective_recomputation_of_compiled_blocks_is_refused(runs, tmp_path):
    both = {"run": {"compile": True, "activation_checkpointing": {"policy": "selective"}}}
    with pytest.raises(UserError, match="selective does not see into compiled blocks"):
        deepspeed_config(runs.config(tmp_path, both))


@pytest.mark.parametrize("key", ["offload_optimizer", "offload_param"])
def test_offloading_is_refused(runs, tmp_path, key):
    with pytest.raises(UserError, match=f"{key} is not supported"):
        deepspeed_config(section(runs, tmp_path, zero_optimization={"stage": 2, key: {"device": "cpu"}}))
