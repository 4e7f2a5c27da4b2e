"""Which data sheet belongs to a device's name, and that the sheets agree with the table of the module."""

import re

import pytest

from millrace.engine.util import data_sheets
from millrace.engine.util.data_sheets import PEAK_BF16, SHEETS, peak_flops, sheet_name

NAMES = [
    ("NVIDIA H200", 989, "h200"),
    ("NVIDIA H200 NVL", 835, None),
    ("NVIDIA H100 80GB HBM3", 989, "h100"),
    ("NVIDIA H100 PCIe", 756, None),
    ("NVIDIA H100 NVL", 835, None),
    ("NVIDIA GH200 480GB", 989, None),
    ("NVIDIA GB200", 2500, None),
    ("NVIDIA B200", 2250, "b200"),
    ("NVIDIA A100-SXM4-80GB", 312, "a100-80gb"),
    ("NVIDIA A100-SXM4-40GB", 312, "a100-40gb"),
    ("NVIDIA A100 80GB PCIe", 312, None),
    ("NVIDIA RTX A1000", None, None),
    ("AMD Instinct MI300X", 1307, "mi300x"),
    ("NVIDIA GeForce RTX 3090", 71, "rtx3090"),
    ("NVIDIA GeForce RTX 3090 Ti", None, None),
    ("NVIDIA GeForce RTX 4090", 165.2, "rtx4090"),
    ("NVIDIA GeForce RTX 4090 D", None, None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
    ("NVIDIA GeForce RTX 5090", 209.5, "rtx5090"),
    ("NVIDIA GeForce RTX 2080", None, None),
]


@pytest.mark.parametrize(("device", "tera", "key"), NAMES)
def test_by_device_name(device, tera, key):
    assert peak_flops(device) == (tera and tera * 1e12)
    assert sheet_name(device) == key


def test_the_table_says_what_is_calculated_with():
    units = {"GB": 1e9, "TB": 1e12}
    rows = {}
    for line in data_sheets.__doc__.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells and cells[0].startswith("`") and cells[0] != "`--device`":
            rows[cells[0].strip("`")] = cells[1:]
    assert set(rows) == set(SHEETS)
    for name, (tera, memory, bandwidth, link, network, _) in rows.items():
        sheet = SHEETS[name]
        assert PEAK_BF16[sheet.chip] == float(tera) * 1e12
        assert sheet.memory == float(memory.removesuffix(" GB")) * 1e9
        number, unit = bandwidth.removesuffix("/s").split()
        assert sheet.bandwidth == pytest.approx(float(number) * units[unit])
        assert link.startswith(sheet.link_kind)
        assert sheet.link == float(re.search(r"(\d+) GB/s", link)[1]) * 1e9
        cards, _, speed = network.rpartition("x ")
        count = int(cards) if cards else 1
        assert sheet.network == count * float(speed.removesuffix(" Gb/s")) * 1e9 / 8 / 8
