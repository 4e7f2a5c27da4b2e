"""Settings that are `auto`: what is chosen for which device, what is kept, and what is refused."""

from dataclasses import replace

import pytest
import torch

from millrace.engine.config import AUTO
from millrace.engine.config.loading import merge
from millrace.engine.config.stages import resolve_stages
from millrace.engine.planning import automatic as module
from millrace.engine.planning.automatic import (
    Earlier,
    automatic,
    settle,
    settle_run,
    settled_as,
    without_auto,
)
from millrace.engine.planning.devices import GPUS, NEWER_ATTENTION, gpu_like
from millrace.engine.planning.search import Planner
from millrace.engine.util.errors import UserError

WIDE = {
    "model": {"width": 64, "heads": 2, "depth": 4},
    "data": {"resolution": 64, "global_batch": 16, "micro_batch": AUTO},
    "run": {"activation_checkpointing": {"policy": AUTO}},
    "deepspeed": {"zero_optimization": AUTO},
    "sampling": {"every_steps": 0},
}
LATER = {"stages": [{"at": 3, "name": "larger", "data": {"resolution": 128}}]}
H100 = GPUS["h100"]


@pytest.fixture
def config(runs, tmp_path):
    return lambda *changes: runs.config(tmp_path, WIDE, *changes)


def peak(config, stage, micro_batch, policy="none", ranks=2):
    return Planner(config, ranks, H100).option(stage, micro_batch, policy).memory.peak


def with_room(size):
    """A device that a run of so many bytes fits, and no larger one."""
    return lambda: replace(H100, memory=size / H100.usable)


def chosen(config):
    zero = config.deepspeed["zero_optimization"]
    return config.data.micro_batch, zero["stage"], config.run.activation_checkpointing.policy


def test_where_all_fits(config):
    alone, pair = settle(config(), 1, lambda: H100), settle(config(), 2, lambda: H100)
    assert chosen(alone.config) == (16, 0, "none")
    assert chosen(pair.config) == (8, 1, "none")
    assert alone.config.deepspeed["zero_optimization"]["overlap_comm"] is False
    assert pair.config.deepspeed["zero_optimization"]["overlap_comm"] is True
    assert not any(automatic(found.config) for found in (alone, pair))
    (line,) = pair.lines
    assert line.startswith("auto: micro-batch 8, ZeRO 1 with overlap, no checkpointing: ")
    assert " of 80 GB, " in line
    assert "images/s a device by the planner on 2 x H100 SXM; next best " in line


def test_less_memory_takes_less(config):
    whole = peak(config(), 1, 8)
    found = settle(config(), 2, with_room(0.75 * whole)).config
    assert chosen(found) != (8, 1, "none")
    stage, micro_batch, policy = chosen(found)[1], chosen(found)[0], chosen(found)[2]
    assert peak(config(), stage, micro_batch, policy) <= 0.75 * whole


@pytest.mark.parametrize(
    "fixed",
    [
        {"data": {"micro_batch": 2}},
        {"run": {"activation_checkpointing": {"policy": "full"}}},
        {"deepspeed": {"zero_optimization": {"stage": 3}}},
        {"deepspeed": {"zero_optimization": {"stage": 2, "overlap_comm": False}}},
    ],
)
def test_what_is_fixed_holds(config, fixed):
    given = config(fixed)
    found = settle(given, 2, lambda: H100).config
    values, kept = found.model_dump(mode="json"), settled_as(given, found)
    assert kept == found
    assert merge(values, fixed) == values
    assert not automatic(found)


