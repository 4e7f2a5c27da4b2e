"""The frozen networks of the published runs at their real size, with random weights made on the device.

What a network costs depends on its shape and not on what it has learnt, so nothing is downloaded. A `path` in
the configuration has precedence: the network in that folder is opened as in training.

| network            | shape                                                                             |
|--------------------|-----------------------------------------------------------------------------------|
| flux1, repa_e      | AutoencoderKL 128/256/512/512, 2 residual blocks a level, 16 channels             |
| flux2              | AutoencoderKLFlux2, the same widths, 32 channels                                  |
| dc_ae              | AutoencoderDC f32c32 with diffusers' default widths                               |
| t5gemma            | encoder of T5Gemma 2B: 26 layers of 2304, 8 query and 4 key heads of 256, MLP 9216 |
| dinov2, dinov3     | ViT-L/14 with 4 registers, ViT-L/16: 24 layers of 1024, 16 heads                  |
"""

import re
import zlib
from collections.abc import Callable
from typing import Any

import torch

from millrace.engine import config as settings
from millrace.engine.config import Alignment, TextTower
from millrace.engine.encoders import autoencoder as autoencoders
from millrace.engine.encoders import dino as dinos
from millrace.engine.encoders import teacher as teachers
from millrace.engine.encoders import text_encoder as texts
from millrace.engine.encoders.pretrained import import_class
from millrace.engine.encoders.text_hf import T5GemmaTower

Settings = dict[str, Any]

_KL: Settings = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
_FLUX1: Settings = {
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    **_KL,
}
AUTOENCODERS: dict[str, tuple[str, Settings]] = {
    "flux1": ("AutoencoderKL", _FLUX1),
    "repa_e": ("AutoencoderKL", _FLUX1),
    "flux2": ("AutoencoderKLFlux2", {"latent_channels": 32, **_KL}),
    "dc_ae": ("AutoencoderDC", {"scaling_factor": 0.41407}),
}
T5GEMMA: Settings = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
}
_VIT_L: Settings = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_register_tokens": 4,
}
DINOS: dict[str, tuple[str, Settings]] = {
    "dinov2": ("Dinov2WithRegisters", {**_VIT_L, "patch_size": 14, "image_size": 518, "mlp_ratio": 4}),
    "dinov3": ("DINOv3ViT", {**_VIT_L, "patch_size": 16, "intermediate_size": 4096}),
}

CHARACTERS = 4
"""Of a token, about what a large English vocabulary has on average."""


class PieceTokenizer:
    """Stands in for a tokenizer: pieces of at most CHARACTERS letters of a word, an end token after them."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(
        self, captions: list[str], truncation: bool = False, max_length: int = 0
    ) -> dict[str, list[list[int]]]:
        """Token ids of each caption, at most `max_length` with `truncation`; the end token stays."""
        ids = []
        for caption in captions:
            pieces = re.findall(rf"\w{{1,{CHARACTERS}}}|[^\w\s]", caption)
            kept = pieces[: max_length - 1] if truncation else pieces
            ids.append([zlib.crc32(piece.encode()) % (self.vocabulary - 2) + 2 for piece in kept] + [1])
        return {"input_ids": ids}


def build(make: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> Any:
    """`make()` with its weights made on `device` in `dtype`, frozen."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.random.fork_rng([device] if device.type == "cuda" else []):
            network = make()
    finally:
        torch.set_default_dtype(usual)
    return network.to(device, dtype).requires_grad_(False).eval()


def open_autoencoder(config: settings.Autoencoder, device: torch.device) -> autoencoders.Autoencoder:
    """As `engine.conditioning.autoencoder.open_autoencoder`, without weights where there is no path."""
    if config.kind == "pixels" or config.path or config.form != "raw" or config.tuning.enabled:
        return autoencoders.open_autoencoder(config, device)
    name, values = AUTOENCODERS[config.kind]
    network_class = import_class("diffusers", name, f"conditioning.autoencoder.kind {config.kind}")
    network = build(lambda: network_class(**values), device, autoencoders.arithmetic(config))
    scale = autoencoders.FLUX2_SCALE if config.kind == "flux2" else network.config.scaling_factor
    shift = network.config.get("shift_factor") or 0.0
    factor = autoencoders.PUBLISHED_FACTOR[config.kind]
    constants = autoencoders.Constants(network.config.latent_channels, factor, scale, shift)
    identity = f"{config.kind}, random weights"
    return autoencoders.Latents(lambda: network, identity, constants, stochastic=config.kind != "dc_ae")


def open_text_tower(
    config: TextTower, dim: int, device: torch.device, dtype: torch.dtype, values: Settings | None = None
) -> texts.TextEncoder:
    """As `engine.conditioning.text.open_text_tower`, without weights for T5Gemma where there is no path."""
    if config.kind != "t5gemma" or config.path:
        return texts.open_text_tower(config, dim, device, dtype)
    key = "conditioning.text.kind t5gemma"
    config_class = import_class("transformers", "T5GemmaConfig", key)
    model = import_class("transformers", "T5GemmaEncoderModel", key)
    side = values or T5GEMMA
    shape = config_class(
        encoder=side,
        decoder=side,
        vocab_size=side["vocab_size"],
        is_encoder_decoder=False,
        attn_implementation="eager",
    )
    network = build(lambda: model(shape), device, dtype)
    tokenizer = PieceTokenizer(side["vocab_size"])
    return T5GemmaTower(config, tokenizer, network, "t5gemma, random weights", device, dtype)


def open_teacher(config: Alignment, device: torch.device, data: str) -> teachers.Teacher | None:
    """As `engine.conditioning.teacher.teacher_of`, without weights where there is no path."""
    teacher = config.teacher
    if not config.active or teacher.kind == "classifier" or teacher.path:
        return teachers.teacher_of(config, device, data)
    name, values = DINOS[teacher.kind]
    key = f"alignment.teacher.kind {teacher.kind}"
    dinos.register_attention(key)
    shape = import_class("transformers", f"{name}Config", key)(**values, attn_implementation=dinos.ATTENTION)
    model = import_class("transformers", f"{name}Model", key)
    dtype = getattr(torch, teacher.dtype)
    network = build(lambda: model(shape), device, dtype)
    dino = dinos.Dino(network, f"{teacher.kind}, random weights", device, dtype)
    opened = teachers.DinoTeacher(teacher, dino, device, config.attention)
    opened.keep_features(data)
    return opened
