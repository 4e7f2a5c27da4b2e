"""PRX's text latents in MDS shards: what is read of them, and every way in which they are not the tower's."""

import numpy as np
import pytest
import torch

from millrace.engine.config import TextTower
from millrace.engine.config.data import Columns
from millrace.engine.config.loading import parse_config
from millrace.engine.data import SampleStream, UnreadablePicture
from millrace.engine.data.formats.mds_text import Tower
from millrace.engine.data.latent_cache import Caches
from millrace.engine.data.sources.mds import MdsSource
from millrace.engine.encoders.frozen_networks import open_caches
from millrace.engine.encoders.text_encoder import open_text_encoder
from millrace.engine.util.errors import UserError

L, E = 8, 4
TOWER = Tower("t5gemma", L, E, torch.bfloat16)
NAME = f"t5gemma2b-{L}-bf16"


@pytest.fixture
def prx(write_mds, picture):
    """`prx(folder, samples, **encodings)`: shards with PRX's bf16 encoding, registered as PRX does it."""
    import streaming.base.format.mds.encodings as encodings

    class BFloat16(encodings.Encoding):
        def encode(self, obj):
            head = np.uint32(obj.ndim).tobytes() + np.array(obj.shape, np.int32).tobytes()
            return head + obj.view(torch.int16).numpy().tobytes()

        def decode(self, data):
            raise AssertionError("the library need not know this encoding")

    encodings._encodings["bf16"] = BFloat16

    def write(folder, samples, **changes):
        kinds = {"image": "jpeg", **dict.fromkeys(samples[0], "str")}
        for name in samples[0]:
            if name.startswith("latent_"):
                kinds[name] = "bf16"
            if name.startswith("attention_mask_"):
                kinds[name] = "ndarray"
        return write_mds(folder, kinds | changes, [{"image": picture((24, 24)), **s} for s in samples])

    yield write
    del encodings._encodings["bf16"]


def rows(count, seed=0):
    return torch.randn(count, E, generator=torch.Generator().manual_seed(seed)).bfloat16()


def mask(count, length=L):
    return (np.arange(length) < count).astype(np.uint8)


def sample(text="a cat", latent=None, valid=None, column="caption", name=NAME):
    latent = rows(3) if latent is None else latent
    valid = mask(3) if valid is None else valid
    return {column: text, f"latent_{column}_{name}": latent, f"attention_mask_{column}_{name}": valid}


def test_rows_are_those_of_valid_positions_however_they_are_stored(tmp_path, prx):
    whole = rows(L)
    stored = {
        "valid rows alone": (whole[:3], mask(3)),
        "padded": (torch.cat([whole[:3], torch.zeros(L - 3, E).bfloat16()]), mask(3)),
        "padded on the left": (whole, mask(3)[::-1].copy()),
        "mask of integers, two dimensions": (whole[:3], mask(3)[None].astype(np.int64)),
        "all of them": (whole, mask(L)),
    }
    source = MdsSource(
        prx(tmp_path / "set", [sample(latent=a, valid=b) for a, b in stored.values()]), Columns()
    )
    assert source.has_latents
    source.require_rows(TOWER)
    found = [source.rows(i, "long", TOWER) for i in range(len(source))]
    wanted = [whole[:3], whole[:3], whole[-3:], whole[:3], whole]
    for how, have, want in zip(stored, found, wanted, strict=True):
        assert have.dtype == torch.bfloat16, how
        assert torch.equal(have, want), how
    caches = Caches(source, ("text",), tower=TOWER)
    assert [caches.text(i, "short").cut for i in range(5)] == [False] * 4 + [True]
    assert caches.text(0, "empty") is None
    assert not caches.complete("text")


@pytest.mark.parametrize("kind", ["ndarray", f"ndarray:float32:{L},{E}", "ndarray:float16"])
def test_arrays_of_numpy(kind, tmp_path, prx):
    dtype = np.float16 if "16" in kind else np.float32
    latent = rows(L).float().numpy().astype(dtype)
    columns = {f"latent_caption_{NAME}": kind, f"attention_mask_caption_{NAME}": "ndarray:uint8"}
    one = sample(latent=latent, valid=mask(5).astype(np.uint8))
    source = MdsSource(prx(tmp_path / "set", [one], **columns), Columns())
    assert torch.equal(source.rows(0, "long", TOWER), torch.from_numpy(latent[:5]))


def test_the_rows_are_those_of_the_caption_that_is_taken(tmp_path, prx):
    """An empty caption is replaced by the other one, and so are its rows."""
    long, short = rows(4, 1), rows(2, 2)
    none = sample("", rows(1), mask(1, 1), "caption_short")
    both = [
        sample("long", long, mask(4), "caption_long") | sample("short", short, mask(2), "caption_short"),
        sample("long", long, mask(4), "caption_long") | none,
        sample("", rows(1), mask(1, 1), "caption_long") | sample("s", short, mask(2), "caption_short"),
    ]
    source = MdsSource(prx(tmp_path / "set", both), Columns())
    taken = [[source.rows(i, which, TOWER) for which in ("long", "short")] for i in range(3)]
    for have, want in zip(taken, [(long, short), (long, long), (short, short)], strict=True):
        assert all(map(torch.equal, have, want))


