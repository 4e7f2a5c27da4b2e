"""Measure the training step of any configuration: speed, memory, and model FLOPs utilisation.

python benchmarks/throughput.py --config configs/jit_1024.json configs/jit_1024_tread.json
python benchmarks/throughput.py --config configs/latent_256.json --conditioning cached live
deepspeed --num_gpus 8 benchmarks/throughput.py --config configs/latent_256.json --accumulate
python benchmarks/throughput.py --config configs/jit_1024.json --set data.micro_batch=16 --output a.json
python benchmarks/throughput.py --config configs/quickstart.json --smoke

A step is the trainer's own: forward and backward of every micro-batch, reduction, clipping, optimizer, the
EMA if the configuration has one, and the log. Weights are random. --conditioning says where inputs come from:

  cached  one micro-batch of random numbers in the true shapes, kept on the device: what the step costs by
          itself, with no pictures, no text tower and no autoencoder. Square pictures, equal caption lengths.
  live    pictures decoded and cropped (ahead, in threads), captions and pictures encoded in every step.

images/s is over the whole measured time, so stalls count; batches/s is images/s / 256, the unit of the post.
On CUDA the rows are also written as JSON to benchmarks/results/, elsewhere only with --output.
"""

import sys
from pathlib import Path

import recording
import throughput_report as report

if __name__ == "__main__":
    # A script's own folder is searched first; names in it must not stand in for installed packages.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import argparse
import gc
import os
import resource
import tempfile
import time
from typing import Any

import torch
from torch import Tensor

from millrace.engine import config as settings
from millrace.engine.cli import run_command
from millrace.engine.conditioning.autoencoder import Autoencoder, Posterior, published_factor
from millrace.engine.conditioning.text import TextEncoder
from millrace.engine.config import Config, Data, TextTower
from millrace.engine.config_file import load_config, merge, parse_config
from millrace.engine.data import Batch
from millrace.engine.model.flops import peak_flops
from millrace.engine.preparation import Prepared
from millrace.engine.runtime import distributed
from millrace.engine.runtime.logs import set_up_logging
from millrace.engine.smoke import smoke
from millrace.engine.trainer import Trainer


class Live(Trainer):
    """The trainer, counting what passes through it."""

    includes = "pictures decoded and cropped (ahead, in threads), pictures and captions encoded in every step"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.count_from_here()

    def count_from_here(self) -> None:
        """Set the counts of this process to zero."""
        self.flops, self.images, self.image_tokens, self.text_tokens = 0.0, 0, 0, 0

    @property
    def counts(self) -> tuple[float, int, int, int]:
        """Model FLOPs, images, image tokens and text tokens so far."""
        return self.flops, self.images, self.image_tokens, self.text_tokens

    def next_batch(self) -> Prepared:
        batch = self.make_batch()
        self.images += len(batch.keys)
        self.image_tokens += len(batch.clean)
        self.text_tokens += len(batch.text)
        return batch

    def make_batch(self) -> Prepared:
        """One micro-batch on the device."""
        return super().next_batch()

    def _record(
        self, rates: dict[str, float], norm: float, applied: bool, seconds: float, flops: float
    ) -> None:
        self.flops += flops
        super()._record(rates, norm, applied, seconds, flops)


