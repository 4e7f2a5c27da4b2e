"""Data sheets of GPUs: peak rates, memory and links, and the sheet that belongs to a device's name.

| `--device`  | BF16 TFLOP/s | memory | bandwidth  | link, one direction       | network of a node | source |
|-------------|--------------|--------|------------|---------------------------|-------------------|--------|
| `rtx3090`   | 71           | 24 GB  | 936 GB/s   | PCIe 4 x16, 32 GB/s       | 100 Gb/s          | [1]    |
| `rtx4080`   | 97.5         | 16 GB  | 716.8 GB/s | PCIe 4 x16, 32 GB/s       | 100 Gb/s          | [2]    |
| `rtx4090`   | 165.2        | 24 GB  | 1008 GB/s  | PCIe 4 x16, 32 GB/s       | 100 Gb/s          | [2]    |
| `rtx5090`   | 209.5        | 32 GB  | 1792 GB/s  | PCIe 5 x16, 64 GB/s       | 100 Gb/s          | [3]    |
| `a100-40gb` | 312          | 40 GB  | 1555 GB/s  | NVLink 3, 300 GB/s        | 8 x 200 Gb/s      | [4]    |
| `a100-80gb` | 312          | 80 GB  | 2039 GB/s  | NVLink 3, 300 GB/s        | 8 x 200 Gb/s      | [4]    |
| `h100`      | 989          | 80 GB  | 3.35 TB/s  | NVLink 4, 450 GB/s        | 8 x 400 Gb/s      | [5]    |
| `h200`      | 989          | 141 GB | 4.8 TB/s   | NVLink 4, 450 GB/s        | 8 x 400 Gb/s      | [5]    |
| `b200`      | 2250         | 180 GB | 8 TB/s     | NVLink 5, 900 GB/s        | 8 x 400 Gb/s      | [6]    |
| `mi300x`    | 1307         | 192 GB | 5.3 TB/s   | Infinity Fabric, 448 GB/s | 8 x 400 Gb/s      | [7]    |

BF16 is dense (without sparsity) and accumulates in FP32, as training does: on GeForce cards half of what FP16
products reach that accumulate in FP16. A100, H100 and H200 are the SXM modules.

[1] NVIDIA Ampere GA102 whitepaper; [2] NVIDIA Ada whitepaper; [3] NVIDIA RTX Blackwell whitepaper; [4] NVIDIA
A100 and DGX A100 data sheets; [5] NVIDIA H100, H200, DGX H100 and DGX H200 data sheets; [6] NVIDIA HGX B200
and DGX B200 data sheets; [7] AMD Instinct MI300X data sheet: seven links of 64 GB/s. A link of PCIe: 16 lanes
of 16 or 32 Gb/s (PCI-SIG). No sheet gives the network of a node of GeForce cards or MI300X: one 100 Gb/s card
that its GPUs share and DGX H100's are taken. The RTX 3090's NVLink joins two cards and is left out.

Sizes are decimal as everywhere here: "80 GB" is taken as 80e9 bytes, though a driver may report up to 7 %
more.
"""

import re
from dataclasses import dataclass
from typing import Literal

LinkKind = Literal["NVLink", "PCIe", "Infinity Fabric"]

PEAK_BF16 = {
    "A100": 312e12,
    "A800": 312e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "GH200": 989e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "H800": 989e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
    "RTX 3090": 71e12,
    "RTX 4080": 97.5e12,
    "RTX 4090": 165.2e12,
    "RTX 5090": 209.5e12,
}
"""Dense BF16 FLOP/s with FP32 accumulation by the words of a device's name, from the makers' data sheets."""


@dataclass(frozen=True)
class Sheet:
    """What the maker says of a GPU and of a node of eight."""

    title: str
    """For people."""
    chip: str
    """Its name in PEAK_BF16."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes/s of the memory."""
    link_kind: LinkKind
    link: float
    """Bytes/s in one direction between GPUs of a node."""
    network: float
    """Bytes/s in one direction of a GPU's part of the network of its node."""
    words: tuple[str, ...] = ()
    """Besides that of the chip in the device's name, where others have the same chip."""


_CARD_100, _CARD_200, _CARD_400 = 100e9 / 8, 200e9 / 8, 400e9 / 8

SHEETS = {
    "h200": Sheet("H200 SXM", "H200", 141e9, 4.8e12, "NVLink", 450e9, _CARD_400),
    "h100": Sheet("H100 SXM", "H100", 80e9, 3.35e12, "NVLink", 450e9, _CARD_400),
    "b200": Sheet("B200 SXM", "B200", 180e9, 8e12, "NVLink", 900e9, _CARD_400),
    "a100-80gb": Sheet(
        "A100 SXM 80 GB", "A100", 80e9, 2.039e12, "NVLink", 300e9, _CARD_200, ("SXM4", "80GB")
    ),
    "a100-40gb": Sheet(
        "A100 SXM 40 GB", "A100", 40e9, 1.555e12, "NVLink", 300e9, _CARD_200, ("SXM4", "40GB")
    ),
    "mi300x": Sheet("MI300X", "MI300X", 192e9, 5.3e12, "Infinity Fabric", 448e9, _CARD_400),
    "rtx5090": Sheet("RTX 5090", "RTX 5090", 32e9, 1.792e12, "PCIe", 64e9, _CARD_100 / 8),
    "rtx4090": Sheet("RTX 4090", "RTX 4090", 24e9, 1.008e12, "PCIe", 32e9, _CARD_100 / 8),
    "rtx4080": Sheet("RTX 4080", "RTX 4080", 16e9, 0.7168e12, "PCIe", 32e9, _CARD_100 / 8),
    "rtx3090": Sheet("RTX 3090", "RTX 3090", 24e9, 0.936e12, "PCIe", 32e9, _CARD_100 / 8),
}
"""By the names of `millrace plan --device`."""


def peak_flops(device_name: str) -> float | None:
    """Peak dense BF16 FLOP/s of a GPU by the name that torch gives, or None if unknown."""
    chip = chip_of(device_name)
    return PEAK_BF16[chip] if chip else None


def sheet_name(device_name: str) -> str | None:
    """The key in SHEETS of a GPU by the name that torch gives, or None if there is none."""
    chip = chip_of(device_name)
    found = (
        key
        for key, sheet in SHEETS.items()
        if sheet.chip == chip and all(_says(device_name, word) for word in sheet.words)
    )
    return next(found, None)


def chip_of(device_name: str) -> str | None:
    """The longest entry of PEAK_BF16 that the name contains."""
    found = [chip for chip in PEAK_BF16 if _says(device_name, chip)]
    return max(found, key=len, default=None)


def _says(device_name: str, words: str) -> bool:
    """Whether a name has whole words: an RTX A1000 is no A100. A GeForce name that goes on (Ti, D, Laptop) is
    another card."""
    end = "$" if words.startswith("RTX ") else r"(?!\w)"
    return re.search(rf"(?<!\w){re.escape(words)}{end}", device_name) is not None
