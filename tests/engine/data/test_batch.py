"""A batch's pixels, and what networks take in their place."""

import pytest
import torch

from millrace.engine.data import signed_unit

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
def test_every_byte_is_divided_and_rounded_alike_on_every_device(device):
    pixels = torch.arange(256, dtype=torch.uint8)
    found = signed_unit(pixels.to(device))
    assert found.device.type == device
    assert torch.equal(found.cpu(), pixels.float().div_(127.5).sub_(1))
    assert (found[0], found[255]) == (-1, 1)
    assert torch.equal(pixels, torch.arange(256, dtype=torch.uint8))  # not in place
