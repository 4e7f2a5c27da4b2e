"""The scaling benchmark: that it runs, that its figures follow from its measurements, and what it accepts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from millrace.benchmarks.models import scaling
from millrace.benchmarks.models import scaling_model as model
from millrace.benchmarks.models import scaling_worker as worker
from millrace.benchmarks.report import scaling_report as page
from millrace.engine.planning import devices
from millrace.engine.planning.devices import GPUS
from millrace.engine.util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
RESULT = BENCHMARKS / "results" / "scaling.json"


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """The file of a trial run: stages 0 and 2 on one and two processes."""
    output = tmp_path_factory.mktemp("scaling") / "scaling.json"
    command = [sys.executable, "-m", "millrace.benchmarks", "scaling", "--smoke", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "a trial, not judged" in done.stdout
    return json.loads(output.read_text())


def test_a_trial_measures_every_point(trial):
    rows = {(row["stage"], row["processes"]): row for row in trial["rows"]}
    assert set(rows) == {(0, 1), (2, 1), (0, 2), (2, 2)}
    calibration = rows.pop((0, 1))
    assert calibration["calibration"]
    if calibration["slack"]:  # a machine that is busy elsewhere while it is measured seems too slow
        assert calibration["predicted_seconds"] == pytest.approx(calibration["seconds"])
    for row in rows.values():
        assert not row["calibration"]
        assert row["seconds"] > 0
    assert not any(point["skipped_steps"] for point in trial["points"])


def test_memory_and_communication_of_a_trial_are_predicted(trial):
    """Neither depends on how busy the machine is, but for tensors that gloo's threads let go too late."""
    late = 4 * model.shape_of(model.parse_config(trial["config"], "test")).parameters
    for row in trial["rows"]:
        most = 1.1 * (row["predicted_memory"] + late)
        assert 0.95 * row["predicted_memory"] <= row["memory"] <= most, row
        assert row["predicted_communication"] == pytest.approx(row["communication"], rel=0.02), row


def test_a_trial_names_its_collectives(trial):
    found = {(p["stage"], p["processes"]): p["collectives"] for p in trial["points"]}
    assert set(found[0, 2]) == {"all_reduce"}
    assert set(found[2, 2]) == {"all_reduce", "all_gather_into_tensor"}
    assert [size for size, _ in trial["machine"]["2"]["collectives"]["all_gather"]] == sorted(
        size for size, _ in trial["machine"]["2"]["collectives"]["all_gather"]
    )


def test_the_measured_points_hold():
    """The acceptance: memory within 10 %, step time within 15 %, at every stage on one and two processes."""
    content = json.loads(RESULT.read_text())
    assert not content["smoke"]
    assert {(row["stage"], row["processes"]) for row in content["rows"]} == {
        (stage, processes) for stage in range(4) for processes in (1, 2)
    }
    for row in content["rows"]:
        assert abs(row["memory_error"]) <= 0.10, row
        assert abs(row["seconds_error"]) <= 0.15, row


def test_the_predictions_in_the_file_are_the_model_s():
    content = json.loads(RESULT.read_text())
    for stored, fresh in zip(content["rows"], model.predict(content), strict=True):
        for name in ("predicted_seconds", "predicted_memory", "predicted_communication", "memory", "seconds"):
            assert stored[name] == pytest.approx(fresh[name], rel=1e-3), (name, "run scaling.py --model-only")


def test_bounds():
    good = {"memory_error": -0.1, "seconds_error": 0.15}
    assert model.accepted([good, good])
    assert not model.accepted([good, good | {"memory_error": 0.11}])
    assert not model.accepted([good, good | {"seconds_error": -0.16}])


def test_releases_that_nobody_saw():
    """A block that overlaps a new one is gone."""
    heap = worker.Heap()
    held = []
    for address, size in ((100, 10), (110, 20), (200, 5), (100, -10), (105, 30), (90, 100), (150, -1)):
        heap.record(address, size)
        held.append(heap.held)
    # 105..135 replaces 110..130; 90..190 replaces that, 200 stays; what comes back from nowhere is nothing.
    assert held == [10, 30, 35, 25, 35, 105, 105]


