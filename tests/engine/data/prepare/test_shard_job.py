"""The whole way from inputs to shards: counts, determinism, going on after a kill, limits."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from millrace.engine.config import Data
from millrace.engine.data import sample_files
from millrace.engine.data.prepare import inputs, shard_job
from millrace.engine.data.prepare.settings import ROOM, Settings
from millrace.engine.data.prepare.shard_job import prepare
from millrace.engine.data.sources.shards import ShardsSource
from millrace.engine.data.stream import SampleStream
from millrace.engine.util.errors import UserError
from tests.engine.data.odd_pictures import PIXELS, odd_picture

ROOT = Path(__file__).resolve().parents[4]


def refused(call, *parts):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


@pytest.fixture
def photos(tmp_path, bad):
    """Thirty good pictures of all shapes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02d}.jpg").write_bytes(bad.jpeg(40 + 7 * (i % 5), 40 + 9 * (i % 4), i))
        (folder / f"{i:02d}.json").write_text(json.dumps({"long": f"long {i} " * i + "x", "short": f"s{i}"}))
    return folder


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_torture(tmp_path, bad, settings, kind):
    """Everything bad that is planted is counted by its reason, everything good is in the shards."""
    fill = bad.torture_folder if kind == "folder" else bad.torture_tars
    planted, good = fill(tmp_path / "in")
    before = set(tmp_path.parent.rglob("*"))
    manifest, _ = prepare(tmp_path / "in", tmp_path / "out", settings, 0, 1.0)
    assert manifest.rejects == dict(planted)
    rejects = bad.rejects_of(tmp_path / "out")
    assert Counter(reject["reason"] for reject in rejects) == planted
    assert all(reject["key"] and "\n" not in reject["detail"] for reject in rejects)
    source = ShardsSource(tmp_path / "out", verify=True)
    assert sorted(source.key(i) for i in range(len(source))) == good
    for i in range(len(source)):
        image = source.image(i)
        h, w = source.buckets[source.bucket_of[i]]
        assert image.width >= w
        assert image.height >= h
        assert Image.open(io.BytesIO(source.encoded(i))).mode == "RGB"
    assert manifest.counts == {
        "seen": len(good) + planted.total(),
        "samples": len(good),
        "rejected": planted.total(),
        "unusable_profiles": 0,
    }
    # Nothing was written outside of the output, whatever names the tars have.
    new = set(tmp_path.parent.rglob("*")) - before
    assert all(path.is_relative_to(tmp_path / "out") for path in new)


