"""Mixtures, scheduled captions and streams that begin later in a run."""

from collections import Counter
from itertools import islice

import pytest
import torch
from PIL import Image

from millrace.engine.config import Data
from millrace.engine.data import Captions, SampleStream, UnreadablePicture, fingerprint, open_source
from millrace.engine.data.sources.digits import DigitsSource
from millrace.engine.data.sources.mixture import MixtureSource
from millrace.engine.data.sources.mixture_shares import SharePlan
from millrace.engine.util.errors import UserError
from millrace.engine.util.randomness import epoch_order, host_generator

BATCH = 8
SHARES = (
    {"name": "real", "source": "digits", "weight": 1},
    {"name": "drawn", "source": "digits", "weight": [[0, 2], [10, 0]]},
    {"name": "rare", "source": "digits", "weight": 0.1, "long_caption": 0},
)


class Memory:
    """Pictures of 4 x 4 pixels, each in a red of its own; those in `bad` cannot be read."""

    def __init__(self, count, bad=()):
        self.count, self.bad = count, bad

    def __len__(self):
        return self.count

    def key(self, index):
        return f"{index}"

    def captions(self, index):
        return Captions(f"long {index}", f"short {index}")

    def image(self, index):
        if index in self.bad:
            raise UnreadablePicture(f"/{self.count}/{index}.jpg", "it is torn")
        return Image.new("RGB", (4, 4), (index, 0, 0))


def settings(parts=SHARES, **data):
    data = {"resolution": 4, "global_batch": BATCH, "micro_batch": 4, "workers": 0} | data
    return Data(source="mixture", mixture=parts, **data)


def mixed(config, sizes=(7, 5, 3), bad=((), (), ())):
    return MixtureSource(config.mixture, [Memory(n, b) for n, b in zip(sizes, bad, strict=True)])


def stream(config=None, source=None, *, rank=0, world_size=1, first_sample=0, caption_drop=0.0, **options):
    config = config or settings()
    return SampleStream(
        source or mixed(config),
        config,
        seed=3,
        patch=4,
        caption_drop=caption_drop,
        rank=rank,
        world_size=world_size,
        first_sample=first_sample,
        **options,
    )


def taken(made, batches):
    """{sample index: (key, caption)} of the next batches."""
    found = {}
    for batch in islice(made, batches):
        for i, key, caption in zip(batch.sample_index.tolist(), batch.keys, batch.captions, strict=True):
            assert i not in found
            found[i] = (key, caption)
    made.close()
    return found


STEPS = 40


@pytest.fixture(scope="module")
def whole():
    return taken(stream(), STEPS * 2)


def test_a_mixture_is_its_parts_one_after_another():
    source = mixed(settings())
    assert len(source) == 15
    assert [source.key(i) for i in (0, 6, 7, 11, 12, 14)] == [
        "real/0",
        "real/6",
        "drawn/0",
        "drawn/4",
        "rare/0",
        "rare/2",
    ]
    assert source.captions(8) == Captions("long 1", "short 1")
    assert source.image(14).getpixel((0, 0)) == (2, 0, 0)


def test_the_configuration_opens_each_part(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "x.txt").write_text("a square")
    (tmp_path / "few").write_text("digits/0007\ndigits/0001\n")
    parts = [
        {"name": "photos", "path": str(tmp_path)},
        {"name": "curated", "source": "digits", "keys": str(tmp_path / "few")},
    ]
    source = open_source(Data(source="mixture", mixture=parts))
    assert [source.key(i) for i in range(len(source))] == [
        "photos/x.png",
        "curated/digits/0001",
        "curated/digits/0007",
    ]
    parts[1]["keys"] = str(tmp_path / "none")
    with pytest.raises(
        UserError, match=r"none: cannot be read: No such file or directory; correct data\.keys"
    ):
        open_source(Data(source="mixture", mixture=parts))


def test_parts_have_their_shares_in_every_step(whole):
    plan = SharePlan([part.weight for part in settings().mixture], BATCH)
    names = [part["name"] for part in SHARES]
    made = stream()
    for step in range(STEPS):
        counts = Counter(whole[i][0].split("/")[0] for i in range((step + 1) * BATCH))
        assert [counts[name] for name in names] == plan.given(step + 1).tolist()
        assert made.given((step + 1) * BATCH) == {name: counts[name] for name in names}
    counts = Counter(whole[i][0].split("/")[0] for i in range(13))
    assert made.given(13) == {name: counts[name] for name in names}
    made.close()


