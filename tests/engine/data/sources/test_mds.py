import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from millrace.engine.config import Data
from millrace.engine.config.data import Columns, Part
from millrace.engine.data import Captions, SampleStream, UnreadablePicture, fingerprint, open_source
from millrace.engine.data.sources.mds import MdsSource

BOTH = {"image": "jpeg", "caption_long": "str", "caption_short": "str"}


def opened(folder, columns=None, **options):
    return MdsSource(folder, columns or Columns(), options.pop("resolution", 64), **options)


def test_samples_come_in_the_order_of_the_index_with_keys_pictures_and_captions(tmp_path, write_mds, picture):
    images = [picture((40 + i, 30), i) for i in range(7)]
    samples = [
        {"image": image, "caption_long": f" a long one {i}\n", "caption_short": f"short {i}"}
        for i, image in enumerate(images)
    ]
    write_mds(tmp_path / "set", BOTH, samples, size_limit=3000)
    source = opened(tmp_path / "set")
    assert len(list((tmp_path / "set").glob("*.mds"))) > 2
    assert len(source) == 7
    keys = [source.key(i) for i in range(7)]
    assert keys[0] == "shard.00000/0"
    assert len(set(keys)) == 7
    for i, image in enumerate(images):
        assert source.captions(i) == Captions(f"a long one {i}", f"short {i}")
        assert source.image(i).size == image.size
        expected = Image.open(io.BytesIO(source.encoded(i)))
        assert np.array_equal(np.array(source.image(i)), np.array(expected))
    with pytest.raises(IndexError):
        source.image(7)


def test_pictures_may_be_stored_as_bytes_or_pixels(tmp_path, write_mds, picture, as_file):
    image = picture((24, 24))
    for encoding, value in (("bytes", as_file(image, "PNG")), ("png", image), ("pil", image)):
        folder = tmp_path / encoding
        write_mds(folder, {"image": encoding, "caption": "str"}, [{"image": value, "caption": "x"}])
        source = opened(folder)
        assert np.array_equal(np.array(source.image(0)), np.array(image)), encoding
        assert source.buckets == ((64, 64),)
        assert (source.encoded(0) is None) == (encoding == "pil")
    assert opened(tmp_path / "bytes").encoded(0) == as_file(image, "PNG")


def test_captions_follow_the_rule_of_all_sources(tmp_path, write_mds, picture):
    samples = [
        {"image": picture((24, 24)), "caption_long": long, "caption_short": "s"}
        for long in ("one\r\ntwo", "\u200b", "w" * 70_000)
    ]
    write_mds(tmp_path / "set", BOTH, samples)
    (tmp_path / "set" / "._index.json").write_bytes(b"\0\5\x16\7")
    source = opened(tmp_path / "set")
    assert source.captions(0) == Captions("one\ntwo", "s")
    assert source.captions(1) == Captions("s", "s")
    with pytest.raises(UnreadablePicture, match="its caption_long has 70000 bytes"):
        source.captions(2)


def test_pictures_are_upright_and_rgb(tmp_path, write_mds, picture, as_file):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = as_file(picture((24, 16)), quality=95, exif=exif)
    grey = as_file(Image.new("L", (8, 8), 128), "PNG")
    samples = [{"image": data, "caption": "x"} for data in (turned, grey)]
    write_mds(tmp_path / "files", {"image": "bytes", "caption": "str"}, samples)
    source = opened(tmp_path / "files")
    assert source.image(0).size == (16, 24)
    assert source.image(1).getpixel((0, 0)) == (128, 128, 128)
    raw = [{"image": Image.new("L", (8, 6), 128), "caption": "x"}]
    write_mds(tmp_path / "pixels", {"image": "pil", "caption": "str"}, raw)
    assert opened(tmp_path / "pixels").image(0).getpixel((0, 0)) == (128, 128, 128)


def test_folders_are_one_data_set_in_order_of_their_names(tmp_path, write_pictures):
    write_pictures(tmp_path / "b", [(64, 64)] * 3)
    write_pictures(tmp_path / "a", [(96, 48)] * 2)
    source = opened(tmp_path)
    assert [source.captions(i).long for i in range(len(source))] == ["a 0", "a 1", "b 0", "b 1", "b 2"]
    assert source.key(4) == "b/shard.00000/2"


