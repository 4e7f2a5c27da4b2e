"""DINOv2 and DINOv3 vision transformers, through transformers: features of patches, and attention of layers.

DINOv2: arXiv 2304.07193, with registers arXiv 2309.16588; DINOv3: arXiv 2508.10104. The class token and the
registers come first in their sequences; here they take part in attention and are left out of every result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from millrace.engine.config import AttentionAlignment
from millrace.engine.config import Teacher as TeacherConfig
from millrace.engine.encoders.pretrained import (
    NetworkSize,
    Settings,
    import_class,
    load,
    load_network,
    random_network,
    shape_alone,
)
from millrace.engine.encoders.teacher import (
    KEY,
    PublishedVision,
    QueriesKeys,
    Teacher,
    VisionEntry,
    vision_entry,
)
from millrace.engine.util.errors import UserError

DinoKind = Literal["dinov2", "dinov3"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

ATTENTION = "millrace_dino"


def load_dino(
    kind: DinoKind, source: str | None, key: str, device: torch.device, dtype: torch.dtype, default: str
) -> "Dino":
    """A frozen DINO.

    Args:
        kind: family; which class of it (with registers or without) the folder's config says.
        source: local folder or hub id; None for `default`.
        key: the setting to name in errors.
        device, dtype: of weights and arithmetic.
        default: hub id.

    Raises UserError if the weights cannot be read, are another network's, or transformers is missing.
    """
    source = source or default
    config = load(import_class("transformers", "AutoConfig", key).from_pretrained, source, key)
    name = vision_entry(kind).classes.get(config.model_type)
    if name is None:
        raise UserError(
            f"{source!r} holds a {config.model_type}, not a {kind}; set {key} to a folder or hub id of one"
        )
    register_attention(key)
    network = load_network(
        import_class("transformers", name, key).from_pretrained,
        source,
        key,
        device,
        dtype=dtype,
        attn_implementation=ATTENTION,
    )
    revision = getattr(network.config, "_commit_hash", None)
    return Dino(network, f"{kind} {source}" + (f"@{revision}" if revision else ""), device, dtype)


class Dino:
    """A frozen DINO on `device`. No `nn.Module`, so that no model that uses it saves or trains it.

    Attributes:
        patch: edge of a patch in pixels.
        dim: features of a token.
        layers, heads: of the network.
        identity: family, source and revision.
    """

    def __init__(self, network: Any, identity: str, device: torch.device, dtype: torch.dtype) -> None:
        config = network.config
        self.network, self.identity, self.device, self.dtype = network, identity, device, dtype
        self.patch: int = config.patch_size
        self.dim: int = config.hidden_size
        self.layers: int = config.num_hidden_layers
        self.heads: int = config.num_attention_heads
        stack = network.encoder if hasattr(network, "encoder") else network.model
        self._attention: list[nn.Module] = [layer.attention for layer in stack.layer]
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        # ((x + 1) / 2 - mean) / std in one multiplication and one addition.
        self._scale, self._offset = (0.5 / std).to(device), ((0.5 - mean) / std).to(device)

    def patch_tokens(self, pictures: Tensor) -> Tensor:
        """Last layer's tokens after the final norm, (B, n, dim) in the network's dtype, n = h * w / patch^2.

        Args:
            pictures: (B, 3, h, w) FP32 in [-1, 1]; h and w are multiples of `patch`.

        The result is differentiable with respect to the pictures where gradients are enabled.
        """
        samples, _, height, width = pictures.shape
        if height % self.patch or width % self.patch:
            raise ValueError(f"pictures are {height} x {width}, expected multiples of the patch {self.patch}")
        n = height * width // self.patch**2
        with torch.autocast(pictures.device.type, enabled=False):
            normal = torch.addcmul(self._offset, pictures.float(), self._scale)
            return self.network(normal.to(self.dtype)).last_hidden_state[:, -n:].view(samples, n, self.dim)

    def tokens_and_attention(
        self, pictures: Tensor, layers: Sequence[int]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """`patch_tokens`, and queries and keys (B, n, heads, dim / heads) of the patches in each layer.

        softmax(q k^T / sqrt(dim / heads)) of a head is its attention among patches, as if class token and
        registers had not been there. The maps themselves are not formed: they are n / 64 times as large.
        """
        taken: dict[int, tuple[Tensor, Tensor]] = {}
        modules = [self._attention[layer] for layer in layers]
        for layer, module in zip(layers, modules, strict=True):
            module.tap = (taken, layer)
        try:
            tokens = self.patch_tokens(pictures)
        finally:
            for module in modules:
                del module.tap
        n = tokens.shape[1]
        return tokens, [tuple(x[:, :, -n:].transpose(1, 2) for x in taken[layer]) for layer in layers]


def register_attention(key: str) -> None:
    """Make transformers know `_attend`; without padding it needs no mask, which registering none means."""
    import_class("transformers", "AttentionInterface", key).register(ATTENTION, _attend)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of (B, heads, N, D) as transformers calls it; leaves q and k where `module.tap` says."""
    tap = getattr(module, "tap", None)
    if tap is not None:
        taken, layer = tap
        taken[layer] = (query, key)
    out = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
    return out.transpose(1, 2), None


