"""`millrace prepare` of tars and Parquet files behind a URL: what it makes of the same files on a disk."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from millrace.engine.data.prepare import shard_job
from millrace.engine.data.prepare.inputs import find_inputs
from millrace.engine.data.prepare.settings import Settings
from millrace.engine.data.prepare.shard_job import prepare
from millrace.engine.data.remote import remote_files, remote_input
from millrace.engine.data.remote.remote_input import RemoteInput, open_input
from millrace.engine.util.errors import UserError

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

ROOT = Path(__file__).resolve().parents[4]
SETTINGS = Settings(resolution=32, patch=8, shard_bytes=20_000)


def tars(root, bad):
    """Good ones, damaged ones, names of all kinds."""
    bad.torture_tars(root)
    bad.TarBuilder(root / "a-b" / "c d.tar").sample("0").close()
    bad.TarBuilder(root / "a" / "e.tar").sample("0").close()
    bad.TarBuilder(root / ".hidden" / "f.tar").sample("0").close()
    return root


def tables(root, bad, noise=3000):
    """Two files of three row groups, one that is damaged, columns that nobody asks for."""
    root.mkdir(parents=True)
    for name in ("a", "b"):
        pictures = [{"bytes": bad.jpeg(40 + i, 50, seed=i), "path": None} for i in range(12)]
        unread = [np.random.default_rng(i).bytes(noise) for i in range(12)]
        columns = {"image": pictures, "noise": unread, "caption": [f"caption {i}" for i in range(12)]}
        parquet.write_table(pyarrow.table(columns), root / f"{name}.parquet", row_group_size=4)
    (root / "c.parquet").write_bytes(b"damaged")
    return root


KINDS = pytest.mark.parametrize("fill", [tars, tables])


def made(output, bad):
    """Every file of a data set, without what tells one copy of its input from another."""
    files = bad.tree(output)
    manifest = json.loads(files.pop("manifest.json"))
    assert len(manifest["settings"].pop("identity")) == 64
    del files["inputs.index"]
    return files | {"manifest.json": manifest}


def put_in_memory(folder):
    """Copy a folder into fsspec's memory; its URL."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.put(f"{folder}/", "/bucket/raw/", recursive=True)
    return "memory://bucket/raw"


@KINDS
@pytest.mark.parametrize("block", [1000, remote_input.BLOCK])
def test_the_result_is_that_of_the_disk(tmp_path, bad, serve, monkeypatch, fill, block):
    monkeypatch.setattr(remote_input, "BLOCK", block)
    monkeypatch.setattr(remote_files, "DELAYS", (0.0,) * 10)
    source = fill(tmp_path / "in", bad)
    server = serve(source, failures=0.05, cuts=0.05)
    prepare(source, tmp_path / "disk", SETTINGS, 0, 1.0)
    prepare(server.url, tmp_path / "far", SETTINGS, 0, 1.0)
    prepare(put_in_memory(source), tmp_path / "memory", SETTINGS, 0, 1.0)
    assert made(tmp_path / "far", bad) == made(tmp_path / "memory", bad) == made(tmp_path / "disk", bad)
    assert block > 1000 or server.counts["failed"] * server.counts["cut"] > 0


@KINDS
def test_one_file_and_a_list_of_files(tmp_path, bad, serve, fill):
    source = fill(tmp_path / "in", bad)
    server = serve(source)
    one = next(path for path in sorted(source.iterdir()) if path.suffix in (".tar", ".parquet"))
    prepare(one, tmp_path / "disk", SETTINGS, 0, 1.0)
    prepare(f"{server.url}/{one.name}", tmp_path / "far", SETTINGS, 0, 1.0)
    assert made(tmp_path / "far", bad) == made(tmp_path / "disk", bad)
    files = [path for path in source.rglob(f"*{one.suffix}") if ".hidden" not in path.parts]
    urls = [f"{server.url}/{path.relative_to(source)}".replace(" ", "%20") for path in files]
    (tmp_path / "urls.txt").write_text("\n".join(reversed(urls)) + "\n\n")
    prepare(source, tmp_path / "disk2", SETTINGS, 0, 1.0)
    prepare(tmp_path / "urls.txt", tmp_path / "far2", SETTINGS, 0, 1.0)
    assert made(tmp_path / "far2", bad) == made(tmp_path / "disk2", bad)


