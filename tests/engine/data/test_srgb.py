import numpy as np
import pytest
from PIL import Image, ImageCms

from millrace.engine.data.srgb import UnusableProfile, to_srgb, transform_of, unusable_profiles
from tests.engine.data.odd_pictures import P3, grey_profile, rgb_profile, srgb_profile

ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
PROPHOTO = ((0.79767, 0.28804, 0), (0.13519, 0.71188, 0), (0.03134, 0.00009, 0.82491))


def shown(image, profile):
    image.info["icc_profile"] = profile
    return to_srgb(image, "x")


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        (rgb_profile(P3), (219, 37, 48)),
        (rgb_profile(ADOBE), (231, 57, 56)),
        (rgb_profile(PROPHOTO, 1.8), (255, 0, 73)),
        (srgb_profile(), (200, 60, 60)),
    ],
)
def test_one_red_in_several_spaces(profile, expected):
    got = shown(Image.new("RGB", (4, 4), (200, 60, 60)), profile).getpixel((0, 0))
    assert np.abs(np.subtract(got, expected)).max() <= 2


def test_a_profile_of_srgb_changes_no_bit():
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert transform_of({"icc_profile": srgb_profile()}, "RGB") is None
    np.testing.assert_array_equal(np.asarray(shown(Image.fromarray(values), srgb_profile())), values)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "I;16"])
def test_grey_with_a_curve_of_its_own(mode):
    """Grey 128 of gamma 1.8 is lighter in sRGB."""
    image = {
        "L": Image.new("L", (4, 4), 128),
        "LA": Image.new("LA", (4, 4), (128, 255)),
        "1": Image.new("1", (4, 4), 1),
        "I;16": Image.fromarray(np.full((4, 4), 128 * 256 + 9, np.uint16)),
    }[mode]
    got = shown(image, grey_profile(1.8)).getpixel((0, 0))
    linear = (128 / 255) ** 1.8
    expected = 255 if mode == "1" else round(255 * (1.055 * linear ** (1 / 2.4) - 0.055))
    assert max(abs(value - expected) for value in got) <= 1


def test_grey_with_a_profile_of_colour():
    got = shown(Image.new("L", (4, 4), 128), rgb_profile(PROPHOTO, 1.8)).getpixel((0, 0))
    assert max(got) - min(got) <= 1
    assert got[0] > 138


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_is_over_white_of_srgb(mode):
    base = Image.new("RGBA", (4, 4), (200, 60, 60, 0))
    base.putpixel((1, 1), (200, 60, 60, 255))
    image = base.convert(mode)
    profile = grey_profile(1.8) if mode == "LA" else rgb_profile(P3)
    got = shown(image, profile)
    assert got.getpixel((0, 0)) == (255, 255, 255)
    if mode != "LA":
        assert np.abs(np.subtract(got.getpixel((1, 1)), (219, 37, 48))).max() <= 2


def test_cmyk_by_its_profile():
    """No printer's profile is at hand: one of another space stands for it, and Pillow's formula is used."""
    image = Image.new("CMYK", (4, 4), (255, 0, 64, 51))
    plain = to_srgb(image, "x").getpixel((0, 0))
    before = unusable_profiles.count
    assert shown(image, srgb_profile()).getpixel((0, 0)) == plain
    assert unusable_profiles.count == before + 1


@pytest.mark.parametrize(
    "profile",
    [
        None,
        b"",
        b"x" * 3000,
        srgb_profile()[:200],
        srgb_profile()[:-100],
        grey_profile(2.2),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(),
    ],
)
def test_profiles_that_cannot_be_used_are_counted_and_named(profile, caplog):
    with pytest.raises(UnusableProfile):
        transform_of({"icc_profile": profile}, "RGB")
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    before = unusable_profiles.count
    np.testing.assert_array_equal(np.asarray(shown(Image.fromarray(values), profile)), values)
    assert unusable_profiles.count == before + 1


def test_the_log_names_the_first_and_every_tenfold(caplog, monkeypatch):
    monkeypatch.setattr(unusable_profiles, "count", 0)
    for number in range(12):
        unusable_profiles.add(f"{number}.jpg", "it is torn")
    assert [record.args[0] for record in caplog.records] == ["0.jpg", "9.jpg"]
