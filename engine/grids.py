"""Sample grids during training."""

import torch
from torch import Tensor

from millrace.engine.config import Config
from millrace.engine.data.pictures import Source
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.objective.flow import FlowMatching
from millrace.engine.preparation import Preparation
from millrace.engine.runtime.precision import DTYPES
from millrace.engine.sampling import Sampler


def training_pictures(
    config: Config,
    weights: dict[str, Tensor],
    flow: FlowMatching,
    prepare: Preparation,
    source: Source,
    device: torch.device,
) -> tuple[Tensor, list[str]]:
    """Pictures (n, 3, h, w) in [-1, 1] on the CPU of `sampling.prompts`, by a copy of the denoiser with
    `weights`, and their prompts: where there are none, the first long captions of `source`."""
    with torch.device(device):
        copy = Denoiser(config.model, config.routing)
    copy.load_state_dict(weights)
    sampler = Sampler(
        copy.eval().requires_grad_(False),
        flow,
        prepare.autoencoder,
        prepare.text_tower,
        device,
        DTYPES[config.precision.compute],
    )
    prompts = list(config.sampling.prompts) or [
        source.captions(i).long for i in range(min(config.sampling.count, len(source)))
    ]
    size = (config.data.resolution, config.data.resolution)
    return sampler(prompts, size, config.sampling, config.run.seed), prompts
