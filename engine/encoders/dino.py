"""DINOv2 and DINOv3 vision transformers, through transformers: features of patches, and attention of layers.

DINOv2: arXiv 2304.07193, with registers arXiv 2309.16588; DINOv3: arXiv 2508.10104. The class token and the
registers come first in their sequences; here they take part in attention and are left out of every result.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from millrace.engine.encoders.pretrained import (
    import_class,
    load,
    load_network,
)
from millrace.engine.util.errors import UserError

DinoKind = Literal["dinov2", "dinov3"]

PUBLISHED: dict[str, str] = {
    "dinov2": "facebook/dinov2-with-registers-large",
    "dinov3": "facebook/dinov3-vitl16-pretrain-lvd1689m",
}
"""The ViT-L that Photoroom/PRX aligns with."""

_CLASSES: dict[str, dict[str, str]] = {
    "dinov2": {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"},
    "dinov3": {"dinov3_vit": "DINOv3ViTModel"},
}
"""Class by what the folder's config calls its model."""

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
    name = _CLASSES[kind].get(config.model_type)
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
