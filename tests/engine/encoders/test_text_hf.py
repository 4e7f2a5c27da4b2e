import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from millrace.engine.config import TextTower
from millrace.engine.encoders.text_encoder import dense_text, open_text_encoder, text_encoder_entry
from millrace.engine.util.errors import UserError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

CPU = torch.device("cpu")
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
WORDS = [*SPECIAL, "a", "red", "fox", "runs", "through", "the", "snow", "at", "dawn", "Fox"]
CAPTIONS = ["a red fox", "", "the snow at dawn runs through a fox", "a"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No test may reach the hub, whatever the machine allows."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def save_tokenizer(folder, padding_side, special):
    """Word-level tokenizer; `special` puts <bos> and <eos> around every caption, as Gemma's does."""
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if special:
        core.post_processor = tokenizers.processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
        )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side=padding_side,
    ).save_pretrained(folder)


def t5gemma_config():
    side = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 64,
    }
    return transformers.T5GemmaConfig(encoder=side, decoder=side, vocab_size=len(WORDS))


def qwen_config():
    text = {
        "vocab_size": len(WORDS),
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 48,
        "deepstack_visual_indexes": [0],
    }
    return transformers.Qwen3VLConfig(text_config=text, vision_config=vision)


def save_tower(folder, kind, padding_side="right"):
    """Random weights in the published layout: the whole generation model of which the tower is a part."""
    torch.manual_seed(0)
    if kind == "t5gemma":
        model = transformers.T5GemmaForConditionalGeneration(t5gemma_config())
    else:
        model = transformers.Qwen3VLForConditionalGeneration(qwen_config())
    with torch.no_grad():
        for parameter in model.parameters():
            # Wider than the usual 0.02, so that a wrong mask or position shows.
            parameter.normal_(std=0.3)
    model.eval().save_pretrained(folder)
    save_tokenizer(folder, padding_side, special=kind == "t5gemma")
    inner = model.model.encoder if kind == "t5gemma" else model.model.language_model
    return inner, transformers.AutoTokenizer.from_pretrained(folder)


DIM = {"t5gemma": 32, "qwen3vl": 48}


def open_tower(folder, kind, max_tokens=64, dim=None):
    config = TextTower(kind=kind, path=str(folder), max_tokens=max_tokens)
    return open_text_encoder(config, dim or DIM[kind], CPU, torch.float32)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("kind", ["t5gemma", "qwen3vl"])
