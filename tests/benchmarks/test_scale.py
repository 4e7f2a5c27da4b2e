"""The program that measures how costs grow."""

import json
import re
import subprocess
import sys

import numpy as np

from millrace.benchmarks.data import scale
from millrace.engine.data.sources.key_subset import keep_listed
from millrace.engine.data.sources.shards import ShardsSource


def test_a_synthetic_set_is_one(tmp_path):
    scale.make_set(tmp_path / "set", 60)
    source = ShardsSource(tmp_path / "set")
    assert len(source) == 60
    assert len(source.buckets) == len(np.unique(source.bucket_of)) == len(scale.buckets(512, scale.EDGE))
    (tmp_path / "listed").write_text("k0\n")
    assert keep_listed(source, tmp_path / "listed").kept.tolist() == [0]


def test_it_runs(tmp_path):
    command = [sys.executable, "-m", "millrace.benchmarks", "scale", "--smoke"]
    command += ["--folder", str(tmp_path), "--output", str(tmp_path / "scale.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "scale.json").read_text())["rows"]
    assert len(re.findall(r"^[A-Za-z].* +[\d,]+ +\d+\.\d{4} ", done.stdout, re.MULTILINE)) == len(rows)
    assert all(row["seconds"] > 0 for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["scale.json"]