class RandomLatents(Autoencoder):
    """Stands in for an autoencoder: latents of the true shape, without weights."""

    stochastic = False

    def __init__(self, config: settings.Autoencoder, channels: int) -> None:
        self.channels, self.factor = channels, published_factor(config)
        self.identity = f"random numbers for {config.kind}"

    def _posterior(self, images: Tensor) -> Posterior:
        height, width = images.shape[-2:]
        shape = (len(images), self.channels, height // self.factor, width // self.factor)
        return Posterior(torch.randn(shape, device=images.device), None)

    def _sample(self, posterior: Posterior, noise: Tensor | None) -> Tensor:
        return posterior.sampled(noise)

    def _decode(self, latents: Tensor) -> Tensor:
        raise RuntimeError("random numbers are no pictures")


class RandomText(TextEncoder):
    """Stands in for a text tower: `length` rows for every caption, without weights."""

    def __init__(self, kind: str, length: int, dim: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(dim, f"random numbers for {kind}", device, dtype)
        self.length = length

    @staticmethod
    def clean(caption: str) -> str:
        return caption

    def _rows(self, captions: list[str]) -> list[tuple[Tensor, bool]]:
        shape = (len(captions), self.length, self.dim)
        return [(rows, False) for rows in torch.randn(shape, device=self.device).to(self.dtype)]


class Cached(Live):
    """The trainer on one micro-batch of random numbers; opens no pictures and no frozen network.

    Args:
        caption_tokens: text tokens of every sample.
    """

    includes = "random numbers in the true shapes, already on the device; no towers, no pictures"

    def __init__(self, config: Config, caption_tokens: int) -> None:
        self.caption_tokens = caption_tokens
        super().__init__(config)
        edge, samples = config.data.resolution, config.data.micro_batch
        names = [f"random/{i}" for i in range(samples)]
        index = torch.arange(samples) + distributed.rank() * samples
        picture = torch.zeros(3, edge, edge, dtype=torch.uint8)
        self.batch = self.prepare(Batch([picture] * samples, names, names, index))

    def make_batch(self) -> Prepared:
        return self.batch

    def look_ahead(self) -> None:
        """The one micro-batch is there."""

    def open_source(self, _config: Data) -> tuple:
        return ()

    def open_autoencoder(self, config: settings.Autoencoder, _device: torch.device) -> RandomLatents:
        return RandomLatents(config, self.config.model.in_channels)

    def open_text_tower(
        self, config: TextTower, dim: int, device: torch.device, dtype: torch.dtype
    ) -> RandomText:
        return RandomText(config.kind, self.caption_tokens, dim, device, dtype)


def time_steps(trainer: Live, warmup: int, steps: int) -> list[float]:
    """Seconds of each of `steps` training steps after `warmup` others, from one idle device to the next."""
    seconds = []
    gc.collect()
    gc.freeze()
    try:
        for i in range(warmup + steps):
            if i == warmup:
                trainer.count_from_here()
                if trainer.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(trainer.device)
            _wait_for(trainer.device)
            started = time.perf_counter()
            trainer.train_step()
            request = trainer.stop.poll()
            _wait_for(trainer.device)
            if i >= warmup:
                seconds.append(time.perf_counter() - started)
            if request.stop:
                raise KeyboardInterrupt
    finally:
        gc.unfreeze()
        trainer.stream.close()
        trainer.log.close()
    return seconds


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resolve(path: str, arguments: argparse.Namespace, folder: Path) -> Config:
    """The configuration to measure: its run writes into `folder`, and nowhere else."""
    own = [
        f"run.output_dir={folder}",
        f"run.steps={arguments.warmup + arguments.steps}",
        "run.init_from=null",
        "logging.tensorboard=false",
        "logging.wandb=false",
    ]
    overrides = [*arguments.overrides, *own]
    config = load_config(path, overrides)
    if arguments.smoke:
        config = smoke(config, overrides)
    if not arguments.accumulate:
        batch = config.data.micro_batch * int(os.environ.get("WORLD_SIZE", "1"))
        values = merge(config.model_dump(mode="json"), {"data": {"global_batch": batch}})
        config = parse_config(values, path)
    return config


def measure(path: str, config: Config, conditioning: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps and return the row, the same on every process."""
    gc.collect()
    torch.cuda.empty_cache()
    if conditioning == "cached":
        trainer: Live = Cached(config, arguments.text_tokens or config.conditioning.text.max_tokens)
    else:
        trainer = Live(config)
    device, devices = trainer.device, distributed.world_size()
    mine = time_steps(trainer, arguments.warmup, arguments.steps)
    if device.type == "cuda":
        memory, kind = torch.cuda.max_memory_allocated(device), "allocated on the GPU in the measured steps"
        peak = peak_flops(torch.cuda.get_device_name(device))
    else:
        memory, kind = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "resident since its start"
        peak = None
    times, memories, counts = zip(*distributed.gather_objects((mine, memory, trainer.counts)), strict=True)
    flops, images, image_tokens, text_tokens = (sum(count) for count in zip(*counts, strict=True))
    step_seconds = [max(step) for step in zip(*times, strict=True)]
    published = None if arguments.smoke else report.published_row(path, arguments.overrides)
    resolved = config.model_dump(mode="json")
    del resolved["run"]["output_dir"]
    return {
        "config": Path(path).stem,
        "overrides": arguments.overrides,
        "smoke": arguments.smoke,
        "conditioning": conditioning,
        "includes": trainer.includes,
        "device": device.type,
        "devices": devices,
        "micro_batch": config.data.micro_batch,
        "global_batch": config.data.global_batch,
        "image_tokens": image_tokens / images,
        "text_tokens": text_tokens / images,
        **report.summarise(step_seconds, config.data.global_batch, devices, flops / images, peak, published),
        "peak_memory_bytes": max(memories),
        "peak_memory_kind": f"of one process, {kind}",
        "skipped_steps": trainer.skipped,
        "warmup_steps": arguments.warmup,
        "step_seconds": step_seconds,
        "resolved": resolved,
    }


def parse() -> argparse.Namespace:
    """Arguments of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="examples:\n" + __doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", nargs="+", metavar="FILE", help="configurations; default those with a published speed"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", dest="overrides", help="override one value"
    )
    parser.add_argument("--smoke", action="store_true", help="shrink everything and measure it on a CPU")
    parser.add_argument(
        "--conditioning",
        nargs="+",
        choices=("cached", "live"),
        default=["cached"],
        help="where the inputs come from: a row for each (default cached)",
    )
    parser.add_argument("--steps", type=_positive, help="measured steps (default 20, with --smoke 4)")
    parser.add_argument("--warmup", type=_positive, help="steps before them (default 5, with --smoke 1)")
    parser.add_argument(
        "--text-tokens",
        type=_positive,
        metavar="N",
        help="text tokens of each sample of `cached` (default conditioning.text.max_tokens, full captions)",
    )
    parser.add_argument(
        "--accumulate",
        action="store_true",
        help="keep data.global_batch, by accumulation; else a step is one micro-batch per process",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the rows here as JSON")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.config = arguments.config or report.published_configs()
    arguments.steps = arguments.steps or (4 if arguments.smoke else 20)
    arguments.warmup = arguments.warmup or (1 if arguments.smoke else 5)
    return arguments


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def main() -> int:
    """Measure every configuration with every kind of inputs; if one fails, those before it are reported."""
    arguments = parse()
    set_up_logging()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="millrace-throughput-") as folder:
        configs = [
            (path, resolve(path, arguments, Path(folder) / str(i))) for i, path in enumerate(arguments.config)
        ]
        try:
            for path, config in configs:
                for conditioning in arguments.conditioning:
                    rows.append(measure(path, config, conditioning, arguments))
        finally:
            if rows and distributed.rank() == 0:
                _publish(rows, arguments.output)
    distributed.wait_for_all()
    return 0


def _publish(rows: list[dict[str, Any]], output: Path | None) -> None:
    """Print the table; write the JSON."""
    print(report.table(rows))
    device = distributed.choose_device(rows[-1]["device"])
    if output is None and device.type == "cuda":
        output = recording.default_path("throughput", device)
    if output is not None:
        recording.write(output, {"benchmark": "throughput", **recording.environment(), "rows": rows})
        print(f"written to {output}")


if __name__ == "__main__":
    run_command(main)
