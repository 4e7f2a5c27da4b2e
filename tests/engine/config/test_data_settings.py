"""The section `data` of the configuration: schedules, mixtures, and what is refused."""

import pytest

from millrace.engine.config import Data
from millrace.engine.config.data import value_at
from millrace.engine.config.loading import parse_config
from millrace.engine.util.errors import UserError


def data(**values):
    return parse_config({"data": values}, "test.json").data


def part(name="a", **values):
    return {"name": name, "source": "digits", **values}


def mixture(*parts, **values):
    return data(source="mixture", mixture=list(parts), **values)


def test_a_schedule_is_linear_between_its_points_and_constant_outside():
    points = data(long_caption=[[10, 1], [20, 0.5], [21, 0.0]]).long_caption
    assert points == ((10, 1.0), (20, 0.5), (21, 0.0))
    values = {0: 1.0, 10: 1.0, 11: 0.95, 15: 0.75, 20: 0.5, 21: 0.0, 22: 0.0, 10**9: 0.0}
    for step, value in values.items():
        assert value_at(points, step) == pytest.approx(value, abs=1e-12)
    assert value_at(((5, 0.25),), 0) == value_at(((5, 0.25),), 9) == value_at(0.25, 7) == 0.25


def test_what_was_parsed_is_written_and_read_again():
    parts = [part(weight=[[0, 1], [9, 0]], long_caption=1), part("b", keys="k.txt", weight=3)]
    config = parse_config(
        {"data": {"source": "mixture", "mixture": parts, "long_caption": [[0, 1], [5, 0.5]]}}, ""
    )
    written = config.model_dump(mode="json")
    assert written["data"]["long_caption"] == [[0, 1.0], [5, 0.5]]
    assert parse_config(written, "again") == config


def test_python_values_are_checked_like_json():
    assert Data(long_caption=1) == data(long_caption=1.0)
    assert Data(long_caption=[[0, 1], [5, 0]]) == data(long_caption=[[0, 1], [5, 0]])


def test_what_follows_steps():
    assert not data().follows_steps
    assert not data(long_caption=1).follows_steps
    assert data(long_caption=[[0, 1]]).follows_steps
    assert mixture(part()).follows_steps


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (1.5, "the value is 1.5; it must be from 0 to 1"),
        (-1, "the value is -1; it must be from 0 to 1"),
        (True, "the value is True; it is a number or a list of [step, value]"),
        ("0.5", "the value is '0.5'; it is a number or a list of [step, value]"),
        ([], "the list of [step, value] is empty; give it a point or write a number"),
        ([0, 1], "point 0 is 0; write it as [step, value]"),
        ([[0, 1, 2]], "point 0 is [0, 1, 2]; write it as [step, value]"),
        ([[0, 1], [5, 2]], "the value at step 5 is 2; it must be from 0 to 1"),
        ([[0, 1], [5, None]], "the value at step 5 is None; it is a number or a list of [step, value]"),
        ([[5, 1], [5, 0]], "step 5 comes after step 5; list the points by increasing step"),
        ([[5, 1], [4, 0]], "step 4 comes after step 5; list the points by increasing step"),
        ([[0.5, 1]], "the step of point 0 is 0.5; it is a whole number to 10000000"),
        ([[-1, 1]], "the step of point 0 is -1; it is a whole number to 10000000"),
        ([[10**7 + 1, 1]], "the step of point 0 is 10000001; it is a whole number to 10000000"),
    ],
)
def test_schedules_are_refused_in_one_line(values, message):
    with pytest.raises(UserError) as caught:
        data(long_caption=values)
    assert str(caught.value) == f"test.json: data.long_caption: {message}"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "mixture"}, "data: source mixture needs data.mixture, a list of parts"),
        (
            {"mixture": [part()]},
            "data: data.mixture is for source mixture, not builtin; set one or the other",
        ),
        (
            {"source": "mixture", "mixture": [part()], "path": "x"},
            "data: data.path says nothing in a mixture; set it to null and give path to the parts",
        ),
        (
            {"source": "mixture", "mixture": [part()], "keys": "x"},
            "data: data.keys says nothing in a mixture; set it to null and give keys to the parts",
        ),
        (
            {"source": "mixture", "mixture": [part(), part()]},
            "data: two parts of the mixture are named 'a'; name them apart",
        ),
        (
            {"source": "mixture", "mixture": [part(weight=0), part("b", weight=0)]},
            "data: all weights of the mixture are 0 at step 0; give a part some there",
        ),
        (
            {
                "source": "mixture",
                "mixture": [
                    part(weight=[[0, 1], [5, 0]]),
                    part("b", weight=[[0, 1], [2, 0], [5, 0], [6, 1]]),
                ],
            },
            "data: all weights of the mixture are 0 at step 5; give a part some there",
        ),
        (
            {"source": "mixture", "mixture": [part(weight=-0.5)]},
            "data.mixture.0.weight: the value is -0.5; it must be at least 0",
        ),
        (
            {"source": "mixture", "mixture": [part(), {"name": "b"}]},
            "data.mixture.1: part 'b': source folder needs data.path",
        ),
        (
            {"source": "mixture", "mixture": [part(wieght=1)]},
            "unknown key 'data.mixture.0.wieght'; did you mean 'weight'?",
        ),
        (
            {"source": "mixture", "mixture": [part("a/b")]},
            "data.mixture.0.name: String should match pattern '^[\\w.-]+$' (got 'a/b')",
        ),
    ],
)
def test_mixtures_are_refused_in_one_line(values, message):
    with pytest.raises(UserError) as caught:
        data(**values)
    assert str(caught.value) == f"test.json: {message}"


