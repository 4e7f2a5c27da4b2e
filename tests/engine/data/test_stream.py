import logging
import os
import threading
import time
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from millrace.engine.config import Data
from millrace.engine.data import Captions, SampleStream, UnreadablePicture, dealing, open_source
from millrace.engine.data.crop import crop_box, cut, output_size
from millrace.engine.util.errors import UserError
from millrace.engine.util.randomness import epoch_order, host_generator


class Memory:
    """Pictures of noise with numbered captions; those in `bad` cannot be read."""

    def __init__(self, count=7, bad=(), size=(40, 30)):
        self.count, self.bad = count, bad
        self.pictures = [
            Image.fromarray(np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), np.uint8))
            for index in range(count)
        ]

    def __len__(self):
        return self.count

    def key(self, index):
        return f"memory/{index}"

    def captions(self, index):
        return Captions(f"long caption {index}", f"short {index}")

    def image(self, index):
        if index in self.bad:
            raise UnreadablePicture(f"/pictures/{index}.jpg", "it is torn")
        return self.pictures[index]


def make(source=None, *, rank=0, world_size=1, first_sample=0, seed=3, patch=4, caption_drop=0.2, **data):
    data = {"resolution": 16, "global_batch": 8, "micro_batch": 4, "flip": 0.5, "workers": 0} | data
    return SampleStream(
        source or Memory(),
        Data(**data),
        seed=seed,
        patch=patch,
        caption_drop=caption_drop,
        rank=rank,
        world_size=world_size,
        first_sample=first_sample,
    )


def samples(stream, batches):
    """{sample index: (image, caption, key)} of the next batches; no index may come twice."""
    found = {}
    for batch in islice(stream, batches):
        assert batch.sample_index.dtype == torch.int64
        assert len(batch.images) == len(batch.captions) == len(batch.keys) == len(batch.sample_index)
        for i, *rest in zip(
            batch.sample_index.tolist(), batch.images, batch.captions, batch.keys, strict=True
        ):
            assert i not in found
            found[i] = rest
    stream.close()
    return found


def assert_same(a, b):
    assert a.keys() == b.keys()
    for i in a:
        assert torch.equal(a[i][0], b[i][0])
        assert a[i][1:] == b[i][1:]


@pytest.fixture(scope="module")
def reference():
    """Samples 0..47, that is 6 steps of 8, from one process without threads."""
    return samples(make(), 12)


def test_samples_are_what_their_index_says(reference):
    source, config = Memory(), Data(resolution=16)
    assert sorted(reference) == list(range(48))
    for i, (image, caption, key) in reference.items():
        picture = int(epoch_order(3, i // 7, 7, "order")[i % 7])
        box = crop_box(40, 30, (16, 16), config, host_generator(3, i, "crop"), "")
        expected = cut(source.image(picture), box, (16, 16))
        if host_generator(3, i, "flip").random() < 0.5:
            expected = expected.flip(2)
        text = source.captions(picture)[0 if host_generator(3, i, "caption").random() < 0.5 else 1]
        if host_generator(3, i, "caption drop").random() < 0.2:
            text = ""
        assert torch.equal(image, expected)
        assert (caption, key) == (text, f"memory/{picture}")


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (1, 1), (2, 4), (2, 2), (4, 1), (8, 1)])
def test_samples_do_not_depend_on_processes_or_micro_batches(reference, world_size, micro_batch):
    together = {}
    share = 8 // world_size
    for rank in range(world_size):
        stream = make(rank=rank, world_size=world_size, micro_batch=micro_batch)
        mine = samples(stream, 6 * share // micro_batch)
        assert sorted(mine) == [step * 8 + rank * share + j for step in range(6) for j in range(share)]
        together |= mine
    assert_same(together, reference)


@pytest.mark.parametrize("first_sample", [8, 13, 40])
def test_resuming_equals_not_stopping(reference, first_sample):
    resumed = samples(make(first_sample=first_sample, micro_batch=1), 48 - first_sample)
    assert_same(resumed, {i: reference[i] for i in range(first_sample, 48)})


def test_resuming_with_another_world_size(reference):
    together = {}
    for rank in range(2):
        together |= samples(make(first_sample=20, rank=rank, world_size=2, micro_batch=2), 6)
    assert_same(together, {i: reference[i] for i in range(20, 44)})


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (4, 1), (4, 5)])
def test_threads_change_nothing(reference, workers, prefetch):
    assert_same(samples(make(workers=workers, prefetch=prefetch), 12), reference)


