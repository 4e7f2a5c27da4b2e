import json

import pytest

from millrace.engine.data import Captions
from millrace.engine.data.captions import (
    captions_by_key,
    captions_listed,
    captions_of,
    check_size,
    checked,
    is_visible,
)
from millrace.engine.data.reject_reasons import Reason, Rejected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"txt": b" a caption\n"}, ("a caption", "a caption")),
        ({"txt": b"one\r\ntwo\rthree\nfour\r\n"}, ("one\ntwo\nthree\nfour",) * 2),
        ({"json": b'{"caption": "one\\r\\ntwo"}'}, ("one\ntwo", "one\ntwo")),
        ({"json": b'{"caption": "\\ud83d\\ude00"}'}, ("😀", "😀")),
        ({"json": b'{"caption": "c", "url": 7}'}, ("c", "c")),
        ({"json": b'{"caption": "c", "n": NaN, "n": 2}'}, ("c", "c")),
        ({"json": b'{"caption": "c", "caption": "c"}'}, ("c", "c")),
        ({"json": b'{"caption": "c", "x": {"caption": "a", "caption": "b"}}'}, ("c", "c")),
        ({"txt": b"t", "json": b'{"long": "l", "short": "s"}'}, ("l", "s")),
        ({"txt": b"t", "json": b'{"short": "s"}'}, ("t", "s")),
        ({"txt": b"t", "json": b'{"long": 12.5, "lat": 3}'}, ("t", "t")),
        ({"txt": b"t", "json": b'{"caption": "c", "status": "success"}'}, ("t", "t")),
        ({"txt": b"t", "json": b"\xff broken metadata"}, ("t", "t")),
        ({"txt": b"t", "json": b"[" * 100_000}, ("t", "t")),
        ({"txt": b"t", "json": b'{"long": "", "short": "\\ud800"}'}, ("t", "t")),
    ],
)
def test_captions_of_a_sample(files, expected):
    assert captions_of(files) == Captions(*expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"caption": "c"}, ("c", "c")),
        ({"long": "l", "short": "s"}, ("l", "s")),
        ({"long": "l", "short": "s", "caption": "c"}, ("l", "s")),
        ({"caption": "c", "short": "s"}, ("c", "s")),
        ({"caption": "c", "long": "l"}, ("l", "c")),
        ({"caption": "c", "long": None, "short": "s"}, ("c", "s")),
        ({"caption": None, "long": "l", "short": "s"}, ("l", "s")),
        ({"long": "l"}, Reason.MISSING_CAPTION),
        ({"short": "s", "caption": None}, Reason.MISSING_CAPTION),
        ({"caption": None}, Reason.MISSING_CAPTION),
        ({}, Reason.MISSING_CAPTION),
        ({"caption": "c", "short": " "}, Reason.EMPTY_CAPTION),
        ({"caption": "c", "long": ["l"]}, Reason.CAPTION_NOT_TEXT),
    ],
)
def test_keys_and_their_precedence(values, expected):
    files = {"json": json.dumps(values).encode()}
    for read in (lambda: captions_of(files), lambda: captions_by_key(values, "the row")):
        if isinstance(expected, Reason):
            with pytest.raises(Rejected) as caught:
                read()
            assert caught.value.reason is expected
        else:
            assert read() == Captions(*expected)


@pytest.mark.parametrize("kind", ["txt", "json"])
@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", b""),
        ("utf-8", b"\xef\xbb\xbf"),
        ("utf-16-le", b"\xff\xfe"),
        ("utf-16-be", b"\xfe\xff"),
        ("utf-32-le", b"\xff\xfe\0\0"),
        ("utf-32-be", b"\0\0\xfe\xff"),
    ],
)
def test_encodings_that_say_what_they_are(kind, encoding, mark):
    text = "naïve 猫 😀"
    data = mark + (text if kind == "txt" else json.dumps({"caption": text}, ensure_ascii=False)).encode(
        encoding
    )
    assert captions_of({kind: data}).long == text


