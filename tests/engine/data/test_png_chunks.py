import io
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from millrace.engine.data.png_chunks import without_text
from millrace.engine.data.sources.pictures import decode_picture
from tests.engine.data.odd_pictures import chunk, png, rgb_profile, srgb_profile, xmp_packet

VALUES = np.arange(6 * 4 * 3).reshape(4, 6, 3)


def with_chunks(*extra):
    return png(VALUES, 8, 2, extra)


@pytest.mark.parametrize("size", [10, 2_000_000])
@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt", "iTXt packed", "several"])
def test_texts_of_any_size(size, kind):
    text = b"x" * size
    chunks = {
        "tEXt": [(b"tEXt", b"Comment\0" + text)],
        "zTXt": [(b"zTXt", b"Comment\0\0" + zlib.compress(text))],
        "iTXt": [(b"iTXt", b"workflow\0\0\0\0\0" + text)],
        "iTXt packed": [(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(text))],
        "several": [(b"zTXt", b"Comment\0\0" + zlib.compress(text))] * 40,
    }[kind]
    np.testing.assert_array_equal(np.asarray(decode_picture(with_chunks(*chunks), "x")), VALUES)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("element", [False, True])
@pytest.mark.parametrize("size", [0, 3_000_000])
def test_an_orientation_in_a_text_of_any_size_counts(packed, element, size):
    text = xmp_packet(6, element) + b" " * size
    body = b"XML:com.adobe.xmp\0" + (b"\1\0\0\0" + zlib.compress(text) if packed else b"\0\0\0\0" + text)
    pixels = np.asarray(decode_picture(with_chunks((b"iTXt", body)), "x"))
    np.testing.assert_array_equal(pixels, np.rot90(VALUES, -1))


def test_pixels_and_their_checksums_stay():
    data = with_chunks((b"tEXt", b"Comment\0x"), (b"gAMA", b"\0\0\xb1\x8f"))
    kept = without_text(data).data
    assert kept == with_chunks((b"gAMA", b"\0\0\xb1\x8f"))
    assert without_text(kept) == (kept, None)


def test_text_behind_the_pixels():
    data = png(VALUES, 8, 2)
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 3_000_000))
    np.testing.assert_array_equal(np.asarray(decode_picture(data[:-12] + text + data[-12:], "x")), VALUES)


@pytest.mark.parametrize(
    "profile", [srgb_profile(), rgb_profile(((0.5, 0.2, 0), (0.3, 0.7, 0), (0.1, 0, 0.8)))]
)
def test_profiles_are_those_that_pillow_reads(profile):
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG", icc_profile=profile)
    taken = without_text(file.getvalue())
    assert taken.profile == profile
    assert "icc_profile" not in Image.open(io.BytesIO(taken.data)).info


@pytest.mark.parametrize("body", [b"", b"name", b"name\0\0 no zlib", b"n\0\0" + zlib.compress(b"x" * 2**25)])
def test_profiles_that_cannot_be_inflated_are_empty(body):
    assert without_text(with_chunks((b"iCCP", body))).profile == b""


@pytest.mark.parametrize("data", [b"", b"x" * 40, b"\x89PNG\r\n\x1a\n", png(VALUES, 8, 2)[:-30]])
def test_other_files_stay_as_they_are(data):
    assert without_text(data) == (data, None)


def test_texts_of_pillow_itself():
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "naïve", zip=True)
    info.add_itxt("Title", "猫")
    file = io.BytesIO()
    Image.fromarray(VALUES.astype(np.uint8)).save(file, "PNG", pnginfo=info)
    np.testing.assert_array_equal(np.asarray(decode_picture(file.getvalue(), "x")), VALUES)
