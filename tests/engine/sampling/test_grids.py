"""Grids of pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from millrace.engine.sampling.grids import save_grid


@pytest.mark.parametrize(("count", "columns"), [(5, 3), (4, None), (1, None)])
def test_grid_is_row_by_row(tmp_path, count, columns):
    """Pictures of 2 x 4 pixels, each of one grey; what no picture fills stays black."""
    greys = torch.linspace(-1, 1, 5)[:count]
    save_grid(greys[:, None, None, None].expand(count, 3, 2, 4), tmp_path / "a" / "grid.png", columns)
    found = np.asarray(Image.open(tmp_path / "a" / "grid.png"))
    across = columns or 1  # one column of four flat pictures is as square as two
    rows = -(-count // across)
    assert found.shape == (2 * rows, 4 * across, 3)
    levels = [round((float(grey) + 1) * 127.5) for grey in greys] + [0] * (rows * across - count)
    for i, level in enumerate(levels):
        top, left = 2 * (i // across), 4 * (i % across)
        assert np.unique(found[top : top + 2, left : left + 4]).tolist() == [level]


def test_grid_cuts_off_what_a_pixel_cannot_show(tmp_path):
    save_grid(torch.tensor([-7.0, 7.0])[:, None, None, None].expand(2, 3, 1, 1), tmp_path / "g.png", 2)
    assert np.asarray(Image.open(tmp_path / "g.png"))[0, :, 0].tolist() == [0, 255]
