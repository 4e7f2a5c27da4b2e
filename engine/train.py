"""Train a model.

deepspeed engine/train.py --config configs/latent_256.json
deepspeed --num_gpus 2 engine/train.py --config configs/quickstart.json --resume auto
python engine/train.py --config configs/jit_1024_tread.json --smoke
python engine/train.py --config configs/quickstart.json --set run.steps=20 --print-config
python engine/train.py --config configs/jit_1024_sprint.json --plan 8
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder is searched first, and engine/ has names (data, config) that others use too.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import argparse
import json
import shutil

from millrace.engine.cli import command_parser, run_command
from millrace.engine.config.loading import (
    json_schema,
    load_config,
)
from millrace.engine.config.smoke import (
    SUFFIX,
    smoke,
)


def parse() -> argparse.Namespace:
    """Arguments of the command."""
    parser = command_parser(__doc__)
    parser.add_argument("--config", help="JSON configuration file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", dest="overrides", help="override one value"
    )
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
        type=int,
        metavar="PROCESSES",
        help="print the plan of the run on so many GPUs (as millrace.engine.plan --gpus does), and exit",
    )
    parser.add_argument(
        "--print-schema", action="store_true", help="print the JSON Schema of configurations and exit"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.config and not arguments.print_schema:
        parser.error("--config FILE is needed; the folder configs/ has one per kind of run")
    if arguments.plan is not None and arguments.plan < 1:
        parser.error(f"--plan {arguments.plan}: the number of processes is 1 or more")
    return arguments


def main() -> int:
    """Resolve the configuration, then train."""
    arguments = parse()
    if arguments.print_schema:
        print(json.dumps(json_schema(), indent=2))
        return 0
    config = load_config(arguments.config, arguments.overrides)
    if arguments.smoke:
        config = smoke(config, arguments.overrides)
        if not arguments.resume and config.run.output_dir.endswith(SUFFIX):
            # A smoke run is thrown away, so the next one may start over in its folder.
            shutil.rmtree(Path(config.run.output_dir) / "checkpoints", ignore_errors=True)
    if arguments.print_config:
        print(config.model_dump_json(indent=2))
        return 0
    if arguments.plan is not None:
        from millrace.engine.planning.report import plan

        print("\n".join(plan(config, arguments.plan)))
        return 0

    from millrace.engine.distributed.process_group import wait_for_all
    from millrace.engine.run_log.logs import set_up_logging
    from millrace.engine.trainer import train

    set_up_logging()
    train(config, arguments.resume)
    wait_for_all()
    return 0


if __name__ == "__main__":
    run_command(main)
