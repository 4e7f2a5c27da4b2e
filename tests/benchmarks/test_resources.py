"""The program that writes down what kernels take: its table, its file, its exit status."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from millrace.kernels.support.compilation import Launch
from millrace.kernels.support.registration import HAS_TRITON, INTERPRETING

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
compiles = pytest.mark.skipif(INTERPRETING or not HAS_TRITON, reason="needs Triton's compiler")

sys.path.insert(0, str(BENCHMARKS))
resources = importlib.import_module("resources")
sys.path.remove(str(BENCHMARKS))


@compiles
def test_writes_the_same_file_every_time(tmp_path, capsys):
    for name in ("first.json", "second.json"):
        assert resources.main(["--only", "geglu", "--output", str(tmp_path / name)]) == 0
    first, second = ((tmp_path / name).read_text() for name in ("first.json", "second.json"))
    assert first == second
    content = json.loads(first)
    assert set(content["versions"]) == {"triton", "ptxas"}
    assert {row["architecture"] for row in content["kernels"]} == {80, 90}
    assert {row["kernel"] for row in content["kernels"]} == {"geglu_fwd_kernel", "geglu_bwd_kernel"}
    for row in content["kernels"]:
        assert 0 < row["registers"] <= 255
        assert row["spill_bytes"] == 0
    table = capsys.readouterr().out
    assert table.count("geglu: backward") == 2 * sum(
        r["kernel"] == "geglu_bwd_kernel" for r in content["kernels"]
    )


@compiles
def test_fails_on_a_kernel_that_does_not_fit(monkeypatch, tmp_path, capsys):
    geglu = importlib.import_module("millrace.kernels.ops.geglu")
    gate_up = torch.empty(8, 128, device="meta")
    launch = Launch("needs wgmma", geglu._forward_triton, (gate_up,), frozenset({"geglu_fwd_kernel"}))
    monkeypatch.setattr(resources, "launches", lambda: iter([("geglu", launch)]))
    output = tmp_path / "resources.json"
    assert resources.main(["--output", str(output)]) == 1
    assert "geglu: needs wgmma: geglu_fwd_kernel for sm_90 does not use wgmma" in capsys.readouterr().err
    assert len(json.loads(output.read_text())["kernels"]) == 2


@compiles
def test_says_which_files_there_are(capsys):
    assert resources.main(["--only", "gelu"]) == 2
    assert "error: --only gelu: no such file with kernels; there are " in capsys.readouterr().err


def test_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(resources, "INTERPRETING", True)
    monkeypatch.setattr(resources, "HAS_TRITON", True)
    assert resources.main([]) == 2
    assert "error: TRITON_INTERPRET=1 is set" in capsys.readouterr().err
    monkeypatch.setattr(resources, "HAS_TRITON", False)
    assert resources.main([]) == 2
    assert "error: Triton is not installed" in capsys.readouterr().err
