import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from millrace.engine import prepare as command
from millrace.engine.data.formats.shard_index import read_manifest
from millrace.engine.data.formats.shard_writer import write_manifest
from millrace.engine.data.latent_cache import CacheFile, CacheRecord, cache_path, cache_problems, record_of
from millrace.engine.data.prepare.recaptioning import recaption
from millrace.engine.data.prepare.settings import Settings
from millrace.engine.data.prepare.shard_job import prepare
from millrace.engine.data.prepare.verify import verify
from millrace.engine.data.sources.shards import ShardsSource
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import sha256_file

SETTINGS = Settings(resolution=32, patch=8, shard_bytes=8_000)
"""A shard has two or three samples."""


@pytest.fixture
def photos(tmp_path, bad):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.jpg").write_bytes(bad.jpeg(60, 40 + 8 * (number % 3), seed=number))
        (folder / f"{number}.txt").write_text(f"caption {number}")
    return folder


@pytest.fixture
def made(tmp_path, photos):
    prepare(photos, tmp_path / "set", SETTINGS, 0, 0.0)
    return tmp_path / "set"


def written(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def samples(root):
    source = ShardsSource(root, verify=True)
    return {source.key(i): (source.captions(i), source.encoded(i)) for i in range(len(source))}


NEW = [{"key": "3.jpg", "long": "a long one", "short": "short"}, {"key": "7.jpg", "caption": "for both"}]


def test_captions_change_and_pictures_do_not(tmp_path, made):
    before, old = samples(made), read_manifest(made)
    done = recaption(made, written(tmp_path / "new.jsonl", *NEW, {"key": "9.jpg", "short": "s"}), 0)
    after, new = samples(made), read_manifest(made)
    assert done.changed == 3
    assert done.notes == [f"7 samples have no line in {tmp_path / 'new.jsonl'} and keep their captions"]
    assert {key: picture for key, (_, picture) in after.items()} == {
        key: picture for key, (_, picture) in before.items()
    }
    expected = {key: captions for key, (captions, _) in before.items()}
    expected |= {
        "3.jpg": ("a long one", "short"),
        "7.jpg": ("for both", "for both"),
        "9.jpg": ("caption 9", "s"),
    }
    assert {key: captions for key, (captions, _) in after.items()} == expected
    assert list(after) == list(before)
    kept = {shard.file for shard in old.shards} & {shard.file for shard in new.shards}
    assert 0 < len(kept) < len(old.shards)  # shards without changes stay
    assert {path.relative_to(made).as_posix() for path in made.glob("*/*.tar")} == {
        s.file for s in new.shards
    }
    assert new.caption_characters["long"]["max"] == len("a long one")
    assert verify(made, 1) == []
    assert not (made / ".recaptioning").exists()


def test_it_is_what_a_new_set_of_the_same_captions_is(tmp_path, photos, made):
    for number in range(10):
        (photos / f"{number}.txt").write_text(f"rewritten {number}")
    prepare(photos, tmp_path / "fresh", SETTINGS, 0, 0.0)
    lines = [{"key": f"{number}.jpg", "caption": f"rewritten {number}"} for number in range(10)]
    recaption(made, written(tmp_path / "new.jsonl", *lines), 0)
    assert samples(made) == samples(tmp_path / "fresh")
    fresh, ours = read_manifest(tmp_path / "fresh"), read_manifest(made)
    assert ours.caption_characters == fresh.caption_characters
    assert [shard.samples for shard in ours.shards] == [shard.samples for shard in fresh.shards]
    assert (made / "caption_lengths.png").read_bytes() == (
        tmp_path / "fresh/caption_lengths.png"
    ).read_bytes()
    with pytest.raises(UserError, match="was given captions by --captions"):
        prepare(photos, made, SETTINGS, 0, 0.0)


def test_workers_parquet_and_json_lines_give_the_same(tmp_path, photos, bad):
    table = pytest.importorskip("pyarrow").Table.from_pylist(
        [{"key": f"{n}.jpg", "long": f"l{n}", "short": f"s{n}"} for n in range(10)]
    )
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "new.parquet")
    lines = written(tmp_path / "new.jsonl", *table.to_pylist())
    for out, path, workers in (("a", "new.parquet", 0), ("b", lines.name, 2)):
        prepare(photos, tmp_path / out, SETTINGS, 0, 0.0)
        assert recaption(tmp_path / out, tmp_path / path, workers).changed == 10
    assert bad.tree(tmp_path / "a") == bad.tree(tmp_path / "b")