@KINDS
def test_what_has_not_changed_is_not_read_again(tmp_path, bad, serve, fill):
    source = fill(tmp_path / "in", bad)
    server = serve(source)
    prepare(server.url, tmp_path / "far", SETTINGS, 0, 1.0)
    before = server.counts["bytes"]
    prepare(server.url, tmp_path / "far", SETTINGS, 0, 1.0)
    footers = 0 if fill is tars else sum(path.stat().st_size for path in source.iterdir())
    assert server.counts["bytes"] - before <= footers
    prepare(source, tmp_path / "disk", SETTINGS, 0, 1.0)
    changed, other = ("a/e.tar", "a.tar") if fill is tars else ("b.parquet", "a.parquet")
    (source / changed).write_bytes((source / other).read_bytes())
    _, notes = prepare(server.url, tmp_path / "far", SETTINGS, 0, 1.0)
    _, expected = prepare(source, tmp_path / "disk", SETTINGS, 0, 1.0)
    assert notes == expected
    assert re.search(r"read [1-3] of \d+ ", str(notes))
    assert made(tmp_path / "far", bad) == made(tmp_path / "disk", bad)


def test_a_tar_comes_over_the_net_once(tmp_path, bad, serve, monkeypatch):
    monkeypatch.setattr(remote_input, "BLOCK", 4096)
    tar = bad.TarBuilder(tmp_path / "in" / "0.tar")
    for i in range(12):
        tar.sample(f"{i:03d}", bad.encoded(bad.smooth(160, 120, i), "PNG"))
    path = tar.close()
    server = serve(tmp_path / "in")
    prepare(server.url, tmp_path / "far", SETTINGS, 0, 0.0)
    assert server.counts["bytes"] < path.stat().st_size + 1000  # the listing


def test_of_a_table_only_the_columns_that_are_read(tmp_path, bad, serve, monkeypatch):
    monkeypatch.setattr(remote_input, "BLOCK", 4096)
    server = serve(tables(tmp_path / "in", bad, noise=200_000))
    prepare(f"{server.url}/a.parquet", tmp_path / "far", SETTINGS, 0, 0.0)
    size = (tmp_path / "in" / "a.parquet").stat().st_size
    footers = 4 * 2**16  # what Arrow takes from the end whenever it opens a file
    ahead = 6 * remote_input.AHEAD * remote_input.BLOCK  # in two places of three row groups
    assert size > 2_400_000
    assert server.counts["bytes"] < footers + ahead + 0.05 * size


def test_skipped_blocks_leave_the_memory(tmp_path, bad, serve, monkeypatch):
    monkeypatch.setattr(remote_input, "BLOCK", 1024)
    data = np.random.default_rng(0).bytes(400_000)
    (tmp_path / "x").write_bytes(data)
    with RemoteInput(f"{serve(tmp_path).url}/x") as file:
        for start in range(0, len(data), 20_000):
            file.seek(start)
            assert file.read(100) == data[start : start + 100]
            assert len(file._coming) <= 2 * remote_input.AHEAD
        file.seek(0)
        assert file.read(len(data) + 5) == data
        assert file.read(5) == b""
        assert file.seek(-7, os.SEEK_END) == len(data) - 7
        assert file.read() == data[-7:]


def test_a_full_disk_is_one_line_and_no_reject(tmp_path, bad, serve, monkeypatch):
    server, real = serve(tars(tmp_path / "in", bad)), os.pwrite

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(remote_input.os, "pwrite", full)
    message = refusal(lambda: prepare(server.url, tmp_path / "far", SETTINGS, 0, 1.0))
    assert message.startswith(
        f"{tmp_path}/far/.preparing/parts: cannot keep {server.url}/a/e.tar while it is read"
    )
    assert "No space left on device; finished work is kept" in message
    monkeypatch.setattr(remote_input.os, "pwrite", real)
    prepare(server.url, tmp_path / "far", SETTINGS, 0, 1.0)
    prepare(tmp_path / "in", tmp_path / "disk", SETTINGS, 0, 1.0)
    assert made(tmp_path / "far", bad) == made(tmp_path / "disk", bad)


