"""The configuration: refusals that say what to do, defaults, and descriptions."""

import json
from collections.abc import Iterator

import pytest
from pydantic import ValidationError

from millrace.engine.config import Config, Section, route_end
from millrace.engine.config.loading import dict_from_overrides, json_schema, load_config, parse_config
from millrace.engine.util.errors import UserError


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
                ["routing.policy=tread", "routing.path_drop=0.1"],
                "routing: path_drop belongs to policy sprint, but policy is tread; remove one of the two",
            ),
            (
                ["routing.mask_token=frozen"],
                "routing: mask_token belongs to policy sprint, but policy is none; remove one of the two",
            ),
            (
                ["routing.policy=sprint", "model.depth=5"],
                "configuration: routing spans blocks 2..1 but model.depth is 5; "
                "set routing.start and routing.end inside the depth",
            ),
            (
                ["routing.policy=sprint", "routing.structured=true", "data.aspect=mixed"],
                "configuration: routing.structured needs one grid for all pictures; "
                "set data.aspect to square",
            ),
            (
                ["routing.policy=sprint", "routing.structured=true", "routing.drop=0.7"],
                "routing: structured drops whole sixteenths of the tokens; drop 0.7 is none",
            ),
            (
                ["precision.master=bfloat16", "precision.compute=float32"],
                "configuration: precision.master bfloat16 needs precision.compute bfloat16",
            ),
        ],
    )
    def test_settings_that_do_not_go_together(self, overrides, message):
        assert refused(*overrides) == f"test.json: {message}"

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("run.steps=true", "run.steps: Input should be a valid integer (got True)"),
            ('run.steps="5"', "run.steps: Input should be a valid integer (got '5')"),
            ("run.steps=5.5", "run.steps: Input should be a valid integer"),
            ("optimizer.lr=Infinity", "optimizer.lr: Input should be a finite number (got inf)"),
            ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1: Input should be less than 1 (got 1.0)"),
        ],
    )
    def test_nothing_is_converted_to_fit(self, override, message):
        assert refused(override).startswith(f"test.json: {message}")


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

    def test_the_usual_share_follows_the_policy(self):
        assert parse("routing.policy=tread").routing.drop == 0.5
        assert parse("routing.policy=sprint").routing.drop == 0.75
        assert parse("routing.policy=sprint", "routing.drop=0.5").routing.drop == 0.5

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
            ["routing.policy=sprint", "routing.structured=true", "routing.mask_token=frozen"],
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
        assert bare == set()

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
        assert set(schema["properties"]) == {"extends", "$schema", "sources", *Config.model_fields}
        json.dumps(schema)
