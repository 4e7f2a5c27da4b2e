"""Whether a run fits, before anything is allocated."""

import psutil
import torch

from millrace.engine.config import Config, route_end
from millrace.engine.distributed.process_group import ranks_here
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.optim.build_optimizer import muon_stacks
from millrace.engine.util.errors import UserError

GIB = 2**30


def estimate_bytes(config: Config, stage: int, ranks: int, factor: int) -> dict[str, float]:
    """Bytes that one process needs for the denoiser's training, by purpose.

    Args:
        stage: ZeRO stage.
        ranks: processes that ZeRO shards over.
        factor: pixels per latent position of the autoencoder.

    Weights, gradients, optimizer state, and the FP32 copy that draws samples are exact up to DeepSpeed's
    buffers. Activations are a rough count per image token and block: 16 C + 5 F numbers with everything kept,
    6 C + 2 F with the products kept, C with full recomputation; routed blocks hold the tokens that run in
    them. Stage 3 has masters of its own: DeepSpeed 0.19 would share them with FP32 weights, but compares a
    torch.device with a string first. Frozen towers are not counted, nor what Muon needs during its update,
    when there are no activations.
    """
    model, data, routing = config.model, config.data, config.routing
    with torch.device("meta"):
        named = list(Denoiser(model, routing).named_parameters())
    parameters, matrices = sum(p.numel() for _, p in named), 0
    if config.optimizer.kind == "muon":
        stacks = muon_stacks(named, config.optimizer, model)
        matrices = sum(p.numel() for name, p in named if name in stacks)
    stored = 4 if config.precision.master == "float32" else 2
    share = ranks if stage > 0 else 1
    tokens = data.micro_batch * (data.resolution / (factor * model.patch_size)) ** 2
    number = 2 if config.precision.compute == "bfloat16" else 4
    per_token = (16 * model.width + 5 * model.mlp_width) * number
    recompute = config.run.activation_checkpointing
    kept = {"full": model.width, "selective": 6 * model.width + 2 * model.mlp_width}.get(recompute.policy)
    if kept is not None:
        per_token = per_token * (1 - 1 / recompute.every) + kept * number / recompute.every
    averages = config.ema.enabled * (1 if config.ema.second_decay is None else 2)
    blocks = float(model.depth)
    if routing.policy != "none":
        blocks -= routing.drop * (route_end(config) + 1 - routing.start)
    return {
        "weights": stored * parameters / (ranks if stage == 3 else 1),
        "gradients": stored * parameters / (ranks if stage >= 2 else 1),
        "master weights": 4 * parameters / share if stage else 0.0,
        "Adam moments": 2 * stored * (parameters - matrices) / share,
        "Muon momentum": stored * matrices / share,
        "EMA": averages * stored * parameters / share,
        "samples": 4 * parameters if config.sampling.every_steps or config.evaluation.every_steps else 0.0,
        "activations": tokens * blocks * per_token,
    }


def check_fits(config: Config, stage: int, ranks: int, factor: int, device: torch.device) -> str | None:
    """Raise UserError, with the estimate, if the run's state alone does not fit the memory of its device.

    Activations are too rough a count to refuse for: if only they go beyond, the returned line says so.
    """
    parts = estimate_bytes(config, stage, ranks, factor)
    need = sum(parts.values())
    if device.type == "cuda":
        have, where = torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_name(device)
    else:
        have, where = psutil.virtual_memory().available / ranks_here(), "this machine (per process)"
    if need > have:
        table = ", ".join(
            f"{name} {size / GIB:.1f}" for name, size in parts.items() if size > min(need / 100, GIB / 10)
        )
        line = (
            f"the run needs about {need / GIB:.1f} GiB per process ({table}), {where} has {have / GIB:.1f} "
            "GiB free; take a smaller model or data.micro_batch, a higher ZeRO stage on more processes, or "
            "run.activation_checkpointing"
        )
        if need - parts["activations"] > have:
            raise UserError(line)
        return f"warning: {line}"
    return None
