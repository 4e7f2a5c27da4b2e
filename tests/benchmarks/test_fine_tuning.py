"""The check of fine-tuning on digits: its pictures, its arithmetic, and what the docs say of its result."""

import json
import sys
from pathlib import Path

import pytest

from millrace.benchmarks.quality import fine_tuning
from millrace.benchmarks.report import fine_tuning_section
from millrace.benchmarks.report.marked_section import BEGIN, END
from millrace.engine.util.errors import UserError

RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "fine_tuning.json"


def test_the_base_never_sees_what_is_fine_tuned_on():
    base, others = (set(fine_tuning.digits(of_base=flag)) for flag in (True, False))
    assert not base & others
    assert len(base | others) == 1438


def test_a_gain_is_a_share_of_that_of_all_weights():
    runs = [
        {"seed": 0, "held_out_loss": {"nothing": 1.0, "all weights": 0.6, "LoRA": 0.7}},
        {"seed": 1, "held_out_loss": {"nothing": 1.2, "all weights": 0.7, "LoRA": 0.7}},
    ]
    nothing, whole, adapter = fine_tuning.compare(runs)
    assert nothing["share_of_gain"] == [0, 0]
    assert whole["share_of_gain"] == [1, 1]
    assert adapter["share_of_gain"] == pytest.approx([0.75, 1])
    assert adapter["mean"] == pytest.approx(0.7)


def test_the_result_is_what_its_runs_give_and_the_page_says():
    stored = json.loads(RESULT.read_text())
    assert not stored["quick"]
    assert len(stored["runs"]) == 3
    assert stored["table"] == fine_tuning.compare(stored["runs"])
    assert stored["arms"] == json.loads(json.dumps(fine_tuning.ARMS))
    page = f"a\n{BEGIN}\nold\n{END}\nz\n"
    text = fine_tuning_section.page([stored], page)
    assert "old" not in text
    assert fine_tuning_section.page([stored], text) == text
    assert "Not measured" in fine_tuning_section.page([stored | {"quick": True}], page)
    with pytest.raises(UserError, match=r"fine_tuning.md has no line <!-- written"):
        fine_tuning_section.page([stored], "nothing")
    # An adapter gains with every seed, and moments of 8 bits what those of 32 do.
    shares = {row["arm"]: row["share_of_gain"] for row in stored["table"]}
    assert all(min(shares[arm]) > 0.3 for arm in ("LoRA, rank 8", "DoRA, rank 8"))
    assert shares["all weights, adamw_8bit"] == pytest.approx([1, 1, 1], abs=0.05)
    assert shares["all weights, adamw_offload"] == [1, 1, 1]


@pytest.mark.slow
def test_a_quick_check(tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    output = tmp_path / "tuned.json"
    words = ["--quick", "--seeds", "0", "--work", str(tmp_path / "work"), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["fine_tuning.py", *words])
    assert fine_tuning.main() == 0
    (run,) = json.loads(output.read_text())["runs"]
    losses = run["held_out_loss"]
    assert list(losses) == list(fine_tuning.ARMS)
    assert losses["all weights, adamw_offload"] == losses["all weights"] != losses["nothing"]
    assert losses["LoRA, rank 8"] != losses["nothing"]