def test_goes_on_after_a_stop(tmp_path, bad, serve, monkeypatch):
    source = tars(tmp_path / "in", bad)
    server = serve(source)
    real, done = shard_job.do_part, []

    def stopping(part, *rest):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(part.name)
        return real(part, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(shard_job, "do_part", stopping)
        with pytest.raises(KeyboardInterrupt):
            prepare(server.url, tmp_path / "far", SETTINGS, 0, 1.0)

    def counting(part, *rest):
        assert part.name not in done
        return real(part, *rest)

    monkeypatch.setattr(shard_job, "do_part", counting)
    prepare(server.url, tmp_path / "far", SETTINGS, 0, 1.0)
    monkeypatch.undo()
    prepare(source, tmp_path / "disk", SETTINGS, 0, 1.0)
    assert made(tmp_path / "far", bad) == made(tmp_path / "disk", bad)


@pytest.mark.slow
def test_goes_on_after_kill_9_with_workers(tmp_path, bad, serve):
    """The real command, from a server that fails and is far away, killed soon after it has made progress."""
    for t in range(6):
        tar = bad.TarBuilder(tmp_path / "in" / f"{t}.tar")
        for i in range(12):
            tar.sample(f"{i:03d}", bad.encoded(bad.smooth(300 + i, 200, t * 20 + i), "PNG"))
        tar.close()
    server = serve(tmp_path / "in", latency=0.05, failures=0.05, cuts=0.05)
    words = [sys.executable, str(ROOT / "engine" / "prepare.py"), "--resolution", "64", "--patch", "16"]

    def start(source, output, workers):
        words_here = [*words, "--input", str(source), "--output", str(output), "--workers", str(workers)]
        return subprocess.Popen(
            words_here, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    out, kills = tmp_path / "far", 0
    for progress in (1, 3):
        process = start(server.url, out, 2)
        deadline = time.monotonic() + 200
        while len(list((out / ".preparing/parts").glob("*.rows"))) < progress and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 1
    for source, output, workers in ((server.url, out, 2), (tmp_path / "in", tmp_path / "disk", 0)):
        process = start(source, output, workers)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert made(out, bad) == made(tmp_path / "disk", bad)


def refusal(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@KINDS
def test_a_server_that_goes_away_is_one_line_and_no_reject(tmp_path, bad, serve, hasty, monkeypatch, fill):
    source = fill(tmp_path / "in", bad)
    server, real = serve(source), shard_job.do_part

    def failing(*rest):
        server.down = True
        return real(*rest)

    with monkeypatch.context() as patch:
        patch.setattr(shard_job, "do_part", failing)
        message = refusal(lambda: prepare(server.url, tmp_path / "far", SETTINGS, 0, 1.0))
    assert re.match(rf"{server.url}/\S+: cannot be read: HTTP 503 ", message)
    server.down = False
    prepare(server.url, tmp_path / "far", SETTINGS, 0, 1.0)
    prepare(source, tmp_path / "disk", SETTINGS, 0, 1.0)
    assert made(tmp_path / "far", bad) == made(tmp_path / "disk", bad)


def test_what_is_refused(tmp_path, bad, serve, hasty):
    def refused(path):
        return refusal(lambda: find_inputs(path, SETTINGS))

    (tmp_path / "in/empty").mkdir(parents=True)
    (tmp_path / "in/pictures").mkdir()
    (tmp_path / "in/pictures/a.png").write_bytes(bad.jpeg())
    (tmp_path / "in/packed").mkdir()
    (tmp_path / "in/packed/a.tar.gz").write_bytes(b"")
    server = serve(tmp_path / "in")
    assert refused(f"{server.url}/empty").startswith(f"{server.url}/empty: holds no files")
    assert "holds pictures (a.png), which are read from a disk" in refused(f"{server.url}/pictures/")
    assert "packed/a.tar.gz: is compressed; unpack it" in refused(f"{server.url}/packed")
    assert "nothing.tar: cannot be read: the store has no such file" in refused(f"{server.url}/nothing.tar")
    assert "cannot be listed: the store has no such file" in refused(f"{server.url}/nowhere")
    assert "nowhere://x: " in refused("nowhere://x")
    server.down = True
    assert f"{server.url}: cannot be read: HTTP 503" in refused(server.url)
    for text, part in (
        ("\n", "lists nothing"),
        ("https://a.b/c.tar\nd.tar", "lists 'd.tar', which is no URL of a .tar file"),
        ("https://a.b/c.tar\nhttps://a.b/c.parquet", "which is no URL of a .parquet file"),
        ("https://a.b/c.tar\ns3://b/c.tar", "have no folder in common"),
    ):
        (tmp_path / "urls.txt").write_text(text)
        assert part in refused(tmp_path / "urls.txt")


def test_local_files_are_opened_as_they_are(tmp_path, bad):
    (tmp_path / "x").write_bytes(b"abc")
    with open_input(tmp_path / "x") as file:
        assert file.read() == b"abc"
    with pytest.raises(FileNotFoundError), open_input(tmp_path / "y"):
        pass
