"""FLUX.1 autoencoder: 16 channels, 8 pixels for each latent position."""

from millrace.engine.encoders.autoencoder import DiffusersNetwork, diffusers_entry
from millrace.engine.encoders.pretrained import NetworkSize, Settings

KL: Settings = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
"""Shape of the autoencoders of FLUX.1 and FLUX.2."""
TINY_KL: Settings = KL | {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}

_OWN: Settings = {
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

FLUX1 = DiffusersNetwork(
    source="black-forest-labs/FLUX.1-dev",
    class_name="AutoencoderKL",
    size=NetworkSize(83_819_683, 4_164_864.0),
    shape=_OWN | KL,
    tiny=_OWN | TINY_KL,
)

ENTRY = diffusers_entry(16, 8, FLUX1)
