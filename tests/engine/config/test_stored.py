"""Configurations out of checkpoints that another version wrote."""

import pytest

from millrace.engine.config import Config
from millrace.engine.config.stored import MEANING, stored_config
from millrace.engine.util.errors import UserError

CONFIG = Config.model_validate({"run": {"steps": 5, "seed": 7}, "model": {"width": 32, "heads": 2}})


def values():
    return CONFIG.model_dump(mode="json")


def test_its_own_version_reads_it_without_a_word(caplog):
    assert stored_config(values(), "run") == CONFIG
    assert caplog.records == []


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("sampling", "some_later_key", 3),
        ("optimizer", "kind", "adam_of_the_future"),
        ("checkpoint", "keep", "all"),
        ("data", "source", "the_cloud"),
        ("logging", "deep", {"er": 1}),
        ("a_later_section", "key", 1),
    ],
)
def test_settings_that_do_not_matter_are_passed_over_and_named(caplog, section, key, value):
    changed = values()
    changed.setdefault(section, {})[key] = value
    found = stored_config(changed, "runs/x")
    assert found.model == CONFIG.model
    assert found.run == CONFIG.run
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("runs/x: settings that this version does not take are passed over: ")
    assert section in said
    assert "\n" not in said


def test_sections_that_contradict_each_other_beside_the_weights_are_left_out(caplog):
    changed = values()
    changed["precision"]["master"] = "bfloat16"
    changed["precision"]["compute"] = "bfloat16"
    changed["alignment"] = {"kind": "repa", "block": 999}
    found = stored_config(changed, "runs/x")
    assert (found.model, found.alignment) == (CONFIG.model, Config().alignment)
    assert found.precision.master == "bfloat16"
    assert "alignment" in caplog.text


@pytest.mark.parametrize("section", MEANING)
def test_what_the_weights_mean_is_read_strictly(section):
    changed = values()
    changed[section]["some_later_key"] = 1
    with pytest.raises(UserError, match=f"runs/x: unknown key '{section}.some_later_key'"):
        stored_config(changed, "runs/x")
