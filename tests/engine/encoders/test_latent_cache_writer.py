"""Caches made by small networks of the real classes, and what training makes of them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from millrace.engine.config.loading import merge, parse_config
from millrace.engine.data import SampleStream, open_source
from millrace.engine.data.formats.shard_index import read_manifest
from millrace.engine.data.latent_cache import LatentCache, TextCache, cache_path
from millrace.engine.encoders import latent_cache_writer
from millrace.engine.encoders.autoencoder import autoencoder_entry, open_autoencoder
from millrace.engine.encoders.batch_encoder import BatchEncoder
from millrace.engine.encoders.frozen_networks import open_frozen
from millrace.engine.encoders.latent_cache_writer import write_caches
from millrace.engine.encoders.text_encoder import open_text_encoder, text_encoder_entry
from millrace.engine.model.layout import LayoutCache
from millrace.engine.util.errors import UserError

pytest.importorskip("transformers")
pytest.importorskip("diffusers")

CPU = torch.device("cpu")
COUNTS = {(32, 96): 6, (96, 32): 4}
"""Even, so that every pass has two pictures, as in training: another shape may round otherwise."""
DIM = 16


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    root = tmp_path_factory.mktemp("networks")
    kinds = ("flux1", "flux2", "dc_ae")
    made = {kind: str(autoencoder_entry(kind).tiny(root / kind)) for kind in kinds}
    made |= {kind: str(text_encoder_entry(kind).tiny(DIM, root / kind)) for kind in ("t5gemma", "qwen3vl")}
    return made


@pytest.fixture
def dataset(tmp_path, write_shards):
    write_shards(tmp_path / "set", COUNTS)
    return tmp_path / "set"


CHANNELS = {"flux1": (16, 8, "raw"), "flux2": (128, 16, "patchified"), "dc_ae": (32, 32, "raw")}


def configured(runs, networks, path, *changes, text="t5gemma", autoencoder="flux1"):
    channels, _, form = CHANNELS[autoencoder]
    return parse_config(
        runs.values(
            path / "run",
            {
                "model": {"in_channels": channels, "context_dim": DIM, "patch_size": 1},
                "objective": {"prediction": "velocity"},
                "conditioning": {
                    "text": {"kind": text, "path": networks[text], "max_tokens": 14},
                    "autoencoder": {"kind": autoencoder, "path": networks[autoencoder], "form": form},
                    "caption_drop": 0.3,
                },
                "precision": {"compute": "bfloat16"},
                "data": {
                    "source": "shards",
                    "path": str(path),
                    "aspect": "bucket",
                    "bucket_run": 2,
                    "resolution": 64,
                    "crop": "center",
                },
            },
            *changes,
        ),
        "test",
    )


def with_caches(config, *kinds):
    return parse_config(merge(config.model_dump(mode="json"), {"data": {"cached": list(kinds)}}), "test")


def prepared(config, batches=12):
    """What training gets, and the networks; all batches of one run."""
    source = open_source(config.data)
    frozen = open_frozen(config, source, CPU, open_autoencoder, open_text_encoder)
    edge = config.model.patch_size * frozen.autoencoder.factor
    stream = SampleStream(
        source,
        config.data,
        seed=0,
        patch=edge,
        caption_drop=config.conditioning.caption_drop,
        rank=0,
        world_size=1,
        caches=frozen.caches,
    )
    layouts = LayoutCache((8, 8), 1e4)
    prepare = BatchEncoder(frozen.autoencoder, frozen.text_encoder, layouts, config.model.patch_size, 0, CPU)
    try:
        return SimpleNamespace(frozen=frozen, batches=[prepare(next(stream)) for _ in range(batches)])
    finally:
        stream.close()


def loaded(found):
    return "network" in vars(found.frozen.autoencoder), "tower" in vars(found.frozen.text_encoder)


def assert_same(found, wanted, text=True):
    assert len(found.batches) == len(wanted.batches)
    for mine, theirs in zip(found.batches, wanted.batches, strict=True):
        assert mine.keys == theirs.keys
        assert mine.layout.grids == theirs.layout.grids
        assert mine.captions_cut == theirs.captions_cut
        assert torch.equal(mine.clean, theirs.clean)
        for name in ("sample_index", "unconditional"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name))
        for name in ("cu_seqlens", "cu_seqlens_text", "positions"):
            assert torch.equal(getattr(mine.layout, name), getattr(theirs.layout, name))
        assert mine.text.dtype == theirs.text.dtype
        assert not text or torch.equal(mine.text, theirs.text)


@pytest.mark.parametrize(
    ("text", "autoencoder"), [("t5gemma", "flux1"), ("qwen3vl", "flux2"), ("t5gemma", "dc_ae")]
)
def test_cached_and_live_conditioning_are_the_same_bits(runs, networks, dataset, text, autoencoder):
    config = configured(runs, networks, dataset, text=text, autoencoder=autoencoder)
    write_caches(dataset, config, ("text", "latents"), say=list)
    live = prepared(config)
    cached = prepared(with_caches(config, "text", "latents"))
    assert loaded(cached) == (False, False)
    assert_same(cached, live)
    assert cached.frozen.autoencoder.identity == live.frozen.autoencoder.identity
    assert cached.frozen.text_encoder.identity == live.frozen.text_encoder.identity
    whole = [batch for batch in live.batches if bool(batch.unconditional.any())]
    assert whole
    assert any(batch.captions_cut for batch in live.batches)
    assert len({batch.layout.grids for batch in live.batches}) == 2
    # A grid of samples decodes with the same network, which is loaded for it.
    latents = torch.randn(
        1,
        *live.frozen.autoencoder.sample(live.frozen.autoencoder.posterior(torch.zeros(1, 3, 64, 64))).shape[
            1:
        ],
    )
    assert torch.equal(cached.frozen.autoencoder.decode(latents), live.frozen.autoencoder.decode(latents))


@pytest.mark.parametrize("kind", ["text", "latents"])
def test_each_cache_works_without_the_other(runs, networks, dataset, kind):
    config = configured(runs, networks, dataset)
    write_caches(dataset, config, (kind,), say=list)
    cached = prepared(with_caches(config, kind))
    assert_same(cached, prepared(config))
    assert loaded(cached)[0] == (kind == "text")
    other = {"text": "latents", "latents": "text"}[kind]
    with pytest.raises(UserError, match=f"no {other} cache; make it with millrace cache {other}"):
        prepared(with_caches(config, kind, other))


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_int8_rows_are_within_their_bound(runs, networks, dataset, compute):
    config = configured(runs, networks, dataset, {"precision": {"compute": compute}})
    write_caches(dataset, config, ("text",), text_dtype="int8", say=list)
    live, cached = prepared(config), prepared(with_caches(config, "text"))
    assert_same(cached, live, text=False)
    worst = 0.0
    for mine, theirs in zip(cached.batches, live.batches, strict=True):
        exact, absmax = theirs.text.double(), theirs.text.double().abs().amax(1, keepdim=True)
        bound = absmax / 254 * (1 + 1e-5)
        if compute == "bfloat16":  # training has the rows in the tower's dtype, which rounds once more
            bound = bound + (absmax + bound) * 2**-9
        error = (mine.text.double() - exact).abs()
        assert bool((error <= bound).all())
        worst = max(worst, float((error / bound).max()))
        for i, dropped in enumerate(theirs.unconditional.tolist()):
            rows = slice(*theirs.layout.cu_seqlens_text[i : i + 2].tolist())
            assert not dropped or torch.equal(mine.text[rows], theirs.text[rows])  # stored exactly
    assert worst > 0.5
    sizes = {path.name: path.stat().st_size for path in dataset.glob("*/*.text.safetensors")}
    assert sizes


def mixture_of(config, cached, plain):
    part = {"source": "shards", "path": str(cached), "name": "cached"}
    other = {"source": "shards", "path": str(plain), "name": "plain"}
    data = {"source": "mixture", "path": None, "mixture": [part, other], "micro_batch": 4, "bucket_run": 4}
    return parse_config(merge(config.model_dump(mode="json"), {"data": data}), "test")


def test_parts_without_a_cache_are_live(runs, networks, dataset, tmp_path, write_shards):
    config = configured(runs, networks, dataset)
    write_caches(dataset, config, ("text", "latents"), say=list)
    write_shards(tmp_path / "plain", {(32, 96): 4})
    mixed = mixture_of(config, dataset, tmp_path / "plain")
    live = prepared(mixed)
    found = prepared(with_caches(mixed, "text", "latents"))
    assert_same(found, live)
    assert "tower" not in vars(found.frozen.text_encoder)  # opened at once: a part needs it
    assert {key.split("/")[0] for batch in live.batches for key in batch.keys} == {"cached", "plain"}
    assert len(found.frozen.lines) == 2
    assert all("other parts go through the network" in line for line in found.frozen.lines)


def test_one_batch_may_hold_kept_and_live_samples(runs, networks, dataset):
    config = configured(runs, networks, dataset, {"data": {"micro_batch": 4, "bucket_run": 4}})
    write_caches(dataset, config, ("text", "latents"), say=list)
    live, cached = config, with_caches(config, "text", "latents")
    source = open_source(config.data)
    frozen = open_frozen(cached, source, CPU, open_autoencoder, open_text_encoder)

    def batches(c, caches):
        stream = SampleStream(
            source, c.data, seed=0, patch=8, caption_drop=0.3, rank=0, world_size=1, caches=caches
        )
        # Where no picture is read, nobody is said to decode.
        assert stream.loader.startswith("latents of the cache, ") is (caches is not None)
        return [next(stream) for _ in range(6)]

    # Its networks load when they are asked for the samples that are not kept.
    prepare = BatchEncoder(frozen.autoencoder, frozen.text_encoder, LayoutCache((8, 8), 1e4), 1, 0, CPU)
    for whole, kept in zip(batches(live, None), batches(cached, frozen.caches), strict=True):
        assert kept.images == [None] * 4
        for chosen in ((0,), (1, 3), (0, 1, 2)):
            for i in range(4):
                if i in chosen:
                    kept.images[i], kept.text[i], kept.posteriors[i] = whole.images[i], None, None
            mine, theirs = prepare(kept), prepare(whole)
            assert torch.equal(mine.clean, theirs.clean)
            assert torch.equal(mine.text, theirs.text)
            assert torch.equal(mine.layout.cu_seqlens_text, theirs.layout.cu_seqlens_text)


REFUSED = {
    "another tower": ({"conditioning": {"text": {"kind": "qwen3vl"}}}, ["kind t5gemma, not qwen3vl"]),
    "other max_tokens": ({"conditioning": {"text": {"max_tokens": 15}}}, ["max_tokens 14, not 15"]),
    "other arithmetic": ({"precision": {"compute": "float32"}}, ["dtype bfloat16, not float32"]),
    "other autoencoder dtype": (
        {"conditioning": {"autoencoder": {"dtype": "float32"}}},
        ["latents cache", "dtype bfloat16, not float32"],
    ),
    "alignment": (
        {"alignment": {"kind": "repa", "block": 1, "weight": 0.5}},
        ["data.cached has latents", "alignment"],
    ),
    "random crops": ({"data": {"crop": "random"}}, ["data.cached latents", "data.crop center"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_caches_that_do_not_fit_are_refused_in_one_line(runs, networks, dataset, case):
    changes, words = REFUSED[case]
    config = configured(runs, networks, dataset)
    write_caches(dataset, config, ("text", "latents"), say=list)
    if case == "another tower":
        changes = merge(changes, {"conditioning": {"text": {"path": networks["qwen3vl"]}}})

    def train():
        values = merge(
            config.model_dump(mode="json"),
            changes,
        )
        prepared(parse_config(merge(values, {"data": {"cached": ["text", "latents"]}}), "test"))

    with pytest.raises(UserError) as caught:
        train()
    assert "\n" not in str(caught.value)
    for part in words:
        assert part in str(caught.value), str(caught.value)


def test_a_tower_whose_weights_changed_is_another(runs, networks, dataset, tmp_path):
    copy = text_encoder_entry("t5gemma").tiny(DIM, tmp_path / "tower")
    config = configured(runs, {**networks, "t5gemma": str(copy)}, dataset)
    write_caches(dataset, config, ("text",), say=list)
    (weights,) = copy.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"text cache was made by another network.*digest \w{12}, not \w{12}"):
        prepared(with_caches(config, "text"))


def test_equal_captions_are_computed_and_stored_once(runs, networks, dataset, monkeypatch):
    asked = []

    def open_counting(*arguments):
        tower = open_text_encoder(*arguments)
        rows = tower._rows
        tower._rows = lambda captions: asked.extend(captions) or rows(captions)
        return tower

    same = SimpleNamespace(long="One  caption", short="one caption")
    monkeypatch.setattr(latent_cache_writer.ShardsSource, "captions", lambda self, i: same)
    monkeypatch.setattr(latent_cache_writer, "open_text_encoder", open_counting)
    write_caches(dataset, configured(runs, networks, dataset), ("text",), say=list)
    manifest = read_manifest(dataset)
    assert asked == ["", *["one caption"] * len(manifest.shards)]
    assert len(load_file(dataset / cache_path(manifest.shards[0], "text"))["cut"]) == 1
    cache = TextCache(dataset, manifest)
    assert torch.equal(cache.rows((0, 0), "long").rows, cache.rows((0, 3), "short").rows)


def test_what_cannot_be_read_has_no_cache_and_is_named(runs, networks, dataset):
    shard = read_manifest(dataset).shards[0]
    tar = dataset / shard.file
    data = bytearray(tar.read_bytes())
    data[600] ^= 0xFF  # inside the first picture
    tar.write_bytes(data)
    said = []
    write_caches(dataset, configured(runs, networks, dataset), ("text", "latents"), say=said.append)
    assert any("text: 1 samples could not be read" in line and str(tar.parent) in line for line in said), said
    assert any("latents: 1 samples could not be read" in line for line in said)
    manifest = read_manifest(dataset)
    latents, text = LatentCache(dataset, manifest), TextCache(dataset, manifest)
    assert latents.moments((0, 0)) is None
    assert text.rows((0, 0), "long") is None
    assert latents.moments((0, 1)) is not None
    assert text.rows((0, 1), "short") is not None


def test_pictures_with_cached_latents_are_not_decoded(runs, networks, dataset, monkeypatch):
    config = configured(runs, networks, dataset)
    write_caches(dataset, config, ("latents",), say=list)

    def refuse(*_arguments):
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr(latent_cache_writer.ShardsSource, "image", refuse)
    monkeypatch.setattr(Image, "open", refuse)
    found = prepared(with_caches(config, "latents"), batches=3)
    assert len(found.batches) == 3


def test_rows_that_are_not_finite_are_not_quantised(runs, networks, dataset, monkeypatch):
    tower = SimpleNamespace(
        clean=str, rows=lambda captions: [(torch.full((1, DIM), np.inf), False) for _ in captions]
    )
    monkeypatch.setattr(latent_cache_writer, "open_text_encoder", lambda *_: tower)
    with pytest.raises(UserError, match=r"not finite.*--text-dtype bf16"):
        write_caches(dataset, configured(runs, networks, dataset), ("text",), text_dtype="int8", say=list)
    assert not list(dataset.glob("*/*.text.safetensors*"))


@pytest.mark.parametrize("changes", [{"kind": "pixels"}, {"tuning": SimpleNamespace(enabled=True)}])
def test_no_latents_of_an_autoencoder_that_has_or_keeps_none(runs, networks, dataset, changes):
    config = configured(runs, networks, dataset)
    section = config.conditioning.autoencoder.model_copy(update=changes)
    conditioning = config.conditioning.model_copy(update={"autoencoder": section})
    config = config.model_copy(update={"conditioning": conditioning})
    with pytest.raises(UserError, match=r"--cache latents: conditioning\.autoencoder"):
        write_caches(dataset, config, ("latents",), say=list)


def test_all_kinds_are_checked_before_the_first_is_made(runs, dataset):
    """Text of a large data set takes hours; that there can be no latents is said before."""
    pixels = parse_config(runs.values(dataset / "run"), "test")
    assert pixels.conditioning.autoencoder.kind == "pixels"
    with pytest.raises(UserError, match=r"--cache latents: conditioning\.autoencoder: pixels has no latents"):
        write_caches(dataset, pixels, ("text", "latents"), say=list)
    assert not list(dataset.rglob("*.safetensors"))
    assert not (dataset / latent_cache_writer.PARTIAL).exists()


def test_files_say_what_they_are(runs, networks, dataset):
    config = configured(runs, networks, dataset)
    write_caches(dataset, config, ("text", "latents"), text_dtype="int8", say=list)
    manifest = read_manifest(dataset)
    text, latents = manifest.caches["text"], manifest.caches["latents"]
    assert (text["dtype"], latents["dtype"]) == ("int8", "bfloat16")
    assert text["network"]["kind"] == "t5gemma"
    assert [file["file"] for file in text["files"]] == [cache_path(s, "text") for s in manifest.shards]
    header = (dataset / cache_path(manifest.shards[0], "latents")).read_bytes()[8:4096].decode()
    assert json.loads(header)["__metadata__"]["of"] == manifest.shards[0].sha256
    assert json.loads(header)["moments"]["shape"] == [4, 2, 16, 4, 12]
