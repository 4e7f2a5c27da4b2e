import math

import numpy as np
import pytest
import torch
from PIL import Image

from millrace.engine.config import Data
from millrace.engine.data.crop import (
    buckets,
    check_resolution,
    crop_box,
    cut,
    evaluation_view,
    output_size,
    prx_buckets,
)
from millrace.engine.util.errors import UserError
from millrace.engine.util.randomness import host_generator


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def rng(i):
    return host_generator(0, i, "crop")


@pytest.mark.parametrize(("width", "height"), [(100, 64), (64, 101), (80, 80)])
def test_square_centre_crop_is_within_two_levels_of_pillows(width, height):
    image = noise(width, height)
    edge = min(width, height)
    left, top = (width - edge) // 2, (height - edge) // 2
    expected = image.crop((left, top, left + edge, top + edge)).resize((32, 32), Image.Resampling.LANCZOS)
    view = evaluation_view(image, Data(resolution=32), patch=8)
    assert view.dtype == torch.float32
    assert view.is_contiguous()
    np.testing.assert_allclose(
        view.numpy(), np.asarray(expected, np.float32).transpose(2, 0, 1) / 127.5 - 1, atol=2.01 / 127.5
    )


def test_mixed_centre_crop_is_within_two_levels_of_pillows():
    image = noise(150, 100)
    view = evaluation_view(image, Data(resolution=64, aspect="mixed"), patch=16)
    # Aspects 48:80, 48:96 and 64:64 surround 2:3; 48:80 is nearest. Height 90 fits the full width of 150.
    expected = image.crop((0, 5, 150, 95)).resize((80, 48), Image.Resampling.LANCZOS)
    np.testing.assert_allclose(
        view.numpy(), np.asarray(expected, np.float32).transpose(2, 0, 1) / 127.5 - 1, atol=2.01 / 127.5
    )


def test_black_and_white_are_exactly_minus_one_and_one():
    for value, expected in ((0, -1.0), (255, 1.0)):
        image = Image.new("RGB", (8, 8), (value,) * 3)
        assert torch.equal(cut(image, (0, 0, 8, 8), (8, 8)), torch.full((3, 8, 8), value, dtype=torch.uint8))
        assert torch.equal(evaluation_view(image, Data(resolution=8), 8), torch.full((3, 8, 8), expected))


def test_large_reductions_are_those_of_pillow():
    y, x = np.mgrid[:512, :512] / 512
    smooth = np.stack([np.sin(9 * x + 4 * y), np.cos(7 * x * y), np.sin(11 * y)], -1) * 100 + 128
    image = Image.fromarray(smooth.astype(np.uint8))
    plain = np.asarray(image.resize((32, 32), Image.Resampling.LANCZOS), np.float32).transpose(2, 0, 1)
    ours = cut(image, (0, 0, 512, 512), (32, 32)).float().numpy()
    assert np.abs(ours - plain).max() <= 2


@pytest.mark.parametrize("upscale", [False, True])
def test_random_square_crops_cover_the_whole_allowed_range(upscale):
    config = Data(resolution=32, crop_scale=0.5, upscale=upscale)
    boxes = [crop_box(100, 80, (32, 32), config, rng(i), "x") for i in range(3000)]
    edges = np.array([right - left for left, _, right, _ in boxes])
    assert all(bottom - top == right - left for left, top, right, bottom in boxes)
    # Edges are uniform in [0.5, 1] * 80: mean 60, standard deviation 40 / sqrt(12).
    assert edges.min() == 40
    assert edges.max() == 80
    assert abs(edges.mean() - 60) < 5 * 40 / math.sqrt(12 * 3000)
    for first, last, size in ((0, 2, 100), (1, 3, 80)):
        starts, ends = np.array([(box[first], box[last]) for box in boxes]).T
        assert starts.min() == 0
        assert ends.max() == size
        # The middle of a crop placed uniformly is the middle of the picture on average.
        spread = (size - (ends - starts)).std() + (size - 60)
        assert abs((starts + ends).mean() / 2 - size / 2) < 5 * spread / math.sqrt(12 * 3000)


def test_a_random_crop_is_never_enlarged_unless_allowed():
    sizes = (70, 90)
    boxes = [crop_box(*sizes, (64, 64), Data(resolution=64), rng(i), "x") for i in range(300)]
    edges = {right - left for left, _, right, _ in boxes}
    assert min(edges) == 64
    assert max(edges) == 70
    allowed = Data(resolution=64, upscale=True)
    edges = {
        box[2] - box[0] for box in (crop_box(*sizes, (64, 64), allowed, rng(i), "x") for i in range(300))
    }
    assert min(edges) == 56  # 0.8 * 70


@pytest.mark.parametrize(
    ("resolution", "patch"), [(256, 16), (1024, 32), (64, 16), (512, 8), (48, 16), (16, 16)]
)
def test_buckets(resolution, patch):
    sizes = buckets(resolution, patch)
    assert (resolution, resolution) in sizes
    assert sizes == tuple(sorted({(w, h) for h, w in sizes}))
    for h, w in sizes:
        assert h % patch == w % patch == 0
        assert 0.5 <= h / w <= 2
        # The longer edge lies within half a patch of its ideal length, seen from one of the two edges.
        off = min(abs(h - resolution**2 / w), abs(w - resolution**2 / h))
        assert off <= patch / 2


