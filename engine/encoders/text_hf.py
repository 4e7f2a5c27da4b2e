"""Text encoders of transformers: one base for T5Gemma and Qwen3-VL-Embedding, text side only.

Both use rotary positions, so where the padding sits does not matter to the result in exact arithmetic. It is
put on the right whatever the tokenizer says: a caption's positions then start at 0 and its rows do not
depend on the other captions of the batch. Masks are built on the host, because those that transformers
builds itself are read back from the device.
"""

import copy
import string
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from millrace.engine.config import TextTower
from millrace.engine.encoders.liger_kernels import Served, serve
from millrace.engine.encoders.pretrained import (
    NetworkSize,
    Settings,
    import_class,
    load,
    name_of,
    random_network,
    shape_alone,
)
from millrace.engine.encoders.text_encoder import PipelineComponent, TextEncoder, TextEncoderEntry
from millrace.engine.util.errors import UserError

KEY = "conditioning.text.path"
_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
_VOCABULARY = [*_SPECIAL, *string.printable]
"""Tokens of a tiny text encoder: single characters."""


def kind_key(kind: str) -> str:
    """What errors name where a kind of text encoder needs a package."""
    return f"conditioning.text.kind {kind}"


class HFTextEncoder(TextEncoder):
    """A tokenizer and a network of transformers; a subclass names its weights, reads, makes and calls one.

    Attributes:
        source: hub id of the published weights.
        size: of the published network, if known.
        shape: settings of the published network, for one with random weights; None if benchmarks need none.
        component: what a pipeline of diffusers loads of what `save` writes.
        special: whether its tokenizer puts <bos> and <eos> around a caption.
        served: what liger-kernel can serve of it.
    """

    source: str
    served: Served
    component: PipelineComponent
    size: NetworkSize | None = None
    shape: Settings | None = None
    special: bool = False

    def __init__(
        self,
        config: TextTower,
        tokenizer: Any,
        network: Any,
        identity: str,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(network.get_input_embeddings().embedding_dim, identity, device, dtype)
        self.tokenizer, self.network, self.max_tokens = tokenizer, network, config.max_tokens
        self.kernels = serve(network, self.served, config.kernels, device)
        window = self._longest()
        if window is not None and self.max_tokens > window:
            raise UserError(
                f"conditioning.text.max_tokens is {self.max_tokens}, beyond the sliding window of {window} "
                f"tokens of {self.identity}; set it to {window} or less"
            )

    def _longest(self) -> int | None:
        """Tokens of a caption that the network attends to as it was trained; None without a limit."""
        return None

    @staticmethod
    @abstractmethod
    def read_network(source: str, device: torch.device, dtype: torch.dtype) -> Any:
        """The frozen network that emits one row a token."""

    @staticmethod
    @abstractmethod
    def tiny_network(settings: Settings) -> Any:
        """The whole published model, of which `read_network` takes a part, made small by settings of its text
        network, with random weights."""

    @staticmethod
    @abstractmethod
    def network_of(source: str) -> Any:
        """What `read_network` returns, with random weights, by the configuration in a local folder or in what
        was fetched of a hub id before."""

    @staticmethod
    def new_network(shape: Settings) -> Any:
        """What `read_network` returns, with random weights of another shape. Raises ValueError where the
        published shape is not known."""
        raise ValueError("the published shape of this text encoder is not known")

    def save(self, folder: Path) -> None:
        """Write network and tokenizer, as a pipeline of diffusers reads them from `folder`."""
        self._save_network(folder / "text_encoder")
        tokenizer = copy.copy(self.tokenizer)
        # The pipeline pads to the tokenizer's length, which is that of training.
        tokenizer.model_max_length, tokenizer.padding_side = self.max_tokens, "right"
        tokenizer.save_pretrained(folder / "tokenizer")

    def _save_network(self, folder: Path) -> None:
        self.network.save_pretrained(folder)

    @abstractmethod
    def _forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Last hidden state (U, L, E) of ids (U, L) int64, padded on the right, and their lengths (U,); both
        arguments are on the host."""

    def _rows(self, captions: list[str]) -> list[tuple[Tensor, bool]]:
        whole = self.tokenizer(captions)["input_ids"]
        cut = [len(ids) > self.max_tokens for ids in whole]
        # A second pass and not a slice: the tokenizer keeps its end token when it cuts.
        kept = (
            self.tokenizer(captions, truncation=True, max_length=self.max_tokens)["input_ids"]
            if any(cut)
            else whole
        )
        lengths = [len(ids) for ids in kept]
        if max(lengths) == 0:
            # A tokenizer without special tokens gives "" no row; PRX masks all text of such a sample.
            hidden = torch.empty(len(kept), 0, self.dim, device=self.device, dtype=self.dtype)
        else:
            padded = torch.zeros(len(kept), max(lengths), dtype=torch.int64)
            for row, ids in zip(padded, kept, strict=True):
                row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
            # PRX runs its towers outside autocast: their own dtype is what the denoiser was trained on.
            with torch.autocast(self.device.type, enabled=False):
                hidden = self._forward(padded, torch.tensor(lengths))
        return [(rows[:n], was_cut) for rows, n, was_cut in zip(hidden, lengths, cut, strict=True)]


def hf_entry(kind: str, encoder: type[HFTextEncoder]) -> TextEncoderEntry:
    """The registry's entry of a text encoder of transformers."""

    def opened(config: TextTower, dim: int, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        source = config.path or encoder.source
        tokenizer = import_class("transformers", "AutoTokenizer", kind_key(kind))
        tokenizer = load(tokenizer.from_pretrained, source, KEY)
        network = encoder.read_network(source, device, dtype)
        identity = name_of(kind, source, getattr(network.config, "_commit_hash", None))
        found = encoder(config, tokenizer, network, identity, device, dtype)
        if found.dim != dim:
            raise UserError(
                f"model.context_dim is {dim} but the text encoder {found.identity} emits {found.dim} "
                f"features a token; set model.context_dim to {found.dim}"
            )
        return found

    def revision(source: str) -> str | None:
        found = import_class("transformers", "AutoConfig", kind_key(kind))
        return getattr(found.from_pretrained(source), "_commit_hash", None)

    def size_of(source: str) -> NetworkSize:
        network = shape_alone(lambda: encoder.network_of(source))
        parameters = sum(p.numel() for p in network.parameters())
        looked_up = network.get_input_embeddings().weight.numel()
        return NetworkSize(parameters, 2.0 * (parameters - looked_up))

    def tiny(dim: int, folder: Path) -> Path:
        settings = {
            "vocab_size": len(_VOCABULARY),
            "hidden_size": dim,
            "intermediate_size": 2 * dim,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = encoder.tiny_network(settings)
        model.eval().save_pretrained(folder)
        _tiny_tokenizer(kind_key(kind), encoder.special).save_pretrained(folder)
        return folder

    def random(config: TextTower, tokenizer: Any, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        shape = encoder.shape
        network = random_network(lambda: encoder.new_network(shape), device, dtype)
        identity = f"{kind}, random weights"
        return encoder(config, tokenizer(shape["vocab_size"]), network, identity, device, dtype)

    return TextEncoderEntry(
        opened,
        source=encoder.source,
        revision=revision,
        size=encoder.size,
        size_of=size_of,
        tiny=tiny,
        random=random if encoder.shape else None,
        component=encoder.component,
    )


def _tiny_tokenizer(key: str, special: bool) -> Any:
    """Characters as tokens; `special` puts <bos> and <eos> around every caption, as Gemma's does."""
    fast = import_class("transformers", "PreTrainedTokenizerFast", key)
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    places = {token: i for i, token in enumerate(_VOCABULARY)}
    core = Tokenizer(models.WordLevel(places, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if special:
        ends = [("<bos>", places["<bos>"]), ("<eos>", places["<eos>"])]
        core.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    return fast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
