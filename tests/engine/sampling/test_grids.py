"""Grids of pictures."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from millrace.engine.config import Sampling
from millrace.engine.data import Captions
from millrace.engine.sampling.grids import (
    Part,
    drawable,
    grid_prompts,
    save_grid,
    save_picture,
    shown_size,
    wrapped,
)

GAP = 6
FONT = ImageFont.load_default(12)


def plain(greens, height, width):
    """Pictures (N, 3, h, w), each of one colour without red, which no text has."""
    pictures = torch.full((len(greens), 3, height, width), -1.0)
    pictures[:, 1] = torch.tensor(greens)[:, None, None] / 127.5 - 1
    return pictures


def places(path, greens, size):
    """(top, left) of each of these colours in a grid, where it fills a rectangle of (h, w) and no more."""
    pixels, found = np.asarray(Image.open(path)), []
    for green in greens:
        rows, columns = np.nonzero((pixels == (0, green, 0)).all(-1))
        top, left = int(rows.min()), int(columns.min())
        assert (int(rows.max()) - top + 1, int(columns.max()) - left + 1) == size
        assert len(rows) == size[0] * size[1]
        found.append((top, left))
    return found


@pytest.mark.parametrize(
    ("size", "largest", "shown"),
    [
        ((32, 32), 256, (96, 96)),
        ((64, 64), 256, (128, 128)),
        ((96, 96), 256, (96, 96)),
        ((256, 256), 256, (256, 256)),
        ((1024, 512), 256, (256, 128)),
        ((1024, 512), 1024, (1024, 512)),
        ((8, 120), 256, (16, 240)),  # no larger than `largest`
    ],
)
def test_the_size_of_a_tile(size, largest, shown):
    assert shown_size(*size, largest) == shown


def test_a_small_picture_is_enlarged_without_interpolation(tmp_path):
    picture = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_grid([Part(picture)], tmp_path / "a" / "grid.png")
    found = np.asarray(Image.open(tmp_path / "a" / "grid.png"))[GAP : GAP + 96, GAP : GAP + 144]
    levels = ((picture[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert (found == levels.repeat(3, 0).repeat(3, 1)).all()


def test_a_grid_is_row_by_row_with_text_below_each_tile(tmp_path):
    greens = [50, 80, 110, 140, 170]
    captions = ["a tower", "", "x" * 300, "two cups of coffee on a table in the morning sun", "\u4e2d\u6587"]
    save_grid([Part(plain(greens, 100, 100), captions)], tmp_path / "g.png")
    found = places(tmp_path / "g.png", greens, (100, 100))
    assert found == sorted(found)
    assert len({left for _, left in found}) == 3
    pixels = np.asarray(Image.open(tmp_path / "g.png"))
    for top, left in found:
        assert (pixels[top + 100 : top + 145, left : left + 100] < 128).all(-1).any()
        assert (pixels[:, left - GAP : left] > 128).all()  # no text beyond the tile it belongs to


def test_49_prompts_and_two_rows_of_captions_leave_no_place_empty(tmp_path):
    pictures = torch.zeros(63, 3, 160, 160)
    save_grid([Part(pictures[:49], ["x"] * 49), Part(pictures[49:], ["y"] * 14)], tmp_path / "g.png")
    width, height = Image.open(tmp_path / "g.png").size
    assert width == 7 * (160 + GAP) + GAP
    assert (height - GAP) % 9 == 0
    save_grid([Part(pictures[:3], ["x"] * 3), Part(pictures[3:15], ["y"] * 12)], tmp_path / "g.png")
    assert Image.open(tmp_path / "g.png").width == 4 * (160 + GAP) + GAP  # not tall and narrow


def test_parts_have_headings_and_pictures_beside(tmp_path):
    first = Part(plain([50], 96, 96), ["a"], "training picture, sample", plain([80], 96, 96))
    second = Part(plain([110, 140], 96, 96), heading="more")
    save_grid([first, second], tmp_path / "g.png")
    sample, own, third, fourth = places(tmp_path / "g.png", [50, 80, 110, 140], (96, 96))
    assert own[0] > GAP + 10  # below the heading
    assert sample == (own[0], own[1] + 97)
    assert own[0] + 96 < third[0]
    assert third < fourth


def test_a_single_picture_is_as_it_is(tmp_path):
    save_picture(torch.tensor([-7.0, 7.0]).expand(3, 1, 2), tmp_path / "p.png", {"seed": 3})
    image = Image.open(tmp_path / "p.png")
    assert np.asarray(image).tolist() == [[[0] * 3, [255] * 3]]  # what a pixel cannot show is cut off
    assert json.loads(image.text["millrace"]) == {"seed": 3}


def test_a_caption_is_wrapped_and_shortened():
    text = "a red fox asleep on a stone wall in late afternoon light, its tail curled over its nose"
    lines = wrapped(text, FONT, 96, 3)
    assert len(lines) == 3
    assert all(0 < FONT.getlength(line) <= 96 for line in lines)
    assert lines[-1].endswith("\u2026")
    assert text.startswith(" ".join(lines)[:-1])
    assert " ".join(wrapped(text, FONT, 96, 99)) == text
    (broken,) = {"".join(wrapped("x" * 70, FONT, 96, 99))}
    assert broken == "x" * 70
    assert wrapped("", FONT, 96, 3) == [""]
    assert wrapped("12 Black-and-white", FONT, 96, 3) == ["12 Black-and-", "white"]


def test_letters_that_the_font_does_not_have():
    assert drawable("Caf\u00e9 \u2014 stra\u00dfe,\n\u0141\u00f3d\u017a \U0001f600 at noon", FONT) == (
        "Cafe - strasse, Lodz at noon"
    )
    assert drawable("\u043b\u0438\u0441\u0430 \u0432 \u0441\u043d\u0435\u0433\u0443, 4K", FONT) == ""
    assert drawable("", FONT) == ""


class Source:
    def __len__(self):
        return 3

    def captions(self, i):
        return Captions(f"picture {i}", "short")


def test_the_prompts_of_a_grid():
    found = grid_prompts(Sampling(prompts=("a cat",), count=2), Source())
    assert found.all == ["a cat", "picture 0", "picture 1"]
    assert grid_prompts(Sampling(), Source()).all == ["picture 0", "picture 1", "picture 2"]
    assert grid_prompts(Sampling(prompts=("a cat",), count=0), Source()).data == ()
    with pytest.raises(ValueError, match="every_steps asks for grids, but count is 0"):
        Sampling(every_steps=5, count=0)
