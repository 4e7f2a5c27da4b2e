import pytest

from millrace.engine.data import Captions
from millrace.engine.data.prepare.captions import captions_of, check_size, checked
from millrace.engine.data.reject_reasons import Reason, Rejected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"txt": b" a caption\n"}, ("a caption", "a caption")),
        ({"txt": "\ufeffnaïve 猫".encode()}, ("naïve 猫", "naïve 猫")),
        ({"json": b'{"caption": "c", "url": 7}'}, ("c", "c")),
        ({"json": b'{"long": "l", "short": "s", "caption": "c"}'}, ("l", "s")),
        ({"txt": b"t", "json": b'{"long": "l", "short": "s"}'}, ("l", "s")),
        ({"txt": b"t", "json": b'{"caption": "c", "status": "success"}'}, ("t", "t")),
        ({"txt": b"t", "json": b"\xff broken metadata"}, ("t", "t")),
        ({"txt": b"t", "json": b'{"long": "", "short": "s"}'}, ("t", "t")),
    ],
)
def test_captions_of_a_sample(files, expected):
    assert captions_of(files) == Captions(*expected)


def sized_captions(files):
    """As the readers do it: sizes first."""
    for suffix, data in files.items():
        check_size(suffix, len(data))
    return captions_of(files)


def test_bad_captions_have_their_reason(bad):
    for name, (files, reason) in bad.BAD_CAPTIONS.items():
        with pytest.raises(Rejected) as caught:
            sized_captions(files)
        assert caught.value.reason == reason, name


def test_limits_are_exact():
    assert checked("é" * 32768, "x") == "é" * 32768
    with pytest.raises(Rejected) as caught:
        checked("é" * 32768 + "x", "x")
    assert caught.value.reason is Reason.CAPTION_TOO_LONG
    check_size("txt", 65536)
    check_size("json", 2**20)
    with pytest.raises(Rejected):
        check_size("txt", 65537)
