"""Does routing save the time it should? Ours and diffusers' PRX, dense, TREAD and SPRINT, in one run.

python -m benchmarks routing
python -m benchmarks routing --rounds 20 --width 256 --output routing.json
python -m benchmarks routing --device cuda --compile --width 1792 --image-tokens 1024 --batch 16

Six training steps (forward and backward, no optimizer) of a PRX network on the same batch and weights: dense,
TREAD with 50 % and SPRINT with 75 % of the tokens bypassing blocks 2 to depth - 4, each by our engine and by
diffusers' modules with the routing of Photoroom/PRX (`peer.py`). A round runs each once, every second round
in reverse order, so that a machine which slows down slows all of them. Medians over the rounds.

User time is the processor time that the process spends in its own code. It differs from the clock where
others use the CPU as well, and where the system hands out fresh memory: the C library returns large blocks to
the system, and a step that asks for them again pays a page fault for every 4 KiB. Which steps do depends on
the sizes of their blocks more than on the work they do, so a dense step with faults beside a routed one
without makes routing look better than it is. A GPU's caching allocator has no such cost. Faults are counted.

Captions have between a quarter and three quarters of --text-tokens. The peer computes on the padded text,
ours on packed text. FLOPs are those of the model (`engine/model/flops.py`) and so the same for both sides:
the definition masks padding out, so computing it anyway is work of an implementation.

On CUDA the result is also written as JSON to benchmarks/results/, elsewhere only with --output.
"""

import argparse
import gc
import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from millrace.benchmarks.report import recording
from millrace.benchmarks.report import routing_report as report
from millrace.benchmarks.report.charts import draw_beside
from millrace.benchmarks.step import training_steps as steps
from millrace.engine.cli import command_parser, number, run_command
from millrace.engine.config import Config
from millrace.engine.config.loading import parse_config
from millrace.engine.model.flops import training_flops
from millrace.engine.util.errors import UserError

SIDES = ("ours", "peer")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Relative difference of the two sides' dense losses above which they are not the same computation."""
SEED = 0
METHOD = "most bytes allocated at once during forward and backward, beyond parameters, inputs and gradients"


class Contestant(NamedTuple):
    """One of the six steps."""

    forward: Callable[[], Tensor]
    parameters: list[nn.Parameter]
    flops: float
    """Model FLOPs of the step, all samples."""


