"""Qwen3-VL-Embedding text encoder: the language model of Qwen3-VL-Embedding 2B."""

from typing import Any

import torch
from torch import Tensor

from millrace.engine.encoders.liger_kernels import Served
from millrace.engine.encoders.pretrained import Settings, import_class, load_network
from millrace.engine.encoders.text_encoder import PipelineComponent, unescape
from millrace.engine.encoders.text_hf import KEY, HFTextEncoder, hf_entry, kind_key
from millrace.kernels.support.packed import to_device

_KIND_KEY = kind_key("qwen3vl")


class Qwen3VL(HFTextEncoder):
    """Language model of Qwen3-VL-Embedding 2B (E = 2048); captions keep their case. Attention is causal, so
    the padding on the right is out of sight and needs no mask."""

    source = "Qwen/Qwen3-VL-Embedding-2B"
    served = Served("Qwen3VLTextRMSNorm", 0.0, "llama", "Qwen3VLTextAttention", "Qwen3VLTextMLP")
    component = PipelineComponent(
        "transformers",
        "Qwen3VLTextModel",
        "transformers.Qwen3VLModel.from_pretrained({source!r}).language_model",
    )
    clean = staticmethod(unescape)

    @staticmethod
    def read_network(source: str, device: torch.device, dtype: torch.dtype) -> Any:
        model = import_class("transformers", "Qwen3VLModel", _KIND_KEY)
        whole = load_network(
            model.from_pretrained, source, KEY, torch.device("cpu"), dtype=dtype, attn_implementation="sdpa"
        )
        return whole.language_model.to(device)

    @staticmethod
    def tiny_network(settings: Settings) -> Any:
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
        vision = {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": settings["hidden_size"],
            "deepstack_visual_indexes": [0],
        }
        config = import_class("transformers", "Qwen3VLConfig", _KIND_KEY)
        model = import_class("transformers", "Qwen3VLForConditionalGeneration", _KIND_KEY)
        return model(config(text_config=settings | {"rope_parameters": rope}, vision_config=vision))

    @staticmethod
    def network_of(source: str) -> Any:
        config = import_class("transformers", "Qwen3VLConfig", _KIND_KEY)
        found = config.from_pretrained(source, local_files_only=True)
        return import_class("transformers", "Qwen3VLModel", _KIND_KEY)(found).language_model

    def _forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        # Time, height and width positions are equal for text. Without the fourth row that transformers would
        # add, it does not look for packed sequences, which would wait for the device.
        positions = torch.arange(ids.shape[1], device=self.device).expand(3, *ids.shape)
        return self.network(
            input_ids=to_device(ids, self.device), position_ids=positions, use_cache=False
        ).last_hidden_state


ENTRY = hf_entry("qwen3vl", Qwen3VL)
