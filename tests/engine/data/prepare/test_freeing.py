"""What is packed leaves the disk meanwhile, and the result is the same, also after a kill and after edits."""

import errno
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from millrace.engine.data.prepare import freeing, shard_job
from millrace.engine.data.prepare.shard_job import prepare
from millrace.engine.util.errors import UserError

SHARD = 300_000
"""Bytes, of several samples."""


class Killed(BaseException):
    pass


@pytest.fixture
def noisy(settings):
    """Settings whose shards are small beside the whole."""
    return replace(settings, resolution=256, shard_bytes=SHARD)


@pytest.fixture
def photos(tmp_path, bad):
    """Sixty pictures of two shapes in turn, of 60 KB, one of them with a key that is there already."""
    folder, random = tmp_path / "photos", np.random.default_rng(0)
    tar = bad.TarBuilder(folder / "a.tar")
    for i in range(60):
        size = (300, 260, 3) if i % 2 else (260, 300, 3)
        picture = Image.fromarray(random.integers(0, 256, size, np.uint8))
        tar.sample(f"{i % 59:02d}", bad.encoded(picture, "JPEG"))
    tar.close()
    return folder


def used(root):
    """Bytes of the disk, by blocks: holes take none."""
    return sum(path.stat().st_blocks * 512 for path in root.rglob("*") if path.is_file())


def watch(monkeypatch, out, kill_before=None):
    """Bytes on the disk before each shard is made; optionally a kill before one."""
    seen, real = [], shard_job.make_shard

    def make_shard(*words):
        if len(seen) == kill_before:
            raise Killed
        seen.append(used(out))
        return real(*words)

    monkeypatch.setattr(shard_job, "make_shard", make_shard)
    return seen


@pytest.mark.parametrize("frees", [True, False])
def test_the_disk_holds_a_few_shards_more_than_the_set(photos, tmp_path, noisy, monkeypatch, capsys, frees):
    out = tmp_path / "out"
    if not frees:
        monkeypatch.setattr(freeing, "_punch", lambda *_: False)
    elif not freeing.can_free(tmp_path):
        pytest.skip("this file system has no holes")
    seen = watch(monkeypatch, out)
    prepare(photos, out, noisy, 0, 0.1)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if " need " in line)
    assert line.startswith(f"packing: {len(seen)} shards of ")
    assert line.endswith("are free")
    assert ("cannot free" in line) != frees
    assert len(seen) > 6
    most = max(seen) / seen[0]
    assert most < 1.2 if frees else most > 1.7


def test_freeing_changes_no_byte(photos, tmp_path, bad, noisy, monkeypatch):
    prepare(photos, tmp_path / "freed", noisy, 2, 0.1)
    monkeypatch.setattr(freeing, "_punch", lambda *_: False)
    prepare(photos, tmp_path / "kept", noisy, 0, 0.1)
    assert bad.tree(tmp_path / "freed") == bad.tree(tmp_path / "kept")


def test_a_kill_at_any_hole_loses_nothing_and_reads_nothing_again(photos, tmp_path, bad, noisy, monkeypatch):
    prepare(photos, tmp_path / "whole", noisy, 0, 0.1)
    inner, finished = freeing._punch, False
    for allowed in (1, 2, 5, 11, 29, 36, 100):
        out, left = tmp_path / f"out{allowed}", [allowed]

        def punch(*words, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return inner(*words)

        with monkeypatch.context() as patch:
            patch.setattr(freeing, "_punch", punch)
            try:
                prepare(photos, out, noisy, 0, 0.1)
                finished = True
            except Killed:
                pass
            if finished:
                break
        with monkeypatch.context() as patch:
            patch.setattr(shard_job, "do_part", pytest.fail)
            prepare(photos, out, noisy, 0, 0.1)
        assert bad.tree(out) == bad.tree(tmp_path / "whole")
    assert finished
    assert allowed == 100


def test_edits_after_a_kill_are_as_a_new_data_set(photos, tmp_path, bad, noisy, monkeypatch):
    """The input that was packed in part is read again."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        watch(patch, out, kill_before=4)
        with pytest.raises(Killed):
            prepare(photos, out, noisy, 0, 0.1)
    assert [path.suffix for path in (out / ".preparing" / "parts").glob("*.[rp]*")] == [".packed"]
    bad.TarBuilder(photos / "0.tar").sample("new", bad.jpeg(300, 260)).close()
    prepare(photos, out, noisy, 0, 0.1)
    prepare(photos, tmp_path / "new", noisy, 0, 0.1)
    assert bad.tree(out) == bad.tree(tmp_path / "new")


def test_a_shard_that_vanished_after_a_kill_is_named(photos, tmp_path, noisy, monkeypatch):
    """Its samples are nowhere else."""
    if not freeing.can_free(tmp_path):
        pytest.skip("this file system has no holes")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        watch(patch, out, kill_before=4)
        with pytest.raises(Killed):
            prepare(photos, out, noisy, 0, 0.1)
    next((out / ".preparing" / "set").glob("*/00000.tar")).unlink()
    with pytest.raises(UserError, match=r"is gone.*; remove .*\.preparing and run the same command again"):
        prepare(photos, out, noisy, 0, 0.1)


def test_a_file_system_without_holes_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(freeing, "_fallocate", lambda: lambda *_: -1)
    monkeypatch.setattr(freeing.ctypes, "get_errno", lambda: errno.EOPNOTSUPP)
    assert not freeing.can_free(tmp_path)
    monkeypatch.setattr(freeing.ctypes, "get_errno", lambda: errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        freeing.can_free(tmp_path)
    assert list(tmp_path.iterdir()) == []