def network(width: int, depth: int) -> Config:
    """PRX of this width and depth, in the proportions of PRX-1.2B: heads of 64, MLP 3.5, text 9/7 as wide."""
    if width % 64:
        raise UserError(f"--width is {width}, expected a multiple of 64, the size of a head")
    model = {"width": width, "depth": depth, "heads": width // 64, "context_dim": width * 9 // 7}
    return parse_config({"model": model, "run": {"seed": SEED}}, "benchmark")


def contestants(arguments: argparse.Namespace) -> dict[tuple[str, str], Contestant]:
    """All steps by (side, variant), on one batch and one set of weights; dense losses are checked equal."""
    config = network(arguments.width, arguments.depth)
    device, dtype = arguments.device, arguments.dtype
    edge = math.isqrt(arguments.image_tokens)
    if edge**2 != arguments.image_tokens:
        raise UserError(f"--image-tokens is {arguments.image_tokens}, expected a square number")
    torch.manual_seed(SEED)
    full = arguments.text_tokens
    lengths = [round(n) for n in np.linspace(full / 4, 3 * full / 4, arguments.batch).tolist()]
    batch = steps.random_batch(config, arguments.batch, (edge, edge), full, lengths, device)
    batch = batch.cast(dtype)

    found: dict[tuple[str, str], Contestant] = {}
    for variant in arguments.variants:
        routed = steps.variant_config(config, variant)
        denoiser = steps.build_denoiser(routed, SEED)
        denoiser.to(device, dtype)
        peer = steps.build_peer(denoiser, routed)
        if arguments.compile:
            for block in (*denoiser.blocks, *peer.model.blocks):
                block.compile()
        flops = sum(training_flops(routed, arguments.image_tokens, n) for n in lengths)
        for side, module, step in (("ours", denoiser, steps.OurStep), ("peer", peer, steps.PeerStep)):
            found[side, variant] = Contestant(
                step(module, routed, batch).forward, list(module.parameters()), flops
            )
    ours, peer = (found[side, "dense"].forward().item() for side in SIDES)
    if not math.isclose(ours, peer, rel_tol=TOLERANCE[dtype]):
        raise RuntimeError(f"the dense losses differ: {ours} and {peer}; the two sides do different work")
    return found


class Sample(NamedTuple):
    """One step in one round, in seconds."""

    clock: float
    user: float
    """Processor time of all threads of this process outside the system; on CUDA the host's work alone."""
    faults: float
    """Pages that the system had to hand out."""

    @classmethod
    def now(cls) -> "Sample":
        """Readings since the process began."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return cls(time.perf_counter(), usage.ru_utime, usage.ru_minflt)


def time_rounds(
    found: Mapping[tuple[str, str], Contestant], rounds: int, warmup: int, device: torch.device
) -> dict[tuple[str, str], list[Sample]]:
    """Each step in each round after `warmup` others; rounds alternate in direction."""
    samples: dict[tuple[str, str], list[Sample]] = {name: [] for name in found}
    gc.collect()
    gc.disable()
    try:
        for i in range(warmup + rounds):
            for name in list(found) if i % 2 == 0 else reversed(found):
                _wait_for(device)
                started = Sample.now()
                steps.run(found[name].forward, found[name].parameters)
                _wait_for(device)
                ended = Sample.now()
                if i >= warmup:
                    samples[name].append(Sample(*(b - a for a, b in zip(started, ended, strict=True))))
                for parameter in found[name].parameters:
                    parameter.grad = None
    finally:
        gc.enable()
    return samples


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summarise(
    found: Mapping[tuple[str, str], Contestant],
    samples: Mapping[tuple[str, str], list[Sample]],
    memory: Mapping[tuple[str, str], int],
) -> list[dict[str, Any]]:
    """One row per step: times, FLOPs, memory, and how they relate to the dense step and to the peer."""
    clock = {name: float(np.median([s.clock for s in own])) for name, own in samples.items()}
    user = {name: float(np.median([s.user for s in own])) for name, own in samples.items()}
    rows = []
    for name, contestant in found.items():
        (side, variant), seconds = name, [s.clock for s in samples[name]]
        dense, peer = (side, "dense"), ("peer", variant)
        p20, p80 = np.percentile(seconds, (20, 80)).tolist()
        flop_ratio = contestant.flops / found[dense].flops
        rows.append(
            {
                "side": side,
                "variant": variant,
                "flops": contestant.flops,
                "flop_ratio": flop_ratio,
                "seconds_median": clock[name],
                "seconds_p20": p20,
                "seconds_p80": p80,
                "time_ratio_to_peer": clock[name] / clock[peer],
                "saved_time_per_saved_flops": _saved(clock[name] / clock[dense], flop_ratio),
                "user_seconds_median": user[name],
                "user_ratio_to_peer": user[name] / user[peer],
                "user_saved_per_saved_flops": _saved(user[name] / user[dense], flop_ratio),
                "page_faults_median": float(np.median([s.faults for s in samples[name]])),
                "peak_bytes": memory[name],
                "memory_ratio_to_peer": memory[name] / memory[peer],
                "seconds": seconds,
                "user_seconds": [s.user for s in samples[name]],
                "page_faults": [s.faults for s in samples[name]],
            }
        )
    return rows


def _saved(time_ratio: float, flop_ratio: float) -> float | None:
    return (1 - time_ratio) / (1 - flop_ratio) if flop_ratio < 1 else None


def peak_bytes(
    forward: Callable[[], Tensor], parameters: Sequence[nn.Parameter], device: torch.device
) -> int:
    """Bytes above the start of `forward`, with every gradient tensor already there; adds to the gradients.

    On the CPU every allocation and release is read from PyTorch's profiler; on CUDA the caching allocator
    keeps the peak itself.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward().backward()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        forward().backward()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events), default=0)


def parse() -> argparse.Namespace:
    """Arguments of the command."""
    parser = command_parser(__doc__)
    for name, default, help_text in (
        ("rounds", 12, "measured rounds"),
        ("warmup", 2, "rounds before them"),
        ("width", 384, "features of a token, a multiple of 64"),
        ("depth", 16, "blocks"),
        ("batch", 4, "images"),
        ("image-tokens", 256, "tokens of an image, a square number"),
        ("text-tokens", 256, "rows of text with padding"),
    ):
        parser.add_argument(
            f"--{name}",
            type=number(int, 1),
            default=default,
            metavar="N",
            help=f"{help_text} (default {default})",
        )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=tuple(steps.VARIANTS),
        default=list(steps.VARIANTS),
        help="which of them beside dense (default all)",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile each block of both sides")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result here as JSON")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but PyTorch finds no CUDA device here; leave it out")
    arguments.device = torch.device(arguments.device)
    arguments.variants = list(dict.fromkeys(("dense", *arguments.variants)))
    arguments.dtype = torch.bfloat16 if arguments.device.type == "cuda" else torch.float32
    return arguments


def main() -> int:
    """Build the six steps, time them, measure their memory, report."""
    arguments = parse()
    device = arguments.device
    found = contestants(arguments)
    samples = time_rounds(found, arguments.rounds, arguments.warmup, device)
    memory = {name: peak_bytes(c.forward, c.parameters, device) for name, c in found.items()}
    options = vars(arguments) | {name: str(vars(arguments)[name]) for name in ("device", "dtype", "output")}
    content = {
        "benchmark": "routing",
        **recording.environment(),
        "threads": torch.get_num_threads(),
        "options": options,
        "memory_method": METHOD,
        "rows": summarise(found, samples, memory),
    }
    print(report.table(content["rows"]).text(), report.conditions(content), sep="\n\n")
    output = arguments.output
    if output is None and device.type == "cuda":
        output = recording.default_path("routing", device)
    if output is not None:
        recording.write(output, content)
        print(draw_beside(report.draw, content, output))
    return 0


if __name__ == "__main__":
    run_command(main)
