"""Which files are made, by whom, and when the manifest names them; the contents are made up."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from millrace.engine.data.formats.shard_index import read_manifest
from millrace.engine.data.latent_cache import TextCache, cache_path, cache_problems
from millrace.engine.data.sources.shards import ShardsSource
from millrace.engine.encoders.latent_cache_writer import PARTIAL, CacheJob, Maker
from millrace.engine.util.errors import UserError

SHARDS = 5


class Killed(BaseException):
    """Nothing catches it."""


class Counting(Maker):
    """Rows that say which sample they are of; counts what it makes, and dies before shard `dies`."""

    kind, first, dtype = "text", "rows", "bfloat16"

    def __init__(self, source, tower="a", dtype="bfloat16", dies=None):
        super().__init__(source, {"kind": "test", "tower": tower})
        self.dtype, self.dies, self.made = dtype, dies, []

    def common(self):
        self.made.append("common")
        return save({"rows": torch.zeros(1, 2), "cut": torch.zeros(1, dtype=torch.uint8)})

    def shard(self, samples, bucket, file):
        if len(self.made) == self.dies:
            file.append(torch.zeros(1, 2))
            raise Killed
        self.made.append(samples)
        file.append(torch.tensor([[float(i), float(ord(self.network["tower"]))] for i in samples]))
        which = torch.arange(len(samples))
        file.finish(
            {
                "offsets": torch.arange(len(samples) + 1),
                "cut": torch.zeros(len(samples), dtype=torch.uint8),
                "long": which,
                "short": which.clone(),
            }
        )


@pytest.fixture
def dataset(tmp_path, write_shards):
    write_shards(tmp_path / "set", {(16, 16): 4 * SHARDS - 2})
    return tmp_path / "set"


def job(dataset, rank=0, world_size=1, replace=False, said=None, **maker):
    source = ShardsSource(dataset)
    made = Counting(source, **maker)
    return CacheJob(source, made, rank, world_size, replace, (said if said is not None else []).append)


def complete(dataset, tower="a"):
    cache = TextCache(dataset, read_manifest(dataset), verify=True)
    for number, shard in enumerate(cache.shards):
        for row in range(shard.samples):
            expected = [4.0 * number + row, float(ord(tower))]
            assert cache.rows((number, row), "long").rows.tolist() == [expected]
    assert cache_problems(dataset) == []
    assert not (dataset / PARTIAL).exists()
    assert [path for path in dataset.rglob("*.tmp")] == []


def test_one_process_makes_all(dataset):
    said = []
    one = job(dataset, said=said)
    one.run()
    assert len(one.maker.made) == SHARDS + 1
    complete(dataset)
    assert said == [f"text cache of {dataset}: process 0 made 5 of its 5 shards; complete"]
    again = job(dataset)
    again.run()
    assert again.maker.made == []
    complete(dataset)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_processes_share_the_shards_and_the_last_one_publishes(dataset, world_size):
    jobs = [job(dataset, rank, world_size) for rank in range(world_size)]
    random.Random(world_size).shuffle(jobs)
    for one in jobs[:-1]:
        one.run()
        assert "text" not in read_manifest(dataset).caches or not jobs[-1].todo
    jobs[-1].run()
    made = [each for one in jobs for each in one.maker.made]
    assert sorted(map(str, made)) == sorted({str(each) for each in made})
    assert len(made) == SHARDS + 1
    complete(dataset)


def test_processes_at_the_same_time(dataset):
    jobs = [job(dataset, rank, 4) for rank in range(4)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(CacheJob.run, jobs))
    complete(dataset)


@pytest.mark.parametrize("dies", [1, 3, 5])
def test_a_job_that_was_killed_goes_on_where_it_was(dataset, dies):
    killed = job(dataset, dies=dies)
    with pytest.raises(Killed):
        killed.run()
    assert len(killed.maker.made) == dies
    assert "text" not in read_manifest(dataset).caches
    rest = [job(dataset, rank, 2) for rank in range(2)]  # on another number of processes
    for one in rest:
        one.run()
    assert sum(len(one.maker.made) for one in rest) == SHARDS + 1 - dies
    complete(dataset)


def test_a_file_that_was_lost_or_cut_is_made_again(dataset):
    job(dataset).run()
    shards = read_manifest(dataset).shards
    (dataset / cache_path(shards[1], "text")).unlink()
    path = dataset / cache_path(shards[3], "text")
    path.write_bytes(path.read_bytes()[:-1])
    one = job(dataset)
    one.run()
    assert one.maker.made == [range(4, 8), range(12, 16)]
    complete(dataset)


@pytest.mark.parametrize(
    ("other", "words"),
    [({"tower": "b"}, "tower a, not b"), ({"dtype": "int8"}, "stored as bfloat16, not int8")],
)
@pytest.mark.parametrize("whole", [True, False])
def test_the_cache_of_another_network_is_refused_or_replaced(dataset, other, words, whole):
    if whole:
        job(dataset).run()
    else:
        with pytest.raises(Killed):
            job(dataset, dies=2).run()
    with pytest.raises(UserError, match=words) as caught:
        job(dataset, **other)
    assert "--replace" in str(caught.value)
    assert "\n" not in str(caught.value)
    one = job(dataset, replace=True, **other)
    one.run()
    assert len(one.maker.made) == SHARDS + 1
    complete(dataset, other.get("tower", "a"))
    assert read_manifest(dataset).caches["text"]["network"]["tower"] == other.get("tower", "a")


def test_a_shard_that_was_made_anew_gets_a_new_cache(dataset, write_shards):
    job(dataset).run()
    before = read_manifest(dataset)
    grey = lambda i, h, w: np.full((h, w, 3), i, np.uint8)  # noqa: E731
    write_shards(dataset, {(16, 16): 4 * SHARDS - 2}, draw=grey)
    path = dataset / "manifest.json"
    values = json.loads(path.read_text()) | {"caches": before.caches}
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="other shards"):
        TextCache(dataset, read_manifest(dataset))
    one = job(dataset)
    one.run()
    assert len(one.maker.made) == SHARDS
    complete(dataset)


def test_files_say_of_what_they_were_made(dataset):
    job(dataset).run()
    shard = read_manifest(dataset).shards[0]
    path = dataset / cache_path(shard, "text")
    assert load_file(path)["rows"].shape == (4, 2)


def test_a_record_that_was_damaged_is_named(dataset):
    with pytest.raises(Killed):
        job(dataset, dies=3).run()
    record = next((dataset / PARTIAL / "text").glob("0*.json"))
    record.write_text("{")
    with pytest.raises(UserError, match=r"not what millrace cache writes") as caught:
        job(dataset)
    assert str(record) in str(caught.value)
