"""The configuration: files that extend files, overrides, and refusals that say what to do."""

import json
from collections.abc import Iterator

import pytest
from pydantic import ValidationError

from millrace.engine.config import (
    Config,
    Section,
    dict_from_overrides,
    json_schema,
    load_config,
    merge,
    parse_config,
    read_json,
    route_end,
)
from millrace.engine.errors import UserError

PLAIN = {
    "optimizer.kind",
    "optimizer.betas",
    "optimizer.weight_decay",
    "ema.enabled",
    "logging.tensorboard",
    "sampling.solver",
}
"""Fields whose name and type say everything."""


def sections(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Every section with its path: ("", Config), ("run.", Run), ("run.activation_checkpointing.", ...) ..."""
    yield prefix, section
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from sections(field.annotation, f"{prefix}{name}.")


SECTIONS = dict(sections())


def parse(*overrides: str) -> Config:
    return parse_config(dict_from_overrides(overrides), "test.json")


def refused(*overrides: str) -> str:
    """The message with which these overrides are refused."""
    with pytest.raises(UserError) as error:
        parse(*overrides)
    return str(error.value)


@pytest.fixture
def write(tmp_path):
    """`write("name.json", {...})` -> path; text is written as it is."""

    def to_file(name, values):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return path

    return to_file


class TestFiles:
    def test_a_chain_of_files(self, write):
        """Paths are relative to the file that names them; later files win, objects merge key by key."""
        write("base.json", {"run": {"steps": 10, "seed": 1}, "model": {"depth": 3}})
        write("family/middle.json", {"extends": "../base.json", "run": {"steps": 20}})
        leaf = write("family/one/leaf.json", {"extends": "../middle.json", "model": {"width": 112}})
        config = load_config(leaf, ["run.seed=5"])
        assert (config.run.steps, config.run.seed) == (20, 5)
        assert (config.model.depth, config.model.width) == (3, 112)

    def test_lists_replace_and_do_not_merge(self, write):
        write("base.json", {"sampling": {"prompts": ["a", "b", "c"]}})
        leaf = write("leaf.json", {"extends": "base.json", "sampling": {"prompts": ["d"]}})
        assert load_config(leaf).sampling.prompts == ("d",)

    def test_null_replaces(self, write):
        write("base.json", {"model": {"bottleneck": 128}})
        leaf = write("leaf.json", {"extends": "base.json", "model": {"bottleneck": None}})
        assert load_config(leaf).model.bottleneck is None

    def test_the_schema_key_of_editors_is_ignored(self, write):
        write("base.json", {"$schema": "schema.json", "run": {"steps": 3}})
        leaf = write("leaf.json", {"$schema": "schema.json", "extends": "base.json"})
        assert load_config(leaf).run.steps == 3

    @pytest.mark.parametrize("ring", [("a",), ("a", "b"), ("a", "b", "c")])
    def test_circles_are_refused(self, ring, write):
        for name, following in zip(ring, (*ring[1:], ring[0]), strict=True):
            first = write(f"{name}.json", {"extends": f"{following}.json"})
        with pytest.raises(UserError, match="extends itself") as error:
            load_config(first)
        assert all(f"{name}.json" in str(error.value) for name in ring)

    def test_one_base_for_two_files_is_no_circle(self, write):
        write("base.json", {"run": {"steps": 2}})
        for name in ("left.json", "right.json"):
            assert load_config(write(name, {"extends": "base.json"})).run.steps == 2

    def test_missing_files_are_named(self, write, tmp_path):
        with pytest.raises(UserError, match=r"nowhere\.json: no such configuration file"):
            load_config(tmp_path / "nowhere.json")
        with pytest.raises(UserError, match=r"gone\.json: no such configuration file"):
            load_config(write("leaf.json", {"extends": "gone.json"}))

    def test_what_is_no_json_object(self, write):
        with pytest.raises(UserError, match=r"broken\.json: not valid JSON: .*line 2"):
            load_config(write("broken.json", '{"run":\n{"steps": }}'))
        with pytest.raises(UserError, match="a configuration is a JSON object, this is a list"):
            load_config(write("list.json", "[1, 2]"))

    def test_read_json_returns_plain_values(self, write):
        write("base.json", {"a": {"b": 1, "c": 2}})
        leaf = write("leaf.json", {"extends": "base.json", "a": {"c": 3}})
        assert read_json(leaf) == {"a": {"b": 1, "c": 3}}

    def test_merge_leaves_its_arguments_alone(self):
        base, over = {"a": {"b": 1}}, {"a": {"c": 2}}
        assert merge(base, over) == {"a": {"b": 1, "c": 2}}
        assert (base, over) == ({"a": {"b": 1}}, {"a": {"c": 2}})


class TestOverrides:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("3", 3),
            ("1e-4", 1e-4),
            ("-2.5", -2.5),
            ("true", True),
            ("null", None),
            ("word", "word"),
            ("two words", "two words"),
            ('"3"', "3"),
            ("[0.9, 0.99]", [0.9, 0.99]),
            ('{"x": 1}', {"x": 1}),
            ("a=b", "a=b"),
            ("", ""),
            ("/data/pictures", "/data/pictures"),
        ],
    )
    def test_values_are_json_where_they_parse(self, text, value):
        parsed = dict_from_overrides([f"a.b.c={text}"])
        assert parsed == {"a": {"b": {"c": value}}}
        assert type(parsed["a"]["b"]["c"]) is type(value)

    def test_several_in_one_section(self):
        assert dict_from_overrides(["a.b=1", "c=2", "a.d=3"]) == {"a": {"b": 1, "d": 3}, "c": 2}

    def test_the_last_one_wins(self):
        assert dict_from_overrides(["a.b=1", "a.b=2"]) == {"a": {"b": 2}}

    def test_they_reach_every_type(self):
        config = parse(
            "run.steps=7",
            "run.compile=true",
            "optimizer.betas=[0.8, 0.9]",
            'sampling.prompts=["a cat", "2"]',
            "data.path=pictures",
            "run.activation_checkpointing.policy=full",
            'model={"depth": 5}',
            "deepspeed.zero_optimization.stage=2",
        )
        assert config.run.steps == 7
        assert config.run.compile is True
        assert config.optimizer.betas == (0.8, 0.9)
        assert config.sampling.prompts == ("a cat", "2")
        assert config.data.path == "pictures"
        assert config.run.activation_checkpointing.policy == "full"
        assert config.model.depth == 5
        assert config.deepspeed == {"zero_optimization": {"stage": 2}}

    def test_they_lie_over_the_file(self, write):
        path = write("run.json", {"run": {"steps": 7, "seed": 3}})
        config = load_config(path, ["run.steps=8"])
        assert (config.run.steps, config.run.seed) == (8, 3)

    @pytest.mark.parametrize("item", ["run.steps", "=3", ""])
    def test_what_is_no_assignment(self, item):
        with pytest.raises(UserError, match=r"write it as section\.key=value") as error:
            dict_from_overrides([item])
        assert item in str(error.value)


class TestRefusals:
    @pytest.mark.parametrize("path", SECTIONS, ids=lambda path: path or "top")
    def test_a_misspelt_key_gets_the_nearest_name(self, path):
        """In every section, every name with its last letter doubled."""
        for name in SECTIONS[path].model_fields:
            typo = name + name[-1]
            assert refused(f"{path}{typo}=1") == (
                f"test.json: unknown key '{path}{typo}'; did you mean '{name}'?"
            )

    @pytest.mark.parametrize("path", SECTIONS, ids=lambda path: path or "top")
    def test_a_key_like_no_other_gets_the_list(self, path):
        names = ", ".join(SECTIONS[path].model_fields)
        assert refused(f"{path}zzzqqq=1") == f"test.json: unknown key '{path}zzzqqq'; valid keys: {names}"

    def test_every_problem_gets_a_line(self):
        lines = refused("run.stepz=1", "model.depth=0", "optimizer.kind=sgd").splitlines()
        assert len(lines) == 3
        assert all(line.startswith("test.json: ") for line in lines)
        for part in ("run.stepz", "model.depth", "optimizer.kind"):
            assert sum(part in line for line in lines) == 1

    def test_problems_name_the_file(self, write):
        path = write("run.json", {"run": {"stepz": 1}})
        with pytest.raises(UserError, match="unknown key") as error:
            load_config(path)
        assert str(error.value).startswith(f"{path}: ")

    @pytest.mark.parametrize(
        ("override", "where", "got"),
        [
            ("run.steps=many", "run.steps", "'many'"),
            ("run.steps=5.5", "run.steps", "5.5"),
            ("run.steps=0", "run.steps", "0"),
            ("run.seed=-1", "run.seed", "-1"),
            ("run.seed=9223372036854775808", "run.seed", "9223372036854775808"),
            ("run.output_dir=null", "run.output_dir", "None"),
            ("run.compile=maybe", "run.compile", "'maybe'"),
            ("run=5", "run", "5"),
            ("model.rope_axes=[1, 2, 3]", "model.rope_axes", r"[1, 2, 3]"),
            ("optimizer.lr=fast", "optimizer.lr", "'fast'"),
            ("optimizer.lr=NaN", "optimizer.lr", "nan"),
            ("objective.t_min=1", "objective.t_min", "1"),
            ("routing.drop=1.0", "routing.drop", "1.0"),
            ("data.flip=1.5", "data.flip", "1.5"),
            ("conditioning.text.kind=clip", "conditioning.text.kind", "'clip'"),
            ("precision.compute=float16", "precision.compute", "'float16'"),
            ("sampling.prompts=a cat", "sampling.prompts", "'a cat'"),
            ("deepspeed=3", "deepspeed", "3"),
        ],
    )
    def test_a_wrong_value_is_named_and_shown(self, override, where, got):
        message = refused(override)
        assert message.startswith(f"test.json: {where}: ")
        assert message.endswith(f"(got {got})")
        assert "\n" not in message

    def test_the_allowed_words_are_listed(self):
        message = refused("precision.master=float16")
        assert "'float32'" in message
        assert "'bfloat16'" in message

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["model.width=100", "model.heads=3"], "model: width 100 is not divisible by heads 3"),
            (
                ["model.rope_axes=[31, 33]"],
                "model: rope_axes [31, 33] must be even and add up to head_dim 64",
            ),
            (
                ["model.rope_axes=[32, 30]"],
                "model: rope_axes [32, 30] must be even and add up to head_dim 64",
            ),
            (
                ["model.width=84", "model.heads=6"],
                "model: rope_axes [7, 7] must be even and add up to head_dim 14",
            ),
            (
                ["routing.policy=tread", "routing.end=16"],
                "configuration: routing spans blocks 2..16 but model.depth is 16; "
                "set routing.start and routing.end inside the depth",
            ),
            (
                ["routing.policy=tread", "model.depth=5"],
                "configuration: routing spans blocks 2..1 but model.depth is 5; "
                "set routing.start and routing.end inside the depth",
            ),
            (
                ["conditioning.autoencoder.kind=pixels"],
                "configuration: model.in_channels is 16; with conditioning.autoencoder.kind pixels it is 3",
            ),
            (["data.source=folder"], "data: source folder needs data.path"),
            (
                ["precision.master=bfloat16", "precision.compute=float32"],
                "configuration: precision.master bfloat16 needs precision.compute bfloat16",
            ),
        ],
    )
    def test_settings_that_do_not_go_together(self, overrides, message):
        assert refused(*overrides) == f"test.json: {message}"


class TestRouting:
    def test_the_default_end_follows_the_depth(self):
        assert route_end(parse("routing.policy=tread")) == 12
        assert route_end(parse("routing.policy=tread", "model.depth=28")) == 24
        assert route_end(parse("routing.policy=tread", "routing.end=5")) == 5

    @pytest.mark.parametrize("span", [(0, 0), (0, 15), (15, 15), (2, 12)])
    def test_any_span_inside_the_depth(self, span):
        config = parse("routing.policy=tread", f"routing.start={span[0]}", f"routing.end={span[1]}")
        assert (config.routing.start, route_end(config)) == span

    @pytest.mark.parametrize("span", [(3, 2), (0, 16), (16, 16)])
    def test_no_span_outside(self, span):
        refused("routing.policy=tread", f"routing.start={span[0]}", f"routing.end={span[1]}")

    def test_bounds_do_not_matter_without_routing(self):
        assert parse("model.depth=1").routing.policy == "none"


class TestConfig:
    def test_defaults_are_valid_and_those_of_prx(self):
        config = parse()
        assert (config.model.head_dim, config.model.axes, config.model.mlp_width) == (64, (32, 32), 6272)
        assert config.precision.master == "float32"

    def test_it_cannot_be_changed(self):
        config = parse()
        for section, name in ((config, "source"), (config.run, "steps"), (config.conditioning.text, "kind")):
            with pytest.raises(ValidationError, match="frozen"):
                setattr(section, name, getattr(section, name))

    @pytest.mark.parametrize(
        "overrides",
        [
            [],
            [
                "model.rope_axes=[16, 48]",
                'sampling.prompts=["a"]',
                "model.bottleneck=64",
                "optimizer.eps=1e-15",
            ],
            ["routing.policy=tread", "deepspeed.zero_optimization.stage=3", "precision.master=bfloat16"],
        ],
    )
    def test_what_is_saved_reads_back_equal(self, overrides, write):
        config = parse(*overrides)
        assert parse_config(config.model_dump(), "dump") == config
        assert load_config(write("resolved.json", config.model_dump_json(indent=2))) == config

    def test_every_field_is_described(self):
        bare = {
            f"{path}{name}"
            for path, section in SECTIONS.items()
            for name, field in section.model_fields.items()
            if not field.description and f"{path}{name}." not in SECTIONS
        }
        assert bare <= PLAIN
        assert all(path.rpartition(".")[0] + "." in SECTIONS for path in PLAIN)

    def test_every_section_refuses_unknown_keys_and_is_frozen(self):
        for section in SECTIONS.values():
            assert section.model_config["extra"] == "forbid"
            assert section.model_config["frozen"]


class TestSchema:
    def test_it_describes_every_field_of_every_section(self):
        schema = json_schema()
        by_title = {"Config": schema, **schema["$defs"]}
        for path, section in SECTIONS.items():
            written = by_title[section.__name__]
            assert written["additionalProperties"] is False
            assert set(section.model_fields) <= set(written["properties"]), path
            for name, field in section.model_fields.items():
                assert written["properties"][name].get("description") == field.description

    def test_it_knows_the_keys_of_files(self):
        schema = json_schema()
        assert schema["properties"]["extends"]["type"] == "string"
        assert "$schema" in schema["properties"]
        assert set(schema["properties"]) == {"extends", "$schema", *Config.model_fields}
        json.dumps(schema)
