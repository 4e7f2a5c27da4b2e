"""The program that measures reading from a server."""

import http.client
import json
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from millrace.benchmarks.data.faulty_server import FaultyServer


@pytest.mark.slow
def test_it_runs(tmp_path):
    command = [sys.executable, "-m", "millrace.benchmarks", "remote", "--smoke", "--workers", "1"]
    command += ["--data", str(tmp_path), "--output", str(tmp_path / "remote.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the same bits as from the disk" in done.stdout
    result = json.loads((tmp_path / "remote.json").read_text())
    assert [row["loader"] for row in result["rows"]] == ["disk", "no cache", "first epoch", "second epoch"]
    assert all(row["images_per_second_median"] > 0 for row in result["rows"])
    assert result["bound"]["most"] <= result["bound"]["limit"]
    assert result["same_bits"]["samples"] == 80
    assert result["same_bits"]["server"]["flipped"] == 1
    assert result["smoke"]


def ask(url, wanted=None):
    headers = {"Range": f"bytes={wanted}"} if wanted else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
        return answer.read()


def test_the_server_gives_what_is_asked_for_and_the_faults_that_were_asked_for(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a").write_bytes(bytes(range(100)))
    with FaultyServer(tmp_path, flips={("folder/a", 50): 1}) as server:
        assert ask(f"{server.url}/folder/a", "10-19") == bytes(range(10, 20))
        assert ask(f"{server.url}/folder/a", "90-") == bytes(range(90, 100))
        assert ask(f"{server.url}/folder/a")[50] == 50 ^ 0xFF
        assert ask(f"{server.url}/folder/a") == bytes(range(100))
        assert b'<a href="a">' in ask(f"{server.url}/folder/")
        server.cuts = 1.0
        with pytest.raises(http.client.IncompleteRead):
            ask(f"{server.url}/folder/a")
        server.down = True
        with pytest.raises(urllib.error.HTTPError, match="503"):
            ask(f"{server.url}/folder/a")
        assert server.counts["flipped"] == server.counts["cut"] == server.counts["failed"] == 1
