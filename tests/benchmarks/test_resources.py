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
    return lambda *words: monkeypatch.setattr(sys, "argv", ["resources", *map(str, words)])


@compiles
def test_writes_the_same_file_every_time(tmp_path, command, capsys):
    for name in ("first.json", "second.json"):
        command("--only", "geglu", "--output", tmp_path / name)
        assert resources.main() == 0
    first, second = ((tmp_path / name).read_text() for name in ("first.json", "second.json"))
    assert first == second
    content = json.loads(first)
    assert set(content["versions"]) == {"triton", "ptxas"}
    found = {(row["kernel"], row["architecture"]): row for row in content["kernels"]}
    assert found.keys() == {(f"geglu_{way}_kernel", sm) for way in ("fwd", "bwd") for sm in (80, 90)}
    for row in found.values():
        assert 0 < row["registers"] <= 255
        assert row["spill_bytes"] == 0
    printed = capsys.readouterr().out.splitlines()
    launched = [line for line in printed if line.startswith("sm_90 geglu_bwd_kernel: registers ")]
    assert len(launched) == 2 * found["geglu_bwd_kernel", 90]["launches"]
    most = max(int(line.split()[3].rstrip(",")) for line in launched)
    assert most == found["geglu_bwd_kernel", 90]["registers"]


@compiles
def test_fails_on_a_kernel_that_does_not_fit(monkeypatch, tmp_path, command):
    geglu = importlib.import_module("millrace.kernels.ops.geglu")
    gate_up = torch.empty(8, 128, device="meta")
    launch = Launch("needs wgmma", geglu._forward_triton, (gate_up,), frozenset({"geglu_fwd_kernel"}))
    monkeypatch.setattr(resources, "launches", lambda: iter([("geglu", launch)]))
    output = tmp_path / "resources.json"
    command("--output", output)
    with pytest.raises(SystemExit, match="geglu: needs wgmma: geglu_fwd_kernel for sm_90 does not use wgmma"):
        resources.main()
    assert not output.exists()


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
