"""The order of one source, above all in buckets: closed forms against simulation."""

import time
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from millrace.engine.config import Data
from millrace.engine.data import Captions, SampleStream, UnreadablePicture
from millrace.engine.data import order as orders
from millrace.engine.data.order import BucketRuns, Epochs, Pool, deal, members_of
from millrace.engine.data.sources.key_subset import KeptSource
from millrace.engine.data.sources.mixture import MixtureSource, order_of
from millrace.engine.data.sources.mixture_shares import SharePlan
from millrace.engine.util.errors import UserError
from millrace.engine.util.randomness import host_generator

SIZES = ((8, 16), (12, 12), (16, 8))
COUNTS = (11, 3, 20)
RUN = 4
N = sum(COUNTS)


class Bucketed:
    """Pictures in buckets, those of a bucket not next to each other; those in `bad` cannot be read."""

    def __init__(self, counts=COUNTS, sizes=SIZES, bad=()):
        self.buckets, self.bad = sizes, bad
        self.bucket_of = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
        self.bucket_of = self.bucket_of.astype(np.int32)

    def __len__(self):
        return len(self.bucket_of)

    def key(self, index):
        return f"{index}"

    def captions(self, index):
        return Captions(f"long {index}", f"short {index}")

    def image(self, index):
        if index in self.bad:
            raise UnreadablePicture(f"/{index}.jpg", "it is torn")
        h, w = self.buckets[self.bucket_of[index]]
        return Image.new("RGB", (w + 2, h + 1), (index, 0, 0))


def runs_of(source=None, run=RUN, seed=3, name="", start=0):
    source = source or Bucketed()
    return BucketRuns(name, start, source.buckets, source.bucket_of, run, seed, 0.5)


def settings(**data):
    data = {"resolution": 12, "global_batch": 8, "micro_batch": 4, "workers": 0} | data
    buckets = {"aspect": "bucket", "bucket_run": data.pop("bucket_run", RUN)}
    return Data(**data).model_copy(update=buckets)


def stream(config=None, source=None, *, rank=0, world_size=1, first_sample=0, **options):
    return SampleStream(
        source or Bucketed(),
        config or settings(),
        seed=3,
        patch=4,
        caption_drop=0.1,
        rank=rank,
        world_size=world_size,
        first_sample=first_sample,
        **options,
    )


def taken(made, batches):
    """{sample index: (key, caption, picture)} of the next batches; every batch has one size."""
    found = {}
    for batch in islice(made, batches):
        assert len({image.shape for image in batch.images}) == 1
        for i, *rest in zip(
            batch.sample_index.tolist(), batch.keys, batch.captions, batch.images, strict=True
        ):
            assert i not in found
            found[i] = rest
    made.close()
    return found


def same(a, b):
    return a.keys() == b.keys() and all(a[i][:2] == b[i][:2] and torch.equal(a[i][2], b[i][2]) for i in a)


def simulated(source, run, seed, epochs):
    """The order by its definition, with queues that are filled an epoch at a time."""
    order = []
    members = [np.flatnonzero(source.bucket_of == b) for b in range(len(source.buckets))]
    queues = [[] for _ in members]
    for epoch in range(epochs):
        ready = []
        for b, (h, w) in enumerate(source.buckets):
            shuffle = host_generator(seed, epoch, f"order of  {h}x{w}").permutation(len(members[b]))
            queues[b] += members[b][shuffle].tolist()
            whole = len(queues[b]) // run
            ready += [(b, queues[b][k * run : (k + 1) * run]) for k in range(whole)]
            queues[b] = queues[b][whole * run :]
        kinds = [b for b, _ in ready]
        shuffled = [kinds[k] for k in host_generator(seed, epoch, "runs").permutation(len(kinds))]
        for b in shuffled:
            order += next(pictures for kind, pictures in ready if kind == b)
            ready.remove(next(item for item in ready if item[0] == b))
    return order


