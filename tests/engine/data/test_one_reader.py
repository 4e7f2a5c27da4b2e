"""The same samples through every source and both loaders: equal pixels, equal captions."""

import importlib.util
import tarfile
from itertools import islice, product

import numpy as np
import pytest

from millrace.engine.config import Data
from millrace.engine.data import Captions, SampleStream, open_source
from millrace.engine.data.prepare.settings import Settings
from millrace.engine.data.prepare.shard_job import prepare
from millrace.engine.data.sources.pictures import picture_size
from tests.engine.data.odd_pictures import ORIENTATIONS, PIXELS, PROFILES, odd_picture

SETTINGS = Settings(resolution=32, patch=8)
JPEG_LEVELS = 3.0
"""Levels of 255, on average over a picture, that encoding as JPEG may cost."""
ROUNDING = 3
"""Levels by which LittleCMS's and Pillow's integers may differ from the formulas."""

CAPTIONS = (
    ({".txt": b"  one caption \n"}, {"caption": "  one caption \n"}, ("one caption",) * 2),
    ({".txt": b"two\r\nlines\r"}, {"caption": "two\r\nlines\r"}, ("two\nlines",) * 2),
    ({".txt": "naïve 猫".encode("utf-16")}, {"caption": "naïve 猫"}, ("naïve 猫",) * 2),
    ({".json": b'{"caption": "c", "url": 1}'}, {"caption": "c"}, ("c", "c")),
    ({".json": b'{"long": "l", "short": "s"}'}, {"long": "l", "short": "s"}, ("l", "s")),
    ({".json": b'{"caption": "c", "short": "s"}'}, {"caption": "c", "short": "s"}, ("c", "s")),
    ({".json": b'{"caption": "c", "long": "l"}'}, {"caption": "c", "long": "l"}, ("l", "c")),
    (
        {".json": b'{"caption": "c", "long": "l", "short": "s"}'},
        {"caption": "c", "long": "l", "short": "s"},
        ("l", "s"),
    ),
    ({".txt": b"t", ".json": b'{"caption": "x", "status": "success"}'}, {"caption": "t"}, ("t", "t")),
    ({".json": '{"caption": "\\ud83d\\ude00"}'.encode("utf-32")}, {"caption": "😀"}, ("😀", "😀")),
)


def _samples():
    made = []
    for number, (pixels, orientation, profile) in enumerate(product(PIXELS, ORIENTATIONS, PROFILES)):
        files, values, captions = CAPTIONS[number % len(CAPTIONS)]
        picture = odd_picture(pixels, orientation, profile, number)
        made.append((f"{number:04d}", picture, files, values, Captions(*captions)))
    return made


@pytest.fixture(scope="module")
def samples():
    return _samples()


@pytest.fixture(scope="module")
def sources(samples, tmp_path_factory):
    """Every source with these samples, by name."""
    root = tmp_path_factory.mktemp("sources")
    folder = root / "folder"
    folder.mkdir()
    for key, picture, files, _, _ in samples:
        (folder / f"{key}{picture.suffix}").write_bytes(picture.data)
        for suffix, text in files.items():
            (folder / f"{key}{suffix}").write_bytes(text)
        (folder / f"{key}.depth.png").write_bytes(b"of no use here")
        (folder / f"._{key}{picture.suffix}").write_bytes(b"\0\5\x16\7")
    names = sorted(path.name for path in folder.iterdir())
    tars = {
        "tar": names,
        "tar, captions last": sorted(names, key=lambda name: (name.endswith((".txt", ".json")), name)),
    }
    made = {"folder": {"source": "folder", "path": str(folder)}}
    for name, order in tars.items():
        path = root / f"{name}.tar"
        with tarfile.open(path, "w") as tar:
            for file in order:
                tar.add(folder / file, file)
        made[name] = _prepared(path, root / f"{name} shards")
    made["folder shards"] = _prepared(folder, root / "folder shards")
    if importlib.util.find_spec("pyarrow"):
        import pyarrow
        from pyarrow import parquet

        columns = {"image": pyarrow.array([picture.data for _, picture, *_ in samples], pyarrow.binary())}
        for key in ("long", "short", "caption"):
            columns[key] = pyarrow.array([values.get(key) for *_, values, _ in samples], pyarrow.string())
        parquet.write_table(pyarrow.table(columns), root / "a.parquet")
        made["Parquet"] = _prepared(root / "a.parquet", root / "Parquet shards")
    if importlib.util.find_spec("streaming"):
        from millrace.engine.data.formats.mds_shards import load_library

        load_library()
        from streaming.base.format.mds import MDSWriter

        columns = {"image": "bytes", "caption_long": "str", "caption_short": "str"}
        with MDSWriter(out=str(root / "mds"), columns=columns) as writer:
            for _, picture, _, values, _ in samples:
                long, short = (values.get(key, values.get("caption")) for key in ("long", "short"))
                writer.write({"image": picture.data, "caption_long": long, "caption_short": short})
        made["MDS"] = {"source": "mds", "path": str(root / "mds")}
    return made


