"""What autocast computes in, asked so that every admitted torch can compile the question."""

import pytest
import torch

from millrace.kernels import fp8_linear, gather_fuse
from millrace.kernels.support.autocast import autocast_dtype


def test_says_what_autocast_computes_in(device):
    assert autocast_dtype(device) is None
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device, dtype):
            assert autocast_dtype(device) == dtype
            with torch.autocast(device, enabled=False):
                assert autocast_dtype(device) is None


def test_devices_without_autocast_have_none():
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_dtype("meta") is None


OPERATIONS = {
    "fp8_linear": lambda x: fp8_linear(x, torch.ones(16, 16, device=x.device)),
    "gather_fuse": lambda x: gather_fuse(x, x, None, x[0], torch.cat((x, x), 1), x[1]),
}


@pytest.mark.parametrize("enabled", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_compiles_in_one_graph_where_dynamo_knows_less(operation, enabled, monkeypatch):
    """As with torch 2.11, whose Dynamo breaks the graph at `is_autocast_available`."""
    monkeypatch.setattr(
        torch.amp, "is_autocast_available", torch._dynamo.disable(torch.amp.is_autocast_available)
    )
    torch._dynamo.reset()
    x = torch.randn(16, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        got = torch.compile(operation, fullgraph=True, backend="aot_eager")(x)
        expected = operation(x)
    assert got.dtype == (torch.bfloat16 if enabled else torch.float32)
    torch.testing.assert_close(got, expected)
