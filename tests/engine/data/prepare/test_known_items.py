"""A data set follows its input: after edits it is what a new one would be, and only what changed was read."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from millrace.engine.data.prepare import inputs, shard_job
from millrace.engine.data.prepare.known_items import INDEX
from millrace.engine.data.prepare.publishing import READY
from millrace.engine.data.prepare.shard_job import prepare
from millrace.engine.util.errors import UserError

SEQUENCES = int(os.environ.get("MILLRACE_EDIT_SEQUENCES", "4"))
"""Of edits, for each kind of input."""


class Folder:
    """A folder of pictures that is edited at random."""

    def __init__(self, root, bad, random):
        self.root, self.bad, self.random = root, bad, random
        (root / "sub").mkdir(parents=True)
        for number in range(24):
            self.write(f"{number:02d}" if number % 3 else f"sub/{number:02d}")

    def write(self, name):
        """A picture, sometimes a broken or a small one, and its caption, sometimes none."""
        kind = int(self.random.integers(12))
        size = (10, 8) if kind == 0 else (40 + 7 * (kind % 5), 40 + 9 * (kind % 4))
        data = self.bad.jpeg(*size, seed=int(self.random.integers(100)))
        (self.root / f"{name}.jpg").write_bytes(data[:-300] if kind == 1 else data)
        self.caption(name)

    def caption(self, name):
        words = int(self.random.integers(6))
        (self.root / f"{name}.txt").write_text(
            "word " * words + (str(self.random.integers(99)) * (words > 0))
        )

    def names(self):
        return sorted(path.relative_to(self.root).as_posix()[:-4] for path in self.root.rglob("*.jpg"))

    def edit(self):
        name = self.random.choice(self.names())
        match self.random.integers(6):
            case 0 | 1:
                self.caption(name)
            case 2:
                self.write(name)
            case 3:
                self.write(f"{self.random.choice(['', 'sub/'])}new{self.random.integers(1000)}")
            case 4:
                for suffix in ("jpg", "txt"):
                    (self.root / f"{name}.{suffix}").unlink(missing_ok=True)
            case 5:
                for suffix in ("jpg", "txt"):
                    old = self.root / f"{name}.{suffix}"
                    if old.exists():
                        old.rename(self.root / f"moved{self.random.integers(1000)}.{suffix}")


class Tars:
    """A folder of tars that is edited at random; a key is there twice now and then."""

    def __init__(self, root, bad, random):
        self.root, self.bad, self.random = root, bad, random
        for number in range(8):
            self.write(f"{number}.tar")

    def write(self, name):
        tar = self.bad.TarBuilder(self.root / name)
        for _ in range(int(self.random.integers(1, 5))):
            sample = f"{self.random.integers(12):02d}"
            data = self.bad.jpeg(60, int(self.random.integers(40, 90)), seed=int(self.random.integers(100)))
            tar.sample(sample, data, b"caption %d" % self.random.integers(99))
        tar.close()

    def edit(self):
        path = self.random.choice(sorted(self.root.glob("*.tar")))
        match self.random.integers(5):
            case 0 | 1:
                self.write(path.name)
            case 2:
                self.write(f"new{self.random.integers(1000)}.tar")
            case 3 if len(list(self.root.glob("*.tar"))) > 2:
                path.unlink()
            case _:
                path.rename(self.root / f"moved{self.random.integers(1000)}.tar")


@pytest.mark.parametrize("kind", [Folder, Tars])
@pytest.mark.parametrize("seed", range(SEQUENCES))
def test_edits_give_what_a_new_data_set_is(tmp_path, bad, settings, monkeypatch, kind, seed):
    monkeypatch.setattr(inputs, "PART_PICTURES", 5)
    random = np.random.default_rng(seed)
    source = kind(tmp_path / "in", bad, random)
    out, read, units = tmp_path / "out", 0, 0
    prepare(source.root, out, settings, 0, 1.0)
    do_part = shard_job.do_part

    def counted(part, *arguments):
        nonlocal read
        read += len(part.units) // inputs.UNIT_BYTES
        return do_part(part, *arguments)

    for step in range(4):
        for _ in range(int(random.integers(1, 4))):
            source.edit()
        with monkeypatch.context() as patch:
            patch.setattr(shard_job, "do_part", counted)
            if random.integers(2):  # is killed once, and other edits follow
                with patch.context() as kill:
                    kill.setattr(shard_job, "make_shard", dies_after(int(random.integers(3))))
                    with pytest.raises(Killed):
                        prepare(source.root, out, settings, 0, 1.0)
                source.edit()
            prepare(source.root, out, settings, 0, 1.0)
        units += sum(len(part.units) for part in inputs.find_inputs(source.root, settings).parts) // 16
        new = tmp_path / f"new{step}"
        prepare(source.root, new, settings, 0, 1.0)
        assert bad.tree(out) == bad.tree(new)
    print(f"{kind.__name__} {seed}: read {read} of {units} again, {read / units:.0%}")
    assert read < 0.7 * units


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def dies_after(count):
    """Makes so many shards before the kill, whose samples are then freed."""
    real, left = shard_job.make_shard, [count]

    def make_shard(*words):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return real(*words)

    return make_shard


@pytest.fixture
def folder(tmp_path, bad):
    root = tmp_path / "in"
    root.mkdir()
    for number in range(8):
        (root / f"{number}.jpg").write_bytes(bad.jpeg(60, 40 + 8 * (number % 3), seed=number))
        (root / f"{number}.txt").write_text(f"caption {number}")
    return root


def test_what_was_named_can_be_repaired(tmp_path, bad, settings, folder):
    (folder / "3.txt").write_text("")
    with pytest.raises(UserError, match=r"1 empty_caption \(3\.jpg\)"):
        prepare(folder, tmp_path / "out", settings, 0, 0.0)
    (folder / "3.txt").write_text("repaired")
    manifest, notes = prepare(folder, tmp_path / "out", settings, 0, 0.0)
    assert manifest.samples == 8
    assert notes == ["read 1 of 8 pictures; the others have not changed"]
    assert bad.rejects_of(tmp_path / "out") == []


def test_a_replaced_file_is_seen_whatever_its_times_say(tmp_path, settings, folder):
    prepare(folder, tmp_path / "out", settings, 0, 0.0)
    path = folder / "3.txt"
    status = path.stat()
    path.write_text("CAPTION 3")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    _, notes = prepare(folder, tmp_path / "out", settings, 0, 0.0)
    assert notes == ["read 1 of 8 pictures; the others have not changed"]


def test_too_much_bad_input_leaves_the_complete_data_set(tmp_path, bad, settings, folder):
    prepare(folder, tmp_path / "out", settings, 0, 0.0)
    before = bad.tree(tmp_path / "out")
    (folder / "3.txt").write_text("")
    with pytest.raises(UserError, match=r"\.preparing/rejects\.jsonl names them"):
        prepare(folder, tmp_path / "out", settings, 0, 0.0)
    after = bad.tree(tmp_path / "out")
    assert {name: after[name] for name in before} == before


def test_without_its_index_everything_is_read_again(tmp_path, bad, settings, folder):
    prepare(folder, tmp_path / "out", settings, 0, 0.0)
    (tmp_path / "out" / INDEX).write_bytes(b"torn")
    (folder / "3.txt").write_text("another")
    _, notes = prepare(folder, tmp_path / "out", settings, 0, 0.0)
    assert notes == [f"{tmp_path / 'out'}: has no {INDEX} that fits it, so everything was read again"]
    prepare(folder, tmp_path / "new", settings, 0, 0.0)
    assert bad.tree(tmp_path / "out") == bad.tree(tmp_path / "new")


def test_a_damaged_shard_is_not_copied(tmp_path, settings, folder):
    manifest, _ = prepare(folder, tmp_path / "out", settings, 0, 0.0)
    tar = tmp_path / "out" / manifest.shards[0].file
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    (folder / "7.txt").write_text("another")
    with pytest.raises(UserError, match="the sample at byte 512 is damaged"):
        prepare(folder, tmp_path / "out", settings, 0, 0.0)


def test_an_update_goes_on_after_a_stop_at_every_file_that_is_written(
    tmp_path, bad, settings, folder, monkeypatch
):
    """Whatever rename was the last one: there is no mixture, and the next call ends what was begun."""
    prepare(folder, tmp_path / "old", settings, 0, 0.0)
    old = bad.tree(tmp_path / "old")
    (folder / "7.txt").write_text("another")
    for name in ("0.jpg", "0.txt"):
        (folder / name).unlink()
    prepare(folder, tmp_path / "new", settings, 0, 0.0)
    new = bad.tree(tmp_path / "new")
    replace, seen = os.replace, set()
    for allowed in range(100):
        out = shutil.copytree(tmp_path / "old", tmp_path / f"out{allowed}")
        left = allowed

        def stops(*arguments, **options):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return replace(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stops)
            patch.setattr(Path, "replace", lambda path, target, stops=stops: stops(path, target))
            try:
                prepare(folder, out, settings, 0, 0.0)
                finished = True
            except Killed:
                finished = False
        found = bad.tree(out)
        seen.add("ready" if (out / READY).exists() else "work" if (out / ".preparing").exists() else "done")
        if "manifest.json" in found:
            whole = old if found["manifest.json"] == old["manifest.json"] else new
            assert {name: found.get(name) for name in whole} == whole
        prepare(folder, out, settings, 0, 0.0)
        assert bad.tree(out) == new
        if finished:
            break
    assert finished
    assert seen == {"work", "ready", "done"}


def test_input_and_output_lie_apart(tmp_path, settings, folder):
    for output in (folder, folder / "set", folder.parent):
        with pytest.raises(UserError, match=r"--output .* what is written would be read as data"):
            prepare(folder, output, settings, 0, 0.0)
    assert sorted(path.suffix for path in folder.iterdir()) == [".jpg"] * 8 + [".txt"] * 8