def test_every_part_has_epochs_of_its_own_in_an_order_of_its_own(whole):
    for name, size in (("real", 7), ("drawn", 5), ("rare", 3)):
        keys = [key for _, (key, _) in sorted(whole.items()) if key.startswith(f"{name}/")]
        assert len(keys) > size
        for epoch in range(len(keys) // size):
            part = keys[epoch * size : (epoch + 1) * size]
            order = host_generator(3, epoch, f"order of {name}").permutation(size)
            assert part == [f"{name}/{place}" for place in order]
            assert sorted(part) == [f"{name}/{place}" for place in range(size)]


def test_places_within_a_step_are_shuffled_by_seed_and_step(whole):
    plan = SharePlan([part.weight for part in settings().mixture], BATCH)
    shuffled = 0
    for step in range(STEPS):
        slots = [whole[i][0].split("/")[0] for i in range(step * BATCH, (step + 1) * BATCH)]
        counts = plan.given(step + 1) - plan.given(step)
        in_order = [part["name"] for part, count in zip(SHARES, counts, strict=True) for _ in range(count)]
        assert slots == [in_order[j] for j in host_generator(3, step, "mixture").permutation(BATCH)]
        shuffled += slots != in_order
    assert shuffled > STEPS // 2


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (1, 1), (2, 4), (2, 2), (4, 1), (8, 1)])
def test_processes_and_micro_batches_change_nothing(whole, world_size, micro_batch):
    together, steps = {}, 12
    for rank in range(world_size):
        made = stream(settings(micro_batch=micro_batch), rank=rank, world_size=world_size)
        together |= taken(made, steps * BATCH // world_size // micro_batch)
    assert together == {i: whole[i] for i in range(steps * BATCH)}


@pytest.mark.parametrize("first_sample", [8, 13, 200])
@pytest.mark.parametrize("workers", [0, 3])
def test_resuming_changes_nothing(whole, first_sample, workers):
    config = settings(micro_batch=1, workers=workers)
    found = taken(stream(config, first_sample=first_sample), 60)
    assert found == {i: whole[i] for i in range(first_sample, first_sample + 60)}


def test_the_seed_and_the_weights_matter(whole):
    other = SampleStream(
        mixed(settings()), settings(), seed=4, patch=4, caption_drop=0.0, rank=0, world_size=1
    )
    assert taken(other, 20) != {i: whole[i] for i in range(80)}
    parts = [part | {"weight": 1} for part in SHARES]
    assert taken(stream(settings(parts)), 20) != {i: whole[i] for i in range(80)}


def test_the_fingerprint_covers_names_weights_and_pictures():
    one = fingerprint(mixed(settings()))
    assert one == fingerprint(mixed(settings(resolution=8, flip=0.5)))
    renamed = [SHARES[0] | {"name": "other"}, *SHARES[1:]]
    heavier = [SHARES[0] | {"weight": 2}, *SHARES[1:]]
    others = [mixed(settings(renamed)), mixed(settings(heavier)), mixed(settings(), (7, 5, 4))]
    others.append(mixed(settings(), (7, 4, 4)))
    assert len({one, *map(fingerprint, others)}) == 5


def test_captions_follow_the_part_or_the_data():
    parts = [SHARES[0], SHARES[1] | {"long_caption": [[10, 1], [11, 0]]}, SHARES[2] | {"weight": 1}]
    parts[1] |= {"weight": 1}
    found = taken(stream(settings(parts, long_caption=1.0)), STEPS * 2)
    for i, (key, caption) in found.items():
        part = key.split("/")[0]
        long = {"real": True, "drawn": i // BATCH <= 10, "rare": False}[part]
        assert caption.startswith("long" if long else "short")


def test_replacements_come_from_the_same_part():
    config = settings(max_bad_share=0.5)
    source = mixed(config, bad=((6,), (1, 2), ()))
    made = stream(config, source)
    found = taken(made, STEPS * 2)
    assert {key for key, _ in found.values() if key.startswith("real/")} == {f"real/{n}" for n in range(6)}
    assert {key for key, _ in found.values() if key.startswith("drawn/")} == {f"drawn/{n}" for n in (0, 3, 4)}
    assert sorted(made.bad) == ["drawn/1", "drawn/2", "real/6"]


def test_bad_pictures_are_counted_by_part():
    config = settings(max_bad_share=0.3)  # 3 of 15 would pass, 2 of the 5 of one part do not
    source = mixed(config, bad=((6,), (1, 3), ()))
    with pytest.raises(
        UserError,
        match=r"^/5/[13]\.jpg: .* \(2 of 5 pictures of part 'drawn' unreadable so far, data\.max_bad_share",
    ):
        taken(stream(config, source), STEPS * 2)
    source = mixed(config, bad=((), range(5), ()))
    with pytest.raises(UserError, match="of 5 pictures of part 'drawn' unreadable"):
        taken(stream(config, source), STEPS * 2)


class TestOrigin:
    """Streams of one source that begin after the run did."""

    def config(self, **data):
        data = {"resolution": 4, "global_batch": 8, "micro_batch": 4, "workers": 0} | data
        return Data(**data)

    def test_epochs_begin_at_the_origin_and_randomness_stays_with_the_sample(self):
        config = self.config(flip=0.5)
        source = DigitsSource()
        late = SampleStream(
            source,
            config.model_copy(update={"resolution": 32}),
            seed=3,
            patch=4,
            caption_drop=0.3,
            rank=0,
            world_size=1,
            first_sample=100,
            origin=(100, 12),
        )
        order = epoch_order(3, 0, len(source), "order")
        for i, (key, caption) in taken(late, 4).items():
            picture = int(order[i - 100])
            assert key == source.key(picture)
            text = source.captions(picture)[0 if host_generator(3, i, "caption").random() < 0.5 else 1]
            assert caption == ("" if host_generator(3, i, "caption drop").random() < 0.3 else text)

    def test_resuming_after_the_origin(self):
        options = {"source": Memory(7), "config": self.config(), "origin": (24, 5)}
        found = taken(stream(first_sample=24, **options), 12)
        resumed = taken(stream(first_sample=40, **options), 8)
        assert resumed == {i: found[i] for i in range(40, 72)}
        keys = [found[i][0] for i in range(24, 31)]
        assert keys == [str(place) for place in epoch_order(3, 0, 7, "order")]

    def test_schedules_are_read_at_the_step_of_the_run(self):
        config = self.config(long_caption=[[50, 1], [51, 0]])
        found = taken(stream(config, Memory(7), first_sample=24, origin=(24, 48)), 10)
        for i, (_, caption) in found.items():
            step = 48 + (i - 24) // 8
            assert caption.startswith("long" if step <= 50 else "short")

    def test_a_mixture_begins_at_its_origin(self):
        late = taken(stream(first_sample=72, origin=(72, 9)), STEPS)
        plan = SharePlan([part.weight for part in settings().mixture], BATCH, first_step=9)
        for step in range(STEPS // 2):
            counts = Counter(late[i][0].split("/")[0] for i in range(72, 72 + (step + 1) * BATCH))
            assert [counts[part["name"]] for part in SHARES] == plan.given(step + 1).tolist()
        resumed = taken(stream(first_sample=88, origin=(72, 9)), 4)
        assert resumed == {i: late[i] for i in range(88, 104)}

    def test_without_a_mixture_no_counts_are_given(self):
        made = stream(self.config(), Memory(7))
        assert made.given(80) == {}
        made.close()

    def test_the_first_sample_is_not_before_the_origin(self):
        with pytest.raises(ValueError, match="first_sample is 3, before the origin at sample 4"):
            stream(self.config(), Memory(7), first_sample=3, origin=(4, 1))


def test_shares_of_scheduled_captions():
    count = 4000
    config = settings(
        [{"name": "a", "source": "digits"}],
        long_caption=[[0, 1.0], [4, 0.0]],
        global_batch=count,
        micro_batch=count,
    )
    made = stream(config, mixed(config, (7,), ((),)))
    for share in (1.0, 0.75, 0.5, 0.25, 0.0):
        long = sum(caption.startswith("long") for caption in next(made).captions)
        # Binomial: five standard deviations.
        assert abs(long - share * count) <= 5 * (share * (1 - share) * count) ** 0.5
    made.close()


def test_dropped_captions_are_marked():
    made = stream(caption_drop=0.4)
    dropped = 0
    for batch in islice(made, 20):
        assert batch.dropped.dtype == torch.bool
        assert batch.dropped.tolist() == [caption == "" for caption in batch.captions]
        for i, mark in zip(batch.sample_index.tolist(), batch.dropped.tolist(), strict=True):
            assert mark == (host_generator(3, i, "caption drop").random() < 0.4)
        dropped += int(batch.dropped.sum())
    made.close()
    assert 0 < dropped < 80
