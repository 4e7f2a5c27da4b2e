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
