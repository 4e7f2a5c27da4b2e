"""Train a model.

millrace train --config latent_256
millrace train --config jit_1024_tread --smoke
millrace train --config quickstart --set run.steps=20 --print-config
millrace train --config jit_1024_sprint --plan 8
torchrun --nproc-per-node 8 engine/train.py --config configs/latent_256.json --resume auto
srun --ntasks-per-node 8 python engine/train.py --config configs/latent_256.json --resume auto
torchrun --nproc-per-node 8 -m millrace.engine.train --config latent_256     (where engine/ is not at hand)
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from millrace.engine.cli import add_config_arguments, command_parser, number, run_command

if TYPE_CHECKING:
    from millrace.engine.config import Config


def build_parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    parser = command_parser(__doc__, "millrace train", launched=True)
    add_config_arguments(parser, required=False)
    parser.add_argument(
        "--smoke", action="store_true", help="shrink everything and run all the code on a CPU"
    )
    parser.add_argument(
        "--resume",
        metavar="auto|STEP|FOLDER",
        help="continue: auto takes the newest good checkpoint of run.output_dir, if there is one",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and exit"
    )
    parser.add_argument(
        "--plan",
        nargs="?",
        const=1,
        type=number(int, 1),
        metavar="PROCESSES",
        help="print the plan of the run on so many GPUs (as millrace plan --gpus does), and exit",
    )
    parser.add_argument(
        "--print-schema", action="store_true", help="print the JSON Schema of configurations and exit"
    )
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Resolve the configuration, then train."""
    parser = build_parser()
    arguments = parser.parse_args(words)
    if not arguments.config and not arguments.print_schema:
        parser.error("--config FILE is needed; the folder configs/ has one per kind of run")

    from millrace.engine.config.loading import json_schema, load_config

    if arguments.print_schema:
        print(json.dumps(json_schema(), indent=2))
        return 0
    config = load_config(arguments.config, arguments.overrides)
    if arguments.smoke:
        from millrace.engine.config.smoke import smoke

        config = smoke(config, arguments.overrides)
    if arguments.print_config:
        from millrace.engine.config.stages import resolve_stages

        resolve_stages(config)  # refuses what only a stage has wrong
        print(config.model_dump_json(indent=2))
        return 0
    if arguments.plan is not None:
        from millrace.engine.planning.report import plan

        print("\n".join(plan(config, arguments.plan)))
        return 0

    from millrace.engine.distributed.launchers import read_launcher

    read_launcher()  # before torch is imported, so that tasks without ranks are refused at once

    from millrace.engine.distributed import process_group
    from millrace.engine.run_log.logs import set_up_logging
    from millrace.engine.trainer import train

    _require_apart(config)
    set_up_logging()
    process_group.join(config.run.device)
    if arguments.smoke and not arguments.resume:
        process_group.lead(lambda: _discard_smoke_run(config))
    train(config, arguments.resume)
    process_group.wait_for_all()
    return 0


def _require_apart(config: "Config") -> None:
    """Raises UserError where the run would write pictures into a folder that it reads as data."""
    from millrace.engine.config.stages import resolve_stages
    from millrace.engine.util.files import require_apart

    for data in {stage.config.data for stage in resolve_stages(config)}:
        for part in (data, *data.mixture):
            if part.path and "://" not in part.path:
                require_apart("data.path", part.path, "run.output_dir", config.run.output_dir)


def _discard_smoke_run(config: "Config") -> None:
    """Remove the checkpoints of the smoke run before this one: it is thrown away, this one starts over.

    Elsewhere than in a folder of smoke's own name (`--set run.output_dir=...`) only if it was the same run.
    """
    from millrace.engine.config.loading import parse_config
    from millrace.engine.config.smoke import SUFFIX
    from millrace.engine.distributed.run_lock import RunLock
    from millrace.engine.planning.automatic import settled_as
    from millrace.engine.util.errors import UserError

    folder = Path(config.run.output_dir)
    try:
        recorded = parse_config(json.loads((folder / "config.json").read_text()), "config.json")
        same = settled_as(config, recorded) == recorded
    except (OSError, ValueError, UserError):
        same = False
    if (same or config.run.output_dir.endswith(SUFFIX)) and (folder / "checkpoints").is_dir():
        with RunLock(folder):
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)


if __name__ == "__main__":
    run_command(main)
