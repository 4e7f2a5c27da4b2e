"""Memory check at the start of a run: whether it fits the device, before the model is allocated."""

import psutil
import torch

from millrace.engine.config import Config
from millrace.engine.distributed.process_group import ranks_here
from millrace.engine.planning.activations import trace
from millrace.engine.planning.frozen_sizes import frozen_networks
from millrace.engine.planning.step_memory import gigabytes, memory_of, shape_of
from millrace.engine.util.errors import UserError


def check_fits(config: Config, stage: int, ranks: int, factor: int, device: torch.device) -> str | None:
    """Raise UserError, with the estimate, if the run's state alone does not fit the memory of its device.

    State is what is always held, with the gradients or with the copies that draw samples. Activations are
    traced without what operators allocate inside themselves: if only with them, or with copies of the
    gradients, the run goes beyond, the returned line says so.

    Called when text encoder and autoencoder are loaded: they are gone from the memory that is free, so only
    the frozen networks that come later are counted here. Takes the time of one trace: 0.6 s for 1.2 B
    parameters, whatever the batch.

    Args:
        stage: ZeRO stage.
        ranks: processes that ZeRO shards over.
        factor: pixels per latent position of the autoencoder.
    """
    data = config.data
    edge = max(round(data.resolution / (factor * config.model.patch_size)), 1)
    text = config.conditioning.text.max_tokens
    later = frozen_networks(config, edge**2, text).of("teacher", "perceptual")
    traced = trace(config, data.micro_batch, edge, text, stage)
    fused = device.type == "cuda"
    shape = shape_of(config)
    memory = memory_of(config, stage, ranks, traced, shape, later.bytes, fused)
    host, free = shape.host_state / (ranks if stage else 1), psutil.virtual_memory().available / ranks_here()
    if host > free:
        raise UserError(
            f"optimizer.kind {config.optimizer.kind} needs {gigabytes(host)} GB of the host's memory per "
            f"process, {gigabytes(free)} GB are free; take adamw_8bit, or ZeRO 1 on more processes"
        )
    if fused:
        # What the allocator keeps for the next tensors counts as free: the driver does not know of it.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        have, where = torch.cuda.mem_get_info(device)[0] + kept, torch.cuda.get_device_name(device)
    else:
        have, where = free - host, "this machine (per process)"
    if memory.peak <= have:
        return None
    line = (
        f"the run needs about {gigabytes(memory.peak)} GB per process ({memory.table()}), {where} has "
        f"{gigabytes(have)} GB free; take a smaller model or data.micro_batch, a higher ZeRO stage on more "
        "processes, or run.activation_checkpointing"
    )
    if memory.certain > have:
        raise UserError(line)
    return f"warning: {line}"
