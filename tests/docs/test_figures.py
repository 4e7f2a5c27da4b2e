"""Figures on hand-written pages have a source: see docs/generator/figures.py."""

import pytest

from tests.docs.building import load

figures = load("figures")


@pytest.mark.parametrize("path", figures.pages(), ids=lambda path: path.name)
def test_figures_have_a_source(path):
    name = path.relative_to(figures.ROOT).as_posix()
    assert not figures.problems(name, path.read_text(), figures.load()), (
        f"link a page that is made from benchmarks/results/, or name the source in {figures.SOURCES}"
    )


def test_sources_are_of_pages_that_exist():
    for name, sources in figures.load().items():
        assert (figures.ROOT / name).exists(), name
        assert all(len(source) > 10 for source in sources.values())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It loads 954.0 images/s on two cores.", ["954.0 images/s"]),
        ("A step takes 12.5 ms, 3 % of it waiting.", ["12.5 ms", "3 %"]),
        ("It moves 3.9 TB/s and is 1.4x faster.", ["3.9 TB/s", "1.4x faster"]),
        ("DALI is twice as fast.", ["twice as fast"]),
        ("It reaches 610 TFLOP/s, MFU 0.61.", ["610 TFLOP/s", "MFU 0.61"]),
        ("Between 7-9 % in the prose.", ["7-9 %"]),
        ("`--set x=5 ms` and\n\n```\n12 ms\n```\n\nare code.", []),
        ("1 ms\n\n<!-- written by a.py -->\n2 ms\n<!-- end -->\n\n3 ms", ["1 ms", "3 ms"]),
        ("256 px, 1,438 pictures, 0.2 of the samples, 30 seconds, 16 bytes, 347 TFLOP", []),
    ],
)
def test_finds_figures(text, found):
    assert figures.figures(text) == found


def test_a_figure_without_a_source_and_a_source_without_a_figure_are_problems():
    sources = {"docs/x.md": {"12 ms": "a data sheet"}}
    assert figures.problems("docs/x.md", "It takes 12 ms.", sources) == []
    (problem,) = figures.problems("docs/x.md", "It takes 12 ms and then 13 ms.", sources)
    assert "'13 ms' has no source" in problem
    (problem,) = figures.problems("docs/x.md", "Nothing.", sources)
    assert "not on the page" in problem