def test_another_seed_gives_other_samples(reference):
    other = samples(make(seed=4), 12)
    assert [other[i][2] for i in range(48)] != [reference[i][2] for i in range(48)]


def test_batches_come_in_order():
    with_threads = make(workers=4, prefetch=3)
    order = [i for batch in islice(with_threads, 10) for i in batch.sample_index.tolist()]
    with_threads.close()
    assert order == list(range(40))


def test_each_choice_is_its_own(reference):
    no_drop = samples(make(caption_drop=0.0), 12)
    no_flip = samples(make(flip=0.0), 12)
    long = samples(make(long_caption=1.0), 12)
    centre = samples(make(crop="center"), 12)
    dropped = flipped = 0
    for i, (image, caption, key) in reference.items():
        assert torch.equal(no_drop[i][0], image)
        dropped += caption == "" != no_drop[i][1]
        assert caption in ("", no_drop[i][1])
        flipped += torch.equal(no_flip[i][0].flip(2), image)
        assert torch.equal(no_flip[i][0], image) or torch.equal(no_flip[i][0].flip(2), image)
        assert no_flip[i][1] == centre[i][1] == caption
        assert torch.equal(long[i][0], image)
        assert (long[i][1] == "") == (caption == "")
        assert no_drop[i][2] == no_flip[i][2] == long[i][2] == centre[i][2] == key
    assert dropped > 0
    assert 0 < flipped < 48


def test_every_epoch_visits_every_picture_once():
    found = samples(make(global_batch=5, micro_batch=5), 14)
    orders = [[found[i][2] for i in range(epoch * 7, epoch * 7 + 7)] for epoch in range(10)]
    for keys in orders:
        assert sorted(keys) == [f"memory/{index}" for index in range(7)]
    assert len({tuple(keys) for keys in orders}) > 5


def test_shares_of_captions():
    count = 2000
    source = Memory(size=(4, 4))
    stream = make(
        source, resolution=4, caption_drop=0.1, long_caption=0.7, global_batch=count, micro_batch=count
    )
    captions = next(stream).captions
    dropped = captions.count("")
    long = sum(caption.startswith("long") for caption in captions)
    # Binomial: five standard deviations.
    assert abs(dropped - 0.1 * count) < 5 * (0.1 * 0.9 * count) ** 0.5
    assert abs(long - 0.7 * (count - dropped)) < 5 * (0.7 * 0.3 * count) ** 0.5
    assert dropped + long + sum(caption.startswith("short") for caption in captions) == count


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_shares_of_zero_and_one_are_exact(share):
    found = samples(make(caption_drop=share, long_caption=share), 12)
    assert all(not caption if share else caption.startswith("short") for _, caption, _ in found.values())


def test_mixed_sizes_share_a_batch():
    config = Data(resolution=64, aspect="mixed", global_batch=16, micro_batch=16, workers=2)
    source = open_source(config)
    stream = SampleStream(source, config, seed=0, patch=16, caption_drop=0, rank=0, world_size=1)
    batch = next(stream)
    stream.close()
    index = {source.key(j): j for j in range(len(source))}
    for image, key in zip(batch.images, batch.keys, strict=True):
        assert tuple(image.shape[1:]) == output_size(*source.image(index[key]).size, config, 16)
        assert image.dtype == torch.uint8
        assert image.min() < image.max()
    assert len({image.shape for image in batch.images}) > 1


@pytest.mark.parametrize("workers", [0, 3])
def test_an_unreadable_picture_stops_the_run(workers):
    stream = make(Memory(bad={2}), workers=workers)
    message = (
        r"^/pictures/2\.jpg: cannot be read: it is torn; repair or remove it \(1 of 7 .*max_bad_share is 0\)$"
    )
    with pytest.raises(UserError, match=message):
        samples(stream, 4)
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)


