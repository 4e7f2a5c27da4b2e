"""Run configurations side by side at one scale on one data set, several seeds each, and tabulate them.

python -m benchmarks ablations                                       # the rows below, small, on digits
python -m benchmarks ablations --sweep                               # first the learning rates
python -m benchmarks ablations --configs latent_256 latent_256_muon --seeds 0 --output muon.json
python -m benchmarks ablations --configs jit_1024 jit_1024_tread jit_1024_sprint --output jit.json
python -m benchmarks ablations --scale post --configs latent_256 latent_256_tread --seeds 42
python -m benchmarks ablations --scale post --launcher "deepspeed --num_gpus 8" --source datasets/mine

Every run is a process of its own (`ablations_run.py`). A run that fails is recorded with its error and the
others go on; a run that finished is not run again; one that was interrupted continues. The first
configuration is the one that the others are compared with. `python -m benchmarks pages` writes
docs/logbook.md from the results.
"""

import argparse
import inspect
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch

from millrace.benchmarks.quality import ablations_run
from millrace.benchmarks.quality.ablations_judge import make_assets
from millrace.benchmarks.quality.ablations_scales import (
    LEARNING_RATES,
    SCALES,
    SWEPT,
    Assets,
    Scale,
    at_scale,
    open_config,
    set_source,
)
from millrace.benchmarks.quality.ablations_table import as_text, best_rate, draw, draw_samples, swept
from millrace.benchmarks.report.recording import RESULTS, ROOT, environment, write
from millrace.engine.cli import command_parser, run_command
from millrace.engine.config import Config
from millrace.engine.config.loading import merge, parse_config
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import sha256_json

ROWS = (
    "latent_256",
    "latent_256_x_prediction",
    "latent_256_contrastive",
    "latent_256_repa_dinov2",
    "latent_256_repa_until",
    "latent_256_irepa_dinov2",
    "latent_256_irepa_dinov2_post",
    "latent_256_tread",
    "latent_256_sprint",
    "latent_256_sprint_paper",
    "latent_256_muon",
    "bf16_master",
    "latent_256_short_captions",
    "latent_256_caption_mix",
    "sft_alchemist",
)
"""The configurations of the reduced scales that differ there from the baseline and from each other.

Left out, and why:

    latent_256_flux2, latent_256_repa_e, repa_e_tuning     another autoencoder; the scale is in pixels
    latent_256_repa_dinov3, latent_256_irepa_dinov3        another teacher; here each is the same classifier
    latent_256_haste                                       aligns attention, which a classifier has not
    latent_256_real_images                                 other pictures; digits have one kind
    latent_256_synthetic_then_real                         the same; its stage would be sft_alchemist's
    sft_alchemist_lora                                     adapts a trained model; a run here starts from none
    speedrun_24h                                           LPIPS, which needs pictures of 16 pixels or more
    jit_1024*                                              another baseline, `jit_1024`: a table of their own
"""
QUICK_ROWS = ("latent_256", "latent_256_x_prediction")
QUICK_STEPS = 6
SWEEP_SEED = 1_000
"""None of the seeds of the table."""
LOOKS = 2
"""How often, at equal distances, a run's samples are judged and its held-out loss is taken; the last time at
its end."""

Result = dict[str, Any]


class Job(NamedTuple):
    """One run."""

    name: str
    """Of the configuration."""
    seed: int
    config: Config
    lr: float | None = None
    """If the run belongs to the sweep, its learning rate."""

    @property
    def title(self) -> str:
        return f"{self.name} seed {self.seed}" + ("" if self.lr is None else f" lr {self.lr:g}")

    def digest(self) -> str:
        """Of all that the run sets, so that a changed configuration is run again. Settings at their default
        do not count: a new one leaves the runs valid that were made before it existed."""
        usual = flat(Config().model_dump(mode="json"))
        values = flat(self.config.model_dump(mode="json", exclude={"source": True, "run": {"output_dir"}}))
        values = {key: value for key, value in values.items() if usual.get(key) != value}
        return sha256_json(values)[:16]


