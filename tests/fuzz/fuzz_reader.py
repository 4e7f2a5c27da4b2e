"""Odd captions, names and picture files against the readers: a sample, or one reason in one line.

    python -m tests.fuzz.fuzz_reader --seconds 600 --seed 0
    python -m tests.fuzz.fuzz_reader --seed 0 --case 1234        repeat one case

Three targets take turns: caption files in every encoding, folders and tars of odd names in any order, and
pictures whose chunks, segments, EXIF, XMP and colour profiles are damaged behind checksums that are right.
What the folder source refuses, preparation must reject, and what one takes, the other must take alike.
"""

import json
import struct
import tarfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from millrace.engine.data import Captions, UnreadablePicture
from millrace.engine.data.captions import captions_of, is_visible
from millrace.engine.data.names import CAPTIONS, list_folder, places
from millrace.engine.data.prepare.folders import read_entries
from millrace.engine.data.prepare.stored_sample import RawSample, convert
from millrace.engine.data.prepare.tars import read_tar
from millrace.engine.data.reject_reasons import Reason, Reject, Rejected
from millrace.engine.data.sources.folder import FolderSource
from millrace.engine.data.sources.pictures import decode_picture
from millrace.engine.util.errors import UserError
from tests.engine.data.odd_pictures import ORIENTATIONS, PIXELS, PROFILES, chunk, odd_picture
from tests.fuzz.fuzz_shards import SETTINGS, Fuzzer, _expect, main, mutate

TEXTS = ("a caption", "naïve 猫 😀", " \r\n two\rlines ", "", "\u200b\ufeff", "\0", "x" * 70_000)
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "latin-1")
VALUES = (*TEXTS, None, 7, 1.5, True, [], ["c"], {}, {"caption": "c"}, "\ud800", "a\udfff")
STEMS = (
    "1",
    "2",
    "a b",
    "v1",
    "v1.3",
    "1.mask",
    "1.depth",
    "IMG.2024.01",
    "é",
    "e\u0301",
    "\udce9",
    "n\nl",
    "._1",
    ".h",
)
SUFFIXES = (
    ".jpg",
    ".JPG",
    ".jpeg",
    ".png",
    ".webp",
    ".txt",
    ".TXT",
    ".json",
    ".gif",
    ".apng",
    ".tga",
    ".md",
    ".npy",
    "",
)