@pytest.mark.parametrize("workers", [0, 3])
def test_tolerated_pictures_are_replaced_counted_and_named_once(reference, caplog, workers):
    stream = make(Memory(bad={2, 3}), workers=workers, max_bad_share=0.3)
    with caplog.at_level(logging.WARNING):
        found = samples(stream, 12)
    assert stream.bad == {"memory/2": "it is torn", "memory/3": "it is torn"}
    lines = [record.getMessage() for record in caplog.records if record.name == "millrace.engine.data.stream"]
    assert sorted(lines) == [
        f"/pictures/{index}.jpg: it is torn; the next readable picture takes its place" for index in (2, 3)
    ]
    for i, (image, caption, key) in found.items():
        original = reference[i][2]
        if original in ("memory/2", "memory/3"):
            assert key == "memory/4"
            assert caption in ("", "long caption 4", "short 4")
        else:
            assert key == original
            assert torch.equal(image, reference[i][0])
    resumed = samples(make(Memory(bad={2, 3}), max_bad_share=0.3, first_sample=16), 8)
    assert_same(resumed, {i: found[i] for i in range(16, 48)})


def test_the_last_picture_is_replaced_by_the_first():
    found = samples(make(Memory(bad={6}), max_bad_share=0.2), 12)
    assert {key for _, _, key in found.values()} == {f"memory/{index}" for index in range(6)}


@pytest.mark.parametrize("bad", [{1, 3}, {1, 2}, set(range(7))])
def test_too_many_unreadable_pictures_stop_the_run(bad):
    # One of seven is a share of 0.143, two are 0.286.
    samples(make(Memory(bad={1}), max_bad_share=0.15), 12)
    with pytest.raises(UserError, match=r"\(2 of 7 pictures unreadable so far, data.max_bad_share is 0.15\)"):
        samples(make(Memory(bad=bad), max_bad_share=0.15), 12)


def test_broken_files_of_a_folder(tmp_path):
    for index in range(4):
        Memory(4).pictures[index].save(tmp_path / f"{index}.jpg")
        (tmp_path / f"{index}.txt").write_text(f"caption {index}")
    torn = tmp_path / "2.jpg"
    torn.write_bytes(torn.read_bytes()[:-100])
    source = open_source(Data(source="folder", path=str(tmp_path)))
    with pytest.raises(UserError) as caught:
        samples(make(source), 2)
    assert str(caught.value).startswith(f"{torn}: cannot be read: image file is truncated")
    tolerant = make(source, max_bad_share=0.25)
    found = samples(tolerant, 2)
    assert list(tolerant.bad) == ["2.jpg"]
    assert {key for _, _, key in found.values()} == {"0.jpg", "1.jpg", "3.jpg"}


@pytest.mark.parametrize("workers", [0, 2])
def test_small_pictures_are_an_error_even_where_unreadable_ones_are_not(workers):
    stream = make(resolution=32, workers=workers, max_bad_share=0.5)
    with pytest.raises(
        UserError, match=r"^memory/\d: the picture is 40x30 .* needs 32x32; set data\.upscale"
    ):
        next(stream)


def test_errors_of_threads_surface_where_the_batch_is_taken():
    class Faulty(Memory):
        def captions(self, index):
            raise ZeroDivisionError("a fault of the source")

    with pytest.raises(ZeroDivisionError, match="a fault of the source"):
        next(make(Faulty(), workers=2))


@pytest.mark.parametrize(
    ("cores", "ranks", "wanted", "threads"), [(16, 8, 4, 2), (16, 1, 4, 4), (4, 8, 4, 1), (16, 8, 0, 0)]
)
def test_threads_are_limited_to_the_cores_of_a_process(cores, ranks, wanted, threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.setenv("LOCAL_SIZE", str(ranks))
    stream = make(workers=wanted)
    said = f"Pillow, {threads} threads" if threads else "Pillow in the training thread"
    assert stream.loader == said
    assert (stream._pool._max_workers if threads else stream._pool) == (threads or None)
    stream.close()


def test_prefetch_is_bounded():
    class Counting(Memory):
        taken = 0
        lock = threading.Lock()

        def image(self, index):
            with self.lock:
                self.taken += 1
            return super().image(index)

    source = Counting()
    stream = make(source, workers=2, prefetch=3, micro_batch=2)
    for expected in (8, 10, 12):  # the batch handed out and three ahead
        next(stream)
        deadline = time.monotonic() + 10
        while source.taken < expected and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.02)
        assert source.taken == expected
    stream.close()


