import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageFile

from millrace.engine.data.sources.pictures import UnreadablePicture, read_picture


def gradient(width=40, height=24):
    """RGB noise-free picture in which every pixel is different."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 6, y * 10, (x + y) * 4], -1).astype(np.uint8)


def save(path, image, **options):
    image.save(path, **options)
    return path


def pixels(path):
    image = read_picture(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize(("name", "options"), [("a.png", {}), ("a.webp", {"lossless": True}), ("A.PNG", {})])
def test_lossless_formats_return_the_same_pixels(tmp_path, name, options):
    path = save(tmp_path / name, Image.fromarray(gradient()), **options)
    np.testing.assert_array_equal(pixels(path), gradient())


def test_greyscale_and_bilevel_are_repeated_over_the_channels(tmp_path):
    grey = gradient()[..., 0]
    path = save(tmp_path / "grey.png", Image.fromarray(grey))
    np.testing.assert_array_equal(pixels(path), np.repeat(grey[..., None], 3, -1))
    bits = grey > 100
    path = save(tmp_path / "bits.png", Image.fromarray(bits))
    np.testing.assert_array_equal(pixels(path), np.repeat(bits[..., None] * 255, 3, -1))


def test_sixteen_bit_greyscale_is_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 40 * 24).astype(np.uint16).reshape(24, 40)
    path = save(tmp_path / "deep.png", Image.fromarray(values))
    np.testing.assert_array_equal(pixels(path), np.repeat((values // 256)[..., None], 3, -1))


def test_palette_picture(tmp_path):
    index = np.arange(40 * 24).reshape(24, 40) % 3
    palette = np.array([[10, 20, 30], [200, 100, 50], [0, 255, 1]], np.uint8)
    image = Image.fromarray(index.astype(np.uint8), "L")
    image.putpalette(palette.tobytes())
    np.testing.assert_array_equal(pixels(save(tmp_path / "p.png", image)), palette[index])


def test_cmyk_jpeg(tmp_path):
    cmyk = np.zeros((16, 16, 4), np.uint8)
    cmyk[...] = (255, 0, 64, 51)
    path = save(tmp_path / "cmyk.jpg", Image.fromarray(cmyk, "CMYK"), quality=100)
    # R = (255 - C)(255 - K) / 255 and so on.
    assert np.abs(pixels(path).astype(int) - [0, 204, 153]).max() <= 2


def test_alpha_is_composited_over_white(tmp_path):
    rgba = np.dstack([gradient(), np.full((24, 40), 64, np.uint8)])
    path = save(tmp_path / "a.png", Image.fromarray(rgba))
    expected = gradient() * (64 / 255) + 255 * (1 - 64 / 255)
    assert np.abs(pixels(path) - expected).max() <= 1


def test_transparent_palette_entry_and_grey_value_become_white(tmp_path):
    index = (np.arange(64).reshape(8, 8) % 2).astype(np.uint8)
    image = Image.fromarray(index, "L")
    image.putpalette(bytes([9, 9, 9, 100, 110, 120]))
    path = save(tmp_path / "p.png", image, transparency=0)
    np.testing.assert_array_equal(pixels(path), np.array([[255] * 3, [100, 110, 120]])[index])

    deep = np.where(index == 0, 1000, 40000).astype(np.uint16)
    path = save(tmp_path / "deep.png", Image.fromarray(deep), transparency=1000)
    np.testing.assert_array_equal(pixels(path)[..., 0], np.where(index == 0, 255, 40000 // 256))


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_exif_orientation(tmp_path, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "turned.png", Image.fromarray(gradient()), exif=exif)
    np.testing.assert_array_equal(pixels(path), upright(gradient()))


def encoded(file_format):
    stream = io.BytesIO()
    Image.fromarray(gradient()).save(stream, file_format)
    return stream.getvalue()


# The last four bytes of a PNG are the checksum of an empty closing chunk: without them no pixel is in doubt.
@pytest.mark.parametrize(
    ("file_format", "missing"),
    [(name, missing) for name in ("JPEG", "PNG", "WEBP") for missing in (5, 20, 400)]
    + [("JPEG", 1), ("WEBP", 1)],
)
def test_truncated_files_are_refused(tmp_path, monkeypatch, file_format, missing):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    path = tmp_path / "cut"
    path.write_bytes(encoded(file_format)[:-missing])
    with pytest.raises(UnreadablePicture) as caught:
        read_picture(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert caught.value.reason


@pytest.mark.parametrize("back", [-14, -17, -60])
def test_one_flipped_bit_in_png_data_is_refused(tmp_path, back):
    data = bytearray(encoded("PNG"))
    data[back] ^= 1
    path = tmp_path / "bit.png"
    path.write_bytes(data)
    with pytest.raises(UnreadablePicture):
        read_picture(path)


@pytest.mark.parametrize("content", [b"hello", encoded("GIF"), encoded("BMP")])
def test_other_contents_are_refused_whatever_the_name(tmp_path, content):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(UnreadablePicture, match="not a JPEG, PNG or WebP picture"):
        read_picture(path)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "the file has no bytes"),
        (b"version https://git-lfs.github.com/spec/v1", "but a Git LFS pointer"),
        (b"<!doctype html>", "but an HTML page"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "but a picture in HEIC"),
        (b"\x1f\x8b\x08", "but a gzip file"),
        (encoded("GIF"), "but a GIF picture"),
    ],
)
def test_the_first_bytes_are_named(tmp_path, content, part):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(UnreadablePicture, match=part):
        read_picture(tmp_path / "x.jpg")


def test_missing_file_says_so(tmp_path):
    with pytest.raises(UnreadablePicture, match=r"gone\.png: No such file or directory"):
        read_picture(tmp_path / "gone.png")


@pytest.mark.parametrize("name", ["a.webp", "a.png"])
def test_animations_are_refused(tmp_path, name):
    frames = [Image.fromarray(gradient()), Image.fromarray(255 - gradient())]
    path = save(tmp_path / name, frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(UnreadablePicture, match="animated"):
        read_picture(path)


def test_phone_jpeg_with_a_second_picture_gives_the_first(tmp_path):
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    path = tmp_path / "phone.jpg"
    first.save(path, "MPO", save_all=True, append_images=[second])
    assert np.abs(pixels(path).astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "limit", [900, 100]
)  # Pillow warns above the limit and refuses above twice the limit
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, limit):
    path = save(tmp_path / "bomb.png", Image.fromarray(gradient(40, 24)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 960)
    assert pixels(path).shape == (24, 40, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UnreadablePicture, match=f"more than the {limit} pixels"):
        read_picture(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnreadablePicture, match=f"more than the {limit} pixels"):
            read_picture(path)