def test_parts_of_a_section(config):
    zero = {"deepspeed": {"zero_optimization": {"stage": AUTO, "reduce_bucket_size": 1_000_000}}}
    found = settle(config(zero), 2, lambda: H100).config
    assert found.deepspeed["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 1_000_000}


def test_every_stage_for_itself(config):
    later = config(LATER)
    first, second = (stage.config for stage in resolve_stages(later))
    room = peak(first, 1, 8)
    assert peak(second, 1, 8) > room
    found = settle(later, 2, with_room(room))
    small, large = (stage.config for stage in resolve_stages(found.config))
    assert chosen(small) == (8, 1, "none")
    assert chosen(large) != chosen(small)
    assert [line.partition(":")[0] for line in found.lines] == ["auto (stage 1)", "auto (larger)"]
    # A stage that says what it wants has it.
    stages = [LATER["stages"][0] | {"data": {"resolution": 128, "micro_batch": 1}}]
    assert (
        resolve_stages(settle(config({"stages": stages}), 2, lambda: H100).config)[1].config.data.micro_batch
        == 1
    )


def test_a_first_stage_of_its_own(config):
    stages = [{"at": 0, "data": {"resolution": 32}}, {"at": 2, "data": {"resolution": 64}}]
    found = settle(config({"stages": stages}), 2, lambda: H100).config
    assert [chosen(stage.config)[0] for stage in resolve_stages(found)] == [8, 8]


def test_a_resume_keeps_what_was_chosen(config):
    """Though another choice would be made now: what fitted least then is kept where all fits."""
    tight = settle(config(), 2, with_room(0.75 * peak(config(), 1, 8))).config
    assert chosen(tight) != chosen(settle(config(), 2, lambda: H100).config)
    again = settle(config(), 2, lambda: H100, Earlier(tight, 2))
    assert again.config == tight
    (line,) = again.lines
    assert line.startswith("auto: as in the checkpoint: micro-batch ")


def test_other_processes_choose_zero_anew_and_keep_the_micro_batch(config):
    before = settle(config({"data": {"micro_batch": 4}}), 2, lambda: H100).config
    alone = settle(config(), 1, lambda: H100, Earlier(before, 2))
    assert chosen(alone.config) == (4, 0, "none")
    assert alone.lines[0].startswith("auto: as in the checkpoint, ZeRO anew for 1 process(es): micro-batch 4")


def test_what_does_not_go_any_more_is_chosen_anew(config):
    before = settle(config(), 2, lambda: H100).config
    less = settle(config(), 2, with_room(0.75 * peak(config(), 1, 8)), Earlier(before, 2))
    assert chosen(less.config) != chosen(before)
    assert less.lines[0].startswith(
        "auto: chosen anew, the checkpoint's settings do not go here: no setting fits 2 x H100 SXM"
    )
    more = settle(config(), 4, lambda: H100, Earlier(before, 2))
    assert chosen(more.config)[0] == 4
    assert "data.global_batch 16 is not a multiple of data.micro_batch 8 x 4 process(es)" in more.lines[0]


def test_a_stage_that_the_checkpoint_does_not_know(config):
    before = settle(config({"data": {"micro_batch": 2}}), 2, lambda: H100).config
    found = settle(config(LATER), 2, lambda: H100, Earlier(before, 2)).config
    assert [stage.config.data.micro_batch for stage in resolve_stages(found)] == [2, 8]


def test_micro_batches_of_buckets_divide_their_runs(config):
    data = {"source": "shards", "path": "s", "aspect": "bucket", "bucket_run": 4}
    assert settle(config({"data": data}), 1, lambda: H100).config.data.micro_batch == 4


@pytest.mark.parametrize(
    ("changes", "ranks", "memory", "message"),
    [
        ({}, 2, 1e5, "no setting fits 2 x H100 SXM: .* or set data.micro_batch, .* by hand"),
        ({}, 3, 80e9, "data.global_batch 16 is not a multiple of 3 devices"),
        ({"data": {"micro_batch": 3}}, 1, 80e9, r"not a multiple of data.micro_batch 3 x 1 process"),
        ({"deepspeed": {"zero_optimization": {"stage": 5}}}, 1, 80e9, "stage is 5; it is 0, 1, 2, 3 or auto"),
        ({"deepspeed": {"zero_optimization": "aut"}}, 1, 80e9, "is 'aut'; it is an object such as"),
    ],
)
def test_refusals_are_one_line(config, changes, ranks, memory, message):
    with pytest.raises(UserError, match=message) as raised:
        settle(config(changes), ranks, lambda: replace(H100, memory=memory))
    assert "\n" not in str(raised.value)


def test_a_tuned_autoencoder_is_not_known(config):
    tuned = config({"deepspeed": {"zero_optimization": {"stage": 1}}})
    tuning = tuned.conditioning.autoencoder.tuning.model_copy(update={"enabled": True})
    autoencoder = tuned.conditioning.autoencoder.model_copy(update={"tuning": tuning})
    conditioning = tuned.conditioning.model_copy(update={"autoencoder": autoencoder})
    planner = Planner(tuned, 1, H100)
    planner.config = tuned.model_copy(update={"conditioning": conditioning})
    with pytest.raises(UserError, match="activations of an autoencoder that is tuned are not known"):
        list(planner.automatic())


def test_sampling_defaults_in_place_of_auto(config):
    plain = without_auto(config())
    assert chosen(plain) == (32, 0, "none")
    assert not automatic(plain)
    fixed = config({"data": {"micro_batch": 2}, "deepspeed": {"zero_optimization": {"stage": 2}}})
    assert chosen(without_auto(fixed)) == (2, 2, "none")


def test_the_smallest_gpu_decides_for_all(config, monkeypatch):
    """Rank 0 has much memory, rank 1 little; what rank 0 finds is what both take."""
    little = 0.75 * peak(config(), 1, 8)
    gpus = [("NVIDIA H100 80GB HBM3", 80e9, False), ("NVIDIA H100 80GB HBM3", little / H100.usable, False)]
    told = []

    def gather(value):
        if isinstance(value, tuple) and value in gpus:
            return gpus
        told.append(value)
        return [told[0]] * 2

    monkeypatch.setattr(module.process_group, "gather_objects", gather)
    monkeypatch.setattr(module.process_group, "world_size", lambda: 2)
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(module.process_group, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(module, "_gpu_here", lambda _, rank=rank: gpus[rank])
        found.append(settle_run(config(), torch.device("cuda", rank), None))
    assert found[0] == found[1]
    assert told[1] == ""  # rank 1 chooses nothing
    assert found[0].config == settle(config(), 2, with_room(little)).config


def test_a_refusal_reaches_every_rank(config, monkeypatch):
    monkeypatch.setattr(module.process_group, "rank", lambda: 1)
    monkeypatch.setattr(module.process_group, "gather_objects", lambda _: ["no setting fits", ""])
    with pytest.raises(UserError, match="no setting fits"):
        settle_run(config(), torch.device("cpu"), None)


def test_the_device_by_its_name():
    assert gpu_like("NVIDIA H200", 140e9) == replace(GPUS["h200"], memory=140e9)
    near = gpu_like("NVIDIA L40S", 48e9)  # its peak is known, its sheet is not
    assert near.name == "NVIDIA L40S (taken as A100 SXM 40 GB)"
    assert near.peak_flops == 362e12
    assert near.memory == 48e9
    unknown = gpu_like("Some Card", 23e9)
    assert unknown.name == "Some Card (taken as RTX 4090)"
    assert unknown.product_flops == GPUS["rtx4090"].product_flops


def test_newer_attention_is_faster_where_it_is_installed():
    plain, newer = (module._gpu("NVIDIA H100 80GB HBM3", 80e9, new) for new in (False, True))
    assert newer.attention_flops == NEWER_ATTENTION > plain.attention_flops
    assert set(plain.assumed) - set(newer.assumed) == {
        "share of the peak FLOP/s in attention",
        "most FLOP/s in attention, FlashAttention-2",
    }
