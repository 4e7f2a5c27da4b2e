"""Text encoder: captions to packed text tokens, and the registry of its kinds.

    captions ──clean──▶ unique captions ──network──▶ rows of each (n_i, E) ──concatenate──▶ PackedText

Padding never leaves a text encoder: the denoiser's text keys carry no position, so attention over the n_i
rows of a caption equals attention over its padded rows under a mask. Row counts are known on the host from
the tokenizer, so packing neither masks on the device nor waits for it.

Rows that were kept from an earlier pass of the same encoder take the place of those it would compute, caption
by caption; the encoder then sees only the others.
"""

import html
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from millrace.engine.config import TextTower
from millrace.engine.encoders.pretrained import NetworkSize
from millrace.engine.util import registry
from millrace.kernels.support.packed import joined, to_device

CLEANING = 1
"""Version of what `clean` does to captions: other captions give other rows."""

# One spelling for each kind of dash and quotation mark.
_PUNCTUATION = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d", "-")
    | dict.fromkeys("\u2018\u2019\u201a\u201b\u00b4`", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb", '"')
)


@dataclass(frozen=True)
class PackedText:
    """Text tokens of B captions without padding, in caption order."""

    embeddings: Tensor
    """(S, E), on the device."""
    cu_seqlens: Tensor
    """(B + 1,) int32, on the device: caption i owns rows cu_seqlens[i] to cu_seqlens[i + 1]."""
    max_seqlen: int
    """Rows of the longest caption, known without waiting for the device."""
    truncated: int = 0
    """How many of the captions were cut at `max_tokens`."""


class KeptRows(Protocol):
    """Rows of a caption on the host, as a cache holds them."""

    rows: Tensor
    """(n, E) in a floating dtype, or int8."""
    scale: Tensor | None
    """(n,) FP32 for int8: row i is scale[i] * rows[i]."""
    cut: bool
    """Whether the caption was cut at `max_tokens`."""


class TextEncoder(ABC):
    """A frozen text encoder. Subclasses turn cleaned captions into rows."""

    def __init__(self, dim: int, identity: str, device: torch.device, dtype: torch.dtype) -> None:
        self.dim = dim
        """E, features of a text token."""
        self.identity = identity
        """Name and origin of the weights, for logs and checkpoints."""
        self.device = device
        self.dtype = dtype
        self.truncated = 0
        """Captions cut at `max_tokens` so far."""
        self.kernels = ""
        """Whose kernels run in the network, for people; empty without a network of its own."""

    @torch.no_grad()
    def encode(self, captions: list[str], kept: Sequence[KeptRows | None] = ()) -> PackedText:
        """Rows of all captions in order. Equal captions are computed once, the empty one once and for all.

        `kept` has the rows of some captions (None for the others), or is empty; no caption that has rows is
        computed. Gradients are off, but the result is an ordinary tensor (not an inference tensor): the first
        layer of the denoiser keeps it for its backward.
        """
        kept = kept or [None] * len(captions)
        live = [self.clean(c) for c, rows in zip(captions, kept, strict=True) if rows is None]
        fresh = [caption for caption in dict.fromkeys(live) if caption]
        known = dict(zip(fresh, self._rows(fresh), strict=True)) if fresh else {}
        if "" in live:
            known[""] = self._empty
        computed = iter([known[caption] for caption in live])
        stored = iter(self._fetch([rows for rows in kept if rows is not None]))
        chosen = [next(computed) if rows is None else next(stored) for rows in kept]
        truncated = sum(cut for _, cut in chosen)
        self.truncated += truncated
        bounds = [0, *accumulate(len(rows) for rows, _ in chosen)]
        return PackedText(
            embeddings=torch.cat([rows for rows, _ in chosen]),
            cu_seqlens=to_device(torch.tensor(bounds, dtype=torch.int32), self.device),
            max_seqlen=max(len(rows) for rows, _ in chosen),
            truncated=truncated,
        )

    def _fetch(self, kept: Sequence[KeptRows]) -> list[tuple[Tensor, bool]]:
        """Kept rows (n_i, E) on the device in the tower's dtype, and whether they were cut. One copy for the
        rows of each stored dtype."""
        found: list[tuple[Tensor, bool]] = [(torch.empty(0), False)] * len(kept)
        groups: dict[torch.dtype, list[int]] = {}
        for i, one in enumerate(kept):
            groups.setdefault(one.rows.dtype, []).append(i)
        for dtype, members in groups.items():
            rows = joined([kept[i].rows for i in members], self.device)
            if dtype == torch.int8:
                rows = rows.float() * joined([kept[i].scale for i in members], self.device)[:, None]
            split = rows.to(self.dtype).split([len(kept[i].rows) for i in members])
            for i, part in zip(members, split, strict=True):
                found[i] = part, kept[i].cut
        return found

    def rows(self, captions: list[str]) -> list[tuple[Tensor, bool]]:
        """For each of several cleaned captions its rows (n_i, E) on the device, and whether it was cut."""
        with torch.no_grad():
            return self._rows(captions)

    @staticmethod
    @abstractmethod
    def clean(caption: str) -> str:
        """The caption as the tower sees it."""

    @abstractmethod
    def _rows(self, captions: list[str]) -> list[tuple[Tensor, bool]]:
        """For each cleaned caption its rows (n_i, E) on the device, and whether it was cut."""

    @cached_property
    def _empty(self) -> tuple[Tensor, bool]:
        # Caption drop is encoding "", so about every batch has it.
        ((rows, cut),) = self._rows([""])
        return rows.clone(), cut


