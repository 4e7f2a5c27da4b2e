"""Times and bytes of collectives against sums done by hand."""

import pytest

from millrace.engine.planning.devices import ASSUMED, GPUS, Hierarchy, Link, MeasuredNetwork, sent_bytes

NODES = Hierarchy(per_node=4, inside=Link(100.0, 0.5), between=Link(10.0, 2.0))


def test_bytes_that_a_process_sends():
    assert sent_bytes("all_gather", 800, 8) == 700
    assert sent_bytes("reduce_scatter", 800, 8) == 700
    assert sent_bytes("all_reduce", 800, 8) == 1400
    assert sent_bytes("all_reduce", 800, 1) == 0


def test_a_ring_within_a_node():
    # 800 bytes on 4 devices: 3 steps of 200 bytes at 100 bytes/s, 0.5 s of latency each.
    assert NODES.seconds("all_gather", 800, 4) == pytest.approx(3 * (2 + 0.5))
    assert NODES.seconds("all_reduce", 800, 4) == pytest.approx(2 * 3 * (2 + 0.5))
    assert NODES.seconds("all_gather", 800, 2) == pytest.approx(1 * (4 + 0.5))
    assert NODES.seconds("all_reduce", 800, 1) == 0


def test_a_ring_between_nodes_has_what_the_node_left():
    # Each of 4 devices has 200 of the 800 bytes left; 2 nodes: one step of 100 bytes at 10 bytes/s.
    inside = 3 * (2 + 0.5)
    assert NODES.seconds("reduce_scatter", 800, 8) == pytest.approx(inside + 10 + 2)
    # 4 nodes: three steps of 50 bytes.
    assert NODES.seconds("reduce_scatter", 800, 16) == pytest.approx(inside + 3 * (5 + 2))


def test_all_to_all_goes_through_both_ways_at_once():
    # 1600 bytes on 16: each holds 100, 3/16 of them stay near, 12/16 go far.
    assert NODES.seconds("all_to_all", 1600, 16) == pytest.approx(75 / 10 + 2)
    assert NODES.seconds("all_to_all", 1600, 4) == pytest.approx(300 / 100 + 0.5)


def test_measured_times_are_interpolated():
    network = MeasuredNetwork({"all_reduce": [(100, 1.0), (200, 2.0), (400, 6.0)]})
    assert network.seconds("all_reduce", 150, 2) == pytest.approx(1.5)
    assert network.seconds("all_reduce", 300, 2) == pytest.approx(4.0)
    assert network.seconds("all_reduce", 500, 2) == pytest.approx(8.0)  # goes on as between the last two
    assert network.seconds("all_reduce", 1, 2) == pytest.approx(1.0)  # no less than the least measured
    assert network.seconds("all_reduce", 500, 1) == 0


def test_data_sheets():
    h200, h100 = GPUS["h200"], GPUS["h100"]
    assert h200.peak_flops == h100.peak_flops == 989e12
    assert (h200.memory, h100.memory) == (141e9, 80e9)
    assert h200.copy_bandwidth / h100.copy_bandwidth == pytest.approx(4.8 / 3.35)
    assert h200.capacity < h200.memory


@pytest.mark.parametrize(
    ("device", "kind"), [("a100-80gb", "NVLink"), ("rtx4090", "PCIe"), ("mi300x", "Infinity Fabric")]
)
def test_of_the_links_only_its_own_is_assumed(device, kind):
    shares = {f"share of the {kind} bandwidth" for kind in ("NVLink", "PCIe", "Infinity Fabric")}
    assert shares <= set(ASSUMED)
    assert shares & set(GPUS[device].assumed) == {f"share of the {kind} bandwidth"}


def test_a_collective_is_slower_on_pcie():
    seconds = {name: device.network.seconds("all_reduce", 1e9, 8) for name, device in GPUS.items()}
    assert sorted(seconds, key=seconds.__getitem__)[:2] == ["b200", "h200"]
    assert seconds["rtx5090"] < seconds["rtx4090"] == seconds["rtx3090"]
    # 2 x 7/8 GB at 0.6 of 32 GB/s, and 14 hops.
    assert seconds["rtx4090"] == pytest.approx(2 * 7 / 8 / (0.6 * 32) + 14 * 3e-6)


def test_calibration_is_no_assumption():
    h200 = GPUS["h200"]
    calibrated = h200.calibrated(1.5)
    assert calibrated.slack == 1.5
    assert set(h200.assumed) - set(calibrated.assumed) == {
        "step over the roofline of its products and its memory traffic"
    }
