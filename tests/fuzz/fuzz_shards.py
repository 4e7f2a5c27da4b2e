"""Damaged tars, pictures, captions and data sets against the readers: only documented errors may come out.

    python tests/fuzz/fuzz_shards.py --seconds 600 --seed 0
    python tests/fuzz/fuzz_shards.py --seed 0 --case 1234        repeat one case

Four targets take turns: the tar reader of prepare.py with what it converts, pictures alone, caption files,
and ShardsSource on a data set whose tar, index or manifest is damaged. Case n of a seed is always the same. A
case that hangs, raises anything else, or returns what cannot be is reported with its number; exit code 1.
"""

import argparse
import faulthandler
import hashlib
import io
import json
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from millrace.engine.data import Captions, UnreadablePicture
from millrace.engine.data.captions import captions_of
from millrace.engine.data.formats.shard_index import Manifest
from millrace.engine.data.formats.shard_writer import sample_record, write_manifest, write_shard
from millrace.engine.data.prepare.settings import Settings
from millrace.engine.data.prepare.stored_sample import RawSample, convert
from millrace.engine.data.prepare.tars import read_tar
from millrace.engine.data.reject_reasons import Reason, Reject, Rejected
from millrace.engine.data.sources.shards import ShardsSource
from millrace.engine.util.errors import UserError

SETTINGS = Settings(resolution=32, patch=8)
CASE_SECONDS = 60
"""A case that computes for longer hangs, and so does one that waits ten times as long: other programs may
have the machine."""
MEMORY = 3 * 2**30
"""Bytes by which the process's peak may grow: Pillow's limit of pixels, decoded, and what is imported."""
HEADER_FIELDS = (
    (0, 100),  # name
    (100, 124),  # mode, user, group
    (124, 136),  # size
    (148, 156),  # checksum
    (156, 157),  # type
    (157, 257),  # name of a link's target
    (257, 265),  # magic
    (345, 500),  # prefix of the name
)
"""First byte and the one after the last."""


class Hang(BaseException):
    """Raised by the alarm; nothing under test catches it."""


