"""The throughput benchmark: its arithmetic, the published numbers, a real run, and that it leaves nothing."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from millrace.benchmarks import throughput
from millrace.benchmarks.report import recording
from millrace.benchmarks.report import throughput_report as report
from millrace.benchmarks.step import step_measurement as measurement
from millrace.engine.config.loading import load_config, parse_config
from millrace.engine.model.flops import training_flops
from millrace.engine.util.errors import UserError
from tests.programs import environment

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


PUBLISHED = json.loads((BENCHMARKS / "published.json").read_text())
ROWS = [(table, row) for table in PUBLISHED["tables"] for row in table["rows"]]
MAPPED = [(table, row) for table, row in ROWS if row["config"]]


def test_published_rows_are_complete_and_plausible():
    ids = [row["id"] for _, row in ROWS]
    assert len(ids) == len(set(ids))
    keys = {"id", "method", "config", *PUBLISHED["units"]}
    for table, row in ROWS:
        assert set(row) == keys
        assert table["resolution"] in (256, 1024)
        assert all(row[metric] > 0 for metric in ("fid", "cmmd", "dino_mmd"))
        assert row["fid"] > 5 > row["cmmd"], "columns swapped"
        assert row["batches_per_second"] is None or 1 < row["batches_per_second"] < 5


def test_published_tables_agree_on_what_they_share():
    """The post repeats its baseline: all rows of one configuration say the same."""
    for name in {row["config"] for _, row in MAPPED}:
        same = [row for _, row in MAPPED if row["config"] == name]
        assert len({(row["fid"], row["cmmd"], row["dino_mmd"]) for row in same}) == 1
        assert len({row["batches_per_second"] for row in same} - {None}) <= 1
    for table in PUBLISHED["tables"]:
        assert table["rows"][0]["config"], "each table begins with its baseline"


@pytest.mark.parametrize(("table", "row"), MAPPED, ids=[row["id"] for _, row in MAPPED])
def test_configurations_are_those_of_the_published_rows(table, row):
    config = load_config(ROOT / "configs" / f"{row['config']}.json")
    assert config.data.resolution == table["resolution"]
    assert config.data.global_batch == PUBLISHED["global_batch"]
    method = row["method"]
    muon = method == "Muon"
    assert config.optimizer.kind == ("muon" if muon else "adamw")
    assert (config.run.steps, config.optimizer.lr) == (100_000, 1e-4)
    assert config.optimizer.eps == (1e-8 if muon else 1e-15)
    assert not config.ema.enabled
    in_pixels = table["resolution"] == 1024
    autoencoder = {"Flux2-AE": "flux2", "REPA-E-VAE": "repa_e"}.get(method, "flux1")
    assert config.conditioning.autoencoder.kind == ("pixels" if in_pixels else autoencoder)
    assert config.objective.prediction == ("sample" if in_pixels or method == "X-Pred" else "velocity")
    assert config.objective.contrastive_weight == (0.05 if method == "Contrastive-FM" else 0)
    assert config.routing.policy == {"TREAD": "tread", "SPRINT": "sprint"}.get(method, "none")
    assert config.precision.master == ("bfloat16" if "BF16" in method else "float32")
    teachers = {"REPA-Dinov2": "dinov2", "REPA-Dinov3": "dinov3", "REPA-E-VAE": "dinov2"}
    assert config.alignment.kind == ("repa" if method in teachers else "none")
    assert config.alignment.teacher.kind == teachers.get(method, "dinov2")
    assert config.data.long_caption == (0 if method == "Short-Captions" else 1)
    assert not config.stages


def summary(seconds, batch=64, devices=2, flops=5e12, peak=100e12, published=None):
    return report.summarise(seconds, batch, devices, flops, peak, published)


def test_summary_is_arithmetic_on_the_steps():
    seconds = [0.5, 1.0, 0.5, 2.0]
    found = summary(seconds, published={"batches_per_second": 0.125})
    assert found["step_seconds_median"] == 0.75
    assert found["images_per_second"] == pytest.approx(4 * 64 / 4.0)
    assert found["images_per_second_per_device"] == pytest.approx(32)
    assert found["batches_per_second"] == pytest.approx(64 / 256)
    assert found["ratio_to_published"] == pytest.approx(2.0)
    # Each of the two devices does 32 images/s of 5 TFLOP, of 100 TFLOP/s.
    assert found["mfu"] == pytest.approx(32 * 5 / 100)


def test_percentiles():
    found = summary([float(i) for i in range(1, 12)])
    assert (found["step_seconds_p20"], found["step_seconds_median"], found["step_seconds_p80"]) == (3, 6, 9)


def test_unknown_peak_and_unpublished_speed_stay_unknown():
    found = summary([1.0], peak=None, published={"batches_per_second": None})
    assert found["mfu"] is None
    assert found["ratio_to_published"] is None
    assert summary([1.0])["ratio_to_published"] is None


def test_frozen_networks_are_counted_apart():
    found = report.summarise([1.0], 64, 2, 5e12, 400e12, None, {"teacher": 1e12, "text": 0.25e12})
    assert found["mfu"] == pytest.approx(32 * 5 / 400)
    assert found["mfu_with_frozen"] == pytest.approx(32 * 6.25 / 400)


@pytest.mark.parametrize(
    ("path", "overrides", "speed"),
    [
        ("configs/latent_256.json", [], 3.95),
        ("configs/jit_1024.json", [], 1.33),
        ("configs/jit_1024_tread.json", ["data.micro_batch=8", "run.compile=false"], 1.64),
        ("configs/jit_1024_tread.json", ["model.attention_backend=sdpa"], 1.64),
        ("configs/jit_1024.json", ["data.resolution=512"], None),
        ("configs/jit_1024.json", ["data.micro_batch=8", "routing.drop=0.75"], None),
        ("configs/quickstart.json", [], None),
        ("configs/bf16_master.json", [], None),
        ("elsewhere/jit_1024.json", [], None),
    ],
)
def test_published_speed_belongs_to_the_file_as_it_stands(path, overrides, speed):
    row = report.published_row(str(ROOT / path), overrides)
    assert (row and row["batches_per_second"]) == speed


def test_default_configurations_are_those_with_a_speed():
    names = [Path(path).stem for path in report.published_configs()]
    assert names == [
        "latent_256",
        "latent_256_repa_dinov3",
        "latent_256_repa_dinov2",
        "latent_256_flux2",
        "latent_256_repa_e",
        "latent_256_contrastive",
        "latent_256_x_prediction",
        "latent_256_tread",
        "latent_256_sprint",
        "jit_1024",
        "jit_1024_tread",
        "jit_1024_sprint",
    ]
    assert all(Path(path).exists() for path in report.published_configs())


def row(**changes):
    """A measured row as the table needs it."""
    values = {
        "config": "jit_1024_tread",
        "overrides": [],
        "smoke": False,
        "conditioning": "cached",
        "includes": "nothing",
        "device": "cuda",
        "devices": 8,
        "micro_batch": 32,
        "global_batch": 1024,
        "peak_memory_bytes": 123 * 2**30,
        "skipped_steps": 0,
        **summary([1.5] * 3, batch=1024, devices=8, peak=989e12, published=ROWS[0][1]),
    }
    return values | changes


def test_table():
    text = report.text([row(), row(config="other", published=None, ratio_to_published=None, mfu=None)])
    head, first, second, *notes = text.splitlines()
    assert len({line.index("cached") for line in (first, second)}) == 1
    assert max(map(len, text.splitlines())) <= 140
    assert head.startswith("config")
    assert first.startswith("jit_1024_tread ")
    assert "32 x 4" in first, "micro-batch x accumulation"
    assert first.split()[-6:-3] == ["2.667", "3.95", "0.68"], "batches/s, the post's, ratio"
    assert second.split()[-6:] == ["2.667", "-", "-", "123.0", "5", "unknown"]
    assert any("not published" in note for note in notes)


def test_table_marks_what_was_changed_or_skipped():
    plain = report.text([row(published=None)])
    assert "*" not in plain
    assert "not published" not in plain
    assert "skipped" not in plain
    assert "jit_1024_tread*" in report.text([row(overrides=["a.b=1"])])
    assert "jit_1024_tread*" in report.text([row(smoke=True)])
    assert "skipped" in report.text([row(skipped_steps=1)])


class Steps:
    """A trainer that counts its steps and is asked to stop before one of them ends."""

    def __init__(self, stop_after=None):
        self.device = torch.device("cpu")
        self.done, self.closed, self.counted_from, self.stop_after = 0, [], None, stop_after
        requests = SimpleNamespace(poll=lambda: SimpleNamespace(stop=self.done == self.stop_after))
        self.stop_requests = nullcontext(requests)
        self.stream = SimpleNamespace(close=lambda: self.closed.append("stream"))
        self.run_log = SimpleNamespace(close=lambda: self.closed.append("log"))
        self.sample_log = SimpleNamespace(close=lambda: self.closed.append("sample log"))

    def train_step(self):
        self.done += 1

    def count_from_here(self):
        self.counted_from = self.done


def test_warm_up_is_not_measured():
    trainer = Steps()
    assert len(measurement.time_steps(trainer, warmup=3, steps=5)) == 5
    assert (trainer.done, trainer.counted_from) == (8, 3)
    assert trainer.closed == ["sample log", "stream", "log"]


def test_a_stop_request_ends_the_measurement():
    trainer = Steps(stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        measurement.time_steps(trainer, warmup=3, steps=5)
    assert trainer.done == 4
    assert trainer.closed == ["sample log", "stream", "log"]


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["throughput.py", *map(str, arguments)])
    return throughput.main()


def test_rows_before_a_failure_are_kept(monkeypatch, tmp_path, capsys):
    def measure(path, config, conditioning, arguments):
        if conditioning == "live":
            raise UserError("no such folder")
        return row(device="cpu")

    monkeypatch.setattr(throughput, "measure", measure)
    output, config = tmp_path / "deep" / "out.json", ROOT / "configs" / "quickstart.json"
    with pytest.raises(UserError, match="no such folder"):
        call(monkeypatch, "--config", config, "--conditioning", "cached", "live", "--output", output)
    assert "jit_1024_tread" in capsys.readouterr().out
    assert len(json.loads(output.read_text())["rows"]) == 1
    assert [path.name for path in output.parent.iterdir()] == ["out.json"]


def test_mistakes_are_told_before_anything_is_built(monkeypatch, capsys):
    config = ROOT / "configs" / "quickstart.json"
    with pytest.raises(UserError, match="did you mean 'width'"):
        call(monkeypatch, "--config", config, "--set", "model.wdth=8")
    with pytest.raises(UserError, match="no such configuration file"):
        call(monkeypatch, "--config", "missing.json")
    with pytest.raises(SystemExit) as leaving:
        call(monkeypatch, "--config", config, "--steps", "0")
    assert leaving.value.code == 2
    assert "not a whole number of 1 or more" in capsys.readouterr().err


def test_a_step_is_one_micro_batch_per_process_unless_accumulated(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "4")
    given = SimpleNamespace(
        overrides=["data.micro_batch=2"],
        warmup=3,
        steps=9,
        smoke=False,
        accumulate=False,
        profile=None,
        stage=None,
    )
    path = str(ROOT / "configs" / "quickstart.json")
    ((name, config),) = measurement.resolve(path, given, tmp_path)
    assert (name, config.data.global_batch, config.run.steps) == ("quickstart", 8, 13), (
        "one step is left over"
    )
    assert config.run.output_dir == str(tmp_path / "1")
    whole = SimpleNamespace(**vars(given) | {"accumulate": True})
    ((_, config),) = measurement.resolve(path, whole, tmp_path)
    assert config.data == load_config(path, given.overrides).data


def test_every_stage_of_a_run_is_measured_or_those_asked_for(monkeypatch, tmp_path):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    given = SimpleNamespace(
        overrides=["evaluation.every_steps=5"],
        warmup=1,
        steps=1,
        smoke=True,
        accumulate=False,
        profile=None,
        stage=None,
    )
    first, second = measurement.resolve("speedrun_24h", given, tmp_path)
    assert (first.name, second.name) == ("speedrun_24h, stage 1", "speedrun_24h, stage 2 1024 px")
    assert second.config.data.resolution == 2 * first.config.data.resolution
    assert first.config.alignment.kind != second.config.alignment.kind == "none"
    for _, config in (first, second):
        assert (config.run.steps, config.evaluation.every_steps) == (3, 0)
    asked = SimpleNamespace(**vars(given) | {"stage": [2]})
    assert [name for name, _ in measurement.resolve("speedrun_24h", asked, tmp_path)] == [second.name]
    asked.stage = [3]
    with pytest.raises(UserError, match="--stage 3: speedrun_24h has 2"):
        measurement.resolve("speedrun_24h", asked, tmp_path)


def test_an_automatic_micro_batch_is_chosen_before_the_step_is_one_of_it(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    given = SimpleNamespace(
        overrides=["data.micro_batch=auto", "data.global_batch=24", "run.device=cpu"],
        warmup=1,
        steps=1,
        smoke=False,
        accumulate=False,
        profile=None,
        stage=None,
    )
    ((_, config),) = measurement.resolve(str(ROOT / "configs" / "quickstart.json"), given, tmp_path)
    assert config.data.micro_batch == config.data.global_batch == 24
    assert capsys.readouterr().out.startswith("auto: micro-batch 24, ZeRO 0, no checkpointing: ")


def measured(folder, *arguments):
    """Run the command in an empty folder; the JSON that it writes elsewhere."""
    work, temporary = folder / "work", folder / "tmp"
    work.mkdir()
    temporary.mkdir()
    of_its_own = {
        "TMPDIR": str(temporary),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "throughput.py", *arguments, "--output", folder / "out.json"],
        cwd=work,
        env=environment() | of_its_own,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    left = [*work.iterdir(), *temporary.iterdir()]
    assert left == [], "the run left something behind"
    return json.loads((folder / "out.json").read_text()), done.stdout, done.stderr


def test_smoke_run(tmp_path):
    config = ROOT / "configs" / "jit_1024_tread.json"
    content, printed, said = measured(
        tmp_path, "--smoke", "--config", config, "--conditioning", "cached", "live", "--text-tokens", "7",
        "--steps", "3", "--set", "optimizer.lr=1e-5",
    )  # fmt: skip
    assert content["benchmark"] == "throughput"
    assert content["versions"]["torch"] == torch.__version__
    assert "--smoke" in content["command"]
    assert content["dirty"] in (True, False, None)
    cached, live = content["rows"]
    assert (cached["conditioning"], live["conditioning"]) == ("cached", "live")
    for found in (cached, live):
        assert (found["config"], found["smoke"], found["device"]) == ("jit_1024_tread", True, "cpu")
        assert found["overrides"] == ["optimizer.lr=1e-5"]
        assert found["resolved"]["optimizer"]["lr"] == 1e-5
        assert "output_dir" not in found["resolved"]["run"]
        assert len(found["step_seconds"]) == 3
        images = found["micro_batch"] * 3 / sum(found["step_seconds"])
        assert found["global_batch"] == found["micro_batch"] == 2
        assert found["images_per_second"] == pytest.approx(images)
        assert found["batches_per_second"] == pytest.approx(images / 256)
        assert found["mfu"] is found["published"] is found["ratio_to_published"] is None
        assert found["peak_memory_bytes"] > 100 * 2**20
        assert found["skipped_steps"] == 0
    resolved = parse_config(cached["resolved"], "test")
    assert resolved.routing.policy == "tread"
    side = resolved.data.resolution // resolved.model.patch_size
    assert (cached["image_tokens"], cached["text_tokens"]) == (side * side, 7)
    assert cached["model_flops_per_image"] == training_flops(resolved, side * side, 7)
    assert live["text_tokens"] > 7, "live captions have their own lengths"
    assert "unknown" in printed
    assert "written to" in printed
    # A line a row, not what each run says of itself.
    assert [line for line in said.splitlines() if "jit_1024_tread" in line] == [
        f"jit_1024_tread, {inputs}: 3 steps after 1" for inputs in ("cached", "live")
    ]
    assert not {"precision audit", "loader", "data", "step 1/5"} & {
        line.partition(":")[0] for line in said.splitlines()
    }
    assert "img/s" not in said


@pytest.mark.cuda
def test_run_on_the_gpu(tmp_path):
    config = ROOT / "configs" / "quickstart.json"
    content, *_ = measured(
        tmp_path, "--config", config, "--steps", "3", "--warmup", "1", "--set", "run.device=cuda"
    )
    (found,) = content["rows"]
    assert (found["device"], found["devices"]) == ("cuda", 1)
    assert content["gpus"][0]["name"] == torch.cuda.get_device_name(0)
    assert 2**20 < found["peak_memory_bytes"] < content["gpus"][0]["memory_bytes"]
    peak = found["peak_flops_per_device"]
    used = found["model_flops_per_image"] * found["images_per_second"]
    assert found["mfu"] == (None if peak is None else pytest.approx(used / peak))


def test_files_are_named_by_benchmark_device_and_time():
    path = recording.default_path("throughput", torch.device("cpu"))
    assert path.parent == BENCHMARKS / "results"
    assert path.name.startswith("throughput-")
    assert path.suffix == ".json"
    assert path.stem.replace("-", "").isalnum()


def test_output_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        recording.write(tmp_path / "file" / "out.json", {})