class ReaderFuzzer(Fuzzer):
    """The three targets."""

    def __init__(self, seed: int, folder: Path) -> None:
        super().__init__(seed, folder)
        self.odd = [
            odd_picture(pixels, orientation, profile, number)
            for number, pixels in enumerate(PIXELS)
            for orientation in ORIENTATIONS[number % 2 :: 2]
            for profile in PROFILES
        ]
        self.small = next(picture.data for picture in self.odd if picture.suffix == ".png")
        self.targets = (self.captions_of_files, self.names, self.picture_files)

    def captions_of_files(self, random: np.random.Generator) -> None:
        """The rule for captions, alone and through the folder source."""
        files = {}
        for kind in (("txt",), ("json",), ("txt", "json"))[int(random.integers(0, 3))]:
            text = TEXTS[int(random.integers(0, len(TEXTS)))] if kind == "txt" else _json(random)
            encoding = ENCODINGS[int(random.integers(0, len(ENCODINGS)))]
            data = text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")
            files[kind] = mutate(data, random) if random.random() < 0.5 else data
        try:
            found: Any = captions_of(files)
            for caption in found:
                _expect(is_visible(caption), "an invisible caption")
                _expect("\r" not in caption and caption == caption.strip(), f"{caption!r}")
                _expect(len(caption.encode()) <= 2**16, "too long")
            self.outcomes["caption read"] += 1
        except Rejected as problem:
            found = problem.reason
            _expect("\n" not in problem.detail, f"more than one line: {problem.detail!r}")
            self.outcomes[f"caption {problem.reason}"] += 1
        if random.random() < 0.1 and all(len(data) <= 2**16 for data in files.values()):
            self._same_in_a_folder(files, found)

    def _same_in_a_folder(self, files: dict[str, bytes], found: Captions | Reason) -> None:
        root = _emptied(self.folder / "captions")
        (root / "a.png").write_bytes(self.small)
        for kind, data in files.items():
            (root / f"a.{kind}").write_bytes(data)
        (item,) = read_entries(root, list_folder(root).entries)
        try:
            taken: Any = FolderSource(root).captions(0)
            _expect(
                isinstance(item, RawSample) and item.captions == taken == found, f"{taken} {found} {item}"
            )
        except UserError as error:
            _expect("\n" not in str(error), f"more than one line: {error}")
            _expect(isinstance(item, Reject) and item.reason is found, f"{error} {found} {item}")

    def names(self, random: np.random.Generator) -> None:
        """The rule for names: no file of a folder is lost, and tars do not depend on their order."""
        count = int(random.integers(1, 12))
        stems = [STEMS[i] for i in random.integers(0, len(STEMS), count)]
        names = sorted(
            {
                stem + SUFFIXES[i]
                for stem, i in zip(stems, random.integers(0, len(SUFFIXES), count), strict=True)
            }
            - {""}
        )
        root = _emptied(self.folder / "names")
        content = {}
        for name in names:
            data = b'{"caption": "c"}' if name.lower().endswith(".json") else b"a caption"
            content[name] = self.small if name.lower().endswith((".jpg", ".jpeg", ".png", ".webp")) else data
            (root / name).write_bytes(content[name])
        listing = list_folder(root)
        used = [entry.path for entry in listing.entries] + [
            name for entry in listing.entries for name in entry.captions
        ]
        lost = set(names) - set(used)
        _expect(listing.left_alone.total() + len(set(used)) == len(names), f"{lost} are not accounted for")
        items = list(read_entries(root, listing.entries))
        for item in items:
            self._account("folder", item)
        try:
            source = FolderSource(root)
            keys = [item.key for item in items if isinstance(item, RawSample)]
            _expect(len(source) == len(keys), "another number of samples")
        except UserError as error:
            self.outcomes["folder source refuses"] += 1
            _expect("\n" not in str(error), f"more than one line: {error}")
        outcomes = []
        for _ in range(2):
            order = [names[i] for i in random.permutation(len(names))]
            path = self.folder / "names.tar"
            with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
                for name in order:
                    tar.add(root / name, name)
            found = list(read_tar(path, "t"))
            for item in found:
                self._account("tar", item)
            outcomes.append(sorted((item.key, isinstance(item, RawSample)) for item in found))
        kinds = [(place.stem, place.suffix in CAPTIONS and place.suffix) for place in places(names)]
        if len(set(kinds)) == len(kinds):  # of samples that share a name, the order of their files decides
            _expect(outcomes[0] == outcomes[1], f"the order of members decides: {outcomes}")

    def _account(self, where: str, item: RawSample | Reject) -> None:
        if isinstance(item, RawSample):
            self.outcomes[f"{where} sample"] += 1
            return
        _expect(isinstance(item.reason, Reason), f"{item!r}")
        json.dumps(item).encode()
        self.outcomes[f"{where} {item.reason}"] += 1

    def picture_files(self, random: np.random.Generator) -> None:
        """The rule for pictures: decoding and conversion agree, and say why in one line."""
        picture = self.odd[int(random.integers(0, len(self.odd)))]
        data = _damaged(picture.data, random)
        try:
            image = decode_picture(data, "a key")
            _expect(image.mode == "RGB", image.mode)
            decoded = True
            self.outcomes["file read"] += 1
        except UnreadablePicture as problem:
            _expect("\n" not in problem.reason, f"more than one line: {problem.reason!r}")
            decoded = False
            self.outcomes[f"file {problem.kind}"] += 1
        try:
            convert(RawSample("a key", data, Captions("long", "short")), SETTINGS)
            _expect(decoded, "converted but not decoded")
        except Rejected as problem:
            _expect(
                not decoded or problem.reason in (Reason.TOO_SMALL, Reason.PICTURE_TOO_LARGE),
                f"decoded but {problem}",
            )


