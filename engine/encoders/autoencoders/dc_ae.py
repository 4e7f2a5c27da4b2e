"""DC-AE autoencoder (arXiv 2410.10733) of Sana: 32 channels, 32 pixels a latent position, no posterior."""

from millrace.engine.encoders.autoencoder import DiffusersNetwork, diffusers_entry
from millrace.engine.encoders.pretrained import NetworkSize

ENTRY = diffusers_entry(
    32,
    32,
    DiffusersNetwork(
        source="mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers",
        class_name="AutoencoderDC",
        size=NetworkSize(362_893_923, 4_965_696.0),
        shape={"scaling_factor": 0.41407},  # the rest is the default of diffusers
        tiny={
            "latent_channels": 32,
            "attention_head_dim": 8,
            "encoder_block_out_channels": (8, 8, 8, 8, 32, 32),
            "decoder_block_out_channels": (8, 8, 8, 8, 32, 32),
            "encoder_layers_per_block": (1,) * 6,
            "decoder_layers_per_block": (1,) * 6,
            "encoder_block_types": ("ResBlock",) * 4 + ("EfficientViTBlock",) * 2,
            "decoder_block_types": ("ResBlock",) * 4 + ("EfficientViTBlock",) * 2,
            "scaling_factor": 0.41407,
        },
        stochastic=False,
        exact=True,
    ),
)
