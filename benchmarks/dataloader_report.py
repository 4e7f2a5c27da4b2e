"""What `dataloader.py` prints, and what the performance page takes from its file."""

from typing import Any

from columns import aligned

Row = dict[str, Any]

PACKAGES = ("pillow", "nvidia-dali-cuda130", "webdataset", "mosaicml-streaming")

TARGETS = (
    ("dense, 256 px latents", "256", 300),
    ("dense, 1024 px pixels", "1024", 85),
    ("TREAD, 1024 px pixels", "1024", 125),
    ("SPRINT, 1024 px pixels", "1024", 165),
)
"""Training, the case that feeds it, and the images/s that one H200 is to reach."""


def table(rows: list[Row]) -> str:
    """`cells` for a terminal."""
    return "\n".join(aligned(cells(rows), 3))


def cells(rows: list[Row]) -> list[list[str]]:
    """A head, and a line for each loader in each case, the fastest first."""
    lines = [["case", "loader", "filter", "images/s", "p20-p80", "per core", "CPU ms", "to best peer"]]
    for case in dict.fromkeys(row["case"] for row in rows):
        for row in ranked(rows, case):
            ratio = against_best_peer(rows, row)
            lines.append(
                [
                    case,
                    row["loader"],
                    row["filter"],
                    f"{row['images_per_second_median']:.1f}",
                    f"{row['images_per_second_p20']:.1f}-{row['images_per_second_p80']:.1f}",
                    f"{row['images_per_second_per_core']:.1f}",
                    f"{row['cpu_seconds_per_image'] * 1e3:.1f}",
                    f"{ratio:.2f}" if ratio and row["ours"] else "",
                ]
            )
    return lines


def notes(result: dict[str, Any]) -> str:
    """What was measured and how, in words."""
    cases = "; ".join(
        f"*{case['name']}*: {case['pictures']} JPEG files of {case['mean_megapixels']:.2f} megapixels and "
        f"{case['mean_bytes'] / 2**10:.0f} KiB on average, to {_output(case)}"
        for case in result["cases"]
    )
    versions = ", ".join(
        f"{name} {result['versions'][name]}" for name in PACKAGES if result["versions"].get(name)
    )
    return (
        f"Batches (B, 3, h, w) uint8 of random crops from the same files in the page cache. {cases}. "
        f"{result['rounds']} turns of {result['seconds']:g} s for each loader, interleaved, with as many "
        f"threads or worker processes as cores; {versions}. CPU ms: processor time of a loader and its "
        "workers per image. To best peer: images/s over those of the fastest loader that is not ours. The "
        "peers resize with Pillow as torchvision does, or, where the filter is bilinear, with torch's kernel "
        "as torchvision's v2 does with bytes."
    )


def _output(case: dict[str, Any]) -> str:
    edge = case["resolution"]
    return f"{edge} x {edge}" if case["square"] else f"{case['buckets']} buckets of about {edge} x {edge}"


def ranked(rows: list[Row], case: str) -> list[Row]:
    """Rows of one case, the fastest first."""
    return sorted(
        (row for row in rows if row["case"] == case), key=lambda row: -row["images_per_second_median"]
    )


def against_best_peer(rows: list[Row], row: Row) -> float | None:
    """images/s of a row over those of the fastest peer in its case; None without a peer."""
    peers = [peer["images_per_second_median"] for peer in ranked(rows, row["case"]) if not peer["ours"]]
    return row["images_per_second_median"] / max(peers) if peers else None


def needs(rows: list[Row]) -> list[tuple[str, int, str, float]]:
    """Training, images/s, our fastest loader in its case, and the cores with which that feeds one H200."""
    found = []
    for training, case, target in TARGETS:
        ours = [row for row in ranked(rows, case) if row["ours"]]
        if ours:
            found.append(
                (training, target, ours[0]["loader"], target / ours[0]["images_per_second_per_core"])
            )
    return found


def needs_in_words(rows: list[Row]) -> str:
    """A line for each throughput that the engine aims at."""
    return "\n".join(
        f"{training} at {target} images/s: {cores:.1f} cores with {loader}"
        for training, target, loader, cores in needs(rows)
    )
