import io

import numpy as np
import pytest
from PIL import Image

from millrace.engine.data import Captions
from millrace.engine.data.prepare.settings import Settings
from millrace.engine.data.prepare.stored_sample import RawSample, convert
from millrace.engine.data.reject_reasons import Reason, Rejected
from millrace.engine.data.sources.pictures import decode_picture
from tests.engine.data.odd_pictures import P3, rgb_profile

SETTINGS = Settings(resolution=32, patch=8)


def stored(data, settings=SETTINGS):
    return convert(RawSample("key", data, Captions("l", "s")), settings).stored


def pixels(data):
    return np.asarray(decode_picture(data, "test")).astype(float)


def test_a_jpeg_that_will_do_is_stored_as_it_is(bad):
    data = bad.jpeg(36, 40)
    assert stored(data).picture == data
    large = bad.jpeg(400, 400)
    assert stored(large).picture != large
    original = stored(large, Settings(resolution=32, patch=8, store="original"))
    assert original.picture == large
    assert (original.width, original.height) == (400, 400)


@pytest.mark.parametrize(
    "name", ["png.png", "webp.webp", "grey.jpg", "cmyk.jpg", "deep.png", "turned.jpg", "clear.png"]
)
def test_others_become_rgb_jpeg_that_look_the_same(bad, name):
    result = stored(bad.GOOD[name])
    with Image.open(io.BytesIO(result.picture)) as image:
        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert not image.getexif()
    expected = decode_picture(bad.GOOD[name], "test").resize((result.width, result.height))
    assert np.abs(pixels(result.picture) - np.asarray(expected)).mean() < 8


def test_turned_pictures_are_upright_and_go_to_their_own_bucket(bad):
    bucket, result, _ = convert(RawSample("key", bad.GOOD["turned.jpg"], Captions("l", "s")), SETTINGS)
    assert SETTINGS.buckets[bucket][0] > SETTINGS.buckets[bucket][1]
    assert result.height > result.width
    assert b'"width":40,"height":60' in result.record


@pytest.mark.parametrize("size", [(640, 480), (333, 2000), (2000, 333), (41, 41)])
def test_pictures_are_stored_a_quarter_larger_than_their_bucket_at_most(bad, size):
    bucket, result, _ = convert(RawSample("key", bad.jpeg(*size), Captions("l", "s")), SETTINGS)
    h, w = SETTINGS.buckets[bucket]
    assert min(result.width / w, result.height / h) == pytest.approx(1.25, abs=0.03)
    assert result.width / result.height == pytest.approx(size[0] / size[1], rel=0.05)


def test_reduced_decoding_looks_like_full_decoding(bad):
    """libjpeg's own reduction takes part in the resize; what is stored is that of a plain resize."""
    y, x = np.mgrid[:960, :1200] / 60
    waves = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1) * 100 + 128
    data = bad.encoded(Image.fromarray(waves.astype(np.uint8)), quality=95)
    result = stored(data)
    plain = decode_picture(data, "test").resize((result.width, result.height), Image.Resampling.LANCZOS)
    assert np.abs(pixels(result.picture) - pixels(bad.encoded(plain, quality=95))).mean() < 1


def test_small_pictures(bad):
    with pytest.raises(Rejected) as caught:
        stored(bad.jpeg(31, 34))
    assert caught.value.reason is Reason.TOO_SMALL
    assert "31x34" in caught.value.detail
    data = bad.jpeg(31, 34)
    assert stored(data, Settings(resolution=32, patch=8, upscale=True)).picture == data


def test_bad_pictures_have_their_reason(bad):
    for name, (data, reason) in bad.BAD_PICTURES.items():
        if name[-4:] in (".gif", ".tif"):
            continue  # refused by their suffix
        with pytest.raises(Rejected) as caught:
            stored(data)
        assert caught.value.reason == reason, name


@pytest.mark.parametrize("size", [(36, 40), (300, 300)])
def test_a_profile_stays_with_the_bytes_or_is_applied(bad, size):
    """Either way the stored picture shows what the file shows."""
    data = bad.encoded(Image.new("RGB", size, (200, 60, 60)), quality=100, icc_profile=rgb_profile(P3))
    kept = stored(data).picture
    with Image.open(io.BytesIO(kept)) as image:
        assert ("icc_profile" in image.info) == (kept == data) == (size[0] < 40)
    assert np.abs(pixels(kept) - [219, 37, 48]).max() <= 3


def test_what_a_jpeg_cannot_hold_is_a_reject(bad):
    data = bad.encoded(Image.new("L", (30, 70_000)), "PNG")
    with pytest.raises(Rejected) as caught:
        stored(data, Settings(resolution=32, patch=8, upscale=True))
    assert caught.value.reason is Reason.PICTURE_TOO_LARGE


def test_nothing_but_pixels_is_carried_over(bad):
    data = bad.encoded(bad.smooth(300, 300), comment=b"secret" * 1000, icc_profile=b"x" * 5000)
    assert b"secret" in data
    assert b"secret" not in stored(data).picture
    assert b"xxxx" not in stored(data).picture
