import numpy as np
import pytest
from PIL import Image

from millrace.engine import prepare
from millrace.engine.util.errors import UserError


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        pixels = np.full((40 + 10 * (i % 2), 50, 3), 30 * i, np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"caption {i}")
    return folder


def words(photos, output, *more):
    return ["--input", str(photos), "--output", str(output), "--resolution", "32", "--patch", "16", *more]


def test_a_data_set_is_made_verified_and_summed_up(photos, tmp_path, capsys):
    (photos / "bad.jpg").write_bytes(b"")
    (photos / "bad.txt").write_text("a caption")
    out = tmp_path / "out"
    assert prepare.main(words(photos, out, "--workers", "0", "--max-bad-share", "0.2")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{out}: 6 of 7 inputs in ")
    assert lines[1] == "  rejected 1 empty_picture, such as bad.jpg"
    for words_of_it in (["verify", str(out)], ["--verify", str(out)], [f"--verify={out}", "--workers", "1"]):
        assert prepare.main(words_of_it) == 0
        assert "every file is as its manifest says" in capsys.readouterr().out
    (out / "rejects.jsonl").unlink()
    next(out.glob("*/*.idx")).write_text("")
    with pytest.raises(UserError, match="is not the index of its tar"):
        prepare.main(["verify", str(out)])


def test_errors_are_one_line(runs, photos, tmp_path):
    (photos / "0.txt").unlink()
    done = runs.script("prepare", *words(photos, tmp_path / "out", "--workers", "0"))
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if not line.startswith("reading")]
    assert len(errors) == 1
    assert errors[0].startswith("error: 1 of 6 inputs are bad")
    assert "1 missing_caption (0.png)" in errors[0]


def test_arguments(photos, tmp_path, capsys):
    with pytest.raises(SystemExit):
        prepare.main(["--input", str(photos)])
    assert "required: --output, --resolution" in capsys.readouterr().err
    for bad in (["--workers", "-1"], ["--max-bad-share", "2"], ["--shard-bytes", "x"], ["--resolution", "0"]):
        with pytest.raises(SystemExit):
            prepare.main([*words(photos, tmp_path / "out"), *bad])
        assert bad[0] in capsys.readouterr().err
