"""A run as a list of stages."""

import pytest

from millrace.engine.config.loading import parse_config
from millrace.engine.config.stages import describe_stage, resolve_stages, stage_at
from millrace.engine.util.errors import UserError


def config(stages=(), **values):
    run = {"steps": 100, "output_dir": "somewhere"}
    return parse_config(
        {"run": run, "data": {"global_batch": 8, "micro_batch": 8}, "stages": stages, **values}, "test"
    )


def resolved(*stages, **values):
    return resolve_stages(config(list(stages), **values))


def test_a_run_without_stages_is_one():
    (stage,) = resolve_stages(config())
    assert (stage.first, stage.last, stage.name) == (0, 100, "")
    assert stage.config == config()
    assert (stage.data_step, stage.data_sample, stage.schedule_step, stage.schedule_end) == (0, 0, 0, 100)


def test_a_value_holds_until_a_later_stage_changes_it():
    stages = resolved(
        {"at": 30, "name": "warm", "optimizer": {"lr": 1e-3}, "conditioning": {"caption_drop": 0.2}},
        {"at": 60, "name": "cold", "optimizer": {"lr": 1e-5}},
    )
    assert [(s.name, s.first, s.last, s.number) for s in stages] == [
        ("", 0, 30, 0),
        ("warm", 30, 60, 1),
        ("cold", 60, 100, 2),
    ]
    assert [s.config.optimizer.lr for s in stages] == [1e-4, 1e-3, 1e-5]
    assert [s.config.conditioning.caption_drop for s in stages] == [0.1, 0.2, 0.2]
    assert all(not s.config.stages and s.config.run.steps == 100 for s in stages)
    assert stage_at(stages, 0) is stages[0]
    assert stage_at(stages, 29) is stages[0]
    assert stage_at(stages, 30) is stages[1]
    assert stage_at(stages, 99) is stages[2]
    assert stage_at(stages, 100) is stages[2]


def test_the_first_stage_may_begin_with_the_run():
    stages = resolved({"at": 0, "name": "burn-in", "optimizer": {"lr": 1e-3}}, {"at": 50})
    assert [(s.name, s.first) for s in stages] == [("burn-in", 0), ("stage 2", 50)]
    assert stages[0].config.optimizer.lr == 1e-3


def test_samples_and_data_sets_are_counted():
    stages = resolved(
        {"at": 10, "data": {"global_batch": 16, "micro_batch": 16}},
        {"at": 20, "data": {"source": "folder", "path": "x"}},
        {"at": 50, "data": {"resolution": 512}},
    )
    assert [s.data_sample for s in stages] == [0, 0, 10 * 8 + 10 * 16, 10 * 8 + 10 * 16]
    assert [s.data_step for s in stages] == [0, 0, 20, 20]


@pytest.mark.parametrize(
    "data",
    [
        {"long_caption": [[0, 1.0], [50, 0.5]]},
        {"source": "mixture", "mixture": [{"name": "all", "source": "builtin"}]},
    ],
    ids=["schedule", "mixture"],
)
def test_data_that_follow_steps_are_counted_anew_where_a_step_has_other_samples(data):
    stages = resolve_stages(
        parse_config(
            {
                "run": {"steps": 100, "output_dir": "somewhere"},
                "data": {"global_batch": 8, "micro_batch": 8, **data},
                "stages": [
                    {"at": 10, "optimizer": {"lr": 1e-5}},
                    {"at": 20, "data": {"global_batch": 16}},
                    {"at": 30, "data": {"global_batch": 16}},
                ],
            },
            "test",
        )
    )
    assert [s.data_sample for s in stages] == [0, 0, 20 * 8, 20 * 8]
    assert [s.data_step for s in stages] == [0, 0, 20, 20]


def test_so_are_data_that_follow_steps_only_later():
    stages = resolved(
        {"at": 10, "data": {"global_batch": 16, "micro_batch": 16}},
        {"at": 20, "data": {"long_caption": [[0, 1.0], [50, 0.5]]}},
    )
    assert [(s.data_sample, s.data_step) for s in stages] == [(0, 0), (0, 0), (10 * 8 + 10 * 16, 20)]


BUCKETS = {"source": "shards", "path": "s", "aspect": "bucket", "bucket_run": 24}


