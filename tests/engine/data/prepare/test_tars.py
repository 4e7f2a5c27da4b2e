import gzip
import hashlib
import tarfile

import pytest

from millrace.engine.data import Captions
from millrace.engine.data.prepare.stored_sample import RawSample
from millrace.engine.data.prepare.tars import read_tar
from millrace.engine.data.reject_reasons import Reason


@pytest.fixture
def build(tmp_path, bad):
    return bad.TarBuilder(tmp_path / "a.tar")


def outcomes(builder):
    """Key and caption, or key and reason, of everything in a tar."""
    found = []
    for item in read_tar(builder.close(), "a"):
        is_sample = isinstance(item, RawSample)
        found.append((item.key, item.captions.long if is_sample else item.reason))
    return found


def test_samples_of_img2dataset(build, bad):
    for i in range(2):
        build.add(f"{i}.jpg", bad.jpeg(seed=i)).add(f"{i}.json", b'{"url": "u", "caption": "c"}')
        build.add(f"{i}.txt", f"caption {i}".encode())
    samples = list(read_tar(build.close(), "a"))
    assert [sample.key for sample in samples] == ["a/0", "a/1"]
    assert [sample.captions for sample in samples] == [
        Captions(f"caption {i}", f"caption {i}") for i in (0, 1)
    ]
    assert [sample.picture for sample in samples] == [bad.jpeg(seed=0), bad.jpeg(seed=1)]


def test_other_components_belong_to_their_sample(build, bad):
    build.add("0.jpg", bad.jpeg()).add("0.mask.png", b"x").add("0.cls", b"7").add("0.txt", b"c")
    build.add("0.after.png", b"x").add("readme.md", b"no sample").add(".DS_Store", b"no sample")
    assert outcomes(build) == [("a/0", "c")]


@pytest.mark.parametrize(
    "order", ["pictures first", "captions first", "auxiliary first", "reversed", "mixed"]
)
def test_members_may_come_in_any_order(build, bad, order):
    names = [
        f"d/{i}{suffix}" for i in range(5) for suffix in (".depth.png", ".jpg", ".mask.png", ".txt", ".json")
    ]
    keys = {
        "pictures first": lambda name: (not name.endswith(".jpg"), name),
        "captions first": lambda name: (not name.endswith(".txt"), name),
        "auxiliary first": lambda name: (name.count(".") < 2, name),
        "reversed": lambda name: [-ord(letter) for letter in name],
        "mixed": lambda name: hash_of(name),
    }
    for name in sorted(names, key=keys[order]):
        content = {
            "jpg": bad.jpeg(seed=int(name[2])),
            "txt": f"caption {name[2]}".encode(),
            "json": b'{"url": 1}',
        }
        build.add(name, content.get(name.rpartition(".")[2], b"x"))
    samples = sorted(read_tar(build.close(), "a"))
    assert [sample.key for sample in samples] == [f"a/d/{i}" for i in range(5)]
    assert [sample.captions.long for sample in samples] == [f"caption {i}" for i in range(5)]
    assert [sample.picture for sample in samples] == [bad.jpeg(seed=i) for i in range(5)]


def hash_of(name):
    return hashlib.sha256(name.encode()).hexdigest()


def test_hidden_files_and_folders_are_left_alone(build, bad):
    build.add("._0.jpg", b"x").add(".cache/1.jpg", b"x").add("a/.DS_Store", b"x").add(
        "a/.x/2.txt", b"c"
    ).sample("0")
    assert outcomes(build) == [("a/0", "a caption")]


def test_formats_that_are_not_read(build, bad):
    for name in ("0.jpe", "1.apng", "2.mpo", "3.tga", "4"):
        build.add(name, bad.jpeg()).add(f"{name[0]}.txt", b"c")
    build.add("5.npy", b"x")
    assert outcomes(build) == [(f"a/{i}", Reason.UNSUPPORTED_FORMAT) for i in range(5)]


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (gzip.compress(b"x" * 5000, mtime=0), "a gzip file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>" * 100, "an HTML page"),
        (b"PK\x03\x04" + b"x" * 5000, "a zip file"),
    ],
)
def test_what_is_no_tar_is_named(tmp_path, data, name):
    (tmp_path / "a.tar").write_bytes(data)
    (item,) = read_tar(tmp_path / "a.tar", "a.tar")
    assert item.reason is Reason.CORRUPT_TAR
    assert name in item.detail


def test_names_with_dots(build, bad):
    build.sample("d/IMG.2024.01").sample("d/IMG.2024.02").sample("./plain")
    assert outcomes(build) == [
        ("a/d/IMG.2024.01", "a caption"),
        ("a/d/IMG.2024.02", "a caption"),
        ("a/plain", "a caption"),
    ]


def test_suffixes_may_be_upper_case(build, bad):
    build.add("0.JPG", bad.jpeg()).add("0.TXT", b"c")
    assert outcomes(build) == [("a/0", "c")]


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x"])
def test_names_that_lead_out(build, name):
    build.sample(name)
    ((_, reason),) = outcomes(build)
    assert reason is Reason.UNSAFE_NAME


def test_one_reject_stands_for_a_sample(build, bad):
    build.add("0.jpg", kind=tarfile.SYMTYPE).add("0.txt", b"w" * 100_000).add("0.json", b"x")
    assert outcomes(build) == [("a/0", Reason.SPECIAL_FILE)]


def test_a_large_json_beside_a_caption_is_metadata(build, bad):
    build.add("0.jpg", bad.jpeg()).add("0.json", b" " * 2_000_000).add("0.txt", b"c")
    build.add("1.jpg", bad.jpeg()).add("1.json", b" " * 2_000_000)
    assert outcomes(build) == [("a/0", "c"), ("a/1", Reason.CAPTION_TOO_LONG)]


def test_a_name_that_comes_again_begins_another_sample(build, bad):
    build.sample("0").sample("0", caption=b"second")
    assert outcomes(build) == [("a/0", "a caption"), ("a/0", "second")]  # which one stays is decided later


def test_a_tar_that_cannot_be_read(tmp_path):
    (item,) = read_tar(tmp_path / "none.tar", "none.tar")
    assert (item.key, item.reason) == ("none.tar", Reason.UNREADABLE_FILE)
