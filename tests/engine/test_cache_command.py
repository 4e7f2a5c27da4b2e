"""The real commands: prepare.py --cache on two processes, then training from the caches."""

import argparse
import json
import os

import pytest
import torch

from millrace.engine import cache
from millrace.engine import prepare as prepare_command
from millrace.engine.config import Config
from millrace.engine.data.formats.shard_index import read_manifest
from millrace.engine.encoders.autoencoder import autoencoder_entry
from millrace.engine.encoders.text_encoder import text_encoder_entry
from millrace.engine.util.errors import UserError

pytest.importorskip("transformers")
pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def world(tmp_path_factory, write_shards, runs):
    """A data set, small networks, and the configuration of a run."""
    root = tmp_path_factory.mktemp("world")
    write_shards(root / "set", {(32, 64): 6, (64, 32): 6})
    changes = {
        "model": {"in_channels": 16, "patch_size": 2},
        "objective": {"prediction": "velocity"},
        "conditioning": {
            "text": {
                "kind": "t5gemma",
                "path": str(text_encoder_entry("t5gemma").tiny(16, root / "t5gemma")),
            },
            "autoencoder": {"kind": "flux1", "path": str(autoencoder_entry("flux1").tiny(root / "flux1"))},
            "caption_drop": 0.3,
        },
        "precision": {"compute": "bfloat16"},
        "data": {
            "source": "shards",
            "path": str(root / "set"),
            "resolution": 48,
            "aspect": "bucket",
            "bucket_run": 4,
            "crop": "center",
            "workers": 2,
        },
    }
    (root / "config.json").write_text(json.dumps(runs.values(root / "run", changes)))
    return root, changes


@pytest.mark.slow
def test_two_processes_make_caches_from_which_a_run_trains_as_it_does_live(world, runs, capsys):
    root, changes = world
    asked = ("--cache", "text,latents", "--dataset", root / "set", "--config", root / "config.json")
    done = runs.script("prepare", *asked, ranks=2)
    assert done.returncode == 0, done.stderr
    assert set(read_manifest(root / "set").caches) == {"text", "latents"}
    assert "complete" in done.stdout
    assert done.stdout.count("made 2 of its 2 shards") == 4
    assert prepare_command.main(["--verify", str(root / "set"), "--workers", "1"]) == 0
    assert "every file is as its manifest says" in capsys.readouterr().out

    held_out = {"validation": {"share": 0.4, "every_steps": 3, "times": 2}}
    assert runs.here(root / "live", changes, held_out).error is None
    cache_read = {"data": {"cached": ["text", "latents"]}}
    assert runs.here(root / "cached", changes, held_out, cache_read).error is None
    # Other processes wrote the caches, perhaps with other numbers of threads: BF16 may round otherwise.
    # That nothing else differs is shown to the bit within one process, in test_latent_cache_writer.py.
    cached, live = (losses(root / name) for name in ("cached", "live"))
    assert len(live) == 6
    assert cached == pytest.approx(live, rel=1e-3)
    cached, live = (held_out_losses(root / name) for name in ("cached", "live"))
    assert len(live) == 4
    for (looked_at, found), (wanted_set, wanted) in zip(cached, live, strict=True):
        assert looked_at == wanted_set
        assert found == pytest.approx(wanted, rel=1e-2)
    lines = capsys.readouterr().err
    for kind, dtype in (("text", "bfloat16"), ("latents", "bfloat16")):
        assert f"cached {kind} ({dtype}): {root / 'set'}" in lines


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def held_out_losses(folder):
    records = map(json.loads, (folder / "validation.jsonl").read_text().splitlines())
    return [(record["set"], record["losses"]) for record in records]


@pytest.mark.slow
def test_a_run_with_grids_loads_what_it_draws_with(world, runs):
    root, changes = world
    if "text" not in read_manifest(root / "set").caches:
        asked = ["--cache", "text,latents", "--dataset", str(root / "set"), "--config"]
        assert prepare_command.main([*asked, str(root / "config.json")]) == 0
    grids = {"sampling": {"every_steps": 3, "count": 2, "steps": 2}, "data": {"cached": ["text", "latents"]}}
    assert runs.here(root / "grids", changes, grids).error is None
    assert len(list((root / "grids" / "samples").glob("*.png"))) == 2


def test_a_data_set_that_is_not_there(world):
    root, _ = world
    (root / "sett").mkdir(exist_ok=True)
    with pytest.raises(UserError) as caught:
        cache.main(["text", "--dataset", str(root / "seet"), "--config", str(root / "config.json")])
    assert str(caught.value).startswith(f"--dataset {root / 'seet'}: no such file or folder; did you mean")
    with pytest.raises(UserError, match="manifest"):
        cache.main(["text", "--dataset", str(root / "sett"), "--config", str(root / "config.json")])


def test_the_former_spelling_is_the_same_command(monkeypatch):
    given = []
    monkeypatch.setattr(cache, "main", lambda words: given.append(cache.build_parser().parse_args(words)))
    rest = ["--dataset", "d", "--config", "c", "--replace"]
    for words in (["--cache", "text,latents", *rest], ["--local_rank=0", *rest, "--cache=text,latents"]):
        prepare_command.main(words)
    assert [(a.kinds, a.dataset, a.config, a.replace) for a in given] == [
        (("text", "latents"), "d", "c", True)
    ] * 2


def test_threads_are_shared_between_processes_of_a_machine(monkeypatch, tmp_path):
    from millrace.engine.config import loading
    from millrace.engine.encoders import latent_cache_writer

    before = torch.get_num_threads()
    seen = []
    monkeypatch.setattr(
        latent_cache_writer, "write_caches", lambda *_, **__: seen.append(torch.get_num_threads())
    )
    monkeypatch.setattr(loading, "load_config", lambda *_: Config())
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    job = {"RANK": "0", "WORLD_SIZE": "64", "LOCAL_RANK": "0", "LOCAL_SIZE": "64"}
    for name, value in (job | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    try:
        assert cache.main(["text", "--dataset", str(tmp_path), "--config", "y"]) == 0
        assert seen == [max(1, len(os.sched_getaffinity(0)) // 64)]
    finally:
        torch.set_num_threads(before)


def test_kinds_on_the_command_line():
    assert cache.cache_kinds("text,latents") == ("text", "latents")
    assert cache.cache_kinds(" latents ") == ("latents",)
    for wrong in ("", "txt", "text,pixels"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no cache; give text, latents or both"):
            cache.cache_kinds(wrong)
