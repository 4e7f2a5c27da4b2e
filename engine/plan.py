"""What a run will take, and which settings fit best, before anything is opened, allocated or trained.

python -m millrace.engine.plan --config configs/latent_256.json --gpus 8
python -m millrace.engine.plan --config configs/speedrun_24h.json --gpus 32 --device h200
python -m millrace.engine.plan --config configs/jit_1024.json --gpus 16 --set data.global_batch=512
python -m millrace.engine.plan --config configs/quickstart.json --device cpu --gpus 2
"""

import torch

from millrace.engine.cli import run_command
from millrace.engine.config import Config
from millrace.engine.data.crop import check_resolution
from millrace.engine.distributed.deepspeed_engine import zero_stage
from millrace.engine.encoders.autoencoder import published_factor
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.flops import dense_training_flops, training_flops
from millrace.engine.model.routing import describe, require_grid
from millrace.engine.planning.fit_check import (
    GIB,
    estimate_bytes,
)


def plan(config: Config, processes: int = 1) -> list[str]:
    """Size, work, expected gain of the routing, and memory of a run, as lines for people.

    Pictures count as squares of `data.resolution`, captions as `conditioning.text.max_tokens` long, and the
    autoencoder as the published one of its kind. Raises UserError for what the start of the run would refuse
    on these grounds.
    """
    model, data = config.model, config.data
    factor = published_factor(config.conditioning.autoencoder)
    edge = factor * model.patch_size
    check_resolution(data, edge)
    require_grid(config, edge)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Denoiser(model, config.routing).parameters())
    image, text = (data.resolution // edge) ** 2, config.conditioning.text.max_tokens
    dense, trained = dense_training_flops(config, image, text), training_flops(config, image, text)
    work = f"training FLOPs per image: {dense:.4g} dense"
    if config.routing.policy != "none":
        work += f", {trained:.4g} with {config.routing.policy} ({trained / dense:.1%}); expected gain: "
        work += f"steps up to {dense / trained:.2f} times as fast"
    stage = zero_stage(config)
    parts = estimate_bytes(config, stage, processes, factor)
    table = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    return [
        f"model: {parameters:,} parameters, width {model.width}, depth {model.depth}",
        f"tokens: {image} of an image, {text} of a caption",
        describe(config),
        work,
        f"memory of each of {processes} process(es), ZeRO {stage}: about {sum(parts.values()) / GIB:.1f} GiB "
        f"({table}) and the frozen networks",
    ]


def main() -> int:
    """Print the plan of a configuration on some devices."""
    from millrace.engine.planning.report import (
        parse,
        run,
    )

    print("\n".join(run(parse(__doc__))))
    return 0


if __name__ == "__main__":
    run_command(main)
