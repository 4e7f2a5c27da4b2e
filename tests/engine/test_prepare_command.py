import shlex

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


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [("--aspect", "mixed"), ("--aspect", "square"), ("--upscale",)],
    ids=["mixed", "square", "upscale"],
)
def test_the_last_line_is_a_command_that_trains(runs, photos, tmp_path, capsys, more):
    Image.new("RGB", (40, 10)).save(photos / "small.png")
    (photos / "small.txt").write_text("too small for its bucket")
    out = tmp_path / "a set"
    assert prepare.main([*words(photos, out, "--workers", "0"), *more]) == 0
    lines = capsys.readouterr().out.splitlines()
    small = [line for line in lines if "rejected 1 too_small" in line]
    assert [line.endswith("such as small.png; --upscale takes such pictures") for line in small] == (
        [] if more == ("--upscale",) else [True]
    )
    said, _, command = lines[-1].partition(": ")
    assert said == "train with"
    program, name, *arguments = shlex.split(command)
    assert (program, name) == ("millrace", "train")
    tiny = ["run.steps=2", f"run.output_dir={tmp_path / 'run'}", "model.width=20", "model.depth=1"]
    tiny += ["sampling.every_steps=0", "data.global_batch=4", "data.micro_batch=4"]
    done = runs.script("train", *arguments, *(word for change in tiny for word in ("--set", change)))
    assert done.returncode == 0, done.stderr
    assert "finished: 2 steps, 8 samples" in done.stderr


def test_a_run_does_not_write_into_its_data(runs, photos, tmp_path):
    for data, output, how in (
        (photos, photos / "run", "lies in"),
        (tmp_path, photos, "lies in"),
        (photos, tmp_path, "holds"),
    ):
        changes = ["data.source=folder", f"data.path={data}", f"run.output_dir={output}"]
        words = [word for change in changes for word in ("--set", change)]
        done = runs.script("train", "--config", "quickstart", *words)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: run.output_dir {output} {how} data.path {data}: ")
        assert len(done.stderr.splitlines()) == 1


def test_prx_buckets(tmp_path):
    pictures = tmp_path / "wide"
    pictures.mkdir()
    Image.new("RGB", (400, 180)).save(pictures / "a.png")
    (pictures / "a.txt").write_text("a caption")
    arguments = ["--input", pictures, "--output", tmp_path / "out", "--resolution", 256, "--aspect", "prx"]
    assert prepare.main([*map(str, arguments), "--workers", "0"]) == 0
    assert (tmp_path / "out" / "160x352" / "00000.tar").exists()


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
