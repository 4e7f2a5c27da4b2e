"""The program that writes down what kernels take: its table, its file, its exit status."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from millrace.benchmarks.kernels import resources
from millrace.engine.util.errors import UserError
from millrace.kernels.support.compilation import Launch
from millrace.kernels.support.registration import HAS_TRITON, INTERPRETING

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
compiles = pytest.mark.skipif(INTERPRETING or not HAS_TRITON, reason="needs Triton's compiler")


@pytest.fixture
def command(monkeypatch):
    """The program's arguments, for this process."""
    resources.declared.cache_clear()
    yield lambda *words: monkeypatch.setattr(sys, "argv", ["resources", *map(str, words), "--processes", "1"])
    resources.declared.cache_clear()


@compiles
def test_writes_the_most_of_every_launch(tmp_path, command, capsys):
    output = tmp_path / "found.json"
    command("--only", "geglu", "--chips", "90", "--output", output)
    assert resources.main() == 0
    content = json.loads(output.read_text())
    assert set(content["versions"]) == {"triton", "ptxas", "ptxas for Blackwell"}
    assert content["minutes"] >= 0
    found = {row["kernel"]: row for row in content["kernels"]}
    assert found.keys() == {"geglu_fwd_kernel", "geglu_bwd_kernel"}
    for row in found.values():
        assert 0 < row["registers"] <= 255
        assert (row["chip"], row["spill_bytes"], row["loop_local"], row["problems"]) == (90, 0, 0, 0)
        assert row["occupancy"] >= 1
    printed = capsys.readouterr().out.splitlines()
    launched = [line for line in printed if line.startswith("sm_90 geglu_bwd_kernel: ")]
    assert len(launched) == found["geglu_bwd_kernel"]["launches"]
    assert max(int(line.split()[2]) for line in launched) == found["geglu_bwd_kernel"]["registers"]


def test_rows_of_one_file_are_renewed():
    def row(file, chip, registers):
        return {"file": file, "kernel": "k", "chip": chip, "registers": registers}

    recorded = {"versions": {"triton": "3"}, "minutes": 9, "kernels": [row("a", 80, 1), row("c", 80, 1)]}
    fresh = {"versions": {"triton": "3"}, "minutes": 1, "kernels": [row("c", 90, 2), row("c", 80, 3)]}
    found = resources.renewed(recorded, fresh)
    assert found["kernels"] == [row("a", 80, 1), row("c", 80, 3), row("c", 90, 2)]
    assert found["minutes"] == 9, "of the whole"
    with pytest.raises(UserError, match="other versions"):
        resources.renewed(recorded, fresh | {"versions": {"triton": "4"}})


@compiles
def test_says_what_does_not_fit(monkeypatch, tmp_path, command, capsys):
    geglu = importlib.import_module("millrace.kernels.ops.geglu")
    gate_up = torch.empty(8, 128, device="meta")
    launch = Launch("needs wgmma", geglu._forward_triton, (gate_up,), frozenset({"geglu_fwd_kernel"}))
    monkeypatch.setattr(resources, "launches", lambda: iter([("geglu", launch)]))
    output = tmp_path / "found.json"
    command("--chips", "90", "--output", output)
    assert resources.main() == 1
    assert "geglu: needs wgmma: geglu_fwd_kernel on sm_90 does not use wgmma" in capsys.readouterr().out
    assert json.loads(output.read_text())["kernels"][0]["problems"] == 1


@compiles
def test_says_which_files_there_are(command):
    command("--only", "gelu")
    with pytest.raises(UserError, match="--only gelu: no such file with kernels; there are "):
        resources.main()


def test_says_what_it_needs(monkeypatch, command):
    command()
    monkeypatch.setattr(resources, "INTERPRETING", True)
    monkeypatch.setattr(resources, "HAS_TRITON", True)
    with pytest.raises(UserError, match="TRITON_INTERPRET=1 is set"):
        resources.main()
    monkeypatch.setattr(resources, "HAS_TRITON", False)
    with pytest.raises(UserError, match="Triton is not installed"):
        resources.main()
