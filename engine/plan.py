"""Plan a run: the settings that fit best, their memory, speed and duration, before anything is opened.

millrace plan --config latent_256 --gpus 8
millrace plan --config speedrun_24h --gpus 32 --device h200
millrace plan --config jit_1024 --gpus 16 --set data.global_batch=512
millrace plan --config latent_256 --gpus 8 --device rtx4090
millrace plan --config quickstart --device cpu --gpus 2
"""

import argparse
from collections.abc import Sequence

from millrace.engine.cli import add_config_arguments, command_parser, number, one_of, run_command
from millrace.engine.util.data_sheets import SHEETS

DEVICES = (*SHEETS, "cpu")


def build_parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    parser = command_parser(__doc__, "millrace plan")
    add_config_arguments(parser)
    parser.add_argument(
        "--gpus",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="devices of the job, one process on each (default 1)",
    )
    parser.add_argument(
        "--device",
        type=one_of(DEVICES, "devices"),
        default=DEVICES[0],
        metavar="NAME",
        help=f"what they are: {', '.join(SHEETS)}, or cpu for this machine (default {DEVICES[0]})",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="plan the shrunken run that millrace train --smoke makes"
    )
    parser.add_argument(
        "--loader",
        type=number(float, 1e-6, 1e9),
        metavar="IMAGES",
        help="images/s that the loader gives one process; `python -m benchmarks dataloader` measures it",
    )
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Print the plan of a configuration on some devices."""
    arguments = build_parser().parse_args(words)

    from millrace.engine.config.loading import load_config

    config = load_config(arguments.config, arguments.overrides)
    if arguments.smoke:
        from millrace.engine.config.smoke import smoke

        config = smoke(config, arguments.overrides)

    from millrace.engine.planning.report import plan

    print("\n".join(plan(config, arguments.gpus, arguments.device, arguments.loader)))
    return 0


if __name__ == "__main__":
    run_command(main)
