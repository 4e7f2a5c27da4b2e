"""MDS data sets, written by the library that defines them; web servers that are far away and fail."""

import io

import numpy as np
import pytest
from PIL import Image

from millrace.benchmarks.data.faulty_server import FaultyServer
from millrace.engine.data.formats.mds_shards import load_library
from millrace.engine.data.remote import remote_files


@pytest.fixture
def picture():
    """`picture((width, height), seed)` -> an RGB picture whose colours change smoothly."""

    def make(size, seed=0):
        small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
        return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)

    return make


@pytest.fixture
def as_file():
    """`as_file(image, format, **options of Pillow)` -> the bytes of its file."""

    def make(image, format="JPEG", **options):
        out = io.BytesIO()
        image.save(out, format, **options)
        return out.getvalue()

    return make


@pytest.fixture
def write_mds():
    """`write_mds(folder, columns, samples, **options of MDSWriter)` -> folder."""
    load_library()
    from streaming.base.format.mds import MDSWriter

    def write(folder, columns, samples, **options):
        with MDSWriter(out=str(folder), columns=columns, **options) as writer:
            for sample in samples:
                writer.write(sample)
        return folder

    return write


@pytest.fixture
def write_pictures(write_mds, picture, as_file):
    """`write_pictures(folder, sizes)` -> folder of JPEG files with the caption "NAME i"."""

    def write(folder, sizes, **options):
        columns = {"image": "bytes", "caption": "str"}
        samples = [
            {"image": as_file(picture(size, i), quality=95), "caption": f"{folder.name} {i}"}
            for i, size in enumerate(sizes)
        ]
        return write_mds(folder, columns, samples, **options)

    return write


@pytest.fixture
def serve():
    """`serve(folder, **faults)` -> a running FaultyServer."""
    running = []

    def start(root, **faults):
        running.append(FaultyServer(root, **faults).__enter__())
        return running[-1]

    yield start
    for server in running:
        server.__exit__()


@pytest.fixture
def hasty(monkeypatch):
    """Attempts follow each other at once."""
    monkeypatch.setattr(remote_files, "DELAYS", (0.0,) * len(remote_files.DELAYS))
