"""The check of FP8 training against BF16: its arithmetic, its runs, and what the docs say of its results."""

import json
import sys
from pathlib import Path

import pytest

from millrace.benchmarks.quality import fp8_parity as parity
from millrace.benchmarks.report import fp8_section
from millrace.benchmarks.report.marked_section import BEGIN, END
from millrace.engine.util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


RESULT = ROOT / "benchmarks" / "results" / "fp8_parity.json"


def run(arm, seed, held_out, level=1.0, skipped=0):
    """A run whose training loss is `level` throughout."""
    looks = [{"step": 4, "held_out_loss": 9.0}, {"step": 8, "held_out_loss": held_out}]
    return {"arm": arm, "seed": seed, "loss": [level] * 8, "skipped": skipped, "looks": looks}


RUNS = [
    run("BF16", 0, 1.00, 2.0),
    run("FP8, torch", 0, 1.02, 2.1),
    run("FP8, torchao", 0, 1.12),
    run("BF16", 1, 1.10, 2.2),
    run("FP8, torch", 1, 1.089, 2.2, skipped=1),
    run("FP8, torchao", 1, 1.10),
]


def test_distances_are_those_of_one_seed_and_the_spread_that_of_two():
    base, own, other = parity.compare(RUNS)
    assert base["held_out_loss"] == pytest.approx(1.05)
    assert base["held_out_spread"] == pytest.approx(0.10 / 1.05)
    assert base["training_spread"] == pytest.approx(abs(2.0 / 2.2 - 1))
    assert own["held_out_distances"] == pytest.approx([0.02, -0.01])
    assert own["training_distances"] == pytest.approx([0.05, 0.0])
    assert (own["within_spread"], own["skipped"], own["seeds"]) == (True, 1, 2)
    assert other["within_spread"] is False, "12 % with one seed, beside 9.5 % between seeds"
    assert "held_out_distances" not in base


def test_one_seed_has_no_spread_to_compare_with():
    base, own = parity.compare(RUNS[:2])
    assert base["held_out_spread"] is None
    assert own["within_spread"] is None
    assert "One seed: no spread to compare with." in fp8_section.section(result(RUNS[:2]))


def result(runs=RUNS):
    config = {
        "run": {"steps": 8},
        "model": {"width": 32, "depth": 2},
        "data": {"resolution": 32, "global_batch": 4},
    }
    return {
        "benchmark": "fp8_parity",
        "quick": False,
        "table": parity.compare(runs),
        "config": config,
        "seeds": [0, 1],
        "gpus": [],
        "dirty": False,
        "commit": "0123456789abcdef",
        "versions": {"torch": "2.13.0"},
        "torchao": None,
        "held_out_pictures": 4,
        "chart": "fp8_parity.svg",
    }


def test_the_section_says_what_was_measured():
    text = fp8_section.section(result())
    assert "| FP8, torch | 1.0545 | +2.00%, -1.00% | 2.50% | 1 |" in text
    assert "Seeds of BF16 lie 9.52% apart in the held-out loss" in text
    own = "- `FP8, torch`: held-out loss +0.50% from BF16 on average, higher or lower with the seed; "
    assert f"{own}every distance is within the spread of the seeds." in text
    assert "not every distance is within the spread of the seeds." in text
    higher = [
        run("BF16", 0, 1.0),
        run("FP8, torch", 0, 1.01),
        run("BF16", 1, 1.1),
        run("FP8, torch", 1, 1.12),
    ]
    assert "on average, higher with every seed; every" in fp8_section.section(result(higher))
    assert "on a CPU, with emulated products" in text
    assert "commit 0123456789ab," in text.lower()
    assert "torchao not installed" in text


def test_the_section_goes_between_its_marks():
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    text = fp8_section.page([result()], page)
    assert text.startswith(f"before\n{BEGIN}\nWidth 32")
    assert text.endswith(f"\n{END}\nafter\n")
    assert "old" not in text
    assert fp8_section.page([result()], text) == text
    assert "Not measured" in fp8_section.page([result() | {"quick": True}], page)
    with pytest.raises(UserError, match=r"precision.md has no line <!-- written"):
        fp8_section.page([result()], "nothing")


def test_the_table_in_the_results_is_what_their_runs_give():
    stored = json.loads(RESULT.read_text())
    assert not stored["quick"]
    assert stored["table"] == parity.compare(stored["runs"])


@pytest.mark.slow
def test_a_quick_check(tmp_path, monkeypatch):
    """Tiny runs of two seeds; started again, nothing is trained twice."""
    output = tmp_path / "parity.json"
    words = ["--quick", "--seeds", "0", "1", "--arms", "BF16", "FP8, torch"]
    words += ["--work", str(tmp_path / "work"), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["fp8_parity.py", *words])
    assert parity.main() == 0
    content = json.loads(output.read_text())
    assert [(one["arm"], one["seed"]) for one in content["runs"]] == [
        ("BF16", 0),
        ("FP8, torch", 0),
        ("BF16", 1),
        ("FP8, torch", 1),
    ]
    assert all(len(one["loss"]) == 6 and one["looks"][-1]["step"] == 6 for one in content["runs"])
    base, own = content["table"]
    assert base["held_out_spread"] > 0
    assert 0 < max(map(abs, own["held_out_distances"])) < 0.01
    assert output.with_suffix(".svg").stat().st_size > 1000
    assert str(tmp_path) not in json.dumps(content["config"])
    monkeypatch.setattr(parity, "train", lambda *_: None)
    assert parity.main() == 0
    assert json.loads(output.read_text())["runs"] == content["runs"]


def test_arguments_that_do_not_go_together(monkeypatch, capsys):
    for words, said in ((["--arms", "FP8, torch"], "add it"),):
        monkeypatch.setattr(sys, "argv", ["fp8_parity.py", *words])
        with pytest.raises(SystemExit):
            parity.parse()
        assert said in capsys.readouterr().err
