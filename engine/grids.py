"""Sample grids during training."""

from pathlib import Path

import torch
from torch import Tensor

from millrace.engine.config import Config
from millrace.engine.data.pictures import Source
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.objective.flow import FlowMatching
from millrace.engine.preparation import Preparation
from millrace.engine.runtime.logs import replace_text
from millrace.engine.runtime.precision import DTYPES
from millrace.engine.sampling import Sampler, save_grid


def draw_grid(
    path: Path,
    config: Config,
    weights: dict[str, Tensor],
    flow: FlowMatching,
    prepare: Preparation,
    source: Source,
    device: torch.device,
) -> None:
    """Write pictures of `sampling.prompts`, by a copy of the denoiser with `weights`, to `path`, and their
    prompts beside it: where there are none, the first long captions of `source`."""
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
    save_grid(sampler(prompts, size, config.sampling, config.run.seed), path)
    replace_text(path.parent / "prompts.txt", "\n".join(prompts) + "\n")
