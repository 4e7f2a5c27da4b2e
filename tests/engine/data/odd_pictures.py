"""Small pictures of every kind that a data set may hold, with the pixels that a viewer shows of them."""

import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

ORIENTATIONS = ("none", "exif 3", "exif 6", "exif 7", "xmp attribute 8", "xmp element 6", "exif 9, xmp 5")
PROFILES = ("none", "sRGB", "Display P3", "broken")
PIXELS = (
    "RGB JPEG",
    "progressive JPEG",
    "grey JPEG",
    "RGB PNG",
    "RGBA PNG",
    "LA PNG",
    "palette PNG",
    "grey PNG",
    "RGB WebP",
    "RGBA WebP",
    "RGB 16-bit PNG",
    "grey 16-bit PNG",
    "grey 4-bit tRNS PNG",
    "RGB 16-bit tRNS PNG",
)
_TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}
P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
"""XYZ of the primaries at D50."""


class OddPicture(NamedTuple):
    """A file, and what is to be seen of it."""

    name: str
    suffix: str
    data: bytes
    shown: np.ndarray
    """(h, w, 3) uint8, upright in sRGB over white."""
    exact: bool
    """Whether the file is lossless."""


def odd_picture(pixels: str, orientation: str, profile: str, seed: int = 0) -> OddPicture:
    """One of PIXELS, stored turned and with a profile."""
    kind = next(kind for kind in ("JPEG", "PNG", "WebP") if pixels.endswith(kind))
    stored, file = _stored(pixels, seed)
    icc = {
        "none": None,
        "sRGB": srgb_profile(),
        "Display P3": rgb_profile(P3),
        "broken": b"no profile",
    }
    exif, xmp, turn = _marks(orientation)
    data = _with_marks(file, kind, pixels, exif, xmp, icc[profile])
    shown = stored[..., :3]
    if profile == "Display P3":
        shown = p3_to_srgb(shown)
    if stored.shape[-1] == 4:
        alpha = stored[..., 3:] / 255
        shown = np.round(shown * alpha + 255 * (1 - alpha)).astype(np.uint8)
    suffix = {"JPEG": ".jpg", "PNG": ".png", "WebP": ".webp"}[kind]
    name = f"{pixels}, {orientation}, {profile}"
    return OddPicture(name, suffix, data, _TURNED[turn](shown), kind != "JPEG")


def rgb_profile(primaries, gamma: float = 2.2) -> bytes:
    """An ICC profile of a display with these primaries (XYZ at D50) and a power as its curve."""

    def xyz(values) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 78
    tags = [(b"desc", text), (b"cprt", b"text\0\0\0\0x\0"), (b"wtpt", xyz((0.9642, 1, 0.8249)))]
    tags += [(name, xyz(values)) for name, values in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)]
    tags += [(name, curve) for name in (b"rTRC", b"gTRC", b"bTRC")]
    return _profile(tags, b"RGB ")