class DinoTeacher(Teacher):
    """DINOv2 or DINOv3: tokens after the final norm, and attention of the layers that HASTE aligns with."""

    def __init__(
        self, config: TeacherConfig, dino: Dino, device: torch.device, attention: AttentionAlignment | None
    ) -> None:
        self.dino = dino
        super().__init__(config, dino.patch, dino.dim, dino.network, dino.identity, device)
        self.layers: tuple[int, ...] = ()
        if attention is not None and attention.weight > 0:
            self.layers, self.heads = self._layers(attention), attention.heads

    def _layers(self, attention: AttentionAlignment) -> tuple[int, ...]:
        depth, count = self.dino.layers, len(attention.blocks)
        if count > depth:
            raise UserError(
                f"alignment.attention.blocks names {count} blocks, but {self.dino.identity} has {depth} "
                "layers; name fewer blocks"
            )
        layers = attention.teacher_layers or tuple(range(depth - count, depth))
        if max(layers) >= depth:
            raise UserError(
                f"alignment.attention.teacher_layers names layer {max(layers)}, but {self.dino.identity} has "
                f"{depth} layers; the last is {depth - 1}"
            )
        if attention.heads > self.dino.heads:
            raise UserError(
                f"alignment.attention.heads is {attention.heads}, but {self.dino.identity} has "
                f"{self.dino.heads} heads; set it to {self.dino.heads} or less"
            )
        return layers

    def _compute(self, pictures: Tensor) -> tuple[Tensor, list[QueriesKeys]]:
        tokens, attention = self.dino.tokens_and_attention(pictures, self.layers)
        return tokens, [(q[:, :, : self.heads], k[:, :, : self.heads]) for q, k in attention]


VIT_L: Settings = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_register_tokens": 4,
}
VIT_B: Settings = VIT_L | {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
_TINY: Settings = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_register_tokens": 2,
}


@dataclass(frozen=True, kw_only=True)
class DinoEntry(VisionEntry):
    """A family of DINO.

    Attributes:
        kind: name of the family.
        name: of its newest class in transformers, without Config or Model.
        classes: class by what a folder's config calls its model.
        smallest: settings of a tiny one beside width, layers and heads.
    """

    kind: DinoKind
    name: str
    classes: Mapping[str, str]
    patch: int
    large: PublishedVision
    base: PublishedVision
    smallest: Settings

    def open_teacher(
        self, config: TeacherConfig, device: torch.device, attention: AttentionAlignment | None
    ) -> Teacher:
        dtype = getattr(torch, config.dtype)
        dino = load_dino(self.kind, config.path, KEY, device, dtype, self.large.source)
        return DinoTeacher(config, dino, device, attention)

    def random_teacher(
        self, config: TeacherConfig, device: torch.device, attention: AttentionAlignment | None
    ) -> Teacher:
        """The published ViT-L with random weights, as benchmarks need it."""
        key, dtype = f"alignment.teacher.kind {self.kind}", getattr(torch, config.dtype)
        register_attention(key)
        network = random_network(
            lambda: self.new_network(self.large.shape, attn_implementation=ATTENTION), device, dtype
        )
        dino = Dino(network, f"{self.kind}, random weights", device, dtype)
        return DinoTeacher(config, dino, device, attention)

    def size_of(self, source: str) -> NetworkSize:
        key = f"alignment.teacher.kind {self.kind}"
        automatic = import_class("transformers", "AutoConfig", key)
        config = automatic.from_pretrained(source, local_files_only=True)
        if config.model_type not in self.classes:
            raise ValueError(f"{source!r} holds a {config.model_type}")
        network_class = import_class("transformers", self.classes[config.model_type], key)
        network = shape_alone(lambda: network_class(config))
        parameters = sum(p.numel() for p in network.parameters())
        return NetworkSize(parameters, 2.0 * parameters)

    def new_network(self, shape: Settings, name: str | None = None, **others: Any) -> nn.Module:
        """A network of a shape with random weights, of the family's newest class or of class `name`."""
        key = f"alignment.teacher.kind {self.kind}"
        config = import_class("transformers", f"{name or self.name}Config", key)
        return import_class("transformers", f"{name or self.name}Model", key)(config(**shape, **others))

    def tiny(self, folder: Path, name: str | None = None, **others: Any) -> Path:
        """Save a small one of the family's newest class, or of class `name`; `others` replace settings, None
        leaves one out."""
        shape = {k: v for k, v in (_TINY | self.smallest | others).items() if v is not None}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = self.new_network(shape, name)
            for parameter in network.parameters():
                # Wider than the usual 0.02, so that features of different pictures differ.
                parameter.data.normal_(std=0.2)
        network.save_pretrained(folder)
        return folder