class LaterTextEncoder(TextEncoder):
    """A text encoder that is loaded when it first meets a caption whose rows are not kept.

    Args:
        open_tower: loads it.
        dim, identity: of the tower.
    """

    def __init__(
        self,
        open_tower: Callable[[], TextEncoder],
        dim: int,
        identity: str,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(dim, identity, device, dtype)
        self._open = open_tower

    @cached_property
    def tower(self) -> TextEncoder:
        """The tower; the first use loads it."""
        return self._open()

    def clean(self, caption: str) -> str:
        return self.tower.clean(caption)

    def _rows(self, captions: list[str]) -> list[tuple[Tensor, bool]]:
        return self.tower.rows(captions)


class PipelineComponent(NamedTuple):
    """How a pipeline of diffusers names and loads a frozen network."""

    library: str
    name: str
    """Of the class in `library`; both stand in the pipeline's model_index.json."""
    loading: str
    """Python that loads the same network from weights named `{source}`, for people."""


@dataclass(frozen=True)
class TextEncoderEntry:
    """A kind of text encoder (`conditioning.text.kind`): all that the engine asks of it.

    Its module in `encoders/text_encoders/` has the kind's name.
    """

    open: Callable[[TextTower, int, torch.device, torch.dtype], TextEncoder]
    """As `open_text_encoder`."""
    source: str | None = None
    """Hub id of the published weights; None for a kind without weights, which loads and caches nothing."""
    revision: Callable[[str], str | None] | None = None
    """Hub commit of a source, found without loading the weights; it may raise."""
    size: NetworkSize | None = None
    """Of the published network; None where it is not known."""
    size_of: Callable[[str], NetworkSize] | None = None
    """Of the network of a local folder, or of a hub id that was fetched before, by its configuration alone;
    it may raise."""
    tiny: Callable[[int, Path], Path] | None = None
    """Saves a small network of the same class that emits so many features, for `--smoke` and tests."""
    random: Callable[[TextTower, Any, torch.device, torch.dtype], TextEncoder] | None = None
    """The published shape with random weights and a tokenizer of a class that takes the size of the
    vocabulary, for benchmarks."""

    component: PipelineComponent | None = None
    """In a pipeline of diffusers; None where it has no place."""

    def source_of(self, config: TextTower) -> str | None:
        """Folder or hub id of the weights."""
        return None if self.source is None else config.path or self.source


def text_encoder_entry(kind: str) -> TextEncoderEntry:
    """The entry of a kind."""
    return registry.entry("encoders.text_encoders", kind)


def open_text_encoder(config: TextTower, dim: int, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """The text encoder of `config` on `device`, with weights and rows in `dtype`.

    `dim` is model.context_dim. Raises UserError when the encoder emits another width, or when its package or
    its weights are not there.
    """
    return text_encoder_entry(config.kind).open(config, dim, device, dtype)


def dense_text(packed: PackedText) -> tuple[Tensor, Tensor]:
    """Padded form: embeddings (B, S_max, E) with zero rows on the right, and mask (B, S_max) bool, true on
    real rows. S_max is `packed.max_seqlen`."""
    starts = packed.cu_seqlens[:-1, None]
    lengths = packed.cu_seqlens.diff()[:, None]
    column = torch.arange(packed.max_seqlen, device=packed.cu_seqlens.device)
    mask = column < lengths
    # Row 0 stands in where the mask is false, so that no index leaves the tensor.
    index = torch.where(mask, starts + column, 0)
    return packed.embeddings[index].masked_fill(~mask[..., None], 0), mask


def clean_text(caption: str) -> str:
    """Lower case, HTML entities resolved (twice: scraped captions are often escaped twice), one spelling of
    dashes and quotes, single spaces.

    Unlike DeepFloyd IF's cleaning, from which PRX's descends, it deletes nothing (no URLs, numbers,
    brackets or CJK characters): captions of today are written for the picture.
    """
    return " ".join(unescape(caption).translate(_PUNCTUATION).lower().split())


def unescape(caption: str) -> str:
    """HTML entities resolved, also those escaped twice, and outer white space removed."""
    return html.unescape(html.unescape(caption)).strip()
