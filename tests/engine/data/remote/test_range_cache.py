"""Ranges on disk: found again, by other processes too, never more than the bound, never wrong."""

import multiprocessing
import os
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from millrace.engine.data.remote import range_cache
from millrace.engine.data.remote.range_cache import RangeCache

KILO = 1024


def content(digest, offset, size):
    """Bytes of a pretended file at an offset: reproducible, never zero."""
    places = np.arange(offset, offset + size, dtype=np.uint64)
    return ((places * 2654435761 + zlib.crc32(digest.encode())) % 255 + 1).astype(np.uint8).tobytes()


def sound(digest, offset, size):
    return lambda data: data == content(digest, offset, size)


def taken(folder):
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir() if path.name != "used")


def test_what_was_put_is_found_and_nothing_else(tmp_path):
    cache = RangeCache(tmp_path / "c", 10**6)
    cache.put([("a", 5000, content("a", 5000, 700)), ("a", 90_000, content("a", 90_000, 10))])
    for fresh in (cache, RangeCache(tmp_path / "c", 10**6)):
        assert fresh.get("a", 5000, 700, sound("a", 5000, 700)) == content("a", 5000, 700)
        assert fresh.get("a", 90_000, 10, sound("a", 90_000, 10)) == content("a", 90_000, 10)
        assert fresh.get("a", 40_000, 10, sound("a", 40_000, 10)) is None  # a hole
        assert fresh.get("a", 90_005, 10, sound("a", 90_005, 10)) is None  # beyond the end
        assert fresh.get("b", 0, 10, sound("b", 0, 10)) is None
    assert taken(tmp_path / "c") <= cache.used <= 6 * 4096


def test_damaged_bytes_are_not_given_and_are_written_again(tmp_path):
    cache = RangeCache(tmp_path, 10**6)
    cache.put([("a", 0, content("a", 0, 100))])
    with (tmp_path / "a").open("r+b") as file:
        file.seek(50)
        file.write(b"\0")
    assert cache.get("a", 0, 100, sound("a", 0, 100)) is None
    cache.put([("a", 0, content("a", 0, 100))])
    assert cache.get("a", 0, 100, sound("a", 0, 100)) is not None


def test_what_was_not_read_for_longest_goes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(range_cache, "TOUCHED", -1.0)
    cache, size = RangeCache(tmp_path, 400 * KILO), 100 * KILO
    for age, name in ((300, "a"), (200, "b"), (100, "c")):
        cache.put([(name, 0, content(name, 0, size))])
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    assert cache.get("a", 0, size, sound("a", 0, size)) is not None  # now the newest
    cache.put([("d", 0, content("d", 0, size))])
    held = {name for name in "abcd" if cache.get(name, 0, size, sound(name, 0, size)) is not None}
    assert held == {"a", "c", "d"}
    cache.put([("b", 0, content("b", 0, size))])  # one that was emptied is filled again
    assert cache.get("b", 0, size, sound("b", 0, size)) is not None


def test_what_is_larger_than_the_cache_is_not_kept(tmp_path):
    cache = RangeCache(tmp_path, 100 * KILO)
    cache.put([("a", 0, content("a", 0, 200 * KILO))])
    assert taken(tmp_path) == 0


def test_a_lost_count_is_taken_anew(tmp_path):
    cache = RangeCache(tmp_path, 10**6)
    cache.put([("a", 0, content("a", 0, 100 * KILO))])
    (tmp_path / "used").write_text("")  # a process was killed while it wrote
    assert cache.used == taken(tmp_path) >= 100 * KILO


def test_a_disk_that_cannot_be_written_ends_writing_in_one_line(tmp_path, monkeypatch, caplog):
    cache = RangeCache(tmp_path, 10**6)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(range_cache.os, "pwrite", full)
    cache.put([("a", 0, b"x")])
    cache.put([("a", 0, b"x")])
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: no more samples are kept: No space left on device"
    ]


def work(folder, limit, seed, times):
    """Read through a cache that holds a third of what is asked for; returns (hits, most that was taken)."""
    rng, cache, hits, most = np.random.default_rng(seed), RangeCache(folder, limit), 0, 0
    for i in range(times):
        name, offset = "abcdef"[rng.integers(6)], int(rng.integers(32)) * 10_000
        size = 9_000
        data = cache.get(name, offset, size, sound(name, offset, size))
        if data is None:
            cache.put([(name, offset, content(name, offset, size))])
        else:
            hits += 1
        if i % 5 == 0:
            with cache._locked():  # so that nobody removes one file and writes another meanwhile
                most = max(most, taken(folder))
    return hits, most


def test_two_processes_stay_within_the_bound(tmp_path):
    limit = 700_000  # of 6 x 32 x 12 KB
    RangeCache(tmp_path, limit)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.starmap(work, [(tmp_path, limit, seed, 1500) for seed in (1, 2)])
    for hits, most in found:
        assert hits > 100
        assert 0.5 * limit < most <= limit
    assert RangeCache(tmp_path, limit).used == taken(tmp_path)


def test_threads_of_one_process_as_well(tmp_path):
    limit = 700_000
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda seed: work(tmp_path, limit, seed, 200), range(8)))
    assert max(most for _, most in found) <= limit
