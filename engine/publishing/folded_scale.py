"""Folded scale: an autoencoder whose own file says how its latents are normalised.

The denoiser's latents are scale (z - shift). Where scale and shift are numbers, they are diffusers'
`scaling_factor` and `shift_factor`. A tuned autoencoder has one of each for every channel, which diffusers'
PRXPipeline does not read: they go into the two 1x1 convolutions that an AutoencoderKL may have around its
latents, and the two factors are 1 and 0. That is exact: such a convolution sees one position, and no padding.
"""

from typing import Any

import torch
from torch import Tensor

from millrace.engine.encoders.autoencoder import Latents
from millrace.engine.util.errors import UserError


def fold_scale(latents: Latents) -> Any:
    """The network of diffusers with the normalisation in it: latents' own, changed, or a new one."""
    network, scale, shift = latents.network, latents.scale, latents.shift
    if not isinstance(scale, Tensor):
        own = {"scaling_factor": scale, "shift_factor": shift}
        network.register_to_config(**{key: value for key, value in own.items() if key in network.config})
        return network
    config = dict(network.config)
    if config.get("use_quant_conv") is not False or config.get("use_post_quant_conv") is not False:
        raise UserError(
            f"{latents.identity} has no place for the scale of each channel in a pipeline; write it with "
            "millrace export --autoencoder"
        )
    wanted = {
        **{key: value for key, value in config.items() if not key.startswith("_")},
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    }
    folded = type(network)(**wanted)  # in FP32: rounding would move the scale
    folded.load_state_dict(network.state_dict(), strict=False)
    scale, shift = scale.flatten().float(), shift.flatten().float()
    ones = torch.ones_like(scale)
    with torch.no_grad():
        # mean -> scale (mean - shift); logvar -> logvar + 2 log scale
        _diagonal(folded.quant_conv, torch.cat([scale, ones]), torch.cat([-scale * shift, 2 * scale.log()]))
        _diagonal(folded.post_quant_conv, 1 / scale, shift)
    return folded.eval()


def _diagonal(convolution: torch.nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    convolution.weight.copy_(weight.diag()[:, :, None, None])
    convolution.bias.copy_(bias)