def test_a_weight_may_be_zero_as_long_as_another_is_not():
    found = mixture(
        part(weight=[[0, 1], [10, 0]]), part("b", weight=[[5, 0], [10, 2.5]]), part("c", weight=0)
    )
    assert [p.weight for p in found.mixture] == [((0, 1.0), (10, 0.0)), ((5, 0.0), (10, 2.5)), 0.0]


def buckets(**values):
    return data(**({"source": "shards", "path": "s", "aspect": "bucket"} | values))


def test_settings_of_shards():
    found = buckets(loader="dali", cached=["text", "latents"], crop="center", verify=True)
    assert found.cached == ("text", "latents")
    assert (found.bucket_run, found.verify, data().loader, data().cached) == (64, True, "auto", ())
    assert buckets(micro_batch=24, bucket_run=48).bucket_run == 48
    two = [part(source="shards", path="s"), part("b", source="shards", path="t")]
    assert mixture(*two, aspect="bucket", global_batch=256, bucket_run=32).named_sources == {
        "part 'a'": "shards",
        "part 'b'": "shards",
    }
    assert mixture(part(source="shards", path="s"), part("b"), cached=["text"]).cached == ("text",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"aspect": "bucket"},
            "data.source is builtin, which is not sorted into buckets; prepare shards of it, or set "
            "data.aspect to mixed",
        ),
        (
            {
                "source": "mixture",
                "mixture": [part("a", source="shards", path="s"), part("b")],
                "aspect": "bucket",
            },
            "part 'b' is digits, which is not sorted into buckets; prepare shards of it, or set "
            "data.aspect to mixed",
        ),
        (
            {"source": "shards", "path": "s", "aspect": "bucket", "micro_batch": 24},
            "data.micro_batch 24 does not divide data.bucket_run 64, so a micro-batch would hold two sizes; "
            "set data.micro_batch to 16 or data.bucket_run to 72",
        ),
        (
            {
                "source": "mixture",
                "mixture": [part("a", source="shards", path="s")],
                "aspect": "bucket",
                "global_batch": 96,
            },
            "data.global_batch 96 is not a multiple of data.bucket_run 64, but steps of a mixture give whole "
            "runs to its parts; set data.bucket_run to 32",
        ),
        (
            {"cached": ["text"]},
            "data.cached is of shards, but data.source is builtin; set data.cached to [] or prepare shards",
        ),
        (
            {"source": "shards", "path": "s", "cached": ["text", "text"]},
            "data.cached names 'text' twice; remove one",
        ),
        (
            {"source": "shards", "path": "s", "aspect": "bucket", "cached": ["latents"]},
            "data.cached latents are of pictures that always look the same; set data.aspect bucket, "
            "data.crop center and data.flip 0, or cache text alone",
        ),
        (
            {
                "source": "shards",
                "path": "s",
                "aspect": "bucket",
                "crop": "center",
                "flip": 0.5,
                "cached": ["latents"],
            },
            "data.cached latents are of pictures that always look the same; set data.aspect bucket, "
            "data.crop center and data.flip 0, or cache text alone",
        ),
    ],
)
def test_shards_are_refused_in_one_line(values, message):
    with pytest.raises(UserError) as caught:
        data(**values)
    assert str(caught.value) == f"test.json: data: {message}"