@pytest.mark.parametrize("run", [1, 3, 4, 16, 50])
def test_the_closed_form_is_the_simulation(run):
    source = Bucketed()
    order = runs_of(source, run)
    wanted = simulated(source, run, 3, 60)
    assert len(wanted) > 40 * N
    assert [order.picture(place)[0] for place in range(len(wanted))] == wanted
    for place in np.random.default_rng(0).integers(len(wanted), size=50).tolist():  # in any order
        assert runs_of(source, run).picture(place)[0] == order.picture(place)[0] == wanted[place]


def test_every_picture_comes_once_an_epoch_up_to_the_tail_that_is_carried():
    source, order = Bucketed(), runs_of()
    counts, place = Counter(), 0
    for epoch in range(1, 2 * RUN + 1):
        end = int(order.runs_before(epoch).sum()) * RUN
        counts.update(order.picture(p)[0] for p in range(place, end))
        place = end
        assert epoch * N - len(SIZES) * (RUN - 1) <= end <= epoch * N
        for b, n in enumerate(COUNTS):
            given = [counts[i] for i in np.flatnonzero(source.bucket_of == b).tolist()]
            assert max(given) - min(given) <= 1
            assert n * epoch - (RUN - 1) <= sum(given) <= n * epoch
            if n * epoch % RUN == 0:
                assert set(given) == {epoch}
    assert set(counts.values()) == {2 * RUN}
    assert place == 2 * RUN * N


def test_runs_have_one_size_and_mix_the_buckets():
    source, order = Bucketed(), runs_of()
    sizes = []
    for run in range(200):
        pools = [order.picture(run * RUN + k)[1] for k in range(RUN)]
        assert len({pool.size for pool in pools}) == 1
        sizes.append(pools[0].size)
        for k in range(RUN):
            picture, pool = order.picture(run * RUN + k)
            assert source.buckets[source.bucket_of[picture]] == pool.size
            assert picture in pool.members
            assert pool.part_size == N
    assert set(sizes) == set(SIZES) == set(order.sizes)
    assert sum(a != b for a, b in pairwise(sizes)) > 60


def test_a_place_far_into_a_run_is_found_at_once():
    source = Bucketed((60_000, 9, 40_000), SIZES)
    order = runs_of(source, run=64)
    begin = time.perf_counter()
    first = 10_000_000 * 256
    pictures = [order.picture(place) for place in range(first, first + 256)]
    assert time.perf_counter() - begin < 1
    assert len({pool.size for _, pool in pictures[:64]}) == 1
    assert [runs_of(source, run=64).picture(place)[0] for place in range(first, first + 3)] == [
        picture for picture, _ in pictures[:3]
    ]


def test_seeds_and_names_give_other_orders():
    def first(**options):
        order = runs_of(**options)
        return [order.picture(place)[0] for place in range(60)]

    assert first() == first()
    assert len({tuple(first(seed=seed)) for seed in range(5)}) == 5
    assert first(name="part") != first()
    assert [picture - 100 for picture in first(start=100)] == first()


def test_buckets_without_pictures_are_left_out():
    source = Bucketed((5, 0, 3), SIZES)
    order = runs_of(source, run=2)
    assert order.sizes == (SIZES[0], SIZES[2])
    assert {order.picture(place)[1].size for place in range(16)} == set(order.sizes)


def test_after_the_last_member_comes_the_first():
    assert [Pool("", 9, range(3, 6), 0.5).after(i) for i in (3, 4, 5)] == [4, 5, 3]
    assert [Pool("", 9, np.array([2, 5, 9]), 0.5).after(i) for i in (2, 5, 9)] == [5, 9, 2]


def test_dealing_gives_each_part_its_numbers_in_order():
    parts, numbers = deal(np.array([3, 0, 2]), np.array([7, 1, 0]), np.random.default_rng(0).permutation(5))
    assert sorted(zip(parts.tolist(), numbers.tolist(), strict=True)) == [
        (0, 7),
        (0, 8),
        (0, 9),
        (2, 0),
        (2, 1),
    ]
    for part in (0, 2):
        mine = numbers[parts == part].tolist()
        assert mine == sorted(mine)


@pytest.fixture(scope="module")
def whole():
    return taken(stream(), 40)


