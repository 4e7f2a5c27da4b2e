"""Arguments of the commands that open a trained model, and the settings that follow from them."""

import argparse
from pathlib import Path
from typing import get_args

from millrace.engine.cli import add_config_arguments, number, require_path
from millrace.engine.config import Sampling
from millrace.engine.config.loading import Given, check_given, load_config, parse_override


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that say which model, and how it is sampled."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="PATH",
        help="run folder (its newest checkpoint), checkpoint folder, or exported weights",
    )
    add_config_arguments(parser, required=False)
    parser.add_argument(
        "--weights",
        choices=("auto", "ema", "ema2", "model"),
        default="auto",
        help="auto: EMA where there is one; ema2: that of ema.second_decay; model: without averaging",
    )
    parser.add_argument(
        "--steps", type=number(int, 1), metavar="N", help="solver steps; default sampling.steps"
    )
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="SCALE",
        help="scale of the guidance, 1 is off; default sampling.guidance",
    )
    parser.add_argument(
        "--method",
        choices=get_args(Sampling.model_fields["method"].annotation),
        help="what the weak branch of the guidance lacks: cfg the caption, self the routed tokens, path_drop "
        "the routed blocks (docs/guidance.md); default sampling.method",
    )
    parser.add_argument("--solver", choices=("euler", "heun"), help="ODE solver; default sampling.solver")
    parser.add_argument(
        "--mean-target",
        type=Path,
        metavar="FILE",
        help="for models trained with objective.contrastive_weight: file of `sample --compute-mean-target`; "
        "the shift of the velocities that this training adds is subtracted",
    )


def check_model_arguments(arguments: argparse.Namespace) -> None:
    """Raise UserError for what is wrong whatever the checkpoint holds, before anything heavy is imported."""
    require_path("--checkpoint", arguments.checkpoint)
    if arguments.mean_target is not None:
        require_path("--mean-target", arguments.mean_target)
    if arguments.config:
        load_config(arguments.config)
    check_given(given_settings(arguments))


def given_settings(arguments: argparse.Namespace) -> list[Given]:
    """Settings of `--set` and of the flags of `add_model_arguments`, the flags last."""
    given = [parse_override(item) for item in arguments.overrides]
    for name in ("steps", "guidance", "solver", "method"):
        if (value := getattr(arguments, name)) is not None:
            given.append(Given(f"--{name} {value}", f"sampling.{name}", value))
    return given