def parse() -> argparse.Namespace:
    """Arguments of the command."""
    parser = command_parser(__doc__)
    parser.add_argument("--scale", choices=(*SCALES, "post"), default="cpu", help="post: as configured")
    parser.add_argument("--configs", nargs="+", metavar="NAME", help="files, or names of files in configs/")
    parser.add_argument("--source", help="digits, builtin, or a folder; default digits, at post its own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="default benchmarks/results/ablations.json")
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, help="runs at a time; default one a core on a CPU, else one")
    parser.add_argument("--launcher", default="", help="words that start a run, in place of python")
    parser.add_argument("--sweep", action="store_true", help="first find the learning rate of each optimizer")
    parser.add_argument("--force", action="store_true", help="run finished runs again")
    parser.add_argument("--quick", action="store_true", help="try everything: two rows, one seed, few steps")
    arguments = parser.parse_args()
    if arguments.jobs is not None and arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs}: it is 1 or more")
    if arguments.sweep and arguments.scale == "post":
        parser.error(
            "--sweep belongs to the reduced scales; at post the learning rate is the configuration's"
        )
    if arguments.quick:
        arguments.seeds = arguments.seeds[:1]
    if arguments.output is None:
        kind = "" if arguments.scale == "cpu" else f"-{arguments.scale}"
        folder = arguments.work if arguments.quick else RESULTS
        arguments.output = folder / f"ablations{kind}.json"
    if arguments.scale == "post" and not arguments.configs:
        parser.error("--scale post runs what it is told to: add --configs NAME ...")
    arguments.source = arguments.source or ("digits" if arguments.scale != "post" else None)
    return arguments


def main() -> int:
    """Plan, run, tabulate; exit code 1 if a run failed."""
    arguments = parse()
    torch.set_num_threads(1)  # the judge is too small for more, and what the runs leave is not known
    names = tuple(arguments.configs or (QUICK_ROWS if arguments.quick else ROWS))
    scale = SCALES.get(arguments.scale)
    if scale is not None and arguments.quick:
        scale = scale._replace(steps=QUICK_STEPS, batch=8, micro_batch=8, solver_steps=2)
    work = (arguments.work / f"{arguments.scale}-{Path(arguments.source or 'own').name}").resolve()
    kept = (
        {} if arguments.force or not arguments.output.exists() else json.loads(arguments.output.read_text())
    )
    judge, assets = make_assets(scale, arguments.source, work, arguments.quick)
    sweep = plan_sweep(scale, arguments, assets) if arguments.sweep else []
    if sweep:
        # Every old run stays in the file until the plan that may need it is known.
        book = Book(arguments.output, header(arguments, scale, judge) | {"rows": []}, kept, sweep, [])
        book.keep_others()
        work_off("sweep", sweep, book, work, arguments)
        kept = book.result
        scale = scale._replace(lr=best_rates(scale.lr, kept))
    jobs, refused = plan(names, scale, arguments, assets)
    head = header(arguments, scale, judge) | {"rows": rows(jobs, names)}
    book = Book(arguments.output, head, kept, sweep + jobs, refused)
    work_off("table", jobs, book, work, arguments)
    print(as_text(book.result))
    output = arguments.output
    draw(book.result, output.with_suffix(".svg"))
    folders = {job.name: run_folder(work, job) for job in jobs}
    draw_samples(book.result, output.with_name(f"{output.stem}-samples.png"), folders)
    print(f"results in {arguments.output}")
    return 1 if any(run["status"] == "failed" for run in book.result["runs"]) else 0


def work_off(what: str, jobs: list[Job], book: "Book", work: Path, arguments: argparse.Namespace) -> None:
    """Run what is not finished."""
    left = [job for job in jobs if not book.has(job)]
    line = f"{what}: {len(jobs)} runs, {len(jobs) - len(left)} of them finished before"
    if left and (seconds := book.seconds_a_run()):
        at_once = arguments.jobs or (1 if torch.cuda.is_available() else len(os.sched_getaffinity(0)))
        line += f"; about {len(left) * seconds / at_once / 60:.0f} minutes, as long as the runs on file took"
    print(line, flush=True)
    run_all(left, book, work, book.result["judge"] is not None, arguments)


def best_rates(usual: dict[str, float], result: Result) -> dict[str, float]:
    """The best learning rate of each optimizer in the sweep; the usual one where it has no finished run."""
    found = {open_config(name).optimizer.kind: best_rate(rates) for name, rates in swept(result).items()}
    return usual | found


