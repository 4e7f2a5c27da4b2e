"""Small frozen networks of the real classes with random weights, saved as the published ones are.

They let every code path around a tower run on a CPU (`--smoke`, tests). They know nothing.
"""

import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from millrace.engine.encoders.lpips import Lpips
from millrace.engine.encoders.pretrained import import_class

_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
_KL: dict[str, Any] = {
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
_FLUX1: dict[str, Any] = {
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    **_KL,
}
_DC: dict[str, Any] = {
    "latent_channels": 32,
    "attention_head_dim": 8,
    "encoder_block_out_channels": (8, 8, 8, 8, 32, 32),
    "decoder_block_out_channels": (8, 8, 8, 8, 32, 32),
    "encoder_layers_per_block": (1,) * 6,
    "decoder_layers_per_block": (1,) * 6,
    "encoder_block_types": ("ResBlock",) * 4 + ("EfficientViTBlock",) * 2,
    "decoder_block_types": ("ResBlock",) * 4 + ("EfficientViTBlock",) * 2,
    "scaling_factor": 0.41407,
}
_AUTOENCODERS = {
    "flux1": ("AutoencoderKL", _FLUX1),
    "repa_e": ("AutoencoderKL", _FLUX1),
    "flux2": ("AutoencoderKLFlux2", {"latent_channels": 32, **_KL}),
    "dc_ae": ("AutoencoderDC", _DC),
}


def tiny_lpips(folder: Path, widths: tuple[int, ...] = (4, 4, 6, 6, 8)) -> Path:
    """Save a narrow LPIPS with random weights in `folder`; returns it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Lpips(widths)
        for weight in network.heads:
            weight.data.uniform_()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), folder / "lpips.safetensors")
    return folder


def tiny_autoencoder(kind: str, folder: Path) -> Path:
    """Save a small autoencoder of `kind`, with the published channels and factor, in `folder`; returns it."""
    name, settings = _AUTOENCODERS[kind]
    network = import_class("diffusers", name, f"conditioning.autoencoder.kind {kind}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network(**settings).save_pretrained(folder)
    return folder


def tiny_text_tower(kind: str, dim: int, folder: Path) -> Path:
    """Save a small text tower of `kind` that emits `dim` features, and a tokenizer of single characters."""
    key = f"conditioning.text.kind {kind}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _t5gemma(dim, key) if kind == "t5gemma" else _qwen(dim, key)
    model.save_pretrained(folder)
    _tokenizer(key, special=kind == "t5gemma").save_pretrained(folder)
    return folder


_DINO: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_register_tokens": 2,
}


def tiny_dino(kind: str, folder: Path, registers: bool = True, **settings: Any) -> Path:
    """Save a small DINO of `kind`, dinov2 (patch 14) or dinov3 (patch 16), in `folder`; returns it.

    `registers` chooses between the two classes of DINOv2; `settings` replace values of its config.
    """
    values = _DINO | settings
    if kind == "dinov3":
        name, values = "DINOv3ViT", {"patch_size": 16, "intermediate_size": 64, **values}
    else:
        name = "Dinov2WithRegisters" if registers else "Dinov2"
        # The published ones were trained on 37 x 37 patches; other sizes interpolate their positions.
        values = {"patch_size": 14, "image_size": 56, "mlp_ratio": 2, **values}
        if not registers:
            del values["num_register_tokens"]
    config = import_class("transformers", f"{name}Config", f"a tiny {kind}")
    model = import_class("transformers", f"{name}Model", f"a tiny {kind}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = model(config(**values))
        for parameter in network.parameters():
            # Wider than the usual 0.02, so that features of different pictures differ.
            parameter.data.normal_(std=0.2)
    network.save_pretrained(folder)
    return folder


def _vocabulary() -> list[str]:
    return [*_SPECIAL, *string.printable]


def _text_settings(dim: int) -> dict[str, Any]:
    return {
        "vocab_size": len(_vocabulary()),
        "hidden_size": dim,
        "intermediate_size": 2 * dim,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }


def _t5gemma(dim: int, key: str) -> Any:
    side = _text_settings(dim) | {"query_pre_attn_scalar": 16, "sliding_window": 256}
    config = import_class("transformers", "T5GemmaConfig", key)
    model = import_class("transformers", "T5GemmaForConditionalGeneration", key)
    return model(config(encoder=side, decoder=side, vocab_size=side["vocab_size"])).eval()


def _qwen(dim: int, key: str) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": dim,
        "deepstack_visual_indexes": [0],
    }
    config = import_class("transformers", "Qwen3VLConfig", key)
    model = import_class("transformers", "Qwen3VLForConditionalGeneration", key)
    text = _text_settings(dim) | {"rope_parameters": rope}
    return model(config(text_config=text, vision_config=vision)).eval()


def _tokenizer(key: str, special: bool) -> Any:
    """Characters as tokens; `special` puts <bos> and <eos> around every caption, as Gemma's does."""
    fast = import_class("transformers", "PreTrainedTokenizerFast", key)
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    places = {token: i for i, token in enumerate(_vocabulary())}
    core = Tokenizer(models.WordLevel(places, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if special:
        ends = [("<bos>", places["<bos>"]), ("<eos>", places["<eos>"])]
        core.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    return fast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