def test_a_folder_may_have_several_indexes(tmp_path, write_pictures):
    write_pictures(tmp_path / "whole", [(64, 64)] * 2)
    folder = tmp_path / "together"
    folder.mkdir()
    (tmp_path / "whole/index.json").rename(folder / "first_index.json")
    (tmp_path / "whole/shard.00000.mds").rename(folder / "shard.00000.mds")
    assert [opened(folder).captions(i).long for i in range(2)] == ["whole 0", "whole 1"]


@pytest.mark.parametrize(
    ("name", "size", "resolution", "expected"),
    [
        ("1344x768", (1344, 768), 1024, (768, 1344)),
        ("768x1344", (1344, 768), 1024, (768, 1344)),
        ("ar_1344x768_v2", (1350, 770), 1024, (768, 1344)),
        ("1344x768", (1344, 768), 256, (192, 352)),
        ("0.57", (1344, 768), 1024, (768, 1344)),
        ("0.57", (1350, 765), 1024, (736, 1344)),
        ("0.57", (700, 400), 1024, (768, 1344)),
        ("720x720", (1344, 768), 1024, (768, 1344)),
        ("square", (300, 300), 256, (256, 256)),
    ],
)
def test_a_folder_of_one_aspect_ratio_is_a_bucket(tmp_path, write_pictures, name, size, resolution, expected):
    write_pictures(tmp_path / name, [size] * 2)
    source = opened(tmp_path, resolution=resolution)
    assert source.buckets == (expected,)
    assert source.bucket_of.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("name", "sizes", "expected"),
    [
        ("48x80", [(80, 48), (100, 60), (100, 50), (170, 83)], ((48, 80),)),
        ("80x48", [(80, 48), (100, 60), (100, 50), (170, 83)], ((48, 80),)),
        ("48x80", [(80, 48), (100, 47)], ()),  # does not cover the bucket, and is of another aspect
        ("48x80", [(80, 48), (100, 80)], ()),  # a third of its edge would be cropped
    ],
)
def test_a_folder_named_for_a_bucket_may_hold_more_than_its_aspect(
    tmp_path, write_pictures, name, sizes, expected
):
    write_pictures(tmp_path / name, sizes)
    assert opened(tmp_path).buckets == expected


def test_buckets_are_sorted_and_tell_the_size_of_every_sample(tmp_path, write_pictures):
    write_pictures(tmp_path / "a", [(64, 64)] * 3, size_limit=2000)
    write_pictures(tmp_path / "b", [(32, 96)] * 2)
    write_pictures(tmp_path / "c", [(65, 64)])
    write_pictures(tmp_path / "d", [(96, 32)] * 2)
    source = opened(tmp_path)
    assert source.buckets == ((32, 96), (64, 64), (96, 32))
    assert source.bucket_of.dtype == np.int32
    assert source.bucket_of.tolist() == [1, 1, 1, 2, 2, 1, 0, 0]


def test_turned_pictures_are_in_the_bucket_of_what_is_seen(tmp_path, write_mds, picture, as_file):
    exif = Image.Exif()
    exif[0x0112] = 8
    samples = [{"image": as_file(picture((96, 48)), exif=exif), "caption": "x"}]
    write_mds(tmp_path / "96x32", {"image": "bytes", "caption": "str"}, samples)
    assert opened(tmp_path).buckets == ((96, 32),)


def test_a_folder_of_several_aspect_ratios_is_no_bucket(tmp_path, write_pictures):
    write_pictures(tmp_path / "a", [(64, 64), (96, 48)])
    write_pictures(tmp_path / "b", [(64, 64)])
    assert opened(tmp_path).buckets == ()


def test_one_empty_caption_is_replaced_by_the_other(tmp_path, write_mds, picture):
    texts = [("", "short"), ("long", " "), ("", "")]
    samples = [{"image": picture((8, 8)), "caption_long": a, "caption_short": b} for a, b in texts]
    source = opened(write_mds(tmp_path / "set", BOTH, samples))
    assert source.captions(0) == Captions("short", "short")
    assert source.captions(1) == Captions("long", "long")
    for use in (source.captions, source.image, source.encoded):
        with pytest.raises(UnreadablePicture, match=r"shard.00000/2: its captions are empty"):
            use(2)


def test_damaged_samples_are_named_and_the_others_remain(tmp_path, write_pictures):
    folder = write_pictures(tmp_path / "set", [(64, 64)] * 4)
    shard = folder / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    offsets = np.frombuffer(data[4:24], np.uint32)
    data[offsets[1] + 4 : offsets[1] + 8] = b"\xff\xff\xff\x00"
    data[offsets[2] + 40 : offsets[3] - 2] = bytes(int(offsets[3] - offsets[2]) - 42)
    shard.write_bytes(data)
    source = opened(folder)
    assert source.image(0).size == source.image(3).size == (64, 64)
    for use in (source.encoded, source.image, source.captions):
        with pytest.raises(UnreadablePicture, match=r"shard.00000/1: the shard is damaged here"):
            use(1)
    with pytest.raises(UnreadablePicture, match=r"shard.00000/2"):
        source.image(2)