def header(arguments: argparse.Namespace, scale: Scale | None, judge: Result | None) -> Result:
    """What the results say about how they came about."""
    return {
        "benchmark": "ablations",
        **environment(),
        "quick": arguments.quick,
        "scale": arguments.scale,
        "sizes": scale._asdict() if scale else None,
        "source": arguments.source,
        "seeds": arguments.seeds,
        "judge": judge,
        "learning_rates": list(LEARNING_RATES),
        "swept": list(SWEPT),
        "sweep_seed": SWEEP_SEED,
        "at_scale": inspect.getsource(at_scale) if scale else None,
    }


def rows(jobs: list[Job], names: tuple[str, ...]) -> list[Result]:
    """Each configuration with its origin and what it sets otherwise than the first, as it was run."""
    first: dict[str, Config] = {}
    for job in jobs:
        if job.lr is None:
            first.setdefault(job.name, job.config)
    found = []
    for given in names:
        name = Path(given).stem
        row: Result = {"name": name, "source": open_config(given).source, "changes": {}}
        if name in first:
            old, new = (flat(c.model_dump(mode="json")) for c in (next(iter(first.values())), first[name]))
            row["changes"] = {
                key: value
                for key, value in new.items()
                if old.get(key) != value and key not in ("source", "run.output_dir")
            }
        found.append(row)
    return found


def flat(values: Result, prefix: str = "") -> Result:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    found: Result = {}
    for key, value in values.items():
        inside = isinstance(value, dict) and value
        found |= flat(value, f"{prefix}{key}.") if inside else {f"{prefix}{key}": value}
    return found


def plan_sweep(scale: Scale, arguments: argparse.Namespace, assets: Assets) -> list[Job]:
    """The runs of the sweep."""
    jobs = []
    for name in SWEPT:
        for lr in LEARNING_RATES[: 2 if arguments.quick else None]:
            rated = scale._replace(lr=dict.fromkeys(scale.lr, lr))
            config = at_scale(open_config(name), rated, arguments.source, assets)
            jobs.append(Job(name, SWEEP_SEED, config, lr))
    return jobs


def plan(
    names: tuple[str, ...], scale: Scale | None, arguments: argparse.Namespace, assets: Assets | None
) -> tuple[list[Job], list[Result]]:
    """The runs of the table, seed by seed; and the rows that cannot be run so, with the reason."""
    jobs, refused = [], []
    for seed in arguments.seeds:
        for name in names:
            config = open_config(name)
            try:
                if scale is not None:
                    config = at_scale(config, scale, arguments.source, assets)
                elif arguments.source is not None:
                    config = set_source(config, arguments.source)
            except UserError as error:
                refused.append({"name": name, "seed": seed, "status": "failed", "error": str(error)})
                continue
            jobs.append(Job(Path(name).stem, seed, config))
    return jobs, refused


def run_folder(work: Path, job: Job) -> Path:
    """Where a run lives; another configuration lives elsewhere."""
    seeded = settled(job, Path("x"))
    return work / f"{job.title.replace(' ', '-')}-{Job(job.name, job.seed, seeded, job.lr).digest()[:8]}"


