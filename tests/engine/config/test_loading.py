"""Configuration files that extend files, and overrides on the command line."""

import json
from pathlib import Path

import pytest

from millrace.engine.config import Config
from millrace.engine.config.loading import (
    Given,
    check_given,
    dict_from_overrides,
    differences,
    json_schema,
    load_config,
    merge,
    parse_config,
    read_json,
    read_sources,
    source_of,
)
from millrace.engine.util.errors import UserError


def parse(*overrides: str) -> Config:
    return parse_config(dict_from_overrides(overrides), "test.json")


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


class TestSources:
    def test_they_follow_the_files_and_are_no_settings(self, write):
        write("base.json", {"optimizer": {"lr": 1.0}, "sources": {"optimizer": "post", "run.seed": "PRX"}})
        leaf = write("leaf.json", {"extends": "base.json", "sources": {"optimizer.lr": "own: to see"}})
        sources = read_sources(leaf)
        assert sources == {"optimizer": "post", "run.seed": "PRX", "optimizer.lr": "own: to see"}
        assert source_of("optimizer.lr", sources) == "own: to see"
        assert source_of("optimizer.eps", sources) == "post"
        assert source_of("run.steps", sources) is None
        assert "sources" not in read_json(leaf)
        assert load_config(leaf).optimizer.lr == 1.0

    @pytest.mark.parametrize("sources", ["post", {"run.seed": 3}])
    def test_they_are_texts(self, write, sources):
        with pytest.raises(UserError, match="it holds a text for each setting"):
            load_config(write("leaf.json", {"sources": sources}))


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

    @pytest.mark.parametrize("word", ["2024", "true", "[text]", "1e5", '{"a": 1}'])
    def test_any_word_is_a_text_where_a_text_is_wanted(self, word):
        assert parse(f"data.path={word}").data.path == word
        assert parse(f"run.init_from={word}", f"logging.project={word}").logging.project == word
        assert parse("run.init_from=null").run.init_from is None

    def test_they_lie_over_the_file(self, write):
        path = write("run.json", {"run": {"steps": 7, "seed": 3}})
        config = load_config(path, ["run.steps=8"])
        assert (config.run.steps, config.run.seed) == (8, 3)

    @pytest.mark.parametrize("item", ["run.steps", "=3", ""])
    def test_what_is_no_assignment(self, item):
        with pytest.raises(UserError, match=r"write it as section\.key=value") as error:
            dict_from_overrides([item])
        assert item in str(error.value)


class TestUnusableFiles:
    def test_a_key_given_twice(self, write):
        path = write("twice.json", '{"run": {"steps": 1}, "run": {"seed": 1}}')
        with pytest.raises(UserError, match="not valid JSON: key 'run' is given twice"):
            read_json(path)

    def test_extends_that_is_no_name(self, write):
        with pytest.raises(UserError, match="extends is 5; it is the name of another configuration file"):
            read_json(write("five.json", {"extends": 5}))

    @pytest.mark.parametrize("text", ["[" * 10**5, '{"run": {"seed": ' + "9" * 10**4 + "}}"])
    def test_what_the_parser_itself_cannot_take(self, write, text):
        with pytest.raises(UserError, match="not valid JSON: ") as error:
            read_json(write("deep.json", text))
        assert "\n" not in str(error.value)

    def test_a_byte_order_mark_is_no_mistake(self, tmp_path):
        path = tmp_path / "bom.json"
        path.write_text('{"run": {"steps": 1}}', encoding="utf-8-sig")
        assert read_json(path) == {"run": {"steps": 1}}

    def test_a_folder(self, write, tmp_path):
        with pytest.raises(UserError, match="cannot be read as a configuration file: Is a directory"):
            read_json(write("folder.json", {"extends": "."}))


def test_differences_are_named():
    old = {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "f": [1]}
    new = {"a": 1, "b": {"c": 5, "d": {"e": 3}, "g": None}, "f": [2], "h": 0}
    assert differences(old, old) == []
    assert differences(old, new) == ["b.c", "f", "h"]


def test_committed_schema_is_current():
    """`make schema` writes it."""
    committed = Path(__file__).resolve().parents[3] / "configs" / "schema.json"
    assert json.loads(committed.read_text()) == json_schema()


class TestBlame:
    """An error names what holds the mistake: the file, or what was typed."""

    def said(self, path, *overrides):
        with pytest.raises(UserError) as caught:
            load_config(path, overrides)
        return str(caught.value).splitlines()

    def test_a_key_and_a_value_of_an_override(self):
        assert self.said("quickstart", "run.stepz=3") == [
            "--set run.stepz=3: unknown key 'run.stepz'; did you mean 'steps'?"
        ]
        (line,) = self.said("quickstart", "zzz.a=1")
        assert line.startswith("--set zzz.a=1: unknown key 'zzz'; valid keys: ")
        (line,) = self.said("quickstart", "run.steps=5", "optimizer.lr=abc")
        assert line.startswith("--set optimizer.lr=abc: optimizer.lr: Input should be a valid number")

    def test_values_that_do_not_go_together(self):
        (line,) = self.said("quickstart", "run.steps=5", "model.heads=7")
        wanted = "quickstart with --set model.heads=7: model: width 160 is not divisible by heads 7"
        assert line.startswith(wanted)
        (line,) = self.said("quickstart", "model.in_channels=4", "run.steps=5")
        assert line.startswith("quickstart with --set model.in_channels=4 --set run.steps=5: ")

    def test_mistakes_of_the_file_are_the_file_s(self, tmp_path):
        path = tmp_path / "mine.json"
        path.write_text('{"run": {"stepz": 1}}')
        first, second = self.said(path, "optimizer.lr=abc")
        lines = sorted((first, second))
        assert lines[0].startswith("--set optimizer.lr=abc: ")
        assert lines[1] == f"{path}: unknown key 'run.stepz'; did you mean 'steps'?"

    def test_a_flag_stands_for_its_setting(self):
        given = [Given("--method self", "sampling.method", "self")]
        with pytest.raises(UserError, match=r"^x with --method self: .*set --method to cfg"):
            parse_config({}, "x", given)
        with pytest.raises(UserError, match=r"^--steps many: sampling.steps: "):
            check_given([Given("--steps many", "sampling.steps", "many")])
        check_given(given)  # wrong beside some configurations only


