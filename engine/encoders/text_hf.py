"""The text towers of the PRX models, through transformers: T5Gemma and Qwen3-VL-Embedding, text side only.

Both use rotary positions, so where the padding sits does not matter to the result in exact arithmetic. It is
put on the right whatever the tokenizer says: a caption's positions then start at 0 and its rows do not
depend on the other captions of the batch. Masks are built on the host, because those that transformers
builds itself are read back from the device.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from millrace.engine.config import TextTower
from millrace.engine.encoders.pretrained import (
    import_class,
    load,
    load_network,
    name_of,
)
from millrace.engine.encoders.text_encoder import (
    TextEncoder,
    clean_text,
    unescape,
)
from millrace.engine.util.errors import UserError
from millrace.kernels.support.packed import to_device

_PUBLISHED = {"t5gemma": "google/t5gemma-2b-2b-ul2", "qwen3vl": "Qwen/Qwen3-VL-Embedding-2B"}
_KEY = "conditioning.text.path"


def source_of(config: TextTower) -> str:
    """Folder or hub id of the weights."""
    return config.path or _PUBLISHED[config.kind]


def open_hf_tower(config: TextTower, dim: int, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """See `text.open_text_tower`."""
    kind = T5GemmaTower if config.kind == "t5gemma" else Qwen3VLTower
    source = source_of(config)
    tokenizer = import_class("transformers", "AutoTokenizer", f"conditioning.text.kind {config.kind}")
    tokenizer = load(tokenizer.from_pretrained, source, _KEY)
    network = kind.read_network(source, device, dtype)
    identity = name_of(config.kind, source, getattr(network.config, "_commit_hash", None))
    tower = kind(config, tokenizer, network, identity, device, dtype)
    if tower.dim != dim:
        raise UserError(
            f"model.context_dim is {dim} but the text tower {tower.identity} emits {tower.dim} features "
            f"a token; set model.context_dim to {tower.dim}"
        )
    return tower


class HFTower(TextEncoder):
    """A tokenizer and a network; subclasses load the network and call it."""

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


class T5GemmaTower(HFTower):
    """Encoder of T5Gemma 2B (E = 2304), lower-case captions. Attention is bidirectional and eager, since its
    logits have a soft cap."""

    clean = staticmethod(clean_text)

    def _longest(self) -> int:
        return self.network.encoder.config.sliding_window

    @staticmethod
    def read_network(source: str, device: torch.device, dtype: torch.dtype) -> Any:
        model = import_class("transformers", "T5GemmaEncoderModel", "conditioning.text.kind t5gemma")
        return load_network(
            model.from_pretrained,
            source,
            _KEY,
            device,
            dtype=dtype,
            is_encoder_decoder=False,
            attn_implementation="eager",
        )

    def _forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        padding = torch.arange(ids.shape[1]) >= lengths[:, None]
        mask = torch.zeros(ids.shape, dtype=self.dtype).masked_fill(padding, torch.finfo(self.dtype).min)
        mask = to_device(mask, self.device)[:, None, None, :]
        masks = {"full_attention": mask, "sliding_attention": mask}
        return self.network(input_ids=to_device(ids, self.device), attention_mask=masks).last_hidden_state


class Qwen3VLTower(HFTower):
    """Language model of Qwen3-VL-Embedding 2B (E = 2048); captions keep their case. Attention is causal, so
    the padding on the right is out of sight and needs no mask."""

    clean = staticmethod(unescape)

    @staticmethod
    def read_network(source: str, device: torch.device, dtype: torch.dtype) -> Any:
        model = import_class("transformers", "Qwen3VLModel", "conditioning.text.kind qwen3vl")
        whole = load_network(
            model.from_pretrained, source, _KEY, torch.device("cpu"), dtype=dtype, attn_implementation="sdpa"
        )
        return whole.language_model.to(device)

    def _forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        # Time, height and width positions are equal for text. Without the fourth row that transformers would
        # add, it does not look for packed sequences, which would wait for the device.
        positions = torch.arange(ids.shape[1], device=self.device).expand(3, *ids.shape)
        return self.network(
            input_ids=to_device(ids, self.device), position_ids=positions, use_cache=False
        ).last_hidden_state
