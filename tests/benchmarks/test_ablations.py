"""The logbook: what its table says, what making a configuration small keeps, and that its runs run."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from millrace.benchmarks.quality import ablations
from millrace.benchmarks.quality import ablations_judge as judge
from millrace.benchmarks.quality import ablations_run as one_run
from millrace.benchmarks.quality import ablations_scales as scales
from millrace.benchmarks.quality import ablations_table as table
from millrace.benchmarks.report import logbook_page as page
from millrace.benchmarks.report.recording import read_results
from millrace.engine.config import Validation
from millrace.engine.config.loading import parse_config
from millrace.engine.data.sources.digits import DigitsSource
from millrace.engine.data.sources.folder import FolderSource
from millrace.engine.util.errors import UserError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


ASSETS = scales.Assets(Path("teacher"), Path("curated.txt"), Path("held_out"))
CPU = scales.SCALES["cpu"]


def run(name, seed, frechet, loss=0.5, lr=None, held_out=0.3, **others):
    look = {"step": 4, "held_out_loss": held_out, "accuracy": 0.5, "frechet": frechet}
    return {
        "name": name,
        "seed": seed,
        "lr": lr,
        "status": "done",
        "compute": "bfloat16",
        "master": "float32",
        "steps": 4,
        "loss_steps": [1, 2, 3, 4],
        "loss": [4 * loss, 3 * loss, 2 * loss, loss],
        "images_per_second": 100.0,
        "looks": [look | {"step": 2, "frechet": 9.0}, look],
    } | others


def results(*runs, names=("latent_256", "latent_256_muon", "bf16_master", "latent_256_tread", "mine")):
    return {
        "benchmark": "ablations",
        "file": "ablations.json",
        "chart": None,
        "quick": False,
        "time": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef",
        "dirty": False,
        "command": "python benchmarks/ablations.py",
        "cpu": "Some CPU",
        "cpu_cores": 2,
        "gpus": [],
        "versions": {"torch": "2.13.0"},
        "scale": "cpu",
        "sizes": CPU._asdict(),
        "source": "digits",
        "seeds": [0, 1],
        "judge": None,
        "learning_rates": [0.001, 0.002],
        "sweep_seed": 1000,
        "at_scale": "def at_scale(): ...",
        "rows": [{"name": name, "source": "somewhere", "changes": {"a.b": 1}} for name in names],
        "runs": list(runs),
    }


FULL = results(
    *(run("latent_256", seed, frechet) for seed, frechet in enumerate((2.0, 3.0, 4.0))),
    *(run("latent_256_muon", seed, frechet) for seed, frechet in enumerate((1.0, 1.9, 3.1))),
    *(run("bf16_master", seed, frechet, master="bfloat16") for seed, frechet in enumerate((1.0, 2.0, 3.1))),
    *(run("latent_256_tread", seed, frechet) for seed, frechet in enumerate((1.9, 3.1, 4.0))),
    run("mine", 1, 6.0),
    run("latent_256", 1000, 0.4, lr=0.001, held_out=0.5),
    run("latent_256", 1000, 0.5, lr=0.002, held_out=0.4),
    {"name": "mine", "seed": 0, "lr": None, "status": "failed", "error": "it broke"},
)


def test_means_and_spreads_are_over_seeds_without_the_sweep():
    found = table.table(FULL)
    assert found["latent_256"]["frechet"] == (3.0, statistics.stdev([2.0, 3.0, 4.0]), 3)
    assert found["mine"]["frechet"] == (6.0, None, 1)
    assert found["latent_256"]["loss"].mean == 0.5
    assert table.show(found["latent_256"]["frechet"]) == "3.00 ± 1.00"
    assert table.show(table.Value(0.012345, None, 1)) == "0.0123"


def test_rows_are_compared_with_the_baseline_by_the_noise_between_seeds():
    found = table.compare(FULL)
    assert list(found) == ["latent_256_muon", "bf16_master", "latent_256_tread", "mine"]
    loss, samples = found["latent_256_muon"]
    assert (loss.measure, loss.difference, loss.verdict) == ("held_out_loss", 0.0, "not decided")
    assert (samples.measure, samples.seeds, samples.row.first) == ("frechet", 3, 3.0)
    assert samples.difference == pytest.approx(-1.0)
    assert samples.row.interval.seeds.basis == "3 seeds, paired, spread of 4 settings"
    assert samples.verdict == "better"
    assert found["mine"][1].verdict == "one seed"


@pytest.mark.parametrize(
    ("frechet", "verdict"),
    [((1.0, 1.9, 3.1), "better"), ((3.1, 4.0, 4.9), "worse"), ((1.0, 3.0, 5.0), "not decided")],
)
def test_three_seeds_decide(frechet, verdict):
    """Paired: -1.0, -1.0 and -0.9 are decided, -1 to 1 is not."""
    rows = [run("latent_256", seed, 2.0 + seed, held_out=0.3 + seed / 100) for seed in range(3)]
    rows += [run("latent_256_muon", seed, value) for seed, value in enumerate(frechet)]
    found = table.compare(results(*rows))["latent_256_muon"][1]
    assert (found.measure, found.verdict) == ("frechet", verdict)
    assert "3 seeds, paired" in found.row.interval.seeds.basis


def with_pictures(name, seed, losses, held_out_set="a"):
    """A run that has the held-out loss of each picture."""
    found = run(name, seed, 2.0, held_out=statistics.fmean(losses))
    found["looks"][-1] |= {"held_out_set": held_out_set, "held_out_losses": losses}
    return found


def test_the_error_of_the_pictures_counts_too():
    """Seeds agree on a difference that one of four pictures alone makes."""
    rows = [with_pictures("latent_256", seed, [0.30 + seed / 1000, 0.3, 0.3, 0.3]) for seed in range(3)]
    rows += [with_pictures("mine", seed, [0.26 + seed / 1000, 0.3, 0.3, 0.3]) for seed in range(3)]
    found = table.compare(results(*rows))["mine"][0]
    assert found.row.interval.seeds.value == pytest.approx(0.0, abs=1e-9)
    assert found.row.interval.pictures.basis == "4 pictures"
    assert found.verdict == "not decided"
    for one in rows:
        del one["looks"][-1]["held_out_losses"]
    assert table.compare(results(*rows))["mine"][0].verdict == "better"


def test_other_held_out_pictures_give_no_verdict():
    rows = [with_pictures(name, seed, [0.3, 0.2], name) for name in ("latent_256", "mine") for seed in (0, 1)]
    assert table.compare(results(*rows))["mine"][0].verdict == "not comparable"


def test_losses_at_times():
    assert [v.mean for v in table.at_times(FULL, "latent_256", (0.25, 0.5, 1.0))] == [2.0, 1.5, 0.5]


def test_the_best_learning_rate_has_the_lowest_held_out_loss():
    assert table.best_rate(table.swept(FULL)["latent_256"]) == 0.002


def test_the_page_says_what_the_numbers_say_beside_the_post():
    text = page.page([FULL])
    assert "| `latent_256` | 3 | 3.00 ± 1.00 |" in text
    muon = next(line for line in text.splitlines() if line.startswith("- `latent_256_muon`"))
    assert (
        "held-out loss **not decided** (+0.0 ± 0.0 %), Frechet distance **better** (-33.3 ± 18.3 %)" in muon
    )
    assert "The post: better, FID 15.55 against 18.20. The same here." in muon
    weights = next(line for line in text.splitlines() if line.startswith("- `bf16_master`"))
    assert "The post: worse, FID 21.87 against 18.20. It does not hold here." in weights
    tread = next(line for line in text.splitlines() if line.startswith("- `latent_256_tread`"))
    assert "Frechet distance **not decided**" in tread
    assert "Whether that holds here is not decided." in tread
    assert (
        "By the held-out loss: **not decided** `latent_256_muon`, `bf16_master`, `latent_256_tread`; "
        "**one seed** `mine`." in text
    )
    assert "held-out loss **one seed** (+0.0" in next(
        line for line in text.splitlines() if line.startswith("- `mine`:")
    )
    assert "- `mine` seed 0: it broke" in text
    assert "| `latent_256` | 0.500 | 0.400 | - | 0.002 |".replace(" - |", "") in text
    assert "bfloat16 / bfloat16" in text
    assert "| `latent_256_flux2` | Flux2-AE | 12.07 |" in text.partition("that were not run")[2]


def test_without_results_and_with_trial_runs_nothing_is_said_to_be_measured():
    for found in ([], [FULL | {"quick": True}]):
        text = page.page(found)
        assert "Not measured" in text
        assert "| `latent_256` | Baseline | 18.20 |" in text


def test_the_page_tells_which_guidance_helps_which_model():
    def row(run, guidance, accuracy, frechet, flops):
        measures = {"accuracy": accuracy, "frechet": frechet, "flops_per_picture": flops}
        return {"run": run, "guidance": guidance, "pictures": 100, **measures}

    rows = [
        row("tread", "none", 0.5, 2.0, 4e9),
        row("tread", "cfg 2", 0.75, 1.5, 8e9),
        row("tread", "self 2", 0.625, 1.25, 6e9),
        row("sprint", "none", 0.5, 1.0, 4e9),
    ]
    about = {"commit": "c" * 40, "dirty": False, "gpus": [], "cpu": "X", "cpu_cores": 2, "command": "it"}
    found = page.guidance_section(
        {"rows": rows, "file": "guidance.json", "time": "2026-01-02T", "versions": {"torch": "2"}, **about}
    )
    assert "| tread | self 2 | 0.62 | 1.25 | 1.50 |" in found
    assert (
        "- `tread`: the lowest Frechet distance is that of self 2 (1.25, unguided 2.00), the highest caption "
        "accuracy that of cfg 2 (0.75, unguided 0.50)." in found
    )
    assert "- `sprint`: the lowest Frechet distance is that of none (1.00, unguided 1.00)" in found


def test_the_learning_rates_are_the_best_of_the_committed_sweep():
    for result in read_results():
        if result["benchmark"] != "ablations" or result["quick"]:
            continue
        for name, rates in table.swept(result).items():
            kind = scales.open_config(name).optimizer.kind
            assert result["sizes"]["lr"][kind] == table.best_rate(rates)


def test_a_sweep_sets_the_learning_rate_of_its_optimizer():
    assert ablations.best_rates({"adamw": 1.0, "muon": 5.0}, FULL) == {"adamw": 0.002, "muon": 5.0}


KEPT = {
    "latent_256_x_prediction": {"objective.prediction": "sample"},
    "latent_256_contrastive": {"objective.contrastive_weight": 0.05},
    "latent_256_repa_dinov2": {"alignment.kind": "repa", "alignment.weight": 0.5},
    "latent_256_repa_until": {"alignment.kind": "repa", "alignment.until": round(CPU.steps * 2 / 3)},
    "latent_256_irepa_dinov2": {"alignment.kind": "irepa", "alignment.projector": "attention"},
    "latent_256_irepa_dinov2_post": {
        "alignment.kind": "irepa",
        "alignment.projector": "conv",
        "alignment.spatial_norm": "constant",
    },
    "latent_256_tread": {"routing.policy": "tread", "routing.drop": 0.5, "routing.end": CPU.depth - 4},
    "latent_256_sprint": {"routing.policy": "sprint", "routing.drop": 0.75, "routing.end": CPU.depth - 4},
    "latent_256_sprint_paper": {
        "routing.policy": "sprint",
        "routing.drop": 0.75,
        "routing.end": CPU.depth - 3,
        "routing.structured": True,
        "routing.fuse_order": "deep_dense",
        "routing.mask_token": "frozen",
        "routing.path_drop": 0.1,
    },
    "latent_256_muon": {"optimizer.kind": "muon", "optimizer.muon.scale": "rms"},
    "bf16_master": {"precision.master": "bfloat16"},
    "latent_256_short_captions": {"data.long_caption": 0.0},
    "latent_256_caption_mix": {"data.long_caption": 1.0},
    "sft_alchemist": {"objective.prediction": "velocity"},
}
MAY_DIFFER = ("source", "run.output_dir", "optimizer.lr", "optimizer.eps", "stages", "routing.start")


def small(name):
    return scales.at_scale(scales.open_config(name), CPU, "digits", ASSETS)


def test_every_row_of_the_default_table_is_looked_at_here():
    assert set(ablations.ROWS) == {"latent_256", *KEPT}


@pytest.mark.parametrize("name", KEPT)
def test_a_small_configuration_keeps_its_technique_and_nothing_else(name):
    baseline, row = (ablations.flat(small(n).model_dump(mode="json")) for n in ("latent_256", name))
    for key, wanted in KEPT[name].items():
        assert row[key] == wanted, key
    changed = {key for key in row if row[key] != baseline[key]}
    assert changed <= KEPT[name].keys() | {*MAY_DIFFER}
    assert row["model.width"] == CPU.width
    assert row["conditioning.autoencoder.kind"] == "pixels"
    assert row["data.source"] == "digits"


def test_the_aligned_block_and_the_teacher_follow():
    config = small("latent_256_repa_dinov2")
    assert config.alignment.block == CPU.depth // 2 - 1  # the eighth of sixteen
    assert (config.alignment.teacher.kind, config.alignment.teacher.path) == ("classifier", "teacher")


def test_fine_tuning_is_a_stage_on_curated_pictures():
    (stage,) = small("sft_alchemist").stages
    assert stage["at"] == round(0.8 * CPU.steps)
    assert stage["data"] == {"keys": "curated.txt"}


def test_stages_move_with_the_steps():
    config = small("latent_256_caption_mix")
    assert config.stages == (
        {"name": "mixed captions", "at": round(100 / 110 * CPU.steps), "data": {"long_caption": 0.5}},
    )


def test_a_run_is_known_by_what_it_sets_and_not_by_where_it_lies():
    job = ablations.Job("a", 0, small("latent_256"))
    moved = small("latent_256").model_copy(
        update={"run": job.config.run.model_copy(update={"output_dir": "x"})}
    )
    assert ablations.Job("a", 0, moved).digest() == job.digest()
    assert ablations.Job("a", 0, small("latent_256_tread")).digest() != job.digest()


def test_a_stage_keeps_its_schedule_and_its_learning_rate_beside_the_run():
    stage = {"at": 50_000, "schedule": {"kind": "cosine", "warmup": 1000}, "optimizer": {"lr": 5e-5}}
    values = scales.open_config("latent_256").model_dump(mode="json") | {"stages": [stage]}
    (found,) = scales.at_scale(parse_config(values, "test"), CPU, "digits", ASSETS).stages
    assert found["at"] == CPU.steps // 2
    assert found["schedule"] == {"kind": "cosine", "warmup": CPU.steps // 100}
    assert found["optimizer"]["lr"] == pytest.approx(CPU.lr["adamw"] / 2)


def test_no_two_rows_are_the_same_at_this_scale():
    digests = [ablations.Job("x", 0, small(name)).digest() for name in ablations.ROWS]
    assert len(set(digests)) == len(digests)


def test_every_row_has_the_same_held_out_pictures_times_and_noise(tmp_path):
    for name in ablations.ROWS:
        config = ablations.settled(ablations.Job(name, 0, small(name)), tmp_path)
        assert config.validation == Validation(
            every_steps=CPU.steps // ablations.LOOKS, path="held_out", samples=512, times=8
        )


def test_a_source_without_a_part_of_its_own_holds_out_a_share():
    config = scales.at_scale(scales.open_config("latent_256"), CPU, "builtin", ASSETS._replace(held_out=None))
    assert (config.validation.share, config.validation.path) == (scales.HELD_OUT_SHARE, None)


def test_held_out_pictures_are_written_with_their_captions(tmp_path):
    part = DigitsSource("test")
    judge.write_pictures(part, tmp_path)
    written = FolderSource(tmp_path)
    assert len(written) == len(part)
    for index in (0, 200):
        assert written.key(index) == f"{part.key(index).replace('/', '-')}.png"
        assert written.captions(index) == part.captions(index)
        assert written.image(index).tobytes() == part.image(index).tobytes()


def test_an_adapter_is_refused():
    with pytest.raises(UserError, match="an adapter trains beside the weights of another run"):
        small("sft_alchemist_lora")


def test_what_cannot_be_made_small_is_refused_in_one_line():
    with pytest.raises(
        UserError, match="flux2 is what this row is about; run it with --scale post"
    ) as caught:
        small("latent_256_flux2")
    assert "\n" not in str(caught.value)


def test_averages_forget_their_start():
    values = [1.0, 2.0, float("nan"), 4.0]
    found = one_run.averages(values, 2)
    assert found[0] == 1.0
    assert found[1] == pytest.approx((0.25 * 1 + 0.5 * 2) / 0.75)
    assert found[2] == found[1]
    assert found[3] == pytest.approx((0.125 * 1 + 0.25 * 2 + 0.5 * 4) / 0.875)


@pytest.fixture
def broken(tmp_path):
    """A configuration whose run stops at its first step."""
    values = json.loads((BENCHMARKS.parent / "configs" / "latent_256.json").read_text())
    values = {key: value for key, value in values.items() if key not in ("$schema", "extends", "sources")}
    values["run"] |= {"max_bad_steps": 1}
    values["objective"] = {"noise_scale": 1e30}
    parse_config(values, "broken")
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.slow
def test_a_quick_run_end_to_end(tmp_path, broken):
    names = ["latent_256", str(broken), "latent_256_x_prediction", "latent_256_flux2"]
    words = [sys.executable, "-m", "millrace.benchmarks", "ablations", "--quick"]
    words += ["--work", str(tmp_path / "work")]
    output = tmp_path / "results.json"

    def start(*configs):
        return subprocess.run(
            [*words, "--output", str(output), "--configs", *configs],
            capture_output=True,
            text=True,
            timeout=400,
        )

    done = start(*names)
    assert done.returncode == 1, done.stdout + done.stderr
    result = json.loads(output.read_text())
    by_name = {found["name"]: found for found in result["runs"]}
    assert by_name["latent_256"]["status"] == by_name["latent_256_x_prediction"]["status"] == "done"
    assert "no finite loss" in by_name["broken"]["error"]
    assert "--scale post" in by_name["latent_256_flux2"]["error"]
    steps = [look["step"] for look in by_name["latent_256"]["looks"]]
    assert steps == [ablations.QUICK_STEPS // 2, ablations.QUICK_STEPS]
    assert by_name["latent_256"]["looks"][-1]["frechet"] > 0
    base, other = (by_name[name]["looks"][-1] for name in ("latent_256", "latent_256_x_prediction"))
    assert base["held_out_set"] == other["held_out_set"]
    assert len(base["held_out_losses"]) == len(DigitsSource("test"))
    assert base["held_out_loss"] == pytest.approx(statistics.fmean(base["held_out_losses"]), abs=1e-5)
    assert by_name["latent_256"]["terms"] == ["flow"]
    changed = {row["name"]: row["changes"] for row in result["rows"]}
    assert changed["latent_256_x_prediction"] == {"objective.prediction": "sample"}
    assert (tmp_path / "results.svg").exists()
    assert (tmp_path / "results-samples.png").exists()

    again = start("latent_256", "latent_256_x_prediction")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "table: 2 runs, 2 of them finished before" in again.stdout
    assert len(json.loads(output.read_text())["runs"]) == 2