@pytest.mark.parametrize(
    ("files", "reason", "detail"),
    [
        ({}, Reason.MISSING_CAPTION, "neither"),
        ({"txt": "naïve".encode("latin-1")}, Reason.CAPTION_NOT_UTF8, "not UTF-8 at byte 2"),
        ({"txt": b"\xff\xfea\0b"}, Reason.CAPTION_NOT_UTF8, "not UTF-16 at byte 4"),
        ({"txt": b"\xff\xfe\0\xd8"}, Reason.CAPTION_NOT_UTF8, "not UTF-16 at byte 2"),
        ({"txt": b"\xff\xfe\0\0a\0\0"}, Reason.CAPTION_NOT_UTF8, "not UTF-32 at byte 4"),
        ({"json": b'{"caption": "\\ud800"}'}, Reason.CAPTION_NOT_UTF8, "half a character at place 0"),
        ({"json": b'{"caption": "a \\ude00 b"}'}, Reason.CAPTION_NOT_UTF8, "half a character at place 2"),
        ({"json": b'{"caption": "c", "short": "\\udfff"}'}, Reason.CAPTION_NOT_UTF8, '"short" has half'),
        ({"json": b"{'caption': 1}"}, Reason.CAPTION_NOT_JSON, "not valid JSON"),
        ({"json": b""}, Reason.CAPTION_NOT_JSON, "not valid JSON"),
        ({"json": b'{"caption": "a"}\n{"caption": "b"}'}, Reason.CAPTION_NOT_JSON, "Extra data"),
        ({"json": b"[" * 200_000}, Reason.CAPTION_NOT_JSON, "recursion"),
        ({"json": b'{"a":' * 100_000}, Reason.CAPTION_NOT_JSON, "recursion"),
        ({"json": b'{"caption": ' + b"1" * 5000 + b"}"}, Reason.CAPTION_NOT_JSON, "4300 digits"),
        ({"json": b'{"caption": "line\nbreak"}'}, Reason.CAPTION_NOT_JSON, "control character"),
        ({"json": b'["a caption"]'}, Reason.CAPTION_NOT_JSON, "it is a list"),
        ({"json": b"null"}, Reason.CAPTION_NOT_JSON, "it is a NoneType"),
        ({"json": b'{"caption": "a", "caption": "b"}'}, Reason.AMBIGUOUS_CAPTION, "more than once"),
        ({"json": b'{"caption": true}'}, Reason.CAPTION_NOT_TEXT, "is a bool"),
    ],
)
def test_bad_captions_have_their_reason_in_one_line(files, reason, detail):
    with pytest.raises(Rejected) as caught:
        captions_of(files)
    assert caught.value.reason is reason
    assert detail in caught.value.detail
    assert "\n" not in caught.value.detail


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\t",
        "\u3000\u2003",
        "\u200b\u200c\u200d",
        "\ufeff",
        "\0\x01\x7f",
        "\u2060\u00ad",
        "\ufe0f",
        "\u3164",
    ],
)
def test_text_without_ink_is_no_caption(text):
    assert not is_visible(text)
    with pytest.raises(Rejected) as caught:
        checked(text, "x")
    assert caught.value.reason is Reason.EMPTY_CAPTION


@pytest.mark.parametrize("text", ["a", ".", "猫", "😀", "é", "e\u0301", "\u200fא", "\u200ba", "✓", "\ue000"])
def test_everything_with_ink_is_a_caption(text):
    assert checked(text, "x") == text


def test_limits_are_exact():
    assert checked("é" * 32768, "x") == "é" * 32768
    with pytest.raises(Rejected) as caught:
        checked("é" * 32768 + "x", "x")
    assert caught.value.reason is Reason.CAPTION_TOO_LONG
    check_size("txt", 65536)
    check_size("json", 2**20)
    with pytest.raises(Rejected):
        check_size("txt", 65537)


LISTED = ["a cat", "zwei Hunde, naïve 猫", "one line\u2028that goes on"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_list_of_captions_is_the_same_in_every_form(encoding, end):
    first, second, third = LISTED
    objects = [{"long": first, "short": "s"}, {"caption": second, "n": 1}, {"long": None, "short": third}]
    dumped = [json.dumps(value, ensure_ascii=False) for value in (first, *objects[1:])]
    forms = {
        ".txt": end.join([f"  {first} ", "", "\u200b", second, third, ""]),
        "": end.join(LISTED),
        ".jsonl": end.join([*dumped, ""]),
        ".JSON": json.dumps(objects, indent=2).replace("\n", end),
        ".json": json.dumps(LISTED, ensure_ascii=False),
    }
    for suffix, text in forms.items():
        assert captions_listed(text.encode(encoding), suffix) == LISTED, suffix


def test_one_object_and_nothing_at_all():
    assert captions_listed(b'{"short": "s", "caption": "c"}', ".json") == ["c"]
    for suffix, data in ((".txt", b""), (".txt", b" \n\xef\xbb\xbf\n"), (".jsonl", b"\n"), (".json", b"[]")):
        assert captions_listed(data, suffix) == []


@pytest.mark.parametrize(
    ("suffix", "data", "reason", "detail"),
    [
        (".txt", b"a\nb \xff", Reason.CAPTION_NOT_UTF8, "not UTF-8 at byte 4"),
        (".txt", b"a\n" + b"w" * 70_000, Reason.CAPTION_TOO_LONG, "line 2: the caption has 70000 bytes"),
        (".jsonl", b'"a"\n\n{"long": ', Reason.CAPTION_NOT_JSON, "line 3: not valid JSON"),
        (".jsonl", b'"a"\n[1]', Reason.CAPTION_NOT_TEXT, "line 2: the caption is a list"),
        (".jsonl", b'{"prompt": "a"}', Reason.MISSING_CAPTION, 'line 1: it has neither "long" nor'),
        (".jsonl", b'{"long": "a", "long": "b"}', Reason.AMBIGUOUS_CAPTION, 'line 1: it has "long" more'),
        (".json", b'["a", "\\ud800"]', Reason.CAPTION_NOT_UTF8, "place 2: the caption has half a character"),
        (".json", b'["a", ""]', Reason.EMPTY_CAPTION, "place 2: the caption is empty"),
        (".json", b'[{"long": 7}]', Reason.CAPTION_NOT_TEXT, 'place 1: "long" is a int, not text'),
        (".json", b"a cat", Reason.CAPTION_NOT_JSON, "not valid JSON"),
        (".json", b"[" * 100_000, Reason.CAPTION_NOT_JSON, "not valid JSON"),
    ],
)
def test_a_list_names_what_is_wrong_and_where(suffix, data, reason, detail):
    with pytest.raises(Rejected) as caught:
        captions_listed(data, suffix)
    assert caught.value.reason is reason
    assert caught.value.detail.startswith(detail)
