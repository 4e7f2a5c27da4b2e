"""What `dataloader.py` prints, and what the performance page takes from its file."""

from typing import Any

from columns import aligned

Row = dict[str, Any]

TARGETS = (
    ("dense, 256 px latents", "256", 300),
    ("dense, 1024 px pixels", "1024", 85),
    ("TREAD, 1024 px pixels", "1024", 125),
    ("SPRINT, 1024 px pixels", "1024", 165),
)
"""Training, the case that feeds it, and the images/s that one H200 is to reach."""


def table(rows: list[Row]) -> str:
    """A line for each loader in each case, the fastest first."""
    head = ["case", "loader", "filter", "images/s", "p20-p80", "per core", "CPU ms", "of the best peer"]
    lines = [head]
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
    return "\n".join(aligned(lines, 3))


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