def _json(random: np.random.Generator) -> str:
    values = {
        key: VALUES[int(random.integers(0, len(VALUES)))]
        for key in ("caption", "long", "short", "url")
        if random.random() < 0.5
    }
    text = json.dumps(values, ensure_ascii=bool(random.integers(0, 2)))
    if random.random() < 0.1:
        text = text[:-1] + ', "caption": "another"}'
    return "[" * 3000 + text if random.random() < 0.02 else text


def _damaged(data: bytes, random: np.random.Generator) -> bytes:
    if data.startswith(b"\x89PNG"):
        return _damaged_png(data, random)
    if data.startswith(b"\xff\xd8"):
        return _damaged_jpeg(data, random)
    return mutate(data, random, 0, 200)


def _damaged_png(data: bytes, random: np.random.Generator) -> bytes:
    """Chunks changed, doubled, lost and moved, each with a checksum that is right."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in range(int(random.geometric(0.5))):
        place = int(random.integers(0, len(chunks)))
        kind, body = chunks[place]
        choice = random.integers(0, 6)
        if choice < 2:
            chunks[place] = kind, mutate(body, random)
        elif choice == 2 and kind in (b"iCCP", b"iTXt", b"zTXt"):
            head, packed = body[:-20], mutate(body[-200:], random)
            chunks[place] = kind, head + zlib.compress(packed)
        elif choice == 3:
            chunks.insert(int(random.integers(0, len(chunks))), chunks[place])
        elif choice == 4 and len(chunks) > 1:
            chunks.insert(int(random.integers(0, len(chunks))), chunks.pop(place))
        else:
            names = (b"zTXt", b"iTXt", b"tEXt", b"iCCP", b"eXIf", b"tRNS", b"gAMA", b"acTL", b"sPLT", b"pHYs")
            text = zlib.compress(b"x" * int(random.choice([1, 2_000_000])))
            body = (b"XML:com.adobe.xmp\0\1\0\0\0" + text, b"k\0\0" + text, random.bytes(9))[
                int(random.integers(0, 3))
            ]
            chunks.insert(place, (names[int(random.integers(0, len(names)))], body))
    return data[:8] + b"".join(chunk(*one) for one in chunks)


def _damaged_jpeg(data: bytes, random: np.random.Generator) -> bytes:
    """Segments changed, doubled and lost, with lengths that are right."""
    segments, at = [], 2
    while data[at : at + 1] == b"\xff" and data[at + 1] != 0xDA:
        (length,) = struct.unpack_from(">H", data, at + 2)
        segments.append((data[at + 1], data[at + 4 : at + 2 + length]))
        at += 2 + length
    for _ in range(int(random.geometric(0.5))):
        place = int(random.integers(0, len(segments)))
        marker, body = segments[place]
        choice = random.integers(0, 5)
        if choice < 2:
            segments[place] = marker, mutate(body, random)[:65000]
        elif choice == 2:
            segments.insert(place, segments[place])
        elif choice == 3 and len(segments) > 1:
            segments.pop(place)
        else:
            heads = (
                b"Exif\0\0",
                b"http://ns.adobe.com/xap/1.0/\0",
                b"ICC_PROFILE\0\1\1",
                b"Adobe\0d",
                b"MPF\0",
                b"",
            )
            marker = int(random.choice([0xE1, 0xE1, 0xE2, 0xEE, 0xFE]))
            segments.insert(place, (marker, heads[int(random.integers(0, len(heads)))] + random.bytes(40)))
    head = b"".join(
        b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body for marker, body in segments
    )
    scan = mutate(data[at:], random) if random.random() < 0.2 else data[at:]
    return b"\xff\xd8" + head + scan


def _emptied(root: Path) -> Path:
    root.mkdir(exist_ok=True)
    for path in root.iterdir():
        path.unlink()
    return root


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # Pillow's about odd files
    main(__doc__, ReaderFuzzer)
