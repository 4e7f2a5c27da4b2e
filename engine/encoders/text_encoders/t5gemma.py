"""T5Gemma text encoder: the encoder half of T5Gemma 2B (PRX's text encoder)."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from millrace.engine.encoders.liger_kernels import Served
from millrace.engine.encoders.pretrained import NetworkSize, Settings, import_class, load_network
from millrace.engine.encoders.text_encoder import PipelineComponent, clean_text
from millrace.engine.encoders.text_hf import KEY, HFTextEncoder, hf_entry, kind_key
from millrace.kernels.support.packed import to_device

_KIND_KEY = kind_key("t5gemma")


class T5Gemma(HFTextEncoder):
    """Encoder of T5Gemma 2B (E = 2304), lower-case captions. Attention is bidirectional and eager, since its
    logits have a soft cap."""

    source = "google/t5gemma-2b-2b-ul2"
    size = NetworkSize(2_614_341_888, 2.0 * (2_614_341_888 - 256_000 * 2304))
    shape: ClassVar[Settings] = {
        "vocab_size": 256_000,
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
    special = True
    component = PipelineComponent(
        "prx",
        "T5GemmaEncoder",
        "transformers.T5GemmaEncoderModel.from_pretrained({source!r}, is_encoder_decoder=False).encoder",
    )
    served = Served("T5GemmaRMSNorm", 1.0, "gemma", "T5GemmaSelfAttention", "T5GemmaMLP")
    clean = staticmethod(clean_text)

    def _longest(self) -> int:
        return self.network.encoder.config.sliding_window

    @staticmethod
    def read_network(source: str, device: torch.device, dtype: torch.dtype) -> Any:
        model = import_class("transformers", "T5GemmaEncoderModel", _KIND_KEY)
        return load_network(
            model.from_pretrained,
            source,
            KEY,
            device,
            dtype=dtype,
            is_encoder_decoder=False,
            attn_implementation="eager",
        )

    @staticmethod
    def tiny_network(settings: Settings) -> Any:
        side = settings | {"query_pre_attn_scalar": 16, "sliding_window": 256}
        config = import_class("transformers", "T5GemmaConfig", _KIND_KEY)
        model = import_class("transformers", "T5GemmaForConditionalGeneration", _KIND_KEY)
        return model(config(encoder=side, decoder=side, vocab_size=side["vocab_size"]))

    @staticmethod
    def network_of(source: str) -> Any:
        config = import_class("transformers", "T5GemmaConfig", _KIND_KEY)
        found = config.from_pretrained(source, is_encoder_decoder=False, local_files_only=True)
        return import_class("transformers", "T5GemmaEncoderModel", _KIND_KEY)(found)

    @staticmethod
    def new_network(shape: Settings) -> Any:
        config = import_class("transformers", "T5GemmaConfig", _KIND_KEY)(
            encoder=shape,
            decoder=shape,
            vocab_size=shape["vocab_size"],
            is_encoder_decoder=False,
            attn_implementation="eager",
        )
        return import_class("transformers", "T5GemmaEncoderModel", _KIND_KEY)(config)

    def _save_network(self, folder: Path) -> None:
        self.network.encoder.save_pretrained(folder)
        # diffusers takes the encoder's settings from those of the whole model.
        self.network.config.save_pretrained(folder)

    def _forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        padding = torch.arange(ids.shape[1]) >= lengths[:, None]
        mask = torch.zeros(ids.shape, dtype=self.dtype).masked_fill(padding, torch.finfo(self.dtype).min)
        mask = to_device(mask, self.device)[:, None, None, :]
        masks = {"full_attention": mask, "sliding_attention": mask}
        return self.network(input_ids=to_device(ids, self.device), attention_mask=masks).last_hidden_state


ENTRY = hf_entry("t5gemma", T5Gemma)