def test_another_order_of_buckets_begins_anew():
    stages = resolved(
        {"at": 10, "data": BUCKETS},
        {"at": 20, "data": {"global_batch": 24, "micro_batch": 8}},
        {"at": 30, "data": {"bucket_run": 8}},
        {"at": 40, "data": {"aspect": "mixed", "bucket_run": 16}},
        {"at": 50, "data": {"bucket_run": 8}},
    )
    assert [s.data_step for s in stages] == [0, 10, 10, 30, 40, 40]


def test_a_stage_inside_a_run_of_one_bucket_is_refused():
    with pytest.raises(UserError) as caught:
        resolved(
            {"at": 10, "data": BUCKETS},
            {"at": 21, "name": "large", "data": {"global_batch": 24, "micro_batch": 24}},
        )
    assert str(caught.value) == (
        "stage 'large' begins after 88 samples, which micro-batches of 24 do not divide: they would hold two "
        "buckets; set its data.micro_batch to a divisor"
    )


def test_a_stage_that_sets_the_schedule_begins_it_anew():
    stages = resolved(
        {"at": 10, "optimizer": {"lr": 1e-3}},
        {"at": 40, "schedule": {"kind": "cosine", "warmup": 5}},
        {"at": 70, "optimizer": {"lr": 1e-5}},
    )
    assert [(s.schedule_step, s.schedule_end) for s in stages] == [(0, 40), (0, 40), (40, 100), (40, 100)]


def test_an_alignment_that_ends_is_two_stages():
    aligned = {"alignment": {"kind": "repa", "until": 25}}
    first, second = resolved(**aligned)
    assert (first.first, first.last, second.first, second.last) == (0, 25, 25, 100)
    assert first.config.alignment.kind == "repa"
    assert not second.config.alignment.active
    stages = resolved({"at": 20, "name": "b", "optimizer": {"lr": 1e-3}}, {"at": 40, "name": "c"}, **aligned)
    assert [s.first for s in stages] == [0, 20, 25, 40]
    assert [s.config.alignment.active for s in stages] == [True, True, False, False]
    assert [s.config.optimizer.lr for s in stages] == [1e-4, 1e-3, 1e-3, 1e-3]


def test_says_where_a_stage_lies_and_what_it_changes():
    stages = resolved({"at": 30, "name": "sft", "optimizer": {"lr": 1e-5}})
    assert describe_stage(stages, stages[0]) == "stage 1 of 2: steps 1 to 30"
    assert describe_stage(stages, stages[1]) == "stage 2 of 2 (sft): steps 31 to 100; changed: optimizer.lr"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            [{"optimizer": {"lr": 1}}],
            "stages[0]: at is None; it is the number of steps done before the stage begins",
        ),
        ([{"at": -1}], "stages[0]: at is -1"),
        ([{"at": True}], "stages[0]: at is True"),
        ([{"at": 20}, {"at": 20}], "stages[1]: at is 20, but the stage before it begins at 20"),
        ([{"at": 0}, {"at": 0}], "stages[1]: at is 0, but the stage before it begins at 0"),
        ([{"at": 100}], "stages[0]: at is 100, but the run ends after run.steps 100"),
        ([{"at": 5, "name": 7}], "stages[0]: name is 7; it is a text"),
        (
            [{"at": 5, "name": "x", "optimiser": {}}],
            "stage 'x': unknown key 'optimiser'; did you mean 'optimizer'?",
        ),
        (
            [{"at": 5, "name": "x", "data": {"resolutoin": 1}}],
            "unknown key 'data.resolutoin'; did you mean 'resolution'?",
        ),
        (
            [{"at": 5, "name": "x", "model": {"depth": 3}}],
            "stage 'x' changes model.depth, which holds for the whole run",
        ),
        (
            [{"at": 5, "name": "x", "run": {"seed": 3}}],
            "stage 'x' changes run.seed, which holds for the whole run",
        ),
        (
            [{"at": 5, "name": "x", "routing": {"policy": "sprint"}}],
            "sprint's fusion layer is part of the model",
        ),
    ],
)
def test_refuses_in_one_line(stages, message):
    with pytest.raises(UserError) as caught:
        resolve_stages(config(stages))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
