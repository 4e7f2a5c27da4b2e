"""The page of recipes is what configs/ says, and what configs/ says of its values is true."""

import json
from pathlib import Path

import pytest

from tests.docs.building import load

ROOT = Path(__file__).resolve().parents[2]
recipes = load("recipes")


def test_the_page_is_current():
    assert recipes.PAGE.read_text() == recipes.page(), "run python docs/generator/recipes.py"


def test_every_row_of_the_post_is_a_recipe():
    tables = json.loads((ROOT / "benchmarks" / "published.json").read_text())["tables"]
    assert {row["config"] for table in tables for row in table["rows"]} - {None} <= set(recipes.recipes())


def test_facts_are_of_files_and_settings_that_there_are():
    known, found = recipes.facts(), recipes.recipes()
    for who in ("post", "part 3", "PRX"):
        assert set(known[who]["rows"]) <= set(found)
    used = {file for name in found for file in recipes._files(name, known)}
    for entry in known["PRX"]["files"].values():
        used |= set(entry.get("uses", []))
    assert used == set(known["PRX"]["files"])
    settings = recipes.flat(recipes.Config().model_dump(mode="json"))
    for values in (entry["values"] for entry in known["PRX"]["files"].values()):
        assert set(values) <= {*settings, "deepspeed.zero_optimization"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("post", "is 0.2 as in post, which says None"),
        ("own", "is our own without a reason"),
        ("paper", "is also as in PRX"),
        ("someone", "is from 'someone'"),
        (None, "has no source"),
    ],
)
def test_wrong_credit_is_refused(source, message):
    said = {"post": {"optimizer.lr": 1e-4}, "part 3": {}, "PRX": {"optimizer.clip": 0.2}}
    sources = {} if source is None else {"optimizer": source}
    if source == "paper":
        sources = {"optimizer": "post"}
        said["post"]["optimizer.clip"] = 0.2
    with pytest.raises(ValueError, match=message):
        recipes._row("x", "optimizer.clip", 0.2, said, sources)


def test_a_value_that_others_do_not_have_needs_a_reason():
    said = {"post": {"sampling.method": "cfg"}, "part 3": {}, "PRX": {"sampling.method": "self"}}
    with pytest.raises(ValueError, match="differs from what another says, without a reason"):
        recipes._row("x", "sampling.method", "cfg", said, {"sampling": "post"})
    row = recipes._row("x", "sampling.method", "cfg", said, {"sampling": "post: no special guidance"})
    assert row.said == {"post": "cfg", "PRX": "self"}


def test_the_model_of_the_pixel_rows_is_the_one_of_its_file():
    """jit_1024 extends the baseline, so that all rows share one recipe, and repeats what its model is."""
    from millrace.engine.config.loading import load_config

    model = load_config(ROOT / "configs" / "models" / "prx_1b_jit_32.json")
    row = load_config(ROOT / "configs" / "jit_1024.json")
    assert row.model == model.model
    assert (row.objective.prediction, row.objective.time_shift) == ("sample", 3.0)
    assert row.conditioning.autoencoder.kind == model.conditioning.autoencoder.kind


def test_the_grid_has_as_many_prompts_as_prx():
    from millrace.engine.config.loading import load_config

    prompts = load_config(ROOT / "configs" / "latent_256.json").sampling.prompts
    assert len(set(prompts)) == 49