def test_the_slowest_process_and_the_fastest_round_count():
    seen = {"skipped": 0, "traffic": {}, "processor_seconds": [1.0, 1.0]}
    first = seen | {"seconds": [1.0, 4.0], "memory": {"peak": 10, "between_steps": 2}}
    second = seen | {"seconds": [3.0, 2.0], "memory": {"peak": 9, "between_steps": 3}}
    again = [seen | {"seconds": [2.0, 2.5], "memory": {}}] * 2
    found = model.point(1, 2, [[first, second], again])
    assert found["step_seconds"] == [[3.0, 4.0], [2.0, 2.5]]
    assert model.seconds_of(found) == 2.25
    assert found["processor_seconds"] == [[2.0, 2.0], [2.0, 2.0]]
    assert (found["peak_memory_bytes"], found["held_memory_bytes"]) == (10, 3)
    rates = {"gemm_flops_per_second": 5.0, "copy_bytes_per_second": 2.0}
    machines = [
        rates | {"collectives": {"all_reduce": [[8, 0.1], [16, 0.4]]}},
        rates | {"gemm_flops_per_second": 4.0, "collectives": {"all_reduce": [[8, 0.2], [16, 0.3]]}},
    ]
    slowest = model.slowest(machines)
    assert slowest["gemm_flops_per_second"] == 4.0
    assert slowest["collectives"] == {"all_reduce": [[8, 0.2], [16, 0.4]]}
    best = model.best(machines)
    assert best["gemm_flops_per_second"] == 5.0
    assert best["collectives"] == {"all_reduce": [[8, 0.1], [16, 0.3]]}


def test_steps_measured_on_gpus_calibrate_the_planner(tmp_path, trial):
    device = GPUS["h200"].calibrated(1.5)
    values = trial["config"]
    _, step, _ = model.evaluate(values, 0, 1, device)
    row = {
        "config": "small",
        "overrides": [],
        "device": "cuda",
        "devices": 1,
        "conditioning": "cached",
        "smoke": False,
        "micro_batch": values["data"]["micro_batch"],
        "resolved": values,
        "step_seconds_median": step.seconds,
        "peak_memory_bytes": 10**6,
    }
    others = [row | {"conditioning": "live"}, row | {"device": "cpu"}, row | {"smoke": True}]
    result = {"benchmark": "throughput", "gpus": [{"name": "NVIDIA H200"}], "rows": [row, *others]}
    (tmp_path / "throughput.json").write_text(json.dumps(result))
    (found,) = model.gpu_points(tmp_path)
    assert found["slack"] == pytest.approx(1.5)
    assert found["file"] == "throughput.json"
    assert found["seconds_error"] == pytest.approx(found["predicted_seconds"] / step.seconds - 1)

    assert found["gpu"] == "h200"
    assert model.calibration([found, found | {"slack": 1.7}, found | {"slack": 1.1}]) == {"h200": 1.5}


def test_what_is_far_is_modelled_at_every_stage(monkeypatch):
    monkeypatch.setattr(model, "MODELLED", ("quickstart", 8))
    assumed = model.modelled()
    assert {(row["stage"], row["devices"]) for row in assumed} == {
        (stage, devices) for stage in range(4) for devices in model.DEVICES
    }


def test_section_says_what_is_measured_and_what_is_not(trial, monkeypatch):
    monkeypatch.setattr(model, "MODELLED", ("quickstart", 8))
    content = trial | {
        "smoke": False,
        "file": "scaling.json",
        "chart": "scaling.svg",
        "modelled": model.modelled(),
    }
    text = page.section([content])
    assert "![Measured and modelled steps](../benchmarks/results/scaling.svg)" in text
    assert "| 0 | 1 | " in text
    assert "fitted" in text
    assert "no measurement: the model of `quickstart` on H200 SXM, 8 images on each device" in text
    assert "assumed: share of the peak FLOP/s in matrix products 0.8" in text
    assert "On GPUs: no measured step among the results yet" in text
    empty = page.section([])
    assert page.NOT_MEASURED in empty


def test_calibration_is_written_where_the_planner_reads_it(tmp_path, monkeypatch, capsys):
    point = {"gpu": "h200", "slack": 1.4, "device": "H200 SXM", "devices": 1, "config": "c", "overrides": []}
    point |= {f"{kind}{name}": 1.0 for name in ("seconds", "memory") for kind in ("", "predicted_")}
    point |= {"stage": 0, "seconds_error": 0.1, "memory_error": 0.1}
    file = tmp_path / "calibration.json"
    file.write_text('{"h100": 1.2}')
    monkeypatch.setattr(scaling, "CALIBRATION", file)
    monkeypatch.setattr(sys, "argv", ["scaling", "--calibrate"])
    monkeypatch.setattr(model, "gpu_points", lambda folder: [])
    with pytest.raises(UserError, match="no step measured on a GPU"):
        scaling.main()
    monkeypatch.setattr(model, "gpu_points", lambda folder: [point])
    assert scaling.main() == 0
    assert json.loads(file.read_text()) == {"h100": 1.2, "h200": 1.4}
    assert "1.40" in capsys.readouterr().out
    assert devices._gpus({"h200": 1.4})["h200"] == devices._gpus({})["h200"].calibrated(1.4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--smoke"], "--smoke needs --output"),
        (["--stages", "1"], "stage 0 on 1 process is what the model is calibrated on"),
        (["--processes", "0"], "whole numbers of at least 1"),
        (["--model-only", "--output", "nowhere.json"], "nowhere.json: no result to model anew"),
    ],
)
def test_bad_input_is_one_line(words, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scaling.py", *words])
    with pytest.raises(UserError, match=message):
        scaling.main()