@pytest.mark.parametrize(
    ("world_size", "micro", "batch"), [(1, 4, 8), (1, 1, 8), (2, 4, 8), (4, 2, 8), (1, 4, 20), (3, 2, 12)]
)
def test_a_stream_does_not_depend_on_processes_and_batches(whole, world_size, micro, batch):
    together = {}
    for rank in range(world_size):
        config = settings(micro_batch=micro, global_batch=batch)
        together |= taken(stream(config, rank=rank, world_size=world_size), 120 // world_size // micro)
    assert same(together, {i: whole[i] for i in range(120)})


@pytest.mark.parametrize(("first", "micro"), [(8, 4), (44, 2), (13, 1), (100, 4)])
@pytest.mark.parametrize("workers", [0, 3])
def test_a_stream_resumes(whole, first, micro, workers):
    config = settings(micro_batch=micro, global_batch=8, workers=workers)
    found = taken(stream(config, first_sample=first), 40 // micro)
    assert same(found, {i: whole[i] for i in range(first, first + 40)})


def test_a_micro_batch_that_would_cut_a_run_is_refused():
    with pytest.raises(
        UserError, match=r"^data\.micro_batch 4 would begin at sample 10 inside .*micro_batch to 2,"
    ):
        stream(first_sample=10)
    assert taken(stream(first_sample=10, origin=(2, 1)), 10)


def test_replacements_come_from_the_same_bucket_and_the_share_is_of_all(whole):
    source = Bucketed()
    bad = [int(np.flatnonzero(source.bucket_of == b)[-1]) for b in range(3)]
    made = stream(settings(max_bad_share=0.1), Bucketed(bad=bad))
    found = taken(made, 40)
    assert sorted(made.bad) == sorted(str(i) for i in bad)
    for i, (key, _, picture) in found.items():
        wanted = int(whole[i][0])
        if wanted in bad:
            first = np.flatnonzero(source.bucket_of == source.bucket_of[wanted])[0]
            assert int(key) == first
            assert picture.shape == whole[i][2].shape
        else:
            assert int(key) == wanted
    with pytest.raises(
        UserError, match=r"\(3 of 34 pictures unreadable so far, data.max_bad_share is 0.06\)"
    ):
        taken(stream(settings(max_bad_share=0.06), Bucketed(bad=bad)), 40)


def test_a_bucket_of_which_nothing_can_be_read_stops_the_run():
    bad = np.flatnonzero(Bucketed().bucket_of == 1).tolist()
    with pytest.raises(UserError, match=r"nor can any other that might take its place \(3 of 3\)"):
        taken(stream(settings(max_bad_share=0.5), Bucketed(bad=bad)), 40)


def test_buckets_of_another_patch_or_resolution_are_refused():
    with pytest.raises(UserError, match=r"^the bucket 10x16 is not in multiples of the 4 pixels of a patch"):
        stream(source=Bucketed(sizes=((8, 16), (10, 16), (16, 8))))
    with pytest.raises(UserError, match=r"^data\.resolution is 24, .* bucket 8x16; set it to 12, or prepare"):
        stream(settings(resolution=24))


def test_a_source_without_buckets_is_refused():
    source = Bucketed()
    del source.buckets
    with pytest.raises(UserError, match=r"^data\.source builtin is not sorted into buckets; prepare shards"):
        order_of(source, settings(), 0, 0)
    with pytest.raises(UserError, match=r"^data\.source builtin is not sorted"):
        order_of(KeptSource(source, np.array([0, 1])), settings(), 0, 0)


def test_a_list_of_keys_keeps_the_buckets():
    source = Bucketed()
    kept = KeptSource(source, np.arange(0, N, 2))
    order = order_of(kept, settings(), 3, 0)
    for place in range(80):
        picture, pool = order.picture(place)
        assert source.buckets[source.bucket_of[2 * picture]] == pool.size


class TestMixture:
    PARTS = (
        {"name": "real", "source": "digits", "weight": 3},
        {"name": "drawn", "source": "digits", "weight": [[0, 1], [10, 0]], "long_caption": 0},
    )

    def made(self, **data):
        config = settings(**{"source": "mixture", "mixture": self.PARTS, "global_batch": 16} | data)
        sources = [Bucketed(), Bucketed((6, 7), ((12, 12), (8, 20)))]
        return config, MixtureSource(config.mixture, sources)

    def test_slots_are_runs_of_one_part_and_size(self):
        config, source = self.made()
        order = order_of(source, config, 3, 0)
        assert order.sizes == ((8, 16), (8, 20), (12, 12), (16, 8))
        plan = SharePlan([part.weight for part in config.mixture], 4)
        counts = Counter()
        for step in range(40):
            for run in range(4):
                places = range(step * 16 + run * 4, step * 16 + run * 4 + 4)
                pools = {(pool.name, pool.size) for pool in (order.picture(p)[1] for p in places)}
                assert len(pools) == 1
                for place in places:
                    assert order.given(place) == {"real": counts["real"], "drawn": counts["drawn"]}
                    counts[next(iter(pools))[0]] += 1
            assert [counts["real"], counts["drawn"]] == (plan.given(step + 1) * 4).tolist()

    def test_parts_go_through_their_buckets_as_they_would_alone(self):
        config, source = self.made()
        order = order_of(source, config, 3, 0)
        found = [order.picture(place) for place in range(16 * 30)]
        for part, (start, alone) in zip(
            ("real", "drawn"),
            ((0, runs_of(name="real")), (N, runs_of(source.sources[1], name="drawn", start=N))),
            strict=True,
        ):
            mine = [picture for picture, pool in found if pool.name == part]
            assert mine == [alone.picture(place)[0] for place in range(len(mine))]
            assert min(mine) >= start

    def test_streams_of_a_mixture(self):
        config, source = self.made()
        whole = taken(stream(config, source), 40)
        halves = {}
        for rank in range(2):
            config, source = self.made(micro_batch=2)
            halves |= taken(stream(config, source, rank=rank, world_size=2, first_sample=32), 16)
        assert same(halves, {i: whole[i] for i in range(32, 96)})


@pytest.mark.parametrize(
    "bucket_of",
    [
        [],
        [0],
        [1, 1, 1, 0, 0, 1, 2, 2],
        [0, 1] * 40,
        np.repeat([2, 0, 2, 1, 0], [700, 1, 333, 50, 2]),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 64, 1 << 20])
def test_members_of_buckets_are_their_indices(monkeypatch, bucket_of, chunk):
    monkeypatch.setattr(orders, "_CHUNK", chunk)
    bucket_of = np.array(bucket_of, np.int32)
    for b, members in enumerate(members_of(bucket_of, 3, 100)):
        wanted = (100 + np.flatnonzero(bucket_of == b)).tolist()
        assert len(members) == len(wanted)
        assert [int(members[i]) for i in range(len(members))] == wanted
        pool = Pool("", len(bucket_of), members, 0.5)
        assert [pool.after(n) for n in wanted] == wanted[1:] + wanted[:1]


def test_buckets_in_any_order_are_not_kept_as_spans():
    members = members_of(np.random.default_rng(0).integers(0, 2, 200_000, np.int32), 2, 0)
    assert all(isinstance(each, np.ndarray) for each in members)


def test_a_permutation_made_ahead_is_the_one_made_in_time(monkeypatch):
    def pictures(places):
        epochs = Epochs(Pool("", 50, range(50), 0.5), 3, "order")
        return [epochs.picture(place)[0] for place in places]

    ways = [range(250), [*range(149), 320, 149, 0, *range(140, 160)]]
    plain = [pictures(places) for places in ways]
    begun = []
    submit = orders._ahead.submit
    monkeypatch.setattr(orders, "_AHEAD_FROM", 1)
    monkeypatch.setattr(orders._ahead, "submit", lambda *call: begun.append(call[1]) or submit(*call))
    assert pictures(ways[0]) == plain[0]
    assert begun == [1, 2, 3, 4, 5]
    assert pictures(ways[1]) == plain[1]
