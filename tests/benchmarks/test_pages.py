"""Committed pages are what the results say; each cell of the planner's table fits, or says that none does."""

import pytest

from millrace.benchmarks.report import pages
from millrace.benchmarks.report import settings_section as table
from millrace.engine.planning.devices import GPUS
from millrace.engine.util.errors import UserError


def test_the_committed_pages_are_what_the_committed_results_say():
    assert not pages.stale(), "run python -m benchmarks pages"


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
