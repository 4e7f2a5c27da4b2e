"""Worlds of many processes: every place is given once, in the order of one process, from any step on."""

import itertools
import sys

import numpy as np
import pytest

from millrace.engine.config import Data
from millrace.engine.config.data import Part
from millrace.engine.data import SampleStream, dealing, order
from millrace.engine.data.crop import output_size
from millrace.engine.data.sources.key_subset import KeptSource
from millrace.engine.data.sources.mixture import MixtureSource
from millrace.engine.data.sources.pictures import stored_sizes

SIZES = ((16, 32), (24, 24), (32, 16))
MICRO = 4


class Numbered:
    """`count` pictures in runs of a bucket, as shards have them, that are never read."""

    def __init__(self, count):
        self.buckets = SIZES
        self.bucket_of = np.repeat(
            np.arange(3, dtype=np.int32), [count // 2, count // 3, count - count // 2 - count // 3]
        )

    def __len__(self):
        return len(self.bucket_of)

    def encoded(self, index):
        raise AssertionError("a picture is read")


def settings(aspect, global_batch, mixture=()):
    source = "mixture" if mixture else "shards"
    return Data(
        source=source,
        path=None if mixture else "x",
        mixture=mixture,
        resolution=24,
        aspect=aspect,
        global_batch=global_batch,
        micro_batch=MICRO,
        bucket_run=16,
        workers=0,
        loader="python",
    )


def streams(kind, world_size, first, ranks=None):
    """A stream of each of the ranks that begins at sample `first`."""
    mixture = ()
    source = Numbered(5003)
    if kind == "mixture":
        mixture = tuple(
            Part(name=name, source="shards", path="x", weight=weight)
            for name, weight in (("a", 3.0), ("b", ((0, 1.0), (40, 4.0))))
        )
        source = MixtureSource(mixture, [source, Numbered(777)])
    config = settings("mixed" if kind == "mixed" else "bucket", 4096, mixture)
    return [
        SampleStream(
            source,
            config,
            seed=7,
            patch=8,
            caption_drop=0.1,
            rank=rank,
            world_size=world_size,
            first_sample=first,
        )
        for rank in (range(world_size) if ranks is None else ranks)
    ]


def micro_batch(stream):
    """(sample, picture, size in common) of the next micro-batch, which is not read."""
    return [(i, picture, pool.size) for i, picture, pool in stream._next_places()]


def samples_of_steps(kind, world_size, first, steps):
    """What all ranks consume in some steps, in the order of samples."""
    found = []
    for stream in streams(kind, world_size, first):
        for _ in range(steps * 4096 // world_size // MICRO):
            batch = micro_batch(stream)
            assert len({size for *_, size in batch}) == 1
            found += batch
    return sorted(found)


@pytest.mark.parametrize("kind", ["mixed", "bucket", "mixture"])
def test_many_processes_give_what_one_gives(kind):
    """Two steps are more than an epoch."""
    alone = samples_of_steps(kind, 1, 0, 2)
    assert [i for i, *_ in alone] == list(range(2 * 4096))
    for world_size in (8, 256, 1024):
        assert samples_of_steps(kind, world_size, 0, 2) == alone


@pytest.mark.parametrize("kind", ["mixed", "bucket"])
def test_no_picture_is_lost_or_doubled(kind):
    counts = np.bincount([picture for _, picture, _ in samples_of_steps(kind, 1024, 0, 5)], minlength=5003)
    epochs = 5 * 4096 // 5003
    if kind == "mixed":
        assert set(counts) == {epochs, epochs + 1}
    else:  # of a bucket less than a run is carried into the next epoch
        assert epochs - 1 <= counts.min()
        assert counts.max() <= epochs + 2
    assert counts.sum() == 5 * 4096


@pytest.mark.parametrize("kind", ["mixed", "bucket", "mixture"])
def test_a_late_step_is_found_without_those_before_it(kind):
    """The first batch of a stream that begins late is that of one that came there, for each rank asked."""
    late = samples_of_steps(kind, 256, 23 * 4096, 1)
    came = samples_of_steps(kind, 1, 0, 24)[23 * 4096 :]
    assert late == came
    ranks = (0, 77, 1023)
    for rank, stream in zip(ranks, streams(kind, 1024, 23 * 4096, ranks), strict=True):
        assert micro_batch(stream) == came[rank * MICRO : (rank + 1) * MICRO]


def test_a_step_far_away_makes_one_permutation(monkeypatch):
    made = []
    real = order.epoch_order
    monkeypatch.setattr(order, "epoch_order", lambda *call: made.append(call[1]) or real(*call))
    (stream,) = streams("mixed", 1024, 900_000 * 4096, [1023])
    micro_batch(stream)
    assert made == [(900_000 * 4096 + 1023 * MICRO) // 5003]


class Sized(Numbered):
    """Pictures of mixed sizes, each as its index says, with more than one at the same size."""

    def __init__(self, count):
        super().__init__(count)
        self.sizes = np.random.default_rng(3).permutation(np.array(SIZES)[self.bucket_of])[:, ::-1]

    def stored_sizes(self, indices):
        return self.sizes[indices]


def dealt(monkeypatch, source, world_size):
    """[samples, pictures] of every micro-batch of a step, by rank."""
    monkeypatch.setattr(sys.modules[__name__], "Numbered", lambda _: source)
    found = []
    for stream in streams("mixed", world_size, 3 * 4096):
        found.append([micro_batch(stream) for _ in range(4096 // world_size // MICRO)])
    return found


@pytest.mark.parametrize("world_size", [1, 8, 256])
def test_a_micro_batch_of_mixed_sizes_meets_few_of_them(monkeypatch, world_size):
    """The samples of a step are the same as unsorted; what differs is in which micro-batch they are."""
    source = Sized(5003)
    ranks = dealt(monkeypatch, source, world_size)
    batches = [batch for rank in ranks for batch in rank]
    sizes = [len({tuple(source.sizes[picture]) for _, picture, _ in batch}) for batch in batches]
    groups = -(-4096 // max(dealing._TOGETHER, 4096 // world_size))
    assert sum(sizes) <= len(batches) + groups * (len(SIZES) - 1)
    plain = dealt(monkeypatch, Numbered(5003), world_size)
    together = sorted(itertools.chain.from_iterable(batches))
    assert together == sorted(sample for rank in plain for batch in rank for sample in batch)


@pytest.mark.parametrize("aspect", ["mixed", "prx"])
def test_sizes_are_those_that_pictures_are_trained_at(aspect):
    config = settings(aspect, 4096).model_copy(update={"resolution": 256})
    sizes = np.random.default_rng(5).integers(100, 4000, (2000, 2))
    found = dealing.Dealing(Sized(5003), config, None, 16, 0, 1, 0, 0)._nearest(sizes)
    wanted = [output_size(width, height, config, 16) for width, height in sizes.tolist()]
    number = {size: i for i, size in enumerate(dict.fromkeys(wanted))}
    pairs = {(bucket, number[size]) for bucket, size in zip(found.tolist(), wanted, strict=True)}
    assert len(pairs) == len(number) == len(set(found.tolist())) > 5


def test_what_processes_share_out_does_not_grow_with_their_number(monkeypatch):
    """Of a step of many samples only neighbours look at each other's."""
    monkeypatch.setattr(dealing, "_TOGETHER", 64)
    asked = []
    source = Sized(5003)
    monkeypatch.setattr(
        source, "stored_sizes", lambda indices: asked.append(len(indices)) or source.sizes[indices]
    )
    ranks = dealt(monkeypatch, source, 256)
    assert [count for count in asked if count > 1] == [64] * 256
    samples = sorted(sample for rank in ranks for batch in rank for sample, *_ in batch)
    assert samples == list(range(3 * 4096, 4 * 4096))
    for first in range(0, 256, 4):
        group = {sample for rank in ranks[first : first + 4] for batch in rank for sample, *_ in batch}
        assert group == set(range(3 * 4096 + 16 * first, 3 * 4096 + 16 * (first + 4)))


def test_sources_that_do_not_know_sizes_are_dealt_as_they_come(monkeypatch):
    """A mixture sorts what its parts know, and leaves the rest in order at the end."""
    known, unknown = Sized(100), Numbered(50)
    parts = tuple(Part(name=name, source="shards", path="x") for name in ("a", "b"))
    mixture = MixtureSource(parts, [known, unknown])
    indices = np.array([149, 3, 100, 99])
    found = stored_sizes(mixture, indices)
    assert found.tolist() == [[0, 0], known.sizes[3].tolist(), [0, 0], known.sizes[99].tolist()]
    assert stored_sizes(unknown, indices) is None
    assert stored_sizes(MixtureSource(parts, [unknown, unknown]), indices[2:3]) is None
    kept = KeptSource(known, np.array([7, 50, 80]))
    assert (stored_sizes(kept, np.array([2, 0])) == known.sizes[[80, 7]]).all()