def test_buckets_by_hand():
    # 4 x 4 patches: 3 x 5 and, seen from 6, 16 / 6 = 2.67 -> 3 x 6; 2 x 8 is too long.
    assert buckets(64, 16) == ((48, 80), (48, 96), (64, 64), (80, 48), (96, 48))


@pytest.mark.parametrize("seed", range(20))
def test_mixed_size_is_the_nearest_in_log_aspect(seed):
    width, height = np.random.default_rng(seed).integers(300, 2000, 2)
    config = Data(resolution=256, aspect="mixed")
    h, w = output_size(int(width), int(height), config, 16)
    mine = abs(math.log((h / w) / (height / width)))
    assert all(mine <= abs(math.log((a / b) / (height / width))) + 1e-9 for a, b in buckets(256, 16))


@pytest.mark.parametrize(("width", "height", "expected"), [(4000, 300, (192, 352)), (300, 4000, (352, 192))])
def test_extreme_pictures_take_the_longest_bucket(width, height, expected):
    assert output_size(width, height, Data(aspect="mixed"), 16) == expected


@pytest.mark.parametrize("i", range(50))
def test_random_mixed_crops_lie_inside_and_keep_the_aspect(i):
    config = Data(resolution=64, aspect="mixed", crop_scale=0.3)
    width, height = (int(edge) for edge in np.random.default_rng(i).integers(100, 500, 2))
    h, w = output_size(width, height, config, 16)
    left, top, right, bottom = crop_box(width, height, (h, w), config, rng(i), "x")
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert right - left >= w
    assert bottom - top >= h
    # Both edges are rounded to whole pixels.
    assert abs((right - left) - (bottom - top) * w / h) <= 0.5 * (1 + w / h)


@pytest.mark.parametrize("upscale", [False, True])
def test_small_pictures(upscale):
    config = Data(resolution=64, upscale=upscale)
    if upscale:
        assert evaluation_view(noise(100, 40), config, 16, key="cat.jpg").shape == (3, 64, 64)
        return
    with pytest.raises(UserError, match=r"cat\.jpg: the picture is 100x40 .* needs 64x64; set data\.upscale"):
        evaluation_view(noise(100, 40), config, 16, key="cat.jpg")


@pytest.mark.parametrize(
    ("resolution", "patch", "choices"),
    [(250, 16, "240 or 256"), (10, 16, "set it to 16"), (33, 32, "32 or 64")],
)
def test_resolution_must_be_whole_patches(resolution, patch, choices):
    with pytest.raises(UserError, match=f"data.resolution {resolution} .* {patch} pixels .*{choices}"):
        check_resolution(Data(resolution=resolution), patch)
    with pytest.raises(UserError, match="not a multiple"):
        evaluation_view(noise(300, 300), Data(resolution=resolution), patch)


def test_sizes_of_prx():
    """As `build_image_size_list` of its transforms gives them for 256 px and 32 px units."""
    wide = ((160, 352), (192, 320), (224, 288))
    assert prx_buckets(256) == (*wide, (256, 256), *((w, h) for h, w in reversed(wide)))
    assert [len(prx_buckets(edge)) for edge in (256, 512, 1024)] == [7, 13, 27]
    for edge in (256, 512, 1024):
        for h, w in prx_buckets(edge):
            assert h % 32 == w % 32 == 0
            units = (edge // 32) ** 2
            assert h // 32 == units // (w // 32) or w // 32 == units // (h // 32)


@pytest.mark.parametrize(
    ("picture", "size"),
    # Between 288:224 = 1.29 and 320:192 = 1.67: the middle is 1.476, that of the logarithms 1.464.
    [
        ((900, 600), (192, 320)),
        ((1470, 1000), (224, 288)),
        ((600, 900), (320, 192)),
        ((3000, 1000), (160, 352)),
    ],
)
def test_a_picture_goes_to_the_nearest_width_over_height_of_prx(picture, size):
    assert output_size(*picture, Data(resolution=256, aspect="prx"), 16) == size


def test_sizes_of_prx_need_whole_units():
    check_resolution(Data(resolution=256, aspect="prx"), 16)
    with pytest.raises(UserError, match="in multiples of 32 pixels, which the 24 pixels"):
        check_resolution(Data(resolution=240, aspect="prx"), 24)
    with pytest.raises(UserError, match="240 is not a multiple of the 32 pixels of a patch; set it to 224"):
        check_resolution(Data(resolution=240, aspect="prx"), 16)


@pytest.mark.parametrize("random", [None, 0])
def test_without_a_crop_the_whole_picture_is_seen(random):
    config = Data(resolution=64, crop="none")
    chance = None if random is None else rng(random)
    assert crop_box(150, 100, (64, 64), config, chance, "x") == (0, 0, 150, 100)
    with pytest.raises(UserError, match="the picture is 150x60"):
        crop_box(150, 60, (64, 64), config, chance, "x")
    image = noise(150, 100)
    expected = np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS), np.float32).transpose(2, 0, 1)
    view = evaluation_view(image, config, patch=8)
    # Unequal scales along the two edges: torch's kernel rounds between its two passes.
    np.testing.assert_allclose(view.numpy(), expected / 127.5 - 1, atol=3.01 / 127.5)