class TestHalfCharacters:
    def test_of_a_file(self, write):
        path = write("half.json", '{"sampling": {"prompts": ["a", "\\ud83d b"]}}')
        with pytest.raises(UserError, match=r"half.json: sampling\.prompts\.1 holds half of a character"):
            load_config(path)

    def test_of_the_command_line(self):
        with pytest.raises(
            UserError, match=r"^--set data.path=.*: data\.path holds .* bytes that are not UTF-8"
        ):
            load_config("quickstart", ["run.steps=5", "data.path=caf\udce9"])

    def test_a_whole_one_is_taken(self, write):
        path = write("whole.json", '{"sampling": {"prompts": ["\\ud83d\\ude00"]}}')
        assert load_config(path).sampling.prompts == ("\U0001f600",)


class TestPaths:
    """`~` and variables in every path mean what they mean in a shell."""

    PATHS = (
        *(
            "run.output_dir",
            "run.init_from",
            "data.path",
            "data.keys",
            "data.remote.cache_dir",
            "evaluation.cache",
            "evaluation.reference",
        ),
        *("conditioning.text.path", "conditioning.autoencoder.path", "alignment.teacher.path"),
        *("evaluation.features.fid", "objective.lpips.path", "sampling.mean_target"),
    )

    @pytest.mark.parametrize("key", PATHS)
    def test_every_one(self, key, monkeypatch):
        monkeypatch.setenv("HOME", "/home/ada")
        monkeypatch.setenv("SCRATCH", "/scratch/ada")
        for typed, meant in {
            "~/x": "/home/ada/x",
            "$SCRATCH/x": "/scratch/ada/x",
            "${SCRATCH}y": "/scratch/aday",
            "s3://bucket/~x": "s3://bucket/~x",
            "google/t5gemma": "google/t5gemma",
        }.items():
            value = parse(f"{key}={typed}").model_dump()
            for part in key.split("."):
                value = value[part]
            assert value == meant

    @pytest.mark.parametrize(
        ("typed", "said"),
        [
            ("$NOWHERE/x", "has no NOWHERE"),
            ("${NOWHERE}", "has no NOWHERE"),
            ("~nobody-here/x", "no user 'nobody-here'"),
        ],
    )
    def test_what_has_no_meaning(self, typed, said, monkeypatch):
        monkeypatch.delenv("NOWHERE", raising=False)
        with pytest.raises(UserError, match=rf"^--set run.output_dir=.*: run.output_dir: .*{said}"):
            load_config("quickstart", [f"run.output_dir={typed}"])


def test_a_missing_file_is_answered_with_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foxes.json").write_text("{}")
    for asked, meant in (
        ("foxe.json", "foxes.json"),
        ("quickstrt", "quickstart"),
        ("a/jit_1024", "jit_1024"),
    ):
        with pytest.raises(UserError, match=f"no such configuration file; did you mean {meant}\\?$"):
            load_config(asked)
    with pytest.raises(UserError, match="no such configuration file; those that come with Millrace lie in "):
        load_config("zzzzzz")
    (tmp_path / "leaf.json").write_text('{"extends": "foxs.json"}')
    with pytest.raises(UserError, match=r"foxs.json: no such configuration file; did you mean .*/foxes.json"):
        load_config("leaf.json")


def test_a_run_from_weights_says_whose_stages_it_goes_through(tmp_path):
    """Those of the file it extends would take it over to other data in the middle of its fine-tuning."""
    stages = [{"at": 30, "data": {"path": "other"}}]
    (tmp_path / "base.json").write_text(json.dumps({"run": {"steps": 60}, "stages": stages}))
    tuned = {"extends": "base.json", "run": {"init_from": "weights"}}
    own = tmp_path / "sft.json"
    own.write_text(json.dumps(tuned))
    with pytest.raises(
        UserError, match=r"would go through the 1 stages of base\.json; give it stages of its own"
    ):
        load_config(own)
    for chosen in ([], stages):
        own.write_text(json.dumps(tuned | {"stages": chosen}))
        assert [stage["at"] for stage in load_config(own).stages] == [stage["at"] for stage in chosen]
    own.write_text(json.dumps({"extends": "base.json", "run": {"init_from": None}}))
    assert len(load_config(own).stages) == 1
