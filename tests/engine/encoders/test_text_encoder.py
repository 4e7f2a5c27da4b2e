import hashlib
import os
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch

from millrace.engine.config import TextTower
from millrace.engine.encoders.text_encoder import (
    LaterTextEncoder,
    PackedText,
    TextEncoder,
    clean_text,
    dense_text,
    open_text_encoder,
)
from millrace.engine.encoders.text_encoders.hash import token_vector, tokenize

CPU = torch.device("cpu")


def hash_tower(dim=16, max_tokens=256, dtype=torch.float32):
    return open_text_encoder(TextTower(kind="hash", max_tokens=max_tokens), dim, CPU, dtype)


def documented_vector(token, dim):
    digest = hashlib.blake2b(token.encode("utf-8"), digest_size=16).digest()
    key = sum(byte << (8 * i) for i, byte in enumerate(digest))
    generator = np.random.Generator(np.random.Philox(key=key))
    return torch.from_numpy(generator.standard_normal(dim, dtype=np.float32))


def test_hash_rows_follow_the_documented_rule():
    packed = hash_tower(dim=24).encode(["Two cats, 12 dogs.", "", "Schön_日本"])
    words = ["two", "cats", ",", "12", "dogs", ".", "</s>", "</s>", "schön", "_", "日本", "</s>"]
    torch.testing.assert_close(
        packed.embeddings, torch.stack([documented_vector(word, 24) for word in words]), rtol=0, atol=0
    )
    assert packed.cu_seqlens.tolist() == [0, 7, 8, 12]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == 7


def test_hash_is_the_same_in_every_process():
    program = (
        "import sys; from millrace.engine.encoders.text_encoders.hash import token_vector;"
        "sys.stdout.write(token_vector('river', 8).tobytes().hex())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert printed == {documented_vector("river", 8).numpy().tobytes().hex()}


def test_hash_vectors_are_standard_normal_and_unrelated():
    a, b = (token_vector(token, 20_000) for token in ("light", "lights"))
    # Standard errors: 1/sqrt(n) = 0.007 of mean and correlation, 1/sqrt(2n) = 0.005 of the deviation.
    for vector in (a, b):
        assert abs(vector.mean()) < 0.03
        assert abs(vector.std() - 1) < 0.02
    assert abs(np.mean(a * b)) < 0.03


def test_empty_caption_has_one_row():
    packed = hash_tower().encode(["", "   "])
    assert packed.cu_seqlens.tolist() == [0, 1, 2]
    torch.testing.assert_close(packed.embeddings, documented_vector("</s>", 16).expand(2, -1))


def test_long_captions_are_cut_before_the_end_token_and_counted():
    tower = hash_tower(max_tokens=3)
    packed = tower.encode(["a b c d", "a b", "a b c d", "a"])
    kept = ["a", "b", "</s>"] * 3 + ["a", "</s>"]
    torch.testing.assert_close(
        packed.embeddings, torch.stack([documented_vector(word, 16) for word in kept]), rtol=0, atol=0
    )
    assert tower.truncated == 2
    tower.encode(["one two three four"])
    assert tower.truncated == 3


def test_hash_identity_says_that_it_has_no_weights():
    assert "no weights" in hash_tower().identity


def test_rows_in_compute_dtype_can_be_saved_for_backward():
    packed = hash_tower(dtype=torch.bfloat16).encode(["a river", ""])
    assert packed.embeddings.dtype == torch.bfloat16
    assert not packed.embeddings.requires_grad
    layer = torch.nn.Linear(16, 4, bias=False, dtype=torch.bfloat16)
    layer(packed.embeddings).float().sum().backward()
    expected = packed.embeddings.float().sum(0).expand(4, -1)
    torch.testing.assert_close(layer.weight.grad.float(), expected, rtol=2**-7, atol=2**-7)


def test_dense_text_pads_on_the_right():
    embeddings = torch.arange(1.0, 13.0).view(6, 2)
    packed = PackedText(embeddings, torch.tensor([0, 2, 2, 5, 6], dtype=torch.int32), 3)
    dense, mask = dense_text(packed)
    assert mask.tolist() == [[True, True, False], [False] * 3, [True] * 3, [True, False, False]]
    expected = torch.tensor(
        [
            [[1, 2], [3, 4], [0, 0]],
            [[0, 0], [0, 0], [0, 0]],
            [[5, 6], [7, 8], [9, 10]],
            [[11, 12], [0, 0], [0, 0]],
        ]
    )
    assert torch.equal(dense, expected.float())
    torch.testing.assert_close(dense[mask], embeddings)


def test_dense_text_without_any_row():
    dense, mask = dense_text(PackedText(torch.empty(0, 5), torch.zeros(3, dtype=torch.int32), 0))
    assert dense.shape == (2, 0, 5)
    assert mask.shape == (2, 0)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  A  Red\n\tFox ", "a red fox"),
        ("salt &amp;amp; pepper &lt;3", "salt & pepper <3"),
        ("\u201cHello\u201d \u2014 it\u2019s", '"hello" - it\'s'),
        ("see https://a.example/b (2024) 日本", "see https://a.example/b (2024) 日本"),
        ("", ""),
    ],
)
def test_clean_text(raw, clean):
    assert clean_text(raw) == clean


