import numpy as np
from PIL import Image

from millrace.engine.data.prepare.reports import ACROSS, THUMBNAIL, draw_caption_lengths, draw_contact_sheet
from millrace.engine.data.sources.shards import ShardsSource


def test_contact_sheet_has_a_row_a_bucket_in_its_shape(tmp_path, write_shards):
    colours = {16: (200, 30, 30), 48: (30, 30, 200)}
    write_shards(
        tmp_path / "set",
        {(16, 48): 20, (48, 16): 2},
        draw=lambda i, h, w: np.full((h, w, 3), colours[h], np.uint8),
    )
    draw_contact_sheet(ShardsSource(tmp_path / "set"), tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    red = np.abs(sheet - colours[16]).max(-1) < 12
    blue = np.abs(sheet - colours[48]).max(-1) < 12
    assert red.sum() == ACROSS * THUMBNAIL * (3 * THUMBNAIL)
    assert blue.sum() == 2 * THUMBNAIL * round(THUMBNAIL / 3)
    assert np.flatnonzero(red.any(1)).max() < np.flatnonzero(blue.any(1)).min()


def test_pictures_of_any_shape_fit(write_shards, tmp_path):
    """Rounding must not put the crop outside of the picture."""
    for h, w in ((32, 48), (37, 53), (736, 1440), (101, 67), (256, 256)):
        root = tmp_path / f"{h}x{w}"
        write_shards(root, {(h, w): 1})
        draw_contact_sheet(ShardsSource(root), root / "sheet.png")
        assert Image.open(root / "sheet.png").height == THUMBNAIL + 16


def test_a_damaged_picture_is_red_on_the_sheet(tmp_path, write_shards):
    write_shards(tmp_path / "set", {(16, 16): 1})
    source = ShardsSource(tmp_path / "set")
    tar = tmp_path / "set/16x16/00000.tar"
    tar.write_bytes(bytes(len(tar.read_bytes())))
    draw_contact_sheet(source, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert (sheet == (200, 0, 0)).all(-1).sum() == THUMBNAIL**2


def test_histogram_has_a_bar_where_captions_are(tmp_path):
    short = np.array([5] * 10 + [300])
    draw_caption_lengths(np.array([7]), short, tmp_path / "lengths.png")
    sheet = np.asarray(Image.open(tmp_path / "lengths.png"))
    bars = (sheet == (70, 110, 180)).all(-1)
    upper, lower = bars[:300].any(0), bars[300:].any(0)
    assert np.diff(np.flatnonzero(upper)).max() == 1  # one bar
    assert np.diff(np.flatnonzero(lower)).max() > 500  # two, at both ends
    heights = bars[300:].sum(0)
    assert heights.max() / heights[np.flatnonzero(lower)[-1]] > 9
