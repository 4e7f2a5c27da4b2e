"""What is said of captions that a run asks for and its pictures have not."""

import pytest

from millrace.engine.config import Data
from millrace.engine.config.data import Part
from millrace.engine.data.captions import Captions
from millrace.engine.data.sample_choices import LOOKED_AT, single_caption_warnings
from millrace.engine.data.sources.mixture import MixtureSource
from millrace.engine.data.sources.pictures import UnreadablePicture


class Pictures:
    """Pictures of which every `single`-th has one caption alone, and some cannot be read."""

    def __init__(self, count, single, unreadable=()):
        self.count, self.single, self.unreadable, self.seen = count, single, unreadable, set()

    def __len__(self):
        return self.count

    def captions(self, index):
        if index in self.unreadable:
            raise UnreadablePicture(str(index), "torn")
        self.seen.add(index)
        return Captions("long", "long" if self.single and index % self.single == 0 else "short")


@pytest.mark.parametrize(("share", "words"), [(0.0, "100%"), (0.75, "25%"), ([[0, 1.0], [9, 0.4]], "60%")])
def test_the_share_that_is_affected(share, words):
    config = Data(source="digits", long_caption=share)
    (line,) = single_caption_warnings(config, Pictures(100, 4))
    assert f"asks for short captions in up to {words} of the samples, but 25% of the pictures" in line
    assert single_caption_warnings(config, Pictures(100, 0)) == []


def test_nobody_asks():
    pictures = Pictures(100, 1)
    assert single_caption_warnings(Data(source="digits", long_caption=1.0), pictures) == []
    assert pictures.seen == set()


def test_few_are_looked_at_and_bad_ones_passed_over():
    pictures = Pictures(1_000_000, 1, unreadable=(0,))
    (line,) = single_caption_warnings(Data(source="digits", long_caption=0.0), pictures)
    assert len(pictures.seen) == LOOKED_AT - 1
    assert f"({LOOKED_AT - 1} looked at)" in line


def test_parts_of_a_mixture_have_their_own_shares():
    parts = (
        Part(name="a", source="digits", long_caption=1.0),
        Part(name="b", source="digits", long_caption=0.0),
        Part(name="c", source="digits"),
    )
    source = MixtureSource(parts, [Pictures(10, 1) for _ in parts])
    lines = single_caption_warnings(Data(source="mixture", mixture=parts, long_caption=0.5), source)
    assert [line.split(":")[1] for line in lines] == [" part 'b'", " part 'c'"]
