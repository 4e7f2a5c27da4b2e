"""Good and bad inputs of every kind, for the tests of millrace prepare."""

import io
import json
import os
import struct
import tarfile
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from millrace.engine.data.prepare.settings import Settings

SETTINGS = Settings(resolution=32, patch=8, shard_bytes=20_000)
"""Buckets of 24x40 to 48x24 pixels; a shard has a few samples."""


def smooth(width=60, height=40, seed=0):
    """RGB picture without noise, so that JPEG changes little of it."""
    y, x = np.mgrid[:height, :width]
    values = np.stack([x * 4 + seed, y * 5, (x + y) * 2 + 3 * seed], -1) % 256
    return Image.fromarray(values.astype(np.uint8))


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(width=60, height=40, seed=0, **options):
    return encoded(smooth(width, height, seed), "JPEG", quality=90, **options)


def bomb(width=60_000, height=60_000):
    """A PNG of a few bytes that would take gigabytes to decode."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def animation(kind):
    frames = [smooth(seed=i) for i in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def turned():
    """A JPEG whose EXIF says that it is to be shown a quarter turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(exif=exif)


def sixteen_bits():
    values = np.linspace(0, 65535, 60 * 40).astype(np.uint16).reshape(40, 60)
    return encoded(Image.fromarray(values), "PNG")


GOOD = {
    "plain.jpg": jpeg(),
    "png.png": encoded(smooth(), "PNG"),
    "webp.webp": encoded(smooth(), "WEBP", lossless=True),
    "grey.jpg": encoded(smooth().convert("L"), "JPEG"),
    "cmyk.jpg": encoded(smooth().convert("CMYK"), "JPEG", quality=95),
    "deep.png": sixteen_bits(),
    "turned.jpg": turned(),
    "palette.png": encoded(smooth().quantize(16), "PNG"),
    "clear.png": encoded(smooth().convert("RGBA"), "PNG"),
    "big.jpg": jpeg(640, 480),
}
"""Pictures that are converted where need be, never rejected."""

BAD_PICTURES = {
    "zero.jpg": (b"", "empty_picture"),
    "cut.jpg": (jpeg()[:-300], "corrupt_picture"),
    "cut.png": (encoded(smooth(), "PNG")[:-20], "corrupt_picture"),
    "noise.jpg": (np.random.default_rng(0).bytes(3000), "corrupt_picture"),
    "text.jpg": (b"<html>404</html>", "corrupt_picture"),
    "gif.jpg": (animation("GIF"), "unsupported_format"),
    "gif.gif": (animation("GIF"), "unsupported_format"),
    "tif.tif": (encoded(smooth(), "TIFF"), "unsupported_format"),
    "bmp.png": (encoded(smooth(), "BMP"), "unsupported_format"),
    "moving.webp": (animation("WEBP"), "animated"),
    "moving.png": (animation("PNG"), "animated"),
    "bomb.png": (bomb(), "decompression_bomb"),
    "bomb2.png": (bomb(10_000, 9_500), "decompression_bomb"),
    "scans.jpg": (jpeg(progressive=True)[:-2] + b"\xff\xda\0\x08" * 501, "decompression_bomb"),
    "small.jpg": (jpeg(20, 15), "too_small"),
}
BAD_CAPTIONS = {
    "none": ({}, "missing_caption"),
    "empty": ({"txt": b" \n\t"}, "empty_caption"),
    "long": ({"txt": b"word " * 2_000_000}, "caption_too_long"),
    "longjson": ({"json": b'{"caption": "' + b"w" * 10_000_000 + b'"}'}, "caption_too_long"),
    "longvalue": ({"json": b'{"caption": "' + b"w" * 70_000 + b'"}'}, "caption_too_long"),
    "latin": ({"txt": "na\xefve".encode("latin-1")}, "caption_not_utf8"),
    "half": ({"json": b'{"caption": "\\ud800"}'}, "caption_not_utf8"),
    "nojson": ({"json": b"{'caption': 1}"}, "caption_not_json"),
    "deepjson": ({"json": b"[" * 200_000}, "caption_not_json"),
    "bigint": ({"json": b'{"caption": ' + b"1" * 5000 + b"}"}, "caption_not_json"),
    "list": ({"json": b'["a caption"]'}, "caption_not_json"),
    "number": ({"json": b'{"caption": 7}'}, "caption_not_text"),
    "null": ({"json": b'{"caption": null}'}, "missing_caption"),
    "other": ({"json": b'{"url": "x", "long": "only one"}'}, "missing_caption"),
}


def torture_folder(root):
    """Fill a folder with GOOD and everything bad; (planted rejects by reason, keys of the good)."""
    root.mkdir(parents=True)
    planted = Counter()
    for name, data in GOOD.items():
        (root / name).write_bytes(data)
        (root / name).with_suffix(".txt").write_text(f"a caption of {name}")
    for name, (data, reason) in BAD_PICTURES.items():
        path = root / "bad" / f"{name[:-4].replace('.', '')}-{name[-3:]}{os.path.splitext(name)[1]}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        path.with_suffix(".txt").write_text("a caption")
        planted[reason] += 1
    (root / "captions").mkdir()
    for name, (files, reason) in BAD_CAPTIONS.items():
        (root / "captions" / f"{name}.jpg").write_bytes(jpeg())
        for suffix, data in files.items():
            (root / "captions" / f"{name}.{suffix}").write_bytes(data)
        planted[reason] += 1
    odd = root / "odd"
    odd.mkdir()
    for name in ("two", "pipe", "dangling", "loud"):
        (odd / f"{name}.txt").write_text("a caption")
    (odd / "two.jpg").write_bytes(jpeg())
    (odd / "two.TXT").write_text("another")
    planted["ambiguous_caption"] += 1
    os.mkfifo(odd / "pipe.jpg")
    planted["special_file"] += 1
    planted["missing_picture"] += 1  # loud.txt
    (odd / "dangling.jpg").symlink_to("nowhere.jpg")
    (odd / "loop").symlink_to(root)
    planted["unreadable_file"] += 2
    with open(os.fsencode(odd) + b"/caf\xe9.jpg", "wb") as file:
        file.write(b"")
    planted["missing_caption"] += 1
    return planted, sorted(GOOD)


