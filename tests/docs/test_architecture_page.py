"""The page about the structure names the rooms and files that there are."""

import re

import pytest

from tests.docs.building import ROOT
from tests.test_architecture import ROOMS

PAGE = (ROOT / "docs" / "architecture.md").read_text()
ANSWERS = re.findall(r"^\| [^|]+ \| `([^`]+)` \|$", PAGE, re.MULTILINE)
FOLDERS = sorted(path.name for path in (ROOT / "engine").iterdir() if (path / "__init__.py").is_file())
FILES = sorted(path.name for path in (ROOT / "engine").glob("[a-z]*.py"))


def test_every_answer_is_a_file():
    assert len(ANSWERS) > 30
    assert [name for name in ANSWERS if not (ROOT / name).is_file()] == []


def test_the_tree_is_the_tree():
    """Every folder and file at the top of engine/ stands in the drawing, and nothing that is gone."""
    tree = PAGE.split("```")[1]
    drawn = tree.partition("engine/")[2].partition("\nkernels/")[0]
    assert sorted(re.findall(r"^  (\w+)/ ", drawn, re.MULTILINE)) == FOLDERS
    assert (
        sorted(re.findall(r"(\w+\.py)\b", "\n".join(re.findall(r"^  \w+\.py.*", drawn, re.MULTILINE))))
        == FILES
    )


def test_the_rooms_of_the_benchmarks_are_in_the_tree():
    tree = PAGE.split("```")[1]
    drawn = tree.partition("benchmarks/ ")[2].partition("\ntests/")[0]
    there = [path.name for path in (ROOT / "benchmarks").iterdir() if (path / "__init__.py").is_file()]
    assert sorted(re.findall(r"^  (\w+)/ ", drawn, re.MULTILINE)) == sorted(there)


def test_the_order_of_the_rooms_is_that_of_the_test():
    sentence = PAGE.partition("from the bottom up: ")[2].partition(", and the trainer")[0]
    rooms = [room.rpartition(".")[2] for room in ROOMS[:-1]]
    assert re.findall(r"\w+", sentence) == rooms


@pytest.mark.parametrize(
    "term",
    [
        "timestep sampling",
        "text encoder",
        "caption dropout",
        "collate",
        "latent cache",
        "learning-rate schedule",
        "gradient clipping",
        "classifier-free guidance",
        "exponential moving average",
        "DeepSpeed configuration",
    ],
)
def test_the_words_of_the_field_are_found(term):
    """In the first line of a module, where an index would have them."""
    first = [path.read_text().split("\n")[0] for path in (ROOT / "engine").rglob("*.py")]
    assert any(term.lower() in line.lower() for line in first)