def grey_profile(gamma: float) -> bytes:
    """An ICC profile of grey with a power as its curve."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    white = b"XYZ \0\0\0\0" + struct.pack(">iii", 63190, 65536, 54061)
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 78
    tags = [(b"desc", text), (b"cprt", b"text\0\0\0\0x\0"), (b"wtpt", white), (b"kTRC", curve)]
    return _profile(tags, b"GRAY")


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def p3_to_srgb(values: np.ndarray) -> np.ndarray:
    """Display P3 with gamma 2.2 -> sRGB, by the matrices of their primaries at D50."""
    srgb = (
        (0.4360747, 0.2225045, 0.0139322),
        (0.3850649, 0.7168786, 0.0971045),
        (0.1430804, 0.0606169, 0.7141733),
    )
    linear = (values / 255) ** 2.2 @ np.array(P3) @ np.linalg.inv(np.array(srgb))
    linear = np.clip(linear, 0, 1)
    encoded = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(encoded * 255).astype(np.uint8)


def png(values: np.ndarray, depth: int, colour: int, extra=()) -> bytes:
    """A PNG of (h, w, c) samples of 1 to 16 bits, written without Pillow; `extra` are (kind, body)."""
    h, w, _ = values.shape
    rows = b""
    for row in values.reshape(h, -1):
        bits = "".join(format(int(value), f"0{depth}b") for value in row)
        bits += "0" * (-len(bits) % 8)
        rows += b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    header = struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def xmp_packet(orientation: int, element: bool = False) -> bytes:
    tag = (
        f"><tiff:Orientation>{orientation}</tiff:Orientation></rdf:Description>"
        if element
        else f' tiff:Orientation="{orientation}"/>'
    )
    return (
        f"<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF><rdf:Description{tag}</rdf:RDF></x:xmpmeta>".encode()
    )


def _profile(tags, space: bytes) -> bytes:
    table = data = b""
    for name, body in tags:
        body += b"\0" * (-len(body) % 4)
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(body))
        data += body
    head = struct.pack(
        ">I4sI4s4s4s", 132 + len(table) + len(data), b"lcms", 0x02400000, b"mntr", space, b"XYZ "
    )
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def _stored(pixels: str, seed: int) -> tuple[np.ndarray, Image.Image | bytes]:
    """(40, 48, 3 or 4) uint8 as they are stored, and the picture of them, or its file without marks."""
    small = np.random.default_rng(seed).integers(60, 200, (3, 3, 4), dtype=np.uint8)
    rgba = np.asarray(Image.fromarray(small).resize((48, 40), Image.Resampling.BICUBIC))
    rgb, grey = rgba[..., :3].copy(), rgba[..., :1]
    grey3 = np.repeat(grey, 3, -1)
    if "16-bit" in pixels:
        tRNS = []
        values = (rgb if "RGB" in pixels else grey).astype(int) * 256 + 77
        alpha = np.full((40, 48, 1), 255, np.uint8)
        if "tRNS" in pixels:
            values[:12, :16] = (2571, 5142, 7713)
            alpha[:12, :16] = 0
            tRNS = [(b"tRNS", struct.pack(">HHH", 2571, 5142, 7713))]
        shown = np.dstack([np.broadcast_to(values >> 8, (40, 48, 3)).astype(np.uint8), alpha])
        return shown, png(values, 16, 2 if "RGB" in pixels else 0, tRNS)
    if "4-bit" in pixels:
        values = (grey >> 4).astype(int)
        values[:12, :16] = 1
        alpha = np.where(values == 1, 0, 255).astype(np.uint8)
        shown = np.dstack([np.repeat(values * 17, 3, -1).astype(np.uint8), alpha])
        return shown, png(values, 4, 0, [(b"tRNS", b"\0\1")])
    if pixels.startswith("palette"):
        index = np.zeros((40, 48), np.uint8)
        index[:, 24:], index[20:, :] = 1, 2
        palette = np.array([[200, 60, 60], [70, 150, 90], [80, 90, 160]], np.uint8)
        image = Image.fromarray(index, "L")
        image.putpalette(palette.tobytes())
        image.info["transparency"] = b"\x40\xff\x90"
        return np.dstack([palette[index], np.array([0x40, 0xFF, 0x90], np.uint8)[index]]), image
    if pixels.startswith("RGBA"):
        return rgba, Image.fromarray(rgba)
    if pixels.startswith("LA"):
        return np.dstack([grey3, rgba[..., 3]]), Image.fromarray(np.dstack([grey, rgba[..., 3]]), "LA")
    if pixels.startswith("grey"):
        return grey3, Image.fromarray(grey[..., 0])
    return rgb, Image.fromarray(rgb)


def _marks(orientation: str) -> tuple[Image.Exif | None, bytes | None, int]:
    if orientation == "none":
        return None, None, 1
    exif = Image.Exif()
    if orientation.startswith("exif"):
        exif[0x0112] = int(orientation[5])
    else:
        exif = None
    xmp = None
    if "xmp" in orientation:
        xmp = xmp_packet(int(orientation[-1]), element="element" in orientation)
    return exif, xmp, int(orientation[-1])


def _with_marks(file, kind: str, pixels: str, exif, xmp, icc) -> bytes:
    if isinstance(file, bytes):
        extra = []
        if icc:
            extra.append((b"iCCP", b"profile\0\0" + zlib.compress(icc)))
        if exif:
            extra.append((b"eXIf", exif.tobytes()[6:]))
        if xmp:
            extra.append((b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)))
        return file[:33] + b"".join(chunk(*one) for one in extra) + file[33:]
    options = (
        {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WebP" else {}
    )
    if pixels.startswith("progressive"):
        options["progressive"] = True
    if exif:
        options["exif"] = exif
    if icc:
        options["icc_profile"] = icc
    if "transparency" in file.info:
        options["transparency"] = file.info["transparency"]
    if xmp and kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode(), zip=True)
        options["pnginfo"] = info
    elif xmp:
        options["xmp"] = xmp
    out = io.BytesIO()
    file.save(out, kind.upper(), **options)
    return out.getvalue()
