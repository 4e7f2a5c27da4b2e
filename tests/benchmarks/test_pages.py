"""Committed pages are what the results say; each cell of the planner's table fits, or says that none does."""

import json
import re
import shutil
from xml.etree import ElementTree

import pytest

from millrace.benchmarks.report import pages
from millrace.benchmarks.report import settings_section as table
from millrace.benchmarks.report.recording import RESULTS
from millrace.engine.planning.devices import GPUS
from millrace.engine.util.errors import UserError


def test_the_committed_pages_are_what_the_committed_results_say():
    assert not pages.stale(), "run python -m benchmarks pages"


def test_the_committed_charts_show_what_the_committed_results_say():
    assert not pages.stale_charts(), "run python -m benchmarks pages"


def test_a_chart_that_shows_another_number_is_seen(tmp_path):
    for name in ("routing.json", "routing.svg"):
        shutil.copyfile(RESULTS / name, tmp_path / name)
    assert not pages.stale_charts(tmp_path)
    result = json.loads((tmp_path / "routing.json").read_text())
    routed = next(row for row in result["rows"] if row["saved_time_per_saved_flops"] is not None)
    routed["saved_time_per_saved_flops"] += 0.5
    (tmp_path / "routing.json").write_text(json.dumps(result))
    assert list(pages.stale_charts(tmp_path)) == [tmp_path / "routing.svg"]


def test_charts_have_the_colours_of_both_schemes():
    """No colour is written into a shape: each is a variable that the light and the dark scheme define."""
    drawings = [*RESULTS.glob("*.svg"), *(pages.DOCS / "diagrams").glob("*.svg")]
    assert len(drawings) >= 11
    for path in drawings:
        text = path.read_text()
        ElementTree.fromstring(text)
        style = re.search(r"<style.*?</style>", text, re.DOTALL).group()
        shapes = text.replace(style, "")
        assert "prefers-color-scheme: dark" in style
        assert not re.findall(r"#[0-9a-f]{6}\b", shapes), path
        used = set(re.findall(r"var\((--[\w-]+)\)", shapes))
        light, dark = style.split("prefers-color-scheme: dark")
        for name in used:
            assert f"{name}:" in light, (path, name)
            assert f"{name}:" in dark, (path, name)


def test_every_cell_fits_or_says_that_nothing_does():
    lines = table.section().splitlines()[2:]
    assert len(lines) == len(table.chosen()) == 5 * len(table.PROCESSES)
    for ((name, ranks), row), line in zip(table.chosen().items(), lines, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:2] == [name, str(ranks)]
        for (device, option), cell in zip(row.items(), cells[2:], strict=True):
            if option is None:
                assert cell == "nothing fits"
                assert (device, ranks) == ("rtx4090", 1)
            else:
                assert option.memory.peak <= GPUS[device].capacity
                assert cell.startswith(f"{option.micro_batch}, ZeRO {option.stage}")
                assert option.stage == 0 if ranks == 1 else option.stage > 0
    assert table.chosen()["jit_1024", 8]["h100"].fits


def test_a_page_without_its_marks_is_an_error():
    with pytest.raises(UserError, match="has no line"):
        table.page([], "no marks")