def test_tokenize_splits_words_numbers_and_marks():
    assert tokenize("f/1.8 at 50mm, it's_me") == [
        "f", "/", "1", ".", "8", "at", "50", "mm", ",", "it", "'", "s", "_", "me", "</s>",
    ]  # fmt: skip


class Kept(NamedTuple):
    rows: torch.Tensor
    scale: torch.Tensor | None = None
    cut: bool = False


class Asked(TextEncoder):
    """Says which captions it was asked for; a caption of n letters has n rows of its length."""

    def __init__(self, dtype=torch.float32):
        super().__init__(4, "asked", CPU, dtype)
        self.asked = []

    @staticmethod
    def clean(caption):
        return caption.strip()

    def _rows(self, captions):
        self.asked += captions
        return [
            (torch.full((max(len(c), 1), 4), float(len(c)), dtype=self.dtype), len(c) > 3) for c in captions
        ]


def test_kept_rows_take_their_captions_place_and_the_tower_sees_only_the_others():
    tower = Asked()
    stored = torch.randn(2, 4)
    kept = [None, Kept(stored, cut=True), None, Kept(stored[:1]), None]
    packed = tower.encode(["abcd", "kept", " xy ", "too", "xy"], kept)
    assert tower.asked == ["abcd", "xy"]
    assert packed.cu_seqlens.tolist() == [0, 4, 6, 8, 9, 11]
    expected = torch.cat(
        [torch.full((4, 4), 4.0), stored, torch.full((2, 4), 2.0), stored[:1], torch.full((2, 4), 2.0)]
    )
    assert torch.equal(packed.embeddings, expected)
    assert (packed.max_seqlen, packed.truncated, tower.truncated) == (4, 2, 2)


def test_kept_rows_of_any_stored_dtype_come_in_the_towers():
    tower = Asked(torch.bfloat16)
    steps, scale = torch.tensor([[127, -64, 0, 1], [3, 2, 1, 0]], dtype=torch.int8), torch.tensor([0.5, 2.0])
    exact = torch.randn(1, 4)
    packed = tower.encode(["a", "b", "c"], [Kept(steps, scale), Kept(exact), Kept(exact.bfloat16())])
    assert packed.embeddings.dtype == torch.bfloat16
    expected = torch.cat([steps.float() * scale[:, None], exact, exact])
    assert torch.equal(packed.embeddings, expected.bfloat16())
    assert tower.asked == []


def test_a_tower_for_later_is_opened_by_the_first_caption_that_is_not_kept():
    opened = []

    def open_tower():
        opened.append(Asked())
        return opened[0]

    later = LaterTextEncoder(open_tower, 4, "asked", CPU, torch.float32)
    rows = Kept(torch.ones(2, 4))
    assert torch.equal(later.encode(["ab", ""], [rows, rows]).embeddings, torch.ones(4, 4))
    assert opened == []
    packed = later.encode(["abcde", "ab", ""], [None, rows, None])
    assert opened[0].asked == ["abcde", ""]
    assert torch.equal(packed.embeddings, Asked().encode(["abcde", "ab", ""], [None, rows, None]).embeddings)
    assert (later.truncated, opened[0].truncated) == (1, 0)
