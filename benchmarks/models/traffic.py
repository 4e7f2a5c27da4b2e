"""Count the bytes that a training step moves, ours and the peer's, and the time they take of an H200.

python -m benchmarks traffic
python -m benchmarks traffic --config configs/jit_1024.json --variant dense --by operator --top 30
python -m benchmarks traffic --config configs/latent_256.json --attention-tflops 600 500 --output traffic.json

No GPU and no weights: the real models run forward and backward on meta tensors, one micro-batch in BF16 with
BF16 weights, and every operator is entered with what it reads and writes (`ledger.py`). Ours are the fused
operators as they are registered, one kernel each; the peer is diffusers' PRX with Photoroom/PRX's routing
(`peer.py`) in eager PyTorch. Pictures are square; captions fill between a quarter and three quarters of
conditioning.text.max_tokens, which the peer pads and ours packs. A step draws the noise, moves the pictures
to their times, predicts, and takes the flow-matching loss back to the gradients. Left out: the optimizer, the
cast of FP32 masters to BF16 weights, reduction between GPUs, and the frozen encoders.

The roofline gives each product the longer of its arithmetic and its bytes, attention its arithmetic, and all
else its bytes, at measured ceilings, with nothing overlapped and no launch waited for. The share of the 989
TFLOP/s of the data sheet that the model FLOPs reach in that time bounds the MFU of these operators from
above.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from millrace.benchmarks.models.ledger import Ledger
from millrace.benchmarks.report import recording
from millrace.benchmarks.report import traffic_report as report
from millrace.benchmarks.report.charts import draw_beside
from millrace.benchmarks.step import training_steps as steps
from millrace.engine.cli import command_parser, run_command
from millrace.engine.config import Config
from millrace.engine.config.loading import load_config
from millrace.engine.encoders.autoencoder import published_factor
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.flops import training_flops
from millrace.engine.planning.automatic import without_auto
from millrace.engine.util.errors import UserError
from millrace.kernels.ops.routing import kept_tokens
from millrace.kernels.support.registration import HAS_TRITON

CONFIGS = ("configs/latent_256.json", "configs/jit_1024.json")
SIDES = ("ours", "peer")


def side_of_grid(config: Config) -> int:
    """Tokens along one edge of a square picture."""
    factor = published_factor(config.conditioning.autoencoder)
    edge, patch = config.data.resolution, factor * config.model.patch_size
    if edge % patch:
        raise UserError(
            f"data.resolution is {edge}, expected a multiple of {patch} pixels, the edge of a token"
        )
    return edge // patch


def caption_lengths(config: Config) -> list[int]:
    """Text tokens of each sample of the micro-batch: a quarter to three quarters of the longest allowed."""
    longest = config.conditioning.text.max_tokens
    return [round(n) for n in np.linspace(longest / 4, 3 * longest / 4, config.data.micro_batch).tolist()]


def record(config: Config, side: str, lengths: list[int] | None = None) -> Ledger:
    """The ledger of one step of `side` under this configuration, routing included.

    Args:
        lengths: text tokens of each sample; default `caption_lengths`.
    """
    edge, samples = side_of_grid(config), config.data.micro_batch
    with torch.device("meta"):
        denoiser = Denoiser(config.model, config.routing)
    denoiser.to(torch.bfloat16)
    batch = steps.random_batch(
        config,
        samples,
        (edge, edge),
        config.conditioning.text.max_tokens,
        lengths or caption_lengths(config),
        torch.device("meta"),
    )
    batch = batch.without_noise().cast(torch.bfloat16)
    # A mask finds as many tokens as a route keeps, so the one shape that depends on data is known.
    ledger = Ledger(selected=samples * kept_tokens(edge * edge, 1 - config.routing.drop))
    if side == "ours":
        step: steps.OurStep | steps.PeerStep = steps.OurStep(denoiser, config, batch)
        ledger.watch(denoiser.blocks)
    else:
        peer = steps.build_peer(denoiser, config)
        step = steps.PeerStep(peer, config, batch)
        ledger.watch(peer.model.blocks)
    with ledger:
        ledger.backward(step.forward())
    return ledger


def resolve(path: str, overrides: list[str], variant: str) -> Config:
    """The configuration with this routing, the default micro-batch for `auto`, and for `auto` attention what
    it takes on a GPU.

    On meta tensors `auto` would take what CPUs do. Captions of unequal length make a GPU take `varlen`.
    """
    config = steps.variant_config(without_auto(load_config(path, overrides)), variant)
    if config.model.attention_backend != "auto":
        return config
    return steps.with_values(config, {"model": {"attention_backend": "varlen"}})


def measure(path: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one configuration: every variant, both sides."""
    rows = []
    for variant in arguments.variant:
        config = resolve(path, arguments.overrides, variant)
        tokens = side_of_grid(config) ** 2
        flops = math.fsum(training_flops(config, tokens, n) for n in caption_lengths(config))
        for side in SIDES:
            row = {
                "config": Path(path).stem,
                "overrides": arguments.overrides,
                "variant": variant,
                "side": side,
                "micro_batch": config.data.micro_batch,
                "image_tokens": tokens,
                "text_tokens": config.conditioning.text.max_tokens,
            }
            entries = record(config, side).entries
            if arguments.by:
                print(f"{row['config']}, {variant}, {side}, outside products and attention:")
                print(report.heaviest(entries, arguments.by, arguments.top).text(), end="\n\n")
            rows.append(row | report.summarise(entries, flops, *arguments.attention_tflops))
        report.compare(*rows[-2:])
    return rows


def parse() -> argparse.Namespace:
    """Arguments of the command."""
    parser = command_parser(__doc__)
    parser.add_argument(
        "--config", nargs="+", default=CONFIGS, metavar="FILE", help=f"default {' '.join(CONFIGS)}"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", dest="overrides", help="override one value"
    )
    parser.add_argument(
        "--variant",
        nargs="+",
        choices=tuple(steps.VARIANTS),
        default=list(steps.VARIANTS),
        help="default all",
    )
    parser.add_argument(
        "--attention-tflops",
        nargs="+",
        type=_rate,
        default=list(report.ATTENTION_TFLOPS),
        metavar="X",
        help="rate of attention, or of its forward and its backward (default 450 420)",
    )
    parser.add_argument(
        "--by", choices=report.GROUPS, help="also list the heaviest rows outside products and attention"
    )
    parser.add_argument("--top", type=int, default=20, metavar="N", help="rows of --by (default 20)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the sums here as JSON")
    arguments = parser.parse_args()
    if len(arguments.attention_tflops) > 2:
        parser.error("--attention-tflops takes one rate, or one of forward and one of backward")
    arguments.attention_tflops = (arguments.attention_tflops * 2)[:2]
    return arguments


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not (math.isfinite(rate) and rate > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return rate


def main() -> int:
    """Write both ledgers of every configuration and variant, and what follows from them."""
    arguments = parse()
    if not HAS_TRITON:
        raise UserError("the ledger counts the scratch memory of Triton kernels: pip install triton")
    rows = [row for path in arguments.config for row in measure(path, arguments)]
    rates = report.ceilings(*arguments.attention_tflops)
    print(report.table(rows).text(), "Of one micro-batch. " + report.assumptions(rates), sep="\n\n")
    if arguments.output is not None:
        content = {"benchmark": "traffic", **recording.environment(), "ceilings": rates, "rows": rows}
        recording.write(arguments.output, content)
        print(draw_beside(report.draw, content, arguments.output))
    return 0


if __name__ == "__main__":
    run_command(main)
