"""NVIDIA DALI as the decoder of a stream: the samples of the Python loader, bad pictures included."""

import io
import logging
import random
from contextlib import contextmanager
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from millrace.engine.config import Data
from millrace.engine.data import Captions, SampleStream, UnreadablePicture, open_source
from millrace.engine.data.decoding import Encoded, PythonDecoder
from millrace.engine.data.sample_choices import View
from millrace.engine.data.sources.pictures import decode_picture
from millrace.engine.util.errors import UserError
from tests.engine.data.odd_pictures import P3, rgb_profile, srgb_profile, xmp_packet
from tests.rehearsal.pretended_cuda import DEVICE, pretended_cuda

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
from millrace.engine.data.dali import DaliDecoder, build_pipeline, feed, size_if_simple

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photograph():
    from skimage.data import astronaut

    return Image.fromarray(astronaut())


def jpeg(image, width, height, mode="RGB", **options):
    file = io.BytesIO()
    image.resize((width, height)).convert(mode).save(file, "JPEG", **({"quality": 92} | options))
    return file.getvalue()


class Files:
    """Pictures that are files in memory."""

    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def key(self, index):
        return f"files/{index}"

    def captions(self, index):
        return Captions(f"long {index}", f"short {index}")

    def encoded(self, index):
        return self.files[index]

    def image(self, index):
        return decode_picture(self.files[index], f"/files/{index}.jpg")


@pytest.fixture(scope="module")
def variety(photograph):
    """Files that DALI decodes, and files that are left to Pillow."""
    rotated = Image.Exif()
    rotated[0x0112] = 6
    png = io.BytesIO()
    photograph.resize((80, 60)).convert("RGBA").save(png, "PNG")
    return Files(
        [
            jpeg(photograph, 70, 50),
            jpeg(photograph, 51, 71, subsampling=0),
            jpeg(photograph, 64, 64, progressive=True),
            jpeg(photograph, 99, 60, subsampling=1),
            jpeg(photograph, 60, 90, restart_marker_blocks=3),
            jpeg(photograph, 48, 48),
            jpeg(photograph, 60, 80, exif=rotated),
            jpeg(photograph, 60, 80, mode="L"),
            jpeg(photograph, 60, 80, mode="CMYK"),
            png.getvalue(),
        ]
    )


def settings(**data):
    data = {"resolution": 32, "global_batch": 8, "micro_batch": 4, "flip": 0.5, "workers": 2} | data
    return Data(**data)


def stream(source, loader, **data):
    config = settings(loader=loader, **data)
    return SampleStream(source, config, seed=5, patch=8, caption_drop=0.2, rank=0, world_size=1)


def taken(made, batches):
    found = []
    for batch in islice(made, batches):
        assert all(image.dtype == torch.uint8 and image.is_contiguous() for image in batch.images)
        found += zip(batch.sample_index.tolist(), batch.keys, batch.captions, batch.images, strict=True)
    made.close()
    return found


def assert_same(found, wanted):
    assert [sample[:3] for sample in found] == [sample[:3] for sample in wanted]
    for (*_, a), (*_, b) in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "data", [{}, {"aspect": "mixed"}, {"crop": "center"}, {"workers": 0}, {"prefetch": 4}]
)
def test_every_sample_and_every_pixel_is_the_python_loaders(variety, data):
    found = taken(stream(variety, "dali", **data), 12)
    assert_same(found, taken(stream(variety, "python", **data), 12))
    assert len({key for _, key, _, _ in found}) == len(variety)


