"""Plan a run: the settings that fit best, their memory, speed and duration, before anything is opened.

python -m millrace.engine.plan --config configs/latent_256.json --gpus 8
python -m millrace.engine.plan --config configs/speedrun_24h.json --gpus 32 --device h200
python -m millrace.engine.plan --config configs/jit_1024.json --gpus 16 --set data.global_batch=512
python -m millrace.engine.plan --config configs/quickstart.json --device cpu --gpus 2
"""

from millrace.engine.cli import run_command


def main() -> int:
    """Print the plan of a configuration on some devices."""
    from millrace.engine.planning.report import parse, run

    print("\n".join(run(parse(__doc__))))
    return 0


if __name__ == "__main__":
    run_command(main)