def test_packed_rows_are_the_valid_rows_of_a_padded_forward(tmp_path, kind, padding_side):
    network, tokenizer = save_tower(tmp_path, kind, padding_side)
    assert tokenizer.padding_side == padding_side
    packed = open_tower(tmp_path, kind).encode(CAPTIONS)

    batch = tokenizer(CAPTIONS, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        hidden = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(packed.embeddings, hidden.last_hidden_state[mask], rtol=1e-4, atol=1e-4)
    assert packed.cu_seqlens.diff().tolist() == mask.sum(1).tolist()
    assert packed.max_seqlen == mask.sum(1).max()
    assert packed.embeddings.std() > 0.1


@pytest.mark.parametrize("kind", ["t5gemma", "qwen3vl"])
def test_rows_do_not_depend_on_the_rest_of_the_batch(tmp_path, kind):
    save_tower(tmp_path, kind, "left")
    tower = open_tower(tmp_path, kind)
    together = tower.encode(CAPTIONS)
    alone = torch.cat([tower.encode([caption]).embeddings for caption in CAPTIONS])
    torch.testing.assert_close(together.embeddings, alone, rtol=1e-5, atol=1e-5)


class Operators(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["hash", "t5gemma", "qwen3vl"])
def test_encoding_reads_nothing_back_from_the_device(tmp_path, kind):
    if kind == "hash":
        tower = open_text_encoder(TextTower(kind="hash"), 16, CPU, torch.float32)
    else:
        save_tower(tmp_path, kind)
        tower = open_tower(tmp_path, kind)
    with Operators() as ran:
        dense_text(tower.encode(CAPTIONS))
    # What `.item()`, `if tensor:`, boolean indexing and data-dependent shapes run as.
    assert not ran.names & {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"}
    assert "cat" in ran.names
    with Operators() as ran:
        bool(torch.ones(1).all())
    assert "_local_scalar_dense" in ran.names


def test_duplicates_are_encoded_once_and_the_empty_caption_once_for_all(tmp_path, monkeypatch):
    save_tower(tmp_path, "t5gemma")
    tower = open_tower(tmp_path, "t5gemma")
    sizes = []
    forward = tower.network.forward

    def counted(input_ids, attention_mask):
        sizes.append(len(input_ids))
        return forward(input_ids=input_ids, attention_mask=attention_mask)

    monkeypatch.setattr(tower.network, "forward", counted)
    packed = tower.encode(["a red fox", "", "snow", "A  red fox", ""])
    assert sorted(sizes) == [1, 2]
    rows = packed.embeddings.split(packed.cu_seqlens.diff().tolist())
    assert torch.equal(rows[0], rows[3])
    assert torch.equal(rows[1], rows[4])
    assert not torch.equal(rows[0][:3], rows[2])
    sizes.clear()
    again = tower.encode([" ", "", ""])
    assert sizes == []
    assert torch.equal(again.embeddings, torch.cat([rows[1]] * 3))


@pytest.mark.parametrize("kind", ["t5gemma", "qwen3vl"])
def test_long_captions_are_cut_as_the_tokenizer_cuts_and_counted(tmp_path, kind):
    network, tokenizer = save_tower(tmp_path, kind)
    tower = open_tower(tmp_path, kind, max_tokens=5)
    long = "the snow at dawn runs through"
    packed = tower.encode([long, "a fox", long, "a"])
    assert tower.truncated == 2
    ids = tokenizer([long], truncation=True, max_length=5, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = network(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    torch.testing.assert_close(packed.embeddings[:5], expected, rtol=1e-4, atol=1e-4)
    assert packed.max_seqlen == 5
    tower.encode(["a", "fox"])
    assert tower.truncated == 2


def test_caption_of_exactly_max_tokens_is_whole(tmp_path):
    save_tower(tmp_path, "t5gemma")
    tower = open_tower(tmp_path, "t5gemma", max_tokens=5)
    assert tower.encode(["a red fox"]).max_seqlen == 5
    assert tower.truncated == 0


def test_empty_caption_of_a_tokenizer_without_special_tokens_has_no_row(tmp_path):
    save_tower(tmp_path, "qwen3vl")
    packed = open_tower(tmp_path, "qwen3vl").encode(["", ""])
    assert packed.embeddings.shape == (0, 48)
    assert packed.cu_seqlens.tolist() == [0, 0, 0]
    assert packed.max_seqlen == 0


def test_case_is_kept_for_qwen_and_lowered_for_t5gemma(tmp_path):
    same = {}
    for kind in ("t5gemma", "qwen3vl"):
        save_tower(tmp_path / kind, kind)
        tower = open_tower(tmp_path / kind, kind)
        same[kind] = torch.equal(tower.encode(["Fox"]).embeddings, tower.encode(["fox"]).embeddings)
    assert same == {"t5gemma": True, "qwen3vl": False}


def test_towers_are_frozen_and_ignore_autocast(tmp_path):
    save_tower(tmp_path, "t5gemma")
    tower = open_tower(tmp_path, "t5gemma")
    assert not any(parameter.requires_grad for parameter in tower.network.parameters())
    assert not tower.network.training
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = tower.encode(["a red fox"]).embeddings
    assert torch.equal(under, tower.encode(["a red fox"]).embeddings)


def test_bfloat16_weights(tmp_path):
    save_tower(tmp_path, "t5gemma")
    config = TextTower(kind="t5gemma", path=str(tmp_path))
    tower = open_text_encoder(
        config.model_copy(update={"max_tokens": 64}), DIM["t5gemma"], CPU, torch.bfloat16
    )
    assert {parameter.dtype for parameter in tower.network.parameters()} == {torch.bfloat16}
    packed = tower.encode(CAPTIONS)
    assert packed.embeddings.dtype == torch.bfloat16
    exact = open_tower(tmp_path, "t5gemma").encode(CAPTIONS).embeddings
    error = (packed.embeddings.float() - exact).norm() / exact.norm()
    assert error < 0.1


@pytest.mark.parametrize("kind", ["t5gemma", "qwen3vl"])
def test_other_width_than_the_denoisers_is_refused(tmp_path, kind):
    save_tower(tmp_path, kind)
    with pytest.raises(UserError, match=rf"model\.context_dim is 2304 .* emits {DIM[kind]} ") as caught:
        open_tower(tmp_path, kind, dim=2304)
    assert "\n" not in str(caught.value)


def test_more_tokens_than_the_sliding_window_are_refused(tmp_path):
    save_tower(tmp_path, "t5gemma")
    with pytest.raises(UserError, match=r"max_tokens is 65, beyond the sliding window of 64"):
        open_tower(tmp_path, "t5gemma", max_tokens=65)


@pytest.mark.parametrize("kind", ["t5gemma", "qwen3vl"])
def test_missing_weights_name_the_key(tmp_path, kind):
    with pytest.raises(UserError, match=r"set conditioning\.text\.path to") as caught:
        open_tower(tmp_path / "nowhere", kind)
    assert "\n" not in str(caught.value)
    assert "nowhere" in str(caught.value)


@pytest.mark.parametrize("kind", ["t5gemma", "qwen3vl"])
def test_default_source_is_the_published_one(kind, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=text_encoder_entry(kind).source):
        open_text_encoder(TextTower(kind=kind), DIM[kind], CPU, torch.float32)


def test_weights_that_lack_a_part_are_refused(tmp_path):
    torch.manual_seed(0)
    model = transformers.T5GemmaForConditionalGeneration(t5gemma_config())
    state = {name: value for name, value in model.state_dict().items() if "encoder.layers.1." not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    save_tokenizer(tmp_path, "right", special=True)
    with pytest.raises(UserError, match=r"lacks \d+ weights of T5GemmaEncoderModel.*layers\.1\."):
        open_tower(tmp_path, "t5gemma")


def test_missing_package_gives_the_pip_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install") as caught:
        open_tower(tmp_path, "t5gemma")
    assert "\n" not in str(caught.value)


def test_identity_names_tower_and_source(tmp_path):
    save_tower(tmp_path, "t5gemma")
    assert open_tower(tmp_path, "t5gemma").identity == f"t5gemma {tmp_path}"