def test_what_dali_is_given(variety, photograph):
    sizes = [size_if_simple(file) for file in variety.files]
    assert sizes == [(70, 50), (51, 71), (64, 64), (99, 60), (60, 90), (48, 48), None, None, None, None]
    whole = variety.files[0]
    assert size_if_simple(whole[:-40]) is None
    assert size_if_simple(whole[: len(whole) // 2] + b"\xff\xd9") == (70, 50)  # Pillow takes it too
    assert size_if_simple(whole + b"trailing") is None
    assert size_if_simple(whole[:-2] + b"\xff\xc4\xff\xd9") is None
    for name, options, size in (
        ("an orientation in XMP", {"xmp": xmp_packet(6)}, None),
        ("upright in XMP", {"xmp": xmp_packet(1)}, (70, 50)),
        ("sRGB", {"icc_profile": srgb_profile()}, (70, 50)),
        ("Display P3", {"icc_profile": rgb_profile(P3)}, None),
        ("no profile at all", {"icc_profile": b"x"}, None),  # Pillow counts it
    ):
        assert size_if_simple(jpeg(photograph, 70, 50, **options)) == size, name
    assert size_if_simple(b"") is size_if_simple(b"\xff\xd8\xff\xd9") is None


def test_the_same_damaged_files_are_refused_by_both(variety):
    """And what both take looks the same, garbage included."""
    rng = random.Random(1)
    files = []
    for k in range(300):
        data = bytearray(rng.choice(variety.files[:5]))
        kind = k % 5
        if kind == 0:
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data = data[: rng.randrange(len(data))] + rng.choice([b"", b"\xff\xd9"])
        elif kind == 2:
            at = rng.randrange(2, len(data) - 2)
            data[at : at + rng.randint(1, 40)] = rng.randbytes(rng.randint(0, 60))
        elif kind == 3:
            data[rng.randrange(2, 600)] = rng.randrange(256)
        else:
            data += rng.randbytes(rng.randint(1, 30)) + rng.choice([b"", b"\xff\xd9"])
        files.append(bytes(data))
    source = Files(files)
    python = PythonDecoder(source, 1)
    dali = DaliDecoder(source, python, settings(workers=1, micro_batch=1, global_batch=1), CPU)

    def viewer(width, height):
        box = (width // 9, height // 7, max(width * 7 // 8, 1), max(height * 8 // 9, 1))
        return View((24, 32), box, width % 2 == 0)

    def outcome(decoder, i):
        try:
            pixels = decoder.start(i, viewer)
        except UnreadablePicture as problem:
            return str(problem), False
        if not isinstance(pixels, Encoded):
            return pixels, False
        (pixels,) = decoder.finish([pixels])
        return str(pixels) if isinstance(pixels, UnreadablePicture) else pixels, True

    refused = decoded = 0
    for i in range(len(files)):
        wanted, _ = outcome(python, i)
        found, by_dali = outcome(dali, i)
        assert type(found) is type(wanted), f"file {i}: {found} {wanted}"
        assert torch.equal(found, wanted) if isinstance(wanted, torch.Tensor) else found == wanted
        refused += isinstance(wanted, str)
        decoded += by_dali and not isinstance(wanted, str)
    dali.close()
    assert refused > 50
    assert decoded > 100


@pytest.fixture(scope="module")
def damaged(variety):
    """Files 1 and 4 are unreadable: DALI finds out about the one, the header's check about the other."""
    files = list(variety.files)
    tables = bytearray(files[1])
    at = tables.index(b"\xff\xc4")
    tables[at + 5 : at + 21] = b"\xff" * 16  # a Huffman table that cannot be
    files[1] = bytes(tables)
    files[4] = files[4][:-100]
    assert size_if_simple(files[1]) is not None
    return Files(files)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_are_replaced_counted_and_named_as_by_the_python_loader(damaged, workers, caplog):
    with caplog.at_level(logging.WARNING):
        python = stream(damaged, "python", workers=workers, max_bad_share=0.2)
        wanted = taken(python, 12)
        said = sorted(record.getMessage() for record in caplog.records)
        caplog.clear()
        dali = stream(damaged, "dali", workers=workers, max_bad_share=0.2)
        assert_same(taken(dali, 12), wanted)
        assert sorted(record.getMessage() for record in caplog.records) == said
    assert len(said) == 2
    assert dali.bad == python.bad
    assert sorted(dali.bad) == ["files/1", "files/4"]


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_too_many_unreadable_pictures_stop_the_run(damaged, share):
    with pytest.raises(UserError) as by_python:
        taken(stream(damaged, "python", max_bad_share=share, workers=0), 12)
    with pytest.raises(UserError) as by_dali:
        taken(stream(damaged, "dali", max_bad_share=share, workers=0), 12)
    assert str(by_dali.value) == str(by_python.value)


def test_the_graph_for_gpus_makes_nearly_the_same_pixels(variety):
    """Run on the CPU: what it adds to decoding is resizing by DALI."""
    python = PythonDecoder(variety, 1)
    views = [
        View((32, 24), (3, 5, 43, 45), False),
        View((24, 32), (0, 0, 51, 71), True),
        View((64, 64), (0, 0, 64, 64), True),
    ]
    files = [
        Encoded(variety.files[i], i, view, lambda _w, _h, view=view: view) for i, view in enumerate(views)
    ]
    found = feed(build_pipeline(4, 1, None, finished=True), files, finished=True)
    for i, (file, view) in enumerate(zip(files, views, strict=True)):
        pixels = torch.from_numpy(np.array(found[i]))
        wanted = python.start(i, file.viewer)
        assert pixels.shape == wanted.shape == (3, *view.size)
        difference = (pixels.int() - wanted.int()).abs().float()
        assert difference.max() <= 16  # Pillow and torch clip between the two passes, DALI does not
        assert difference.mean() < 0.5


def test_small_pictures_are_named(variety):
    with pytest.raises(
        UserError, match=r"^files/\d: the picture is \d+x\d+ pixels .* but its crop needs 96x96"
    ):
        taken(stream(variety, "dali", resolution=96), 3)


def test_shards_through_dali(write_shards, tmp_path):
    counts = {(32, 48): 9, (48, 32): 7, (40, 40): 5}
    write_shards(tmp_path, counts, patch=8)
    found = {}
    for loader in ("dali", "python"):
        config = settings(
            source="shards", path=str(tmp_path), aspect="bucket", bucket_run=4, resolution=40, loader=loader
        )
        made = SampleStream(
            open_source(config), config, seed=5, patch=8, caption_drop=0.0, rank=0, world_size=1
        )
        found[loader] = []
        for batch in islice(made, 20):
            assert len({image.shape for image in batch.images}) == 1
            found[loader] += zip(
                batch.sample_index.tolist(), batch.keys, batch.captions, batch.images, strict=True
            )
        made.close()
    assert_same(found["dali"], found["python"])
    assert len({sample[1] for sample in found["dali"]}) == 21


def test_closing_in_the_middle_ends_all_threads(variety):
    made = stream(variety, "dali", prefetch=5)
    next(made)
    made.close()
    made.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(made)


class Watched:
    """CUDA's streams and events as they are asked for, and DALI's calls between them."""

    def __init__(self, monkeypatch):
        self.seen, self.current = [], "training"
        watched = self

        class Stream:
            def __init__(self, _device):
                watched.seen.append("new stream")

            def __repr__(self):
                return "own"

        class Event:
            def __init__(self, blocking):
                assert blocking

            def record(self, stream):
                watched.seen.append(f"record on {stream!r}")

            def synchronize(self):
                watched.seen.append("wait for the event")

        @contextmanager
        def on(stream):
            self.current, before = repr(stream), self.current
            yield
            self.current = before

        def copied(_picture, pixels, cuda_stream):
            assert pixels.is_cuda
            self.seen.append(f"copy on {cuda_stream!r}, memory of {self.current}")

        def decoded(*_arguments, finished):
            assert finished
            self.seen.append("decode")
            return [SimpleNamespace(shape=lambda: (3, 24, 32)) for _ in range(2)]

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", on)
        monkeypatch.setattr("nvidia.dali.plugin.pytorch.feed_ndarray", copied)
        monkeypatch.setattr("millrace.engine.data.dali.feed", decoded)
        monkeypatch.setattr("millrace.engine.data.dali.build_pipeline", lambda *_, **__: None)
        monkeypatch.setattr(DaliDecoder, "_works_on", lambda *_: True)


@pytest.fixture
def watched(monkeypatch):
    with pretended_cuda():
        yield Watched(monkeypatch)


def test_copies_on_a_gpu_do_not_queue_behind_training(variety, watched):
    """They have a stream of their own, and are done before DALI decodes the next micro-batch."""
    decoder = DaliDecoder(variety, PythonDecoder(variety, 1), settings(), DEVICE)
    assert decoder.description.endswith("on cuda:0, 2 threads")
    view = View((24, 32), (0, 0, 32, 24), False)
    files = [Encoded(variety.files[0], 0, view, lambda *_: view)] * 2
    for _ in range(2):
        assert [pixels.shape for pixels in decoder.finish(files)] == [(3, 24, 32)] * 2
    one = ["decode", *["copy on own, memory of own"] * 2, "record on own", "wait for the event"]
    assert watched.seen == ["new stream", *one, *one]


def test_pictures_of_pillow_go_to_the_gpu_on_the_same_stream(variety, watched, monkeypatch):
    decoder = DaliDecoder(variety, PythonDecoder(variety, 1), settings(), DEVICE)
    moved, to = set(), torch.Tensor.to

    def watched_to(tensor, *arguments):
        moved.add(watched.current)
        return to(tensor, *arguments)

    decoder._python = SimpleNamespace(start=lambda *_: torch.zeros(3, 8, 8, dtype=torch.uint8))
    monkeypatch.setattr(torch.Tensor, "to", watched_to)
    assert decoder.start(9, lambda *_: None).is_cuda
    assert moved == {"own"}
    assert watched.seen == ["new stream", "record on own", "wait for the event"]
