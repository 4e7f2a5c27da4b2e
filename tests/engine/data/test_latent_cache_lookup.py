"""Which cache a picture's rows come from, whatever the source is made of."""

import pytest
import torch

from millrace.engine.config import Data, TextTower
from millrace.engine.config.data import Part
from millrace.engine.config.loading import parse_config
from millrace.engine.data import open_source
from millrace.engine.data.latent_cache import Caches
from millrace.engine.data.sources.key_subset import keep_listed, write_keys
from millrace.engine.data.sources.mixture import MixtureSource
from millrace.engine.data.sources.shards import ShardsSource
from millrace.engine.encoders.latent_cache_writer import write_caches
from millrace.engine.encoders.text_encoder import open_text_encoder
from millrace.engine.util.errors import UserError

DIM = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory, write_shards, runs):
    """Two data sets with text caches, and one without."""
    root = tmp_path_factory.mktemp("sets")
    for name, counts in (("a", {(16, 32): 6, (32, 16): 3}), ("b", {(16, 32): 5}), ("plain", {(16, 32): 2})):
        write_shards(root / name, counts)
        if name != "plain":
            config = parse_config(runs.values(root / "run", {"model": {"context_dim": DIM}}), "test")
            write_caches(root / name, config, ("text",), say=list)
    return root


def expected(caption):
    tower = open_text_encoder(TextTower(kind="hash"), DIM, torch.device("cpu"), torch.float32)
    return tower.encode([caption]).embeddings


def assert_right(source, picture, caches):
    captions = source.captions(picture)
    for which in ("long", "short"):
        found = caches.text(picture, which)
        assert torch.equal(found.rows, expected(getattr(captions, which)).bfloat16())
    assert torch.equal(caches.text(picture, "empty").rows, expected(""))  # stored exactly


def test_every_picture_of_shards_has_its_own(folders):
    source = open_source(Data(source="shards", path=str(folders / "a")))
    caches = Caches(source, ("text",))
    assert caches.complete("text")
    assert not caches.complete("latents")
    assert len(caches.of("text")) == 1
    for picture in range(len(source)):
        assert_right(source, picture, caches)
        assert caches.moments(picture) is None


def test_chosen_pictures_keep_theirs(folders, tmp_path):
    whole = ShardsSource(folders / "a")
    write_keys(tmp_path / "keys.txt", ["pictures/7.png", "pictures/1.png", "pictures/4.png"])
    source = keep_listed(whole, tmp_path / "keys.txt")
    caches = Caches(source, ("text",))
    for picture in range(3):
        assert_right(source, picture, caches)
    assert caches.complete("text")


def test_a_mixture_has_those_of_its_parts(folders, tmp_path):
    write_keys(tmp_path / "keys.txt", ["pictures/0.png", "pictures/8.png"])
    sources = [
        ShardsSource(folders / "plain"),
        keep_listed(ShardsSource(folders / "a"), tmp_path / "keys.txt"),
        ShardsSource(folders / "b"),
    ]
    parts = tuple(Part(name=name, source="builtin") for name in ("plain", "kept", "b"))
    source = MixtureSource(parts, sources)
    caches = Caches(source, ("text",))
    assert not caches.complete("text")
    assert [cache.root.name for cache in caches.of("text")] == ["a", "b"]
    for picture in range(len(source)):
        if picture < 2:
            assert caches.text(picture, "long") is None
            assert caches.text(picture, "empty") is None
        else:
            assert_right(source, picture, caches)
    without_plain = Caches(MixtureSource(parts[1:], sources[1:]), ("text",))
    assert without_plain.complete("text")


@pytest.mark.parametrize(("name", "kind"), [("plain", "text"), ("a", "latents")])
def test_a_cache_that_nothing_has_is_refused(folders, name, kind):
    source = ShardsSource(folders / name)
    with pytest.raises(UserError, match=f"has no {kind} cache; make it with millrace cache {kind}"):
        Caches(source, (kind,))
    parts = (Part(name="one", source="builtin"), Part(name="two", source="builtin"))
    mixture = MixtureSource(parts, [source, open_source(Data(source="digits"))])
    with pytest.raises(UserError, match=f"data.cached has {kind}, but no part of the data has") as caught:
        Caches(mixture, (kind,))
    assert str(folders / name) in str(caught.value)
