"""diffusers' PRX in training loops as people write them: the peers of the throughput suite.

A step is: noise, noisy images, forward under BF16 autocast on FP32 weights, flow-matching loss, backward,
clipping, AdamW (fused on CUDA). Every block is compiled by itself, as diffusers and torchtitan do. Inputs are
those of `cached`: random, on the device, text padded to its longest with a mask. The network is the peer of
`routing.py` (`peer.py`), with the same routing.

    diffusers                  one process, or DDP; the mask is broadcast by the attention (B, 1, 1, keys)
    diffusers, expanded mask   the mask is written out for every head and query, as Photoroom/PRX's code does
    diffusers, FSDP2           each block sharded by `fully_shard`, weights gathered in BF16 and kept until
                               backward, gradients reduced in FP32: Photoroom/PRX's setting
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from millrace.benchmarks.report import throughput_report as report
from millrace.benchmarks.step import step_measurement as measurement
from millrace.benchmarks.step import training_steps as steps
from millrace.benchmarks.step.peer import Peer
from millrace.engine.config import Config, route_end
from millrace.engine.distributed import process_group
from millrace.engine.encoders.autoencoder import published_factor
from millrace.engine.model.conversion import diffusers_config
from millrace.engine.model.flops import training_flops

Row = dict[str, Any]

PEERS = ("diffusers", "diffusers, expanded mask", "diffusers, FSDP2")
INCLUDES = "random latents (or pixels) and padded text rows with their mask, already on the device"


def missing() -> str | None:
    """Why the peers cannot run here, or None."""
    try:
        from diffusers import PRXTransformer2DModel  # noqa: F401
    except ImportError:
        return "not installed: pip install 'diffusers>=0.42'"
    return None


def measure(path: str, config: Config, name: str, arguments: argparse.Namespace) -> Row:
    """Train a few steps of peer `name` and return the row, the same on every process."""
    return measurement.halving(config, lambda fitting: _measure(path, fitting, name, arguments))


def _measure(path: str, config: Config, name: str, arguments: argparse.Namespace) -> Row:
    device = process_group.choose_device(config.run.device)
    process_group.initialize(device)
    side = config.data.resolution // (
        published_factor(config.conditioning.autoencoder) * config.model.patch_size
    )
    text = arguments.text_tokens or config.conditioning.text.max_tokens
    samples, devices = config.data.micro_batch, process_group.world_size()
    batch = steps.random_batch(config, samples, (side, side), text, [text] * samples, device)
    batch = batch.without_noise().cast(torch.bfloat16)
    with expanded_mask() if name == "diffusers, expanded mask" else mock.patch.dict({}):
        step = training_step(config, name, batch, device)
        mine = _time(step, device, arguments.warmup, arguments.steps)
    memory, kind, peak = measurement.memory_and_peak(device)
    times, memories = zip(*process_group.gather_objects((mine, memory)), strict=True)
    step_seconds = [max(one) for one in zip(*times, strict=True)]
    flops = training_flops(config, side * side, text)
    return {
        "config": Path(path).stem,
        "peer": name,
        "overrides": arguments.overrides,
        "smoke": arguments.smoke,
        "conditioning": "cached",
        "includes": INCLUDES,
        "device": device.type,
        "devices": devices,
        "micro_batch": samples,
        "global_batch": samples * devices,
        "image_tokens": side * side,
        "text_tokens": text,
        **report.summarise(step_seconds, samples * devices, devices, flops, peak, None),
        "peak_memory_bytes": max(memories),
        "peak_memory_kind": f"of one process, {kind}",
        "skipped_steps": 0,
        "warmup_steps": arguments.warmup,
        "step_seconds": step_seconds,
    }


def training_step(config: Config, name: str, batch: steps.Batch, device: torch.device) -> Callable[[], None]:
    """One optimizer step of the peer on this batch."""
    peer = build(config, device)
    if config.run.compile:
        # Wrapped, so that what FSDP2 does before and after a block stays outside of what is compiled.
        for i, block in enumerate(peer.model.blocks):
            peer.model.blocks[i] = torch.compile(block)
    sharded = name == "diffusers, FSDP2"
    if sharded:
        shard(peer)
    module: nn.Module = peer
    if not sharded and process_group.world_size() > 1:
        module = nn.parallel.DistributedDataParallel(peer)
    forward = steps.PeerStep(module, config, batch).forward
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        peer.parameters(),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=device.type == "cuda",
    )

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=not sharded):
            loss = forward()
        loss.backward()
        if settings.clip:
            nn.utils.clip_grad_norm_(peer.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@torch.no_grad()
def build(config: Config, device: torch.device) -> Peer:
    """The peer with FP32 weights on the device, random in every parameter."""
    from diffusers import PRXTransformer2DModel

    torch.manual_seed(config.run.seed)
    with torch.device(device):
        model = PRXTransformer2DModel(**diffusers_config(config.model))
        routing = config.routing
        if routing.policy == "none":
            peer = Peer(model)
        else:
            peer = Peer(model, routing.policy, routing.start, route_end(config), routing.drop)
    for parameter in peer.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return peer.train()


def shard(peer: Peer) -> None:
    """FSDP2 over all processes, one unit a block, as Photoroom/PRX sets it up."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in peer.model.blocks:
        fully_shard(block, mp_policy=policy, reshard_after_forward=False)
    # Inputs of the whole keep their dtype: the times, above all.
    whole = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    fully_shard(peer, mp_policy=whole, reshard_after_forward=False)


@contextmanager
def expanded_mask() -> Iterator[None]:
    """diffusers' attention with the mask (B, heads, queries, keys) that Photoroom/PRX adds to the logits."""
    from diffusers.models.transformers import transformer_prx

    attend = transformer_prx.dispatch_attention_fn

    def expanded(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **options: Any) -> Tensor:
        samples, queries, heads, _ = query.shape
        allowed = attn_mask.expand(samples, heads, queries, key.shape[1]).to(query.dtype)
        mask = (1.0 - allowed) * torch.finfo(query.dtype).min
        return attend(query, key, value, attn_mask=mask, **options)

    with mock.patch.object(transformer_prx, "dispatch_attention_fn", expanded):
        yield


def _time(step: Callable[[], None], device: torch.device, warmup: int, count: int) -> list[float]:
    seconds = []
    gc.collect()
    gc.freeze()
    try:
        for i in range(warmup + count):
            if i == warmup and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            measurement.wait_for(device)
            started = time.perf_counter()
            step()
            measurement.wait_for(device)
            if i >= warmup:
                seconds.append(time.perf_counter() - started)
    finally:
        gc.unfreeze()
    return seconds