@pytest.mark.parametrize(
    ("tower", "wanted"),
    [
        (TOWER._replace(max_tokens=2 * L), f"latent_caption_t5gemma2b-{2 * L}-bf16"),
        (TOWER._replace(kind="qwen3vl"), f"latent_caption_qwen3vl-2b-{L}-bf16"),
        (TOWER._replace(dtype=torch.float32), f"latent_caption_t5gemma2b-{L}-fp32"),
    ],
)
def test_another_tower_is_refused_with_those_that_are_there(tower, wanted, tmp_path, prx):
    source = MdsSource(prx(tmp_path / "set", [sample()]), Columns())
    with pytest.raises(UserError) as caught:
        Caches(source, ("text",), tower=tower)
    said = str(caught.value)
    assert f"has no column {wanted}, which data.cached text needs" in said
    assert f"(it has latents of caption by: {NAME})" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("changes", "columns", "wanted"),
    [
        ({"valid": mask(3, 2 * L)}, {}, f"is of {2 * L} positions, not {L}"),
        ({"latent": rows(3).repeat(1, 2)}, {}, f"has the shape (3, {2 * E}), not (n, {E})"),
        ({"latent": rows(2)}, {}, "has 2 rows for 3 positions that hold text"),
        ({"latent": rows(3) * float("nan")}, {}, "has numbers that are not finite"),
        ({"latent": rows(0), "valid": mask(0)}, {}, "is empty"),
        ({"latent": b"\1\0"}, {f"latent_caption_{NAME}": "bytes"}, "is stored as 'bytes', not as bf16"),
        ({"latent": [1.0]}, {f"latent_caption_{NAME}": "pkl"}, "is stored as 'pkl', not as bf16"),
        ({"name": "no-tower"}, {}, "by: no-tower)"),
    ],
)
def test_rows_that_do_not_fit_are_refused_at_the_start(changes, columns, wanted, tmp_path, prx):
    source = MdsSource(prx(tmp_path / "set", [sample(**changes)], **columns), Columns())
    with pytest.raises(UserError) as caught:
        Caches(source, ("text",), tower=TOWER)
    assert wanted in str(caught.value)
    assert "take text out of data.cached" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_set_without_latents_or_without_masks(tmp_path, prx):
    source = MdsSource(prx(tmp_path / "none", [{"caption": "a"}]), Columns())
    assert not source.has_latents
    with pytest.raises(UserError, match=r"latents of caption by: none\)"):
        Caches(source, ("text",), tower=TOWER)
    one = sample()
    del one[f"attention_mask_caption_{NAME}"]
    source = MdsSource(prx(tmp_path / "unmasked", [one]), Columns())
    with pytest.raises(UserError, match=f"has no column attention_mask_caption_{NAME}"):
        Caches(source, ("text",), tower=TOWER)


def test_one_damaged_sample_is_an_unreadable_one(tmp_path, prx):
    samples = [sample(), sample(latent=rows(3) * float("inf")), sample()]
    source = MdsSource(prx(tmp_path / "set", samples), Columns())
    caches = Caches(source, ("text",), tower=TOWER)
    with pytest.raises(UnreadablePicture, match=r"set: shard\.00000/1: its latent_.* not finite"):
        caches.text(1, "long")


def test_training_gets_the_rows_of_the_live_tower(tmp_path, prx):
    """Rows of the hash tower, stored as PRX would: the same text as without them, dropped captions too."""
    tower = open_text_encoder(TextTower(kind="hash", max_tokens=L), E, torch.device("cpu"), torch.float32)
    captions = [f"{word} cat on a mat" for word in ("a", "the", "one", "no", "my", "that")]
    kept = tower.rows([tower.clean(caption) for caption in captions])
    name = f"hash-{L}-fp32"
    samples = [
        sample(caption, latent.numpy(), mask(len(latent)), name=name)
        for caption, (latent, _) in zip(captions, kept, strict=True)
    ]
    folder = prx(tmp_path / "set", samples, **{f"latent_caption_{name}": "ndarray"})
    data = {
        "source": "mds",
        "path": str(folder),
        "resolution": 32,
        "global_batch": 6,
        "micro_batch": 6,
        "upscale": True,
    }
    text = {"text": {"kind": "hash", "max_tokens": L}}
    config = parse_config(
        {
            "data": data | {"cached": ["text"]},
            "conditioning": text,
            "model": {"context_dim": E},
            "precision": {"compute": "float32"},
        },
        "here",
    )
    source = MdsSource(folder, Columns())
    found = open_caches(source, config)
    stream = SampleStream(
        source, config.data, seed=1, patch=16, caption_drop=0.5, rank=0, world_size=1, caches=found
    )
    batch = next(stream)
    assert set(batch.dropped.tolist()) == {False, True}
    assert [text is None for text in batch.text] == batch.dropped.tolist()
    stored, live = tower.encode(batch.captions, batch.text), tower.encode(batch.captions)
    assert torch.equal(stored.embeddings, live.embeddings)
    assert torch.equal(stored.cu_seqlens, live.cu_seqlens)
    assert stored.truncated == live.truncated == 0