def settled(job: Job, folder: Path) -> Config:
    """The job's configuration with its seed, its folder, and the checkpoints that will be looked at."""
    steps = job.config.run.steps
    values = {
        "run": {"seed": job.seed, "output_dir": str(folder)},
        "checkpoint": {"every_steps": max(1, steps // LOOKS), "keep": 4 * LOOKS},
        "logging": {"tensorboard": False, "wandb": False},
    }
    if job.config.validation.share or job.config.validation.path is not None:
        values["validation"] = {"every_steps": values["checkpoint"]["every_steps"]}
    return parse_config(merge(job.config.model_dump(mode="json"), values), job.title)


class Book:
    """The results on disk: written anew after every run."""

    def __init__(self, path: Path, head: Result, old: Result, jobs: list[Job], refused: list[Result]) -> None:
        self.path, self._lock = path, Lock()
        self._old = {
            (run["name"], run["seed"], run.get("lr"), run.get("digest")): run for run in old.get("runs", [])
        }
        self._others: list[Result] = []
        self._keys = [(job.name, job.seed, job.lr, job.digest()) for job in jobs]
        done = {key: self._old[key] for key in self._keys if self._old.get(key, {}).get("status") == "done"}
        self._runs: dict[tuple[Any, ...], Result] = done
        self.result = head | {"runs": []}
        self._refused = refused
        self._write()

    def keep_others(self) -> None:
        """Leave the old runs in the file that none of the jobs is."""
        self._others = [run for key, run in self._old.items() if key not in self._keys]
        self._write()

    def has(self, job: Job) -> bool:
        """Whether the run is finished."""
        return (job.name, job.seed, job.lr, job.digest()) in self._runs

    def seconds_a_run(self) -> float | None:
        """Mean duration of the finished runs that were on file, training and looking; None without any."""
        parts = (run for run in self._old.values() if run.get("train_seconds") and run.get("look_seconds"))
        times = [run["train_seconds"] + run["look_seconds"] for run in parts]
        return statistics.fmean(times) if times else None

    def add(self, job: Job, outcome: Result) -> None:
        """Record a run that ended, well or not."""
        with self._lock:
            key = (job.name, job.seed, job.lr, job.digest())
            known = {"name": job.name, "seed": job.seed, "lr": job.lr, "digest": job.digest()}
            facts = {
                "learning_rate": job.config.optimizer.lr,
                "compute": job.config.precision.compute,
                "master": job.config.precision.master,
                "steps": job.config.run.steps,
            }
            self._runs[key] = known | facts | outcome
            self._write()

    def _write(self) -> None:
        runs = [self._runs[key] for key in self._keys if key in self._runs]
        self.result["runs"] = runs + self._refused + self._others
        write(self.path, self.result)


def run_all(jobs: list[Job], book: Book, work: Path, judged: bool, arguments: argparse.Namespace) -> None:
    """Run the jobs, several at a time, and say after each how far it is."""
    if not jobs:
        return
    cores = len(os.sched_getaffinity(0))
    on_cpu = arguments.scale == "cpu" or not torch.cuda.is_available()
    parallel = arguments.jobs or (cores if on_cpu else 1)
    threads = max(1, cores // parallel)
    began, done = time.perf_counter(), 0
    with ThreadPoolExecutor(parallel) as pool:
        futures = {pool.submit(run, job, work, judged, threads, arguments): job for job in jobs}
        try:
            for future in as_completed(futures):
                job, outcome = futures[future], future.result()
                book.add(job, outcome)
                done += 1
                left = (time.perf_counter() - began) / done * (len(jobs) - done)
                print(
                    f"[{done}/{len(jobs)}] {job.title}: {_said(outcome)}; {left / 60:.0f} min left",
                    flush=True,
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _said(outcome: Result) -> str:
    if outcome["status"] != "done":
        return f"failed: {outcome['error']}"
    last = outcome["looks"][-1]
    words = [f"loss {outcome['loss'][-1]:.4f}"]
    words += [
        f"{name} {last[name]:.4f}"
        for name in ("held_out_loss", "accuracy", "frechet", "recall")
        if name in last
    ]
    return f"{', '.join(words)} ({outcome['train_seconds'] + outcome['look_seconds']:.0f} s)"


def run(job: Job, work: Path, judged: bool, threads: int, arguments: argparse.Namespace) -> Result:
    """Train and look in another process; what it found, or why it failed."""
    folder = run_folder(work, job)
    if arguments.force:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    config = settled(job, folder)
    steps = config.run.steps
    every = config.checkpoint.every_steps
    content = {
        "config": config.model_dump(mode="json"),
        "judge": str(work / "judge") if judged else None,
        "curated": str(work / "curated.txt") if judged else None,
        "weights_at": sorted({*range(every, steps + 1, every), steps})[-LOOKS:],
    }
    (folder / "job.json").write_text(json.dumps(content))
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    words = shlex.split(arguments.launcher) or [sys.executable]
    done = subprocess.run(
        [*words, ablations_run.__file__, str(folder / "job.json"), str(result)],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    (folder / "output.txt").write_text(done.stdout + done.stderr)
    if done.returncode or not result.exists():
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        return {"status": "failed", "error": lines[-1][:500]}
    return {"status": "done"} | json.loads(result.read_text())


if __name__ == "__main__":
    run_command(main)
