"""Public data sets: the table against the configurations, the page, and the parser of millrace prepare."""

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from millrace.engine.config import Data
from millrace.engine.data import open_source
from millrace.engine.data.public_sets import PUBLIC_SETS, require_published
from millrace.engine.prepare import build_parser
from millrace.engine.util.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "data.md").read_text()
CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.json")) if path.name != "schema.json"]


def data_sections(value):
    """Every `data` and part of a mixture in a configuration."""
    for key, inner in value.items():
        if key == "data":
            yield inner
            yield from inner.get("mixture", [])
        if key == "stages":
            for stage in inner:
                yield from data_sections(stage)


def named():
    found = {}
    for path in CONFIGS:
        for section in data_sections(json.loads(path.read_text())):
            if section.get("path"):
                found.setdefault(section["path"], []).append(path.name)
    return found


def test_every_path_of_a_configuration_is_known():
    assert named()
    missing = {path: files for path, files in named().items() if path not in PUBLIC_SETS}
    assert not {path for path in missing if not (ROOT / path).exists()}, missing


@pytest.mark.parametrize("path", PUBLIC_SETS)
def test_commands_end_in_the_path(path):
    """Each command reads what one before it has made, or the page; the last ones make the path."""
    made = set()
    for command in PUBLIC_SETS[path].commands:
        words = shlex.split(command)
        options = dict(pairwise(words))
        for option in ("--input", "--url_list", "unzip"):
            read = options.get(option)
            assert read is None or any(read.startswith(folder) for folder in made), command
        for option in ("--output", "--output_folder", "--local-dir", "-d"):
            if option in options:
                made.add(options[option])
    assert path in made


@pytest.mark.parametrize("path", sorted(named()))
def test_prepare_takes_its_command(path):
    (command,) = [line for line in PUBLIC_SETS[path].commands if line.startswith("millrace prepare ")]
    arguments = build_parser().parse_args(shlex.split(command)[2:])
    assert arguments.output == path
    assert arguments.upscale  # as the configurations, which would refuse no small picture


def test_the_page_has_the_table():
    section = PAGE.partition("\n## Public data sets\n")[2].partition("\n## ")[0]
    parts = re.split(r"^### (\S+)$", section, flags=re.MULTILINE)
    assert parts[1::2] == list(PUBLIC_SETS)
    for path, text in zip(parts[1::2], parts[2::2], strict=True):
        public = PUBLIC_SETS[path]
        (block,) = re.findall(r"^```bash\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE)
        assert tuple(re.sub(r" \\\n +", " ", block).split("\n")) == public.commands
        assert f"({public.page}); licence: {public.licence}." in text


@pytest.mark.parametrize("kind", ["folder", "shards", "mds"])
def test_a_missing_set_names_its_first_command(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        open_source(Data(source=kind, path="datasets/midjourney-v6/"))
    first = PUBLIC_SETS["datasets/midjourney-v6"].commands[0]
    assert str(caught.value).startswith(f"datasets/midjourney-v6/: no such folder; begin with {first} and")
    assert "\n" not in str(caught.value)


def test_other_folders_and_those_that_are_there_are_no_concern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    require_published(None)
    require_published("datasets/mine")
    (tmp_path / "datasets" / "pexels").mkdir(parents=True)
    require_published("datasets/pexels")
    with pytest.raises(UserError, match="datasets/unsplash: no such folder; begin with curl"):
        require_published("datasets/unsplash")


def test_shards_opened_as_a_folder(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds shards, not pictures; set data.source to shards"):
        open_source(Data(source="folder", path=str(tmp_path)))
