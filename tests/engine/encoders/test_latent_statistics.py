"""Statistics of latents on disk."""

import pytest
import torch
from safetensors.torch import save_file

from millrace.engine.encoders.latent_statistics import STATISTICS_FILE, load_statistics, save_statistics
from millrace.engine.util.errors import UserError

CPU = torch.device("cpu")
CHANNELS = 3


def test_saved_statistics_come_back(tmp_path):
    scale, shift = torch.rand(2, CHANNELS, 1, 1)
    save_statistics(tmp_path, scale, shift)
    found = load_statistics(tmp_path, CHANNELS, CPU, "the.key")
    assert torch.equal(found[0], scale)
    assert torch.equal(found[1], shift)


def test_a_folder_without_statistics_has_none(tmp_path):
    assert load_statistics(tmp_path, CHANNELS, CPU, "the.key") is None


def test_statistics_of_another_autoencoder_are_refused(tmp_path):
    save_file({"scale": torch.ones(4), "shift": torch.ones(4)}, tmp_path / STATISTICS_FILE)
    with pytest.raises(UserError, match=r"not the statistics of 3 channels.*the\.key"):
        load_statistics(tmp_path, CHANNELS, CPU, "the.key")
    (tmp_path / STATISTICS_FILE).write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"the\.key"):
        load_statistics(tmp_path, CHANNELS, CPU, "the.key")
