"""The pictures that loading is measured on: the same everywhere, and the same bytes in every format."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from millrace.benchmarks.data import picture_set
from millrace.engine.config.data import Columns
from millrace.engine.data.sources.mds import MdsSource
from millrace.engine.data.sources.shards import ShardsSource

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


EDGE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    picture_set.make_pictures(folder / "pictures", 12, EDGE, workers=0)
    picture_set.make_shards(folder / "pictures", folder / "shards", EDGE, workers=0, patch=8)
    picture_set.copy_to_mds(folder / "shards", folder / "mds")
    picture_set.copy_to_files(folder / "shards", folder / "files")
    return folder


def test_a_picture_depends_on_its_number_alone(folder, tmp_path):
    picture_set.make_pictures(tmp_path, 3, EDGE, workers=2)
    for i in range(3):
        for suffix in ("jpg", "json"):
            name = f"{i:05d}.{suffix}"
            assert (tmp_path / name).read_bytes() == (folder / "pictures" / name).read_bytes()


def test_what_is_there_stays_and_what_is_too_much_goes(tmp_path):
    picture_set.make_pictures(tmp_path, 3, EDGE, workers=0)
    written = (tmp_path / "00001.jpg").stat().st_mtime_ns
    (tmp_path / "00000.json").unlink()  # as if stopped in the middle of it
    picture_set.make_pictures(tmp_path, 2, EDGE, workers=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000.jpg",
        "00000.json",
        "00001.jpg",
        "00001.json",
    ]
    assert (tmp_path / "00001.jpg").stat().st_mtime_ns == written


def test_pictures_are_large_enough_detailed_and_of_several_shapes(folder):
    aspects = set()
    for path in (folder / "pictures").glob("*.jpg"):
        with Image.open(path) as image:
            aspects.add(round(image.width / image.height, 1))
            assert 1.2 * EDGE < (image.width * image.height) ** 0.5 < 1.4 * EDGE
            bits = 8 * path.stat().st_size / (image.width * image.height)
            rows = np.asarray(image.convert("L"), np.int16)
        assert 1 < bits < 10
        assert np.abs(np.diff(rows)).mean() > 1
    assert len(aspects) >= 5


def test_every_format_has_the_same_bytes(folder):
    shards, mds = ShardsSource(folder / "shards"), MdsSource(folder / "mds", Columns(), EDGE)
    files = sorted((folder / "files").glob("*/*.jpg"))
    assert len(shards) == len(mds) == len(files) == 12
    stored = [shards.encoded(i) for i in range(12)]
    assert [mds.encoded(i) for i in range(12)] == stored
    assert [mds.captions(i) for i in range(12)] == [shards.captions(i) for i in range(12)]
    assert [path.read_bytes() for path in files] == stored
    assert [path.parent.name for path in files] == [
        "{}x{}".format(*shards.buckets[number]) for number in shards.bucket_of
    ]


def test_copies_are_made_anew_when_the_shards_change(folder, tmp_path):
    output = tmp_path / "files"
    picture_set.copy_to_files(folder / "shards", output)
    one = next(output.glob("*/*.jpg"))
    one.write_bytes(b"touched")
    picture_set.copy_to_files(folder / "shards", output)
    assert one.read_bytes() == b"touched"
    (output / "digest").write_text("of other shards")
    picture_set.copy_to_files(folder / "shards", output)
    assert one.read_bytes() != b"touched"