class TarBuilder:
    """Writes tars member by member, sound or not."""

    def __init__(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._tar = tarfile.open(path, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115

    def add(self, name, data=b"", kind=tarfile.REGTYPE, link=""):
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        member.size = len(data) if kind == tarfile.REGTYPE else 0
        self._tar.addfile(member, io.BytesIO(data))
        return self

    def sample(self, name, data=None, caption=b"a caption"):
        return self.add(f"{name}.jpg", jpeg() if data is None else data).add(f"{name}.txt", caption)

    def close(self):
        self._tar.close()
        return self.path


def torture_tars(root):
    """Fill a folder with tars; (planted rejects by reason, keys of the good)."""
    planted, good = Counter(), []

    def builder(name):
        return TarBuilder(root / name)

    tar = builder("a.tar")
    for name, data in GOOD.items():
        tar.add(name, data).add(f"{name.rpartition('.')[0]}.txt", b"a caption")
        good.append(f"a.tar/{name.rpartition('.')[0]}")
    for name, (data, reason) in BAD_PICTURES.items():
        stem, _, suffix = name.rpartition(".")
        tar.add(f"bad/{stem}-{suffix}.{suffix}", data).add(f"bad/{stem}-{suffix}.txt", b"a caption")
        planted[reason] += 1
    for name, (files, reason) in BAD_CAPTIONS.items():
        tar.add(f"captions/{name}.jpg", jpeg())
        for suffix, data in files.items():
            tar.add(f"captions/{name}.{suffix}", data)
        planted[reason] += 1
    tar.close()

    tar = builder("names/b.tar")
    tar.sample("../escape").sample("/absolute").sample("x/../../y")
    planted["unsafe_name"] += 3
    tar.add("link.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd").add("link.txt", b"a caption")
    tar.add("hard.jpg", kind=tarfile.LNKTYPE, link="link.jpg").add("hard.txt", b"a caption")
    tar.add("device.jpg", kind=tarfile.CHRTYPE).add("fifo", kind=tarfile.FIFOTYPE)
    planted["special_file"] += 4
    tar.add("lonely.txt", b"a caption").add("readme.md", b"belongs to nothing")
    planted["missing_picture"] += 1
    tar.sample("twice").sample("between").sample("twice")
    planted["duplicate_key"] += 1
    tar.add("pair.jpg", jpeg()).add("pair.png", GOOD["png.png"]).add("pair.txt", b"a caption")
    planted["duplicate_key"] += 1
    tar.add("d", kind=tarfile.DIRTYPE).sample("d/IMG.2024.05").add("._twice.jpg", b"left by a mac")
    tar.sample("n" * 300)
    tar.add("parts.jpg", jpeg()).add("parts.mask.png", b"").add("parts.json", b'{"long": "l", "short": "s"}')
    tar.close()
    good += [f"names/b.tar/{name}" for name in ("twice", "between", "d/IMG.2024.05", "n" * 300, "parts")]

    path = builder("cut.tar").sample("0").sample("1").close()
    good.append("cut.tar/0")
    os.truncate(path, 512 * 3 + len(jpeg()) + 1000)
    planted["truncated_tar"] += 1
    path = builder("noend.tar").sample("0").close()
    good.append("noend.tar/0")
    os.truncate(path, 512 * 4 + len(jpeg()) // 512 * 512)
    planted["truncated_tar"] += 1
    path = builder("torn.tar").sample("0").sample("1").sample("2").close()
    good += ["torn.tar/0", "torn.tar/2"]
    with tarfile.open(path) as tar:
        offset = tar.getmember("1.jpg").offset
    data = bytearray(path.read_bytes())
    data[offset + 100 : offset + 160] = b"\xff" * 60
    path.write_bytes(data)
    planted["corrupt_tar"] += 1
    planted["missing_picture"] += 1  # the caption of the picture whose header is lost
    (root / "nothing.tar").write_bytes(b"")
    planted["truncated_tar"] += 1
    (root / "zip.tar").write_bytes(b"PK\x03\x04" + bytes(range(256)) * 20)
    planted["corrupt_tar"] += 1
    return planted, sorted(good)


@pytest.fixture(scope="session", name="bad")
def _bad():
    """Everything above by name, for test files, which cannot import each other."""

    class Bad:
        pass

    for name, value in globals().items():
        if not name.startswith("_"):
            setattr(
                Bad, name, staticmethod(value) if callable(value) and not isinstance(value, type) else value
            )
    return Bad


@pytest.fixture(scope="session")
def settings():
    return SETTINGS


def tree(root):
    """Every file below `root` with its bytes."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def rejects_of(root):
    return [json.loads(line) for line in (root / "rejects.jsonl").read_text().splitlines()]
