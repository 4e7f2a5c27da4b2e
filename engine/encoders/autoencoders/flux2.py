"""FLUX.2 autoencoder: 32 channels and 8 pixels a latent position, or folded 128 channels and 16 pixels."""

from millrace.engine.encoders.autoencoder import DiffusersNetwork, diffusers_entry
from millrace.engine.encoders.autoencoders.flux1 import KL, TINY_KL
from millrace.engine.encoders.pretrained import NetworkSize

ENTRY = diffusers_entry(
    32,
    8,
    DiffusersNetwork(
        source="black-forest-labs/FLUX.2-dev",
        class_name="AutoencoderKLFlux2",
        size=NetworkSize(84_046_115, 4_169_600.0),
        shape={"latent_channels": 32} | KL,
        tiny={"latent_channels": 32} | TINY_KL,
        scale=0.18215,  # default of diffusers' AutoencoderKL, as which PRX loads these weights
        folded_norm=True,
    ),
)