def _expect(condition: object, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _peak() -> int:
    """Bytes that this process has reached at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def pictures() -> list[bytes]:
    """Small files of the formats that are read."""
    y, x = np.mgrid[:40, :56]
    image = Image.fromarray((np.stack([x * 4, y * 6, x + y], -1) % 256).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    grey16 = Image.fromarray((np.arange(40 * 56).reshape(40, 56) * 29).astype(np.uint16))
    made = []
    for picture, kind, options in (
        (image, "JPEG", {}),
        (image, "JPEG", {"progressive": True, "subsampling": 0}),
        (image, "JPEG", {"exif": exif, "restart_marker_blocks": 2}),
        (image.convert("CMYK"), "JPEG", {}),
        (image.convert("L"), "JPEG", {}),
        (image, "PNG", {}),
        (image.quantize(8), "PNG", {"transparency": 3}),
        (grey16, "PNG", {}),
        (image, "WEBP", {}),
        (image.convert("RGBA"), "WEBP", {"lossless": True, "exif": exif}),
        (image, "GIF", {}),
    ):
        file = io.BytesIO()
        picture.save(file, kind, **options)
        made.append(file.getvalue())
    return made


def tars(samples: list[bytes]) -> list[bytes]:
    """Small tars in the three dialects, with long names, links, folders and other components."""
    made = []
    for dialect in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=dialect) as tar:

            def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, tar: tarfile.TarFile = tar):
                member = tarfile.TarInfo(name)
                member.size, member.type = len(data), kind
                member.linkname = "target" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
                tar.addfile(member, io.BytesIO(data))

            add("folder", kind=tarfile.DIRTYPE)
            for i, data in enumerate(samples[:4]):
                add(f"folder/{i}.jpg", data)
                add(f"folder/{i}.cls", b"7")
                add(f"folder/{i}.txt", b"a caption")
            add("link.jpg", kind=tarfile.SYMTYPE)
            long = "long" * (60 if dialect != tarfile.USTAR_FORMAT else 10)
            add(f"{long}.png", samples[5])
            add(f"{long}.json", b'{"long": "a long caption", "short": "short"}')
        made.append(file.getvalue())
    return made


def mutate(data: bytes, random: np.random.Generator, start: int = 0, end: int | None = None) -> bytes:
    """A few random changes of `data`, most of them between `start` and `end`."""
    changed = bytearray(data)
    end = len(data) if end is None else end
    for _ in range(int(random.geometric(0.3))):
        if not changed:
            break
        kind = random.integers(0, 10)
        at = int(random.integers(start, max(start + 1, min(end, len(changed)))))
        at = min(at, len(changed) - 1)
        if kind < 4:
            changed[at] ^= 1 << int(random.integers(0, 8))
        elif kind < 6:
            changed[at] = int(random.choice([0, 0xFF, 0x7F, 0x80, ord("0"), ord("7"), random.integers(256)]))
        elif kind == 6:
            n = int(random.integers(1, 64))
            changed[at : at + n] = random.bytes(len(changed[at : at + n]))
        elif kind == 7:
            del changed[at : at + int(random.choice([1, 7, 512, 5000]))]
        elif kind == 8:
            n = int(random.choice([1, 8, 512, 1024]))
            changed[at:at] = changed[at : at + n]
        elif random.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def mutate_json(data: bytes, random: np.random.Generator) -> bytes:
    """Another value, or none, in some place of a JSON file."""
    root = json.loads(data)
    place = root
    while True:
        names = list(place) if isinstance(place, dict) else list(range(len(place)))
        name = names[int(random.integers(0, len(names)))]
        if isinstance(place[name], dict | list) and place[name] and random.random() < 0.8:
            place = place[name]
            continue
        values = (None, -1, 0, 1, 2**31, 2**70, 1.5, True, "", "x", "../x", "0" * 64, [], [1, 2], {}, [[]])
        if random.random() < 0.2:
            del place[name]
        else:
            place[name] = values[int(random.integers(0, len(values)))]
        return json.dumps(root).encode()


def mutate_tar(data: bytes, random: np.random.Generator) -> bytes:
    """Changes of headers above all, often with a checksum that is right again."""
    headers = [i for i in range(0, len(data) - 512, 512) if data[i + 257 : i + 262] == b"ustar"]
    changed = bytearray(data)
    for _ in range(int(random.geometric(0.4))):
        at = int(random.choice(headers))
        first, last = HEADER_FIELDS[int(random.integers(0, len(HEADER_FIELDS)))]
        n = int(random.integers(1, last - first + 1))
        place = at + first + int(random.integers(0, last - first - n + 1))
        choice = random.integers(0, 3)
        if choice == 0:
            changed[place : place + n] = random.bytes(n)
        elif choice == 1:
            changed[place : place + n] = bytes(random.choice(list(b"01234567 \0./xXgLKSA"), n).tolist())
        else:
            changed[place : place + n] = b"\xff" * n
        if random.random() < 0.7:
            changed[at + 148 : at + 156] = b" " * 8
            total = sum(changed[at : at + 512])
            changed[at + 148 : at + 156] = b"%06o\0 " % total
    return mutate(bytes(changed), random) if random.random() < 0.3 else bytes(changed)


class Fuzzer:
    """The targets and what they start from."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.folder, self.peak = seed, folder, _peak()
        self.outcomes: Counter[str] = Counter()
        self.pictures = pictures()
        self.tars = tars(self.pictures)
        self.set = folder / "set"
        self._make_set(self.set)
        self.files = {
            path.relative_to(self.set): path.read_bytes() for path in self.set.rglob("*") if path.is_file()
        }
        self.targets = (self.tar, self.picture, self.caption, self.shards)

    def case(self, number: int) -> None:
        """Run one case; raises whatever must not be raised."""
        random = np.random.default_rng([self.seed, number])
        target = self.targets[number % len(self.targets)]
        signal.alarm(10 * CASE_SECONDS)
        signal.setitimer(signal.ITIMER_PROF, CASE_SECONDS)
        try:
            target(random)
        finally:
            signal.alarm(0)
            signal.setitimer(signal.ITIMER_PROF, 0)
        grown = _peak() - self.peak
        _expect(grown < MEMORY, f"the process has grown by {grown / 2**20:.0f} MiB")

    def tar(self, random: np.random.Generator) -> None:
        """prepare.py's reading of a tar."""
        data = mutate_tar(self.tars[int(random.integers(0, len(self.tars)))], random)
        path = self.folder / "fuzzed.tar"
        path.write_bytes(data)
        for n, item in enumerate(read_tar(path, "fuzzed.tar")):
            _expect(n <= 2 * len(data) // 512 + 2, "more samples than blocks")
            if isinstance(item, RawSample):
                self._convert(item)
            else:
                _expect(isinstance(item, Reject) and isinstance(item.reason, Reason), f"{item!r}")
                json.dumps(item).encode()
                self.outcomes[f"tar {item.reason}"] += 1

    def picture(self, random: np.random.Generator) -> None:
        """prepare.py's conversion of a picture."""
        data = self.pictures[int(random.integers(0, len(self.pictures)))]
        end = len(data) if random.random() < 0.5 else 200  # headers are denser in meaning
        self._convert(RawSample("a key", mutate(data, random, 0, end), Captions("long", "short")))

    def caption(self, random: np.random.Generator) -> None:
        """Caption files."""
        json_file = (
            b'{"long": "na\xc3\xafve \\u732b", "short": "s", "caption": "c", "n": [1, 2.5, null, {"x": 1}]}'
        )
        files = {
            "txt": mutate(b"a caption, na\xc3\xafve \xe7\x8c\xab", random),
            "json": mutate(json_file, random),
        }
        chosen = [("txt",), ("json",), ("txt", "json"), ()][int(random.integers(0, 4))]
        try:
            captions = captions_of({name: files[name] for name in chosen})
        except Rejected as problem:
            self.outcomes[f"caption {problem.reason}"] += 1
            return
        _expect(captions.long.strip() and captions.short.strip(), "an empty caption")
        sample_record("key", captions, 1, 1).decode()
        self.outcomes["caption read"] += 1

    def shards(self, random: np.random.Generator) -> None:
        """A data set of which one file is damaged, read as training does."""
        names = sorted(self.files, key=str)
        name = names[int(random.integers(0, len(names)))]
        data = self.files[name]
        sizes_stay = name.suffix == ".tar" and random.random() < 0.7
        changed = mutate(data, random, 0, 200 if name.suffix == ".npy" else None)
        if name.suffix == ".json" and random.random() < 0.7:
            changed = mutate_json(data, random)
        if sizes_stay:
            changed = changed[: len(data)].ljust(len(data), b"\0")
        (self.set / name).write_bytes(changed)
        if name.suffix == ".npy" and random.random() < 0.8:
            # As if the index had been written like this: its checksum does not tell.
            values = json.loads(self.files[Path("manifest.json")])
            for shard in values["shards"]:
                if shard["file"] == name.with_suffix(".tar").as_posix():
                    shard["index_sha256"] = hashlib.sha256(changed).hexdigest()
            (self.set / "manifest.json").write_text(json.dumps(values))
        try:
            self._read_set(verify=bool(random.random() < 0.2))
        finally:
            for restored in {name, Path("manifest.json")}:
                (self.set / restored).write_bytes(self.files[restored])

    def _read_set(self, verify: bool) -> None:
        try:
            source = ShardsSource(self.set, verify)
        except UserError as error:
            _expect("\n" not in str(error), f"more than one line: {error}")
            self.outcomes["shards refused"] += 1
            return
        for i in range(len(source)):
            for read in (source.key, source.captions, source.encoded, source.image):
                try:
                    read(i)
                    self.outcomes["shards read"] += 1
                except UnreadablePicture:
                    _expect(read != source.key, "no key")
                    self.outcomes["shards unreadable"] += 1
                except UserError:
                    _expect(verify, "a checksum that was not asked for")
                    self.outcomes["shards checksum"] += 1

    def _convert(self, raw: RawSample) -> None:
        try:
            bucket, stored, _ = convert(raw, SETTINGS)
        except Rejected as problem:
            _expect(isinstance(problem.reason, Reason), f"{problem!r}")
            self.outcomes[f"picture {problem.reason}"] += 1
            return
        h, w = SETTINGS.buckets[bucket]
        with Image.open(io.BytesIO(stored.picture)) as image:
            image.load()
            _expect((image.format, image.mode) == ("JPEG", "RGB"), "another kind of picture")
            _expect(image.size == (stored.width, stored.height), "another size than it says")
            _expect(image.width >= w and image.height >= h, "smaller than its bucket")
        self.outcomes["picture converted"] += 1

    def _make_set(self, root: Path) -> None:
        shards, first = [], 0
        for bucket in ((16, 48), (32, 32)):
            for number in range(2):
                raw = [
                    RawSample(f"{bucket}/{number}/{i}", data, Captions("long", "short"))
                    for i, data in enumerate(self.pictures[:3])
                ]
                some = [convert(sample, SETTINGS).stored for sample in raw]
                shards.append(write_shard(root, bucket, number, some, first))
                first += len(some)
        write_manifest(
            root,
            Manifest(
                resolution=32,
                aspect="mixed",
                patch=16,
                buckets=((16, 48), (32, 32)),
                shards=tuple(shards),
            ),
        )


def fuzz(seconds: float, seed: int, only: int | None = None, kind: type[Fuzzer] = Fuzzer) -> int:
    """Run cases for a time, or one; exit code."""

    def hangs(*_: object) -> None:
        raise Hang(f"more than {CASE_SECONDS} s")

    warnings.simplefilter("ignore")
    previous = {number: signal.signal(number, hangs) for number in (signal.SIGALRM, signal.SIGPROF)}
    folder = Path(tempfile.mkdtemp(prefix="fuzz-shards-"))
    try:
        fuzzer = kind(seed, folder)
        started = shown = time.monotonic()
        number = 0 if only is None else only
        slowest = (0.0, number)
        while (only is None and time.monotonic() - started < seconds) or number == only:
            before = time.process_time()
            try:
                fuzzer.case(number)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                traceback.print_exc()
                print(f"FAILED: --seed {seed} --case {number}: {type(error).__name__}: {error}")
                return 1
            slowest = max(slowest, (time.process_time() - before, number))
            number += 1
            if time.monotonic() - shown > 10:
                shown = time.monotonic()
                print(f"{number:,} cases, {shown - started:.0f} s", file=sys.stderr, flush=True)
        passed = time.monotonic() - started
        print(f"seed {seed}: {number:,} cases in {passed:.0f} s, nothing unexpected")
        print(f"slowest: {slowest[0]:.2f} s of CPU, --case {slowest[1]}")
        for outcome, n in sorted(fuzzer.outcomes.items()):
            print(f"  {outcome:<32} {n:>10,}")
        return 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        shutil.rmtree(folder)


def main(description: str = __doc__, kind: type[Fuzzer] = Fuzzer) -> None:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this case alone")
    options = parser.parse_args()
    faulthandler.enable()  # a crash in a library shows where
    sys.exit(fuzz(options.seconds, options.seed, options.case, kind))


if __name__ == "__main__":
    main()