def _prepared(path, output):
    manifest, _ = prepare(path, output, SETTINGS, 0, 0.0)
    assert manifest.rejects == {}
    return {"source": "shards", "path": str(output)}


def _loaded(where, loader, count, **data):
    """(picture's key, captions, pixels) of each sample, in the order of the source."""
    config = Data(
        **where, resolution=32, aspect="mixed", crop="center", flip=0.0, global_batch=4, micro_batch=4
    ).model_copy(update={"loader": loader, "workers": 2, **data})
    source = open_source(config)
    assert len(source) == count
    made = SampleStream(source, config, seed=0, patch=8, caption_drop=0.0, rank=0, world_size=1)
    found = {}
    for batch in islice(made, -(-count // 4)):
        found.update(zip(batch.keys, batch.images, strict=True))
    made.close()
    return source, found


def test_pixels_are_those_that_a_viewer_shows(samples, sources):
    source = open_source(Data(**sources["folder"]))
    worst = {}
    for index, (_, picture, _, _, captions) in enumerate(samples):
        assert source.captions(index) == captions, picture.name
        got = np.asarray(source.image(index)).astype(int)
        assert got.shape == picture.shown.shape, picture.name
        apart = np.abs(got - picture.shown)
        kind = "lossless" if picture.exact else "JPEG"
        worst[kind] = max(worst.get(kind, 0), int(apart.max()))
        assert apart.max() <= ROUNDING if picture.exact else apart.mean() < JPEG_LEVELS, picture.name
    print(f"{len(samples)} pictures beside what is shown of them, largest difference in levels: {worst}")


def test_every_source_has_the_same_pixels_and_captions(samples, sources):
    wanted = open_source(Data(**sources["folder"]))
    for name, where in sources.items():
        source = open_source(Data(**where, resolution=32))
        place = _order(source, name, len(samples))
        kept, largest = 0, 0
        for index, (_, picture, *_) in enumerate(samples):
            there = place[index]
            assert source.captions(there) == wanted.captions(index), (name, picture.name)
            image = source.image(there)
            assert picture_size(source, there) == image.size, (name, picture.name)
            a = np.asarray(image).astype(int)
            b = np.asarray(wanted.image(index)).astype(int)
            same_bytes = name in ("folder", "MDS") or source.encoded(there) == picture.data
            kept += same_bytes
            apart = np.abs(a - b)
            assert (apart.max() == 0) if same_bytes else apart.mean() < JPEG_LEVELS, (name, picture.name)
            largest = max(largest, int(apart.max()))
        print(
            f"{name}: {kept} of {len(samples)} are the same bytes and pixels, others within {largest} levels"
        )


def test_shards_of_every_input_are_the_same(samples, sources):
    first = open_source(Data(**sources["folder shards"], resolution=32))
    order = _order(first, "folder shards", len(samples))
    for name in {"tar", "tar, captions last", "Parquet"} & set(sources):
        source = open_source(Data(**sources[name], resolution=32))
        place = _order(source, name, len(samples))
        for index in range(len(samples)):
            assert source.encoded(place[index]) == first.encoded(order[index])


@pytest.mark.parametrize("name", ["folder", "tar", "Parquet", "MDS"])
def test_both_loaders_give_the_same_bits(samples, sources, name):
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    if name not in sources:
        pytest.skip("its library is not installed")
    _, python = _loaded(sources[name], "python", len(samples))
    _, dali = _loaded(sources[name], "dali", len(samples))
    assert python.keys() == dali.keys()
    assert len(python) == len(samples)
    for key, pixels in python.items():
        assert pixels.shape == dali[key].shape, key
        assert (pixels == dali[key]).all(), key


def _order(source, name, count):
    """Place in a source of each sample by its number."""
    keys = [source.key(index) for index in range(len(source))]
    assert len(keys) == count, name
    numbers = [int(key.rpartition("/")[2].rpartition("#")[2].partition(".")[0]) for key in keys]
    return {number: place for place, number in enumerate(numbers)}