def test_any_thread_may_read_any_sample(tmp_path, write_pictures):
    folder = write_pictures(tmp_path / "set", [(64, 64)] * 20, size_limit=4000, hashes=["xxh64"])
    source = opened(folder, verify=True)
    expected = [(source.encoded(i), source.captions(i).long) for i in range(20)]
    order = np.random.default_rng(0).integers(0, 20, 400).tolist()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: (source.encoded(i), source.captions(i).long), order))
    assert found == [expected[i] for i in order]


def test_a_copy_for_another_process_gives_the_same(tmp_path, write_pictures):
    source = opened(write_pictures(tmp_path / "set", [(64, 64)] * 2))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.encoded(1) == source.encoded(1)


def test_digest_follows_the_shards_and_the_columns(tmp_path, write_mds):
    def written(name, caption, **options):
        samples = [{"image": b"x", "caption": caption, "other": caption}]
        return write_mds(
            tmp_path / name, {"image": "bytes", "caption": "str", "other": "str"}, samples, **options
        )

    one = opened(written("a", "fox", hashes=["sha1"]))
    assert one.digest == opened(written("b", "fox", hashes=["sha1"])).digest
    assert one.digest != opened(written("c", "cat", hashes=["sha1"])).digest
    assert one.digest != opened(tmp_path / "a", Columns(long="other")).digest
    assert fingerprint(one) != fingerprint(opened(tmp_path / "c"))


def test_the_configuration_opens_it_alone_and_as_a_part(tmp_path, write_mds, picture):
    samples = [{"jpg": picture((96, 96), i), "alt": f"alt {i}", "caption": f"caption {i}"} for i in range(4)]
    write_mds(tmp_path / "set", {"jpg": "pil", "alt": "str", "caption": "str"}, samples)
    columns = {"short": "alt"}
    (tmp_path / "keys.txt").write_text("shard.00000/2\n")
    alone = open_source(
        Data(source="mds", path=str(tmp_path / "set"), columns=columns, keys=str(tmp_path / "keys.txt"))
    )
    assert len(alone) == 1
    assert alone.captions(0) == Captions("caption 2", "alt 2")
    part = Part(name="m", source="mds", path=str(tmp_path / "set"), columns=columns)
    config = Data(source="mixture", mixture=(part, Part(name="b", source="builtin")))
    mixture = open_source(config)
    assert mixture.key(1) == "m/shard.00000/1"
    assert isinstance(mixture.image(1), Image.Image)


@pytest.mark.parametrize("loader", ["dali", "python"])
def test_a_stream_reads_buckets(tmp_path, write_pictures, loader):
    write_pictures(tmp_path / "a", [(96, 48)] * 4)
    write_pictures(tmp_path / "b", [(80, 80)] * 4)
    data = {"source": "mds", "path": str(tmp_path), "resolution": 64, "aspect": "bucket", "loader": loader}
    config = Data(**data, bucket_run=4, global_batch=4, micro_batch=4, workers=2)
    stream = SampleStream(
        open_source(config), config, seed=0, patch=16, caption_drop=0.0, rank=0, world_size=1
    )
    batches = {tuple(batch.images[0].shape): batch for batch in (next(stream), next(stream))}
    stream.close()
    assert sorted(batches[3, 32, 96].captions) == ["a 0", "a 1", "a 2", "a 3"]
    assert sorted(batches[3, 64, 64].captions) == ["b 0", "b 1", "b 2", "b 3"]


def test_a_stream_reads_it(tmp_path, write_pictures):
    write_pictures(tmp_path / "set", [(96, 96)] * 4)
    config = Data(
        source="mds", path=str(tmp_path / "set"), resolution=64, global_batch=4, micro_batch=4, workers=2
    )
    source = open_source(config)
    stream = SampleStream(source, config, seed=0, patch=16, caption_drop=0.0, rank=0, world_size=1)
    batch = next(stream)
    stream.close()
    assert sorted(batch.captions) == ["set 0", "set 1", "set 2", "set 3"]
    assert all(image.shape == (3, 64, 64) for image in batch.images)
    assert isinstance(source, MdsSource)