def test_every_line_without_effect_is_named(tmp_path, made, capsys):
    path = written(
        tmp_path / "new.jsonl",
        *NEW,
        {"key": "3.jpg", "caption": "a second one"},
        {"key": "nowhere.jpg", "caption": "lost"},
        {"key": "4.jpg", "caption": "  "},
        {"key": "5.jpg"},
        "not json",
    )
    assert command.main(["--captions", str(path), "--output", str(made), "--workers", "0"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{made}: 2 of 10 samples have other captions than before",
        '  3 lines cannot be used, such as line 5 ("long" is empty), line 6 (no caption), line 7 (no key)',
        "  1 lines repeat a key, such as 3.jpg; the first one counts",
        "  1 keys are not in the data set, such as nowhere.jpg",
        f"  8 samples have no line in {path} and keep their captions",
    ]
    assert samples(made)["3.jpg"][0] == ("a long one", "short")


def test_files_that_have_no_captions(tmp_path, made):
    with pytest.raises(UserError, match="has no line with a key and a caption: line 1"):
        recaption(made, written(tmp_path / "x.jsonl", "what is this"), 0)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"x\.parquet: cannot be read"):
        recaption(made, tmp_path / "x.parquet", 0)


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def test_a_stop_at_every_file_leaves_the_old_or_the_new_set(tmp_path, photos, bad, monkeypatch):
    prepare(photos, tmp_path / "new", SETTINGS, 0, 0.0)
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    old = samples(tmp_path / "new")
    path = written(tmp_path / "new.jsonl", *NEW)
    recaption(tmp_path / "new", path, 0)
    new, tree = samples(tmp_path / "new"), bad.tree(tmp_path / "new")
    replace, seen = os.replace, set()
    for allowed in range(100):
        out = shutil.copytree(tmp_path / "old", tmp_path / f"out{allowed}")
        left = [allowed]

        def stops(*arguments, left=left, **options):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return replace(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stops)
            try:
                recaption(out, path, 0)
                finished = True
            except Killed:
                finished = False
        found = samples(out)
        assert found in (old, new)
        assert verify(out, 1) == []
        seen.add(found == new)
        recaption(out, path, 0)
        assert bad.tree(out) == tree
        if finished:
            break
    assert finished
    assert seen == {True, False}


def test_latents_stay_and_text_is_stale(tmp_path, made):
    manifest, caches = read_manifest(made), {}
    for kind in ("text", "latents"):
        save_file({"rows": torch.zeros(1, 4)}, made / f"{kind}.safetensors")
        files = []
        for number, shard in enumerate(manifest.shards):
            path = made / cache_path(shard, kind)
            save_file({"moments": torch.full((shard.samples, 2, 1, 1, 1), number)}, path)
            files.append(entry(made, path, shard.sha256))
        common = entry(made, made / f"{kind}.safetensors", "")
        record = CacheRecord(network={}, dtype="bf16", common=common, files=tuple(files))
        caches[kind] = record.model_dump(mode="json")
    write_manifest(made, manifest.model_copy(update={"caches": caches}))
    done = recaption(made, written(tmp_path / "new.jsonl", *NEW), 0)
    assert any(note.startswith("its text cache is stale") for note in done.notes)
    new = read_manifest(made)
    assert record_of(made, new, "latents") is not None
    assert len(cache_problems(made)) == 1
    assert re.search("its text cache was made from other shards", cache_problems(made)[0])
    places = [shard.file.split("/")[0] for shard in new.shards]
    assert len(list(made.glob("*/*.latents.safetensors"))) == len(places)


def entry(root, path, of):
    size, digest = path.stat().st_size, sha256_file(path)
    return CacheFile(file=path.relative_to(root).as_posix(), bytes=size, sha256=digest, of=of)
