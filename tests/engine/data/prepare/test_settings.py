import ast
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from millrace.engine.config import Data
from millrace.engine.data.crop import output_size
from millrace.engine.data.prepare.settings import Settings, readable, relative
from millrace.engine.util.errors import UserError


@pytest.mark.parametrize(
    ("aspect", "resolution"), [("mixed", 256), ("mixed", 1024), ("square", 512), ("prx", 512), ("prx", 768)]
)
def test_bucket_is_the_size_that_training_chooses(aspect, resolution):
    settings = Settings(resolution, 32, aspect)
    config = Data(resolution=resolution, aspect=aspect)
    for width, height in np.random.default_rng(0).integers(50, 3000, (300, 2)).tolist():
        bucket = settings.buckets[settings.bucket_of(width, height)]
        assert bucket == output_size(width, height, config, 32)


def test_sizes_hold_those_of_the_prx_pipeline():
    """Those published in diffusers, whose source is read since importing it takes long: the sizes that PRX's
    rule gives, without three of 1024 pixels that come one way round only."""
    found = importlib.util.find_spec("diffusers")
    if found is None:
        pytest.skip("diffusers is not installed")
    source = Path(found.submodule_search_locations[0], "pipelines", "prx", "pipeline_prx.py").read_text()
    bins = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and re.fullmatch(r"ASPECT_RATIO_\d+_BIN", node.targets[0].id)
    }
    assert len(bins) == 3
    for name, sizes in bins.items():
        settings = Settings(int(name.split("_")[2]), 32, "prx")
        found = {tuple(size) for size in sizes.values()}
        assert found <= set(settings.buckets) == found | {(w, h) for h, w in found}


def test_settings_that_cannot_be():
    with pytest.raises(UserError, match="--resolution 100 is not a multiple of --patch 32; use 96 or 128"):
        Settings(100)
    with pytest.raises(UserError, match="80 is not a multiple of the 32 pixels of --aspect prx; use 64"):
        Settings(80, 16, "prx")
    with pytest.raises(UserError, match="--aspect prx has sizes"):
        Settings(512, 64, "prx")


def test_description_comes_back_from_json():
    settings = Settings(512, caption_columns=("long", "short"))
    assert json.loads(json.dumps(settings.described())) == settings.described()
    assert settings.described()["pillow"]


def test_sets_of_another_rule_of_sizes_are_not_gone_on_with():
    assert Settings(512, aspect="prx").described()["sizes"] == "|w / h - W / H| over all of crop.prx_buckets"
    assert "sizes" not in Settings(512).described()


def test_names_that_are_no_text_can_be_printed():
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    assert readable(name) == "caf\\xe9.jpg"
    assert relative(Path("/a/b") / name, Path("/a")) == "b/caf\\xe9.jpg"
    assert readable("naïve 猫\u202f") == "naïve 猫\u202f"
    assert readable("a\nb\x1b[31m\u2028") == "a\\nb\\x1b[31m\\u2028"
