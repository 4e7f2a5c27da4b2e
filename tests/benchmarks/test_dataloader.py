"""The benchmark of loading runs every loader, refuses wrong ones, and reports what was counted."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from millrace.benchmarks.data import dataloader
from millrace.benchmarks.data import dataloader_peers as peers
from millrace.benchmarks.report import dataloader_report as report
from millrace.engine.util.errors import UserError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Folder of a trial run, what it printed, and what it wrote."""
    folder = tmp_path_factory.mktemp("smoke")
    command = [sys.executable, "-m", "millrace.benchmarks", "dataloader", "--smoke"]
    command += ["--data", folder / "data"]
    command += ["--cases", "256", "--output", folder / "result.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, json.loads((folder / "result.json").read_text())


def test_every_loader_is_measured(smoke):
    _, printed, result = smoke
    assert result["smoke"] is True
    assert {row["loader"] for row in result["rows"]} == set(peers.CONTESTANTS)
    for row in result["rows"]:
        assert row["measured_images"] > 0
        assert row["cpu_seconds_per_image"] > 0
        assert row["images_per_second_per_core"] * result["cores"] == row["images_per_second_median"]
        assert row["loader"] in printed
    epochs = {row["loader"]: row["epoch_images"] for row in result["rows"]}
    assert epochs["webdataset"] == epochs["torch DataLoader"] == epochs["Millrace, DALI"] == 40
    assert 20 <= epochs["mosaicml-streaming"] <= 40
    (case,) = result["cases"]
    assert case["pictures"] == 40
    assert case["buckets"] >= 3
    assert result["versions"]["webdataset"]
    assert "SPRINT" not in printed  # its case did not run


def test_an_epoch_that_is_wrong_is_refused(smoke):
    folder, _, _ = smoke
    case = peers.Case(
        "256", *(folder / "data" / f"{kind}-256" for kind in ("shards", "mds", "files")), 32, False, 4
    )
    right = dataloader.expected_shapes(case)
    assert right.total() == 40
    shape = max(right, key=right.get)
    for name in peers.CONTESTANTS:
        dataloader.check(name, right, case)
        for wrong in (
            right - Counter({shape: right[shape]}),
            right + Counter({shape: 4}),
            right - Counter({shape: 1}) + Counter({(3, 8, 8): 1}),
        ):
            with pytest.raises(UserError, match="an epoch gives"):
                dataloader.check(name, wrong, case)


@pytest.mark.parametrize("lanczos", [True, False])
def test_the_peers_transform_crops_the_wanted_part(lanczos):
    rows, columns = np.mgrid[0:120, 0:200]
    image = Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))
    transform = peers.RandomResizedCrop(lanczos)
    corners = set()
    for _ in range(20):
        pixels = transform(image, (48, 64))
        assert pixels.dtype == torch.uint8
        assert pixels.shape == (3, 48, 64)
        left, right = int(pixels[0, 24, 0]), int(pixels[0, 24, -1])
        top, bottom = int(pixels[1, 0, 32]), int(pixels[1, -1, 32])
        assert right - left >= 0.5 * 200
        assert abs((right - left) / (bottom - top) - 64 / 48) < 0.06
        corners.add((left, top))
    assert len(corners) > 10


def test_crops_that_never_fit_are_the_largest_centred_one():
    image = Image.new("RGB", (400, 20))
    assert peers.RandomResizedCrop.box(image, (64, 64)) == (0, 190, 20, 20)


def test_batches_of_one_size_hold_every_place_once_an_epoch():
    sizes = [(8, 8)] * 5 + [(4, 16)] * 3
    batches = list(peers.SizedBatches(sizes, 2, endless=False))
    assert sorted(place for batch in batches for place in batch) == list(range(8))
    assert all(len({sizes[place] for place in batch}) == 1 for batch in batches)
    assert sorted(map(len, batches)) == [1, 1, 2, 2, 2]
    many = iter(peers.SizedBatches(sizes, 2, endless=True))
    counts = Counter(place for _ in range(3 * len(batches)) for place in next(many))
    assert set(counts.values()) == {3}


def row(loader, case, rate, ours):
    return {
        "case": case,
        "loader": loader,
        "filter": "Lanczos",
        "ours": ours,
        "images_per_second_median": rate,
        "images_per_second_p20": rate,
        "images_per_second_p80": rate,
        "images_per_second_per_core": rate / 2,
        "cpu_seconds_per_image": 0.01,
    }


ROWS = [
    row("slow", "256", 100.0, False),
    row("ours", "256", 240.0, True),
    row("fast", "256", 200.0, False),
    row("ours", "1024", 20.0, True),
]


def test_the_table_ranks_and_compares_with_the_best_peer():
    lines = report.table(ROWS).text().splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["ours", "fast", "slow", "ours"]
    assert lines[1].split()[-1] == "1.20"
    assert report.against_best_peer(ROWS, ROWS[3]) is None


def test_cores_that_a_gpu_needs():
    found = {training: cores for training, _, _, cores in report.needs(ROWS).rows}
    assert found["dense, 256 px latents"] == "2.5"
    assert found["SPRINT, 1024 px pixels"] == "16.5"


def test_a_loader_that_fails_is_one_line(smoke):
    folder, _, _ = smoke
    runner = peers.Runner("torch DataLoader", 1, [0])
    try:
        case = peers.Case("none", *[folder / "none"] * 3, 32, False, 4)
        with pytest.raises(UserError, match=r"^torch DataLoader: open: UserError: .*none: no pictures$"):
            runner.open(case)
    finally:
        runner.close()