def test_pictures_with_a_profile_that_cannot_be_used_are_counted(tmp_path, settings):
    """Of every format, stored as it is or encoded anew; counted on when they are not read again."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i, pixels in enumerate(PIXELS):
        for profile in ("none", "Display P3", "broken"):
            name = f"{i:02d} {profile}"
            (folder / f"{name}.{pixels.split()[-1].lower()}").write_bytes(
                odd_picture(pixels, "none", profile).data
            )
            (folder / f"{name}.txt").write_text(name)
    wanted = {"samples": 3 * len(PIXELS), "unusable_profiles": len(PIXELS)}
    taken = replace(settings, upscale=True)
    first, _ = prepare(folder, tmp_path / "out", taken, 0, 0)
    assert first.counts == first.counts | wanted
    (folder / "00 none.txt").write_text("another caption")
    second, _ = prepare(folder, tmp_path / "out", taken, 0, 0)
    assert second.counts == second.counts | wanted
    assert second.digest != first.digest
    (folder / "00 broken.jpeg").unlink()
    third, _ = prepare(folder, tmp_path / "out", taken, 0, 1)
    assert third.counts["unusable_profiles"] == len(PIXELS) - 1


@pytest.mark.parametrize("aspect", ["mixed", "prx"])
def test_training_gives_each_picture_the_size_of_its_bucket(tmp_path, bad, aspect):
    """Of shards at the resolution that they were prepared for, though it knows the stored sizes alone."""
    folder, settings = tmp_path / "in", Settings(256, 32, aspect, upscale=True)
    folder.mkdir()
    borders = _sizes_at_borders(settings)
    any_shape = np.random.default_rng(1).integers(60, 250, (40, 2)).tolist()
    for i, (width, height) in enumerate([*borders, *any_shape]):
        Image.new("L", (width, height)).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text("a caption")
    prepare(folder, tmp_path / "out", settings, 0, 0.0)
    source = ShardsSource(tmp_path / "out")
    config = Data(
        **{"source": "shards", "path": str(tmp_path / "out"), "resolution": 256, "aspect": aspect},
        **{"upscale": True, "global_batch": len(source), "micro_batch": len(source), "workers": 2},
    )
    stream = SampleStream(source, config, seed=0, patch=32, caption_drop=0, rank=0, world_size=1)
    batch = next(stream)
    stream.close()
    trained = {key: image.shape[1:] for key, image in zip(batch.keys, batch.images, strict=True)}
    assert len(trained) == len(source) == len(borders) + len(any_shape)
    assert trained == {source.key(i): source.buckets[source.bucket_of[i]] for i in range(len(source))}


def _sizes_at_borders(settings):
    """(width, height) of pictures whose stored size, rounded to whole pixels, would be of another bucket."""
    found = []
    for width, height in np.random.default_rng(0).integers(256, 1024, (8000, 2)).tolist():
        bucket = settings.bucket_of(width, height)
        h, w = settings.buckets[bucket]
        scale = ROOM / min(width / w, height / h)
        if scale < 1 and settings.bucket_of(round(width * scale), round(height * scale)) != bucket:
            found.append((width, height))
    assert len(found) > 5
    return found


def test_result_does_not_depend_on_the_number_of_workers_or_the_size_of_parts(
    tmp_path, bad, settings, monkeypatch
):
    bad.torture_tars(tmp_path / "in")
    prepare(tmp_path / "in", tmp_path / "0", settings, 0, 1.0)
    prepare(tmp_path / "in", tmp_path / "3", settings, 3, 1.0)
    assert bad.tree(tmp_path / "0") == bad.tree(tmp_path / "3")
    bad.torture_folder(tmp_path / "folder")
    prepare(tmp_path / "folder", tmp_path / "whole", settings, 0, 1.0)
    monkeypatch.setattr(inputs, "PART_PICTURES", 7)
    prepare(tmp_path / "folder", tmp_path / "cut", settings, 0, 1.0)
    assert bad.tree(tmp_path / "whole") == bad.tree(tmp_path / "cut")


def test_shards_are_full_but_not_larger_than_wanted(photos, tmp_path, settings):
    manifest, _ = prepare(photos, tmp_path / "out", settings, 0, 0.0)
    assert sum(manifest.histogram.values()) == manifest.samples == 30
    assert len(manifest.shards) > len(manifest.buckets)
    for shard, following in zip(manifest.shards, manifest.shards[1:], strict=False):
        assert shard.bytes <= settings.shard_bytes
        if shard.bucket == following.bucket:
            rows = np.load((tmp_path / "out" / following.file).with_suffix(".npy"))
            first = int(rows["json_offset"][0] + rows["json_bytes"][0])
            assert shard.bytes + first > settings.shard_bytes
    source = ShardsSource(tmp_path / "out")
    assert sorted(source.key(i) for i in range(30)) == [f"{i:02d}.jpg" for i in range(30)]
    for bucket in range(len(source.buckets)):
        keys = [source.key(i) for i in np.flatnonzero(source.bucket_of == bucket)]
        assert keys == sorted(keys)


def test_a_shard_holds_at_least_one_sample(photos, tmp_path):
    tiny = Settings(resolution=32, patch=8, shard_bytes=1)
    manifest, _ = prepare(photos, tmp_path / "out", tiny, 0, 0.0)
    assert [shard.samples for shard in manifest.shards] == [1] * 30


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def test_goes_on_after_a_stop_at_every_file_that_is_written(photos, tmp_path, bad, settings, monkeypatch):
    """Whatever rename was the last one: the next call gives what an uninterrupted one gives."""
    for path in [*photos.glob("1*"), *photos.glob("2*")]:
        path.unlink()
    (photos / "05.jpg").write_bytes(b"")
    monkeypatch.setattr(inputs, "PART_PICTURES", 5)
    prepare(photos, tmp_path / "whole", settings, 0, 0.5)
    whole = bad.tree(tmp_path / "whole")
    replace = os.replace
    for allowed in range(200):
        out = tmp_path / f"out{allowed}"
        left = [allowed]

        def stops(*arguments, left=left, **options):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return replace(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stops)
            patch.setattr(Path, "replace", lambda path, target: stops(path, target))
            try:
                prepare(photos, out, settings, 0, 0.5)
                finished = True
            except Killed:
                finished = False
        prepare(photos, out, settings, 0, 0.5)
        assert bad.tree(out) == whole
        if finished:
            break
    assert finished
    assert allowed > 15


@pytest.mark.slow
def test_goes_on_after_kill_9_with_workers(tmp_path, bad):
    """The real command, killed again and again soon after it has made some progress."""
    for t in range(8):
        tar = bad.TarBuilder(tmp_path / "in" / f"{t}.tar")
        for i in range(20):
            tar.sample(f"{i:03d}", bad.encoded(bad.smooth(500 + i, 400, t * 20 + i), "PNG"))
        tar.close()
    words = [sys.executable, str(ROOT / "engine" / "prepare.py"), "--input", str(tmp_path / "in")]
    words += ["--resolution", "64", "--patch", "16", "--shard-bytes", "100K"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(output, workers):
        return subprocess.Popen(
            [*words, "--output", str(output), "--workers", str(workers)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def finished_files(output):
        ends = (".json", ".rows", ".packed")
        return sum(path.suffix in ends for path in (output / ".preparing").glob("*/*"))

    out, random = tmp_path / "out", np.random.default_rng(0)
    kills = 0
    for progress in (1, 3, 2, 4):
        before = finished_files(out)
        process = start(out, 2)
        deadline = time.monotonic() + 100
        while finished_files(out) < before + progress and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.2))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 3
    for output, workers in ((out, 2), (tmp_path / "whole", 0)):
        process = start(output, workers)
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    assert bad.tree(out) == bad.tree(tmp_path / "whole")


def test_a_finished_data_set_is_left_alone(photos, tmp_path, settings):
    first, _ = prepare(photos, tmp_path / "out", settings, 0, 0.0)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again, notes = prepare(photos, tmp_path / "out", settings, 0, 0.0)
    assert again == first
    assert notes == [f"{tmp_path / 'out'} is complete already"]
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    other = Settings(resolution=48, patch=8)
    refused(
        lambda: prepare(photos, tmp_path / "out", other, 0, 0.0), tmp_path / "out", "settings (resolution"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "00.jpg").write_bytes((photos / "00.jpg").read_bytes())
    (elsewhere / "00.txt").write_text("a caption")
    refused(lambda: prepare(elsewhere, tmp_path / "out", settings, 0, 0.0), tmp_path / "out", "other input")


def test_what_was_begun_is_not_mixed_with_other_settings(photos, tmp_path, settings, monkeypatch):
    def stops(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shard_job, "plan_shards", stops)
        with pytest.raises(Killed):
            prepare(photos, tmp_path / "out", settings, 0, 0.0)
    other = Settings(resolution=48, patch=8)
    refused(lambda: prepare(photos, tmp_path / "out", other, 0, 0.0), tmp_path / "out", "begun with other")
    monkeypatch.setattr(shard_job, "do_part", None)  # finished parts are not done again
    prepare(photos, tmp_path / "out", settings, 0, 0.0)


def test_outputs_that_hold_something_else(photos, tmp_path, settings):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("")
    refused(lambda: prepare(photos, tmp_path / "out", settings, 0, 0.0), tmp_path / "out", "not empty")
    (tmp_path / "file").write_text("")
    refused(lambda: prepare(photos, tmp_path / "file", settings, 0, 0.0), tmp_path / "file")
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_two_commands_do_not_write_one_output(photos, tmp_path, settings):
    with shard_job._workspace(tmp_path / "out", json.dumps(settings.described())):
        refused(lambda: prepare(photos, tmp_path / "out", settings, 0, 0.0), "another millrace prepare")


def test_too_much_bad_input_stops_in_one_line_and_can_go_on(photos, tmp_path, bad, settings, monkeypatch):
    monkeypatch.setattr(inputs, "PART_PICTURES", 5)
    for name in ("00", "01"):
        (photos / f"{name}.jpg").write_bytes(b"")
    refused(
        lambda: prepare(photos, tmp_path / "out", settings, 0, 0.05),
        "2 of 5 inputs are bad",  # not all 30 had to be read
        "--max-bad-share 0.05",
        "2 empty_picture (00.jpg)",
        tmp_path / "out" / "rejects.jsonl",
    )
    assert [reject["key"] for reject in bad.rejects_of(tmp_path / "out")] == ["00.jpg", "01.jpg"]
    manifest, _ = prepare(photos, tmp_path / "out", settings, 0, 2 / 30)
    assert manifest.counts == {"seen": 30, "samples": 28, "rejected": 2, "unusable_profiles": 0}


def test_tars_stop_early_only_when_enough_is_known(tmp_path, bad, settings, monkeypatch):
    for name, empty in (("0", 3), ("1", 0), ("2", 0)):
        tar = bad.TarBuilder(tmp_path / "in" / f"{name}.tar")
        for i in range(10):
            tar.sample(f"{i}", b"" if i < empty else None)
        tar.close()
    manifest, _ = prepare(tmp_path / "in", tmp_path / "late", settings, 0, 0.1)
    assert manifest.rejects == {"empty_picture": 3}
    monkeypatch.setattr(shard_job, "EARLY", 10)
    refused(lambda: prepare(tmp_path / "in", tmp_path / "early", settings, 0, 0.1), "3 of 10")


def test_duplicates_count_as_bad(tmp_path, bad, settings):
    tar = bad.TarBuilder(tmp_path / "a.tar")
    tar.sample("a").sample("b").sample("a").close()
    refused(
        lambda: prepare(tmp_path / "a.tar", tmp_path / "out", settings, 0, 0.3), "1 duplicate_key (a.tar/a)"
    )


def test_small_pictures_do_not_count_but_nothing_left_is_an_error(tmp_path, bad, settings):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, data in (("a", bad.jpeg(8, 8)), ("b", bad.jpeg(9, 9))):
        (folder / f"{name}.jpg").write_bytes(data)
        (folder / f"{name}.txt").write_text("a caption")
    refused(lambda: prepare(folder, tmp_path / "out", settings, 0, 0.0), "no sample is left", "2 too_small")
    large = Settings(resolution=32, patch=8, upscale=True)
    manifest, _ = prepare(folder, tmp_path / "out2", large, 0, 0.0)
    assert manifest.samples == 2


def test_memory_is_bounded(tmp_path, bad, settings, monkeypatch):
    """A picture of 60 MB, a caption of 10 MB and a tar of both: no more is read than one sample may have."""
    monkeypatch.setattr(sample_files, "MAX_PICTURE_BYTES", 2**20)
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(3):
        with (folder / f"{i}.jpg").open("wb") as file:
            file.truncate(60_000_000)
        (folder / f"{i}.txt").write_text("a caption")
    (folder / "c.jpg").write_bytes(bad.jpeg())
    (folder / "c.txt").write_bytes(b"w " * 5_000_000)
    (folder / "good.jpg").write_bytes(bad.jpeg())
    (folder / "good.txt").write_bytes(b"a caption")
    tars = tmp_path / "tars" / "a.tar"
    tars.parent.mkdir()
    subprocess.run(["tar", "--sort=name", "-cf", str(tars), "-C", str(folder), "."], check=True)
    for source in (folder, tars):
        tracemalloc.start()
        manifest, _ = prepare(source, tmp_path / f"out-{source.name}", settings, 0, 1.0)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert manifest.rejects == {"caption_too_long": 1, "picture_too_large": 3}
        assert peak < 6_000_000


def test_reports_and_manifest_describe_the_data(photos, tmp_path, settings):
    manifest, _ = prepare(photos, tmp_path / "out", settings, 0, 0.0)
    assert Image.open(tmp_path / "out" / "contact_sheet.png").width > 100
    assert Image.open(tmp_path / "out" / "caption_lengths.png").width > 100
    lengths = sorted(len((f"long {i} " * i + "x").strip()) for i in range(30))
    assert manifest.caption_characters["long"]["max"] == lengths[-1]
    assert manifest.caption_characters["long"]["min"] == 1
    assert manifest.settings["resolution"] == 32
    assert re.fullmatch("[0-9a-f]{64}", manifest.settings["identity"])
    assert not list((tmp_path / "out").glob(".preparing*"))


def test_a_full_disk_is_one_line(photos, tmp_path, settings, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr(shard_job, "do_part", full)
    refused(
        lambda: prepare(photos, tmp_path / "out", settings, 0, 0.0), "No space left", "finished work is kept"
    )