def test_close_returns_while_pictures_are_being_read():
    class Slow(Memory):
        release = threading.Event()
        started = threading.Event()

        def image(self, index):
            self.started.set()
            assert self.release.wait(30)
            return super().image(index)

    source = Slow()
    stream = make(source, workers=2)
    # The consumer is in another thread, submitting or waiting; closing must let it go as well.
    outcome = []

    def consume():
        try:
            next(stream)
        except BaseException as error:
            outcome.append(type(error).__name__)

    consumer = threading.Thread(target=consume)
    consumer.start()
    assert source.started.wait(10)
    begin = time.monotonic()
    stream.close()
    stream.close()
    assert time.monotonic() - begin < 1
    source.release.set()
    consumer.join(10)
    assert not consumer.is_alive()
    assert outcome in (["CancelledError"], ["RuntimeError"])
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)


def test_threads_end_after_close():
    before = set(threading.enumerate())
    stream = make(workers=3)
    next(stream)
    mine = set(threading.enumerate()) - before
    assert mine
    stream.close()
    for thread in mine:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("global_batch", "world_size", "micro_batch", "choices"),
    [
        (100, 2, 32, "= 64; set data.global_batch 64 or 128, or data.micro_batch 25"),
        (8, 1, 32, "= 32; set data.global_batch 32, or data.micro_batch 8"),
        (9, 2, 1, "= 2; set data.global_batch 8 or 10"),
        (2, 3, 4, "= 12; set data.global_batch 12"),
    ],
)
def test_global_batch_must_divide(global_batch, world_size, micro_batch, choices):
    with pytest.raises(UserError) as caught:
        make(global_batch=global_batch, world_size=world_size, micro_batch=micro_batch)
    assert str(caught.value) == (
        f"data.global_batch {global_batch} is not a multiple of {world_size} processes x "
        f"data.micro_batch {micro_batch} {choices}"
    )


def test_resolution_must_be_whole_patches():
    with pytest.raises(UserError, match=r"data\.resolution 18 is not a multiple of the 4 pixels"):
        make(resolution=18)


def test_mixed_shards_are_shared_out_by_size_and_each_sample_stays_what_it_is(
    tmp_path, write_shards, monkeypatch
):
    """Pixels, captions and keys of a step by the number of the sample, for several numbers of processes."""
    write_shards(tmp_path, {(16, 32): 7, (24, 24): 9, (32, 16): 8}, patch=8)
    config = Data(
        source="shards",
        path=str(tmp_path),
        resolution=24,
        aspect="mixed",
        global_batch=16,
        micro_batch=4,
        workers=2,
        loader="python",
    )

    def batches(world_size, steps=3):
        found = []
        for rank in range(world_size):
            stream = SampleStream(
                open_source(config),
                config,
                seed=1,
                patch=8,
                caption_drop=0.2,
                rank=rank,
                world_size=world_size,
            )
            found += [next(stream) for _ in range(steps * 4 // world_size)]
            stream.close()
        return found

    def by_sample(found):
        rows = {}
        for batch in found:
            for i, image, caption, key in zip(
                batch.sample_index.tolist(), batch.images, batch.captions, batch.keys, strict=True
            ):
                rows[i] = image.numpy().tobytes(), tuple(image.shape), caption, key
        return rows

    def encodes(found):
        return sum(len({image.shape for image in batch.images}) for batch in found)

    dealt = {world_size: batches(world_size) for world_size in (1, 2, 4)}
    monkeypatch.setattr(dealing, "stored_sizes", lambda *_: None)
    plain = batches(1)
    wanted = by_sample(plain)
    assert sorted(wanted) == list(range(48))
    for found in dealt.values():
        assert by_sample(found) == wanted
        assert encodes(found) <= 3 * (4 + 2)  # of a step four micro-batches, and three sizes
    assert encodes(plain) > 3 * (4 + 2)
